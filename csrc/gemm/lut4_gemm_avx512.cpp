#include "gemm/lut4_gemm_strip.h"

namespace effllm {

void lut4_strip_avx512(const PackedStrip& strip) { multiply_strip<CodebookDecoder, 16>(strip); }

}  // namespace effllm
