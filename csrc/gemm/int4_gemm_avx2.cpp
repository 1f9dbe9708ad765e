#include "gemm/int4_gemm_strip.h"

namespace effllm {

void int4_strip_avx2(const Int4Strip& strip) { multiply_strip<8>(strip); }

}  // namespace effllm
