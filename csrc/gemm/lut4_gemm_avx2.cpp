#include "gemm/lut4_gemm_strip.h"

namespace effllm {

void lut4_strip_avx2(const PackedStrip& strip) { multiply_strip<CodebookDecoder, 8>(strip); }

}  // namespace effllm
