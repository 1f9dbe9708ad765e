#include "gemm/w4a8_code_rows.h"

namespace effllm {

void unpack_w4a8_rows_avx512(const W4A8CodeRows& rows) { unpack_w4a8_rows<16>(rows); }

}  // namespace effllm
