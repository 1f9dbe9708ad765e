#include "gemm/fp8_gemm_block.h"

namespace effllm {

void fp8_block_avx2(const Fp8Block& block) { multiply_block<8>(block); }

}  // namespace effllm
