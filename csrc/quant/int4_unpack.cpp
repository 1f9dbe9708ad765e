#include "quant/int4_unpack.h"

#include "common/torch.h"

namespace effllm {
namespace {

Tensor int4_unpack_cpu(const Tensor& qweight, int64_t n, int64_t k) {
  Int4UnpackParams params = check_int4_unpack(as_view(qweight, "qweight"), n, k);
  Tensor codes = new_empty(qweight, {n, k}, DType::kUInt8);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());

  parallel_for(0, n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t col = 0; col < k; ++col) {
        params.codes[row * k + col] = int4_unpack_code(params, row, col);
      }
    }
  });
  return codes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("int4_unpack(Tensor qweight, SymInt n, SymInt k) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("int4_unpack", TORCH_BOX(&int4_unpack_cpu)); }

}  // namespace effllm
