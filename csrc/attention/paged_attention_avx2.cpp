#include "attention/paged_attention_rows.h"

namespace effllm {

AttentionKernels attention_kernels_avx2(DType kv_dtype) { return attention_kernels<8>(kv_dtype); }

}  // namespace effllm
