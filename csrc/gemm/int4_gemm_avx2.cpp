#include "gemm/int4_gemm_strip.h"

namespace effllm {

void int4_strip_avx2(const PackedStrip& strip) { multiply_strip<Int4Decoder, 8>(strip); }

}  // namespace effllm
