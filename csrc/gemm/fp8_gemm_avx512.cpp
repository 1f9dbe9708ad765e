#include "gemm/fp8_gemm_block.h"

namespace effllm {

void fp8_block_avx512(const Fp8Block& block) { multiply_block<16>(block); }

}  // namespace effllm
