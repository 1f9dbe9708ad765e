#include "gemm/int4_gemm_strip.h"

namespace effllm {

void int4_strip_avx512(const PackedStrip& strip) { multiply_strip<Int4Decoder, 16>(strip); }

}  // namespace effllm
