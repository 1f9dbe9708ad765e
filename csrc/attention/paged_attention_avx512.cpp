#include "attention/paged_attention_rows.h"

namespace effllm {

AttentionKernels attention_kernels_avx512(DType kv_dtype) {
  return attention_kernels<16>(kv_dtype);
}

}  // namespace effllm
