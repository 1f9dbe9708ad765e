#include "gemm/fp8_gemm_block.h"

namespace effllm {

void int8_weight_block_avx512(const Fp8Block& block) { multiply_block<16, Int8Decoder>(block); }

}  // namespace effllm
