#include "quant/int4_pack.h"

#include <string>

#include "common/torch.h"

namespace effllm {
namespace {

void check_codes(const Int4PackParams& params) {
  for (int64_t n = 0; n < params.n; ++n) {
    for (int64_t k = 0; k < params.k; ++k) {
      const int code = params.codes[n * params.stride_n + k * params.stride_k];
      if (code > 15) {
        fail("int4_pack", "codes must be 0..15, got " + std::to_string(code) + " at [" +
                              std::to_string(n) + ", " + std::to_string(k) + "]");
      }
    }
  }
}

Tensor int4_pack_cpu(const Tensor& codes) {
  Int4PackParams params = check_int4_pack(as_view(codes, "codes"));
  check_codes(params);
  Tensor qweight = new_empty(codes, {params.num_strips(), params.strip_words()}, DType::kInt32);
  params.qweight = static_cast<int32_t*>(qweight.mutable_data_ptr());

  parallel_for(0, params.num_strips(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t strip = begin; strip < end; ++strip) {
      int32_t* row = params.qweight + strip * params.strip_words();
      for (int64_t word = 0; word < params.strip_words(); ++word) {
        row[word] = static_cast<int32_t>(int4_pack_word(params, strip, word));
      }
    }
  });
  return qweight;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) { m.def("int4_pack(Tensor codes) -> Tensor"); }

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("int4_pack", TORCH_BOX(&int4_pack_cpu)); }

}  // namespace effllm
