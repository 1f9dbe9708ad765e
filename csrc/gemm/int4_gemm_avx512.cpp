#include "gemm/int4_gemm_strip.h"

namespace effllm {

void int4_strip_avx512(const Int4Strip& strip) { multiply_strip<16>(strip); }

}  // namespace effllm
