// merge_states: schema and CPU implementation.
#include "attention/merge_states.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Row (token, head) of the result; `sums` has room for D numbers.
template <class T>
void merge_row(const MergeStatesParams& params, int64_t token, int64_t head, float* sums) {
  float lses[MergeStatesParams::kMaxStates];
  float maximum = -kInfinity;
  for (int idx = 0; idx < params.num_states; ++idx) {
    const AttentionState& state = params.states[idx];
    lses[idx] = state.lse[token * state.stride_lse_token + head * state.stride_lse_head];
    maximum = std::max(maximum, lses[idx]);
  }

  const int64_t dim = params.head_dim, row = token * params.num_heads + head;
  float total = 0.f;
  std::fill_n(sums, dim, 0.f);
  for (int idx = 0; idx < params.num_states; ++idx) {
    if (lses[idx] == -kInfinity) continue;
    const AttentionState& state = params.states[idx];
    const auto* values = reinterpret_cast<const T*>(
        state.out + token * state.stride_out_token_bytes + head * state.stride_out_head_bytes);
    const float weight = std::exp(lses[idx] - maximum);
    total += weight;
    for (int64_t i = 0; i < dim; ++i) sums[i] += weight * to_float(values[i]);
  }

  auto* out = static_cast<T*>(params.out) + row * dim;
  const float inverse = total == 0.f ? 0.f : 1.f / total;
  for (int64_t i = 0; i < dim; ++i) out[i] = from_float<T>(sums[i] * inverse);
  params.lse[row] = total == 0.f ? -kInfinity : maximum + std::log(total);
}

std::tuple<Tensor, Tensor> merge_states_cpu(const std::vector<Tensor>& outs,
                                            const std::vector<Tensor>& lses) {
  const ViewList out_views = as_views(outs, "outs"), lse_views = as_views(lses, "lses");
  MergeStatesParams params = check_merge_states(out_views.views, lse_views.views);
  Tensor out =
      new_empty(outs[0], {params.num_tokens, params.num_heads, params.head_dim}, params.dtype);
  Tensor lse = new_empty(outs[0], {params.num_tokens, params.num_heads}, DType::kFloat32);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());

  // Threads pay off from some ten thousand elements each.
  const int64_t row_work = params.num_states * int64_t{params.head_dim} + 1;
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, row_work);
  const int64_t num_heads = params.num_heads;
  dispatch_float(params.dtype, [&](auto element) {
    parallel_for(0, params.num_tokens * num_heads, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> sums(params.head_dim);
      for (int64_t row = begin; row < end; ++row) {
        merge_row<decltype(element)>(params, row / num_heads, row % num_heads, sums.data());
      }
    });
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("merge_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("merge_states", TORCH_BOX(&merge_states_cpu));
}

}  // namespace effllm
