#include "gemm/fp8_gemm_block.h"

namespace effllm {

void int8_weight_block_avx2(const Fp8Block& block) { multiply_block<8, Int8Decoder>(block); }

}  // namespace effllm
