// fp8_quantize: schema and CPU implementation.
#include "quant/fp8_quantize.h"

#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

template <class T>
void quantize_group(const Fp8QuantizeParams& params, int64_t index) {
  const int64_t offset = params.row(index) * params.k + params.first_column(index);
  const T* x = static_cast<const T*>(params.x) + offset;
  const int64_t columns = params.num_columns(index);
  const float scale = symmetric_scale(max_magnitude_bits(x, columns), kE4M3Max);
  encode_e4m3(x, columns, scale, params.codes + offset);
  params.scales[params.group(index) * params.stride_scales_group + params.row(index)] = scale;
}

std::tuple<Tensor, Tensor> fp8_quantize_cpu(const Tensor& x, std::optional<int64_t> group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Fp8QuantizeParams params = check_fp8_quantize(as_view(x_rows, "x"), group_size);
  Tensor codes = new_empty_as(x, DType::kFloat8E4M3);
  Tensor scales = new_empty(x, {params.num_groups, params.stride_scales_group}, DType::kFloat32);
  params.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  params.scales = static_cast<float*>(scales.mutable_data_ptr());

  // Threads pay off from some ten thousand elements each.
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, params.group_size + 1);
  dispatch_float(params.dtype, [&](auto element) {
    TorchThreads().for_each(params.num_scales(), grain, [&](int64_t index) {
      quantize_group<decltype(element)>(params, index);
    });
  });
  return {codes, as_scales_of_rows(scales, x)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("fp8_quantize(Tensor x, *, int? group_size=None) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("fp8_quantize", TORCH_BOX(&fp8_quantize_cpu));
}

}  // namespace effllm
