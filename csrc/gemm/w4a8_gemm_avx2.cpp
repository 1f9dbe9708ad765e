#include "gemm/w4a8_code_rows.h"

namespace effllm {

void unpack_w4a8_rows_avx2(const W4A8CodeRows& rows) { unpack_w4a8_rows<8>(rows); }

}  // namespace effllm
