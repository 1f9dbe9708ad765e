// Roofline: bytes. Every row of outs is read once and the result written once; a step of decoding
// moves so little that the launch is what it costs.
#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "attention/merge_states.h"
#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"

namespace effllm {
namespace {

// One block merges one token: its threads run over the chunks of all its heads' rows. Each finds
// its row's weights for itself; the lse of one row are one address for the whole row's threads.
template <class Element, int kElements>
__global__ void merge_states_kernel(const __grid_constant__ MergeStatesParams params) {
  struct alignas(kElements * sizeof(Element)) Chunk {
    Element values[kElements];
  };
  const int64_t token = blockIdx.x;
  const uint32_t chunks_per_row = params.head_dim / kElements;
  const uint32_t num_chunks = params.num_heads * chunks_per_row;

  for (uint32_t chunk = threadIdx.x; chunk < num_chunks; chunk += blockDim.x) {
    const int64_t head = chunk / chunks_per_row;
    const int64_t dim = int64_t{chunk % chunks_per_row} * kElements;
    const auto lse_of = [&](const AttentionState& state) {
      return state.lse[token * state.stride_lse_token + head * state.stride_lse_head];
    };
    float maximum = -INFINITY;
    for (int idx = 0; idx < params.num_states; ++idx) {
      maximum = fmaxf(maximum, lse_of(params.states[idx]));
    }

    float total = 0.f, sums[kElements] = {};
#pragma unroll 2
    for (int idx = 0; idx < params.num_states; ++idx) {
      const AttentionState& state = params.states[idx];
      // Loaded before the weight is known, and selected rather than multiplied by 0: what a state
      // without keys holds there may be NaN.
      const auto loaded = *reinterpret_cast<const Chunk*>(
          state.out + token * state.stride_out_token_bytes + head * state.stride_out_head_bytes +
          dim * sizeof(Element));
      const float lse = lse_of(state);
      const bool empty = lse == -INFINITY;
      const float weight = empty ? 0.f : expf(lse - maximum);
      total += weight;
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        sums[i] += weight * (empty ? 0.f : device_to_float(loaded.values[i]));
      }
    }

    const int64_t row = token * params.num_heads + head;
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    Chunk merged;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      merged.values[i] = device_from_float<Element>(sums[i] * inverse);
    }
    auto* out = static_cast<Element*>(params.out) + row * params.head_dim + dim;
    *reinterpret_cast<Chunk*>(out) = merged;
    if (dim == 0) params.lse[row] = total == 0.f ? -INFINITY : maximum + logf(total);
  }
}

template <class Element, int kElements>
void launch_merge_states(const MergeStatesParams& params, cudaStream_t stream) {
  constexpr int64_t kWarpSize = 32, kMaxThreads = 256;
  const int64_t num_chunks = int64_t{params.num_heads} * params.head_dim / kElements;
  const int64_t threads = std::clamp(round_up(num_chunks, kWarpSize), kWarpSize, kMaxThreads);
  const Launch launch{"merge_states", dim3(params.num_tokens), dim3(threads), 0, stream};
  launch(merge_states_kernel<Element, kElements>, params);
}

std::tuple<Tensor, Tensor> merge_states_cuda(const std::vector<Tensor>& outs,
                                             const std::vector<Tensor>& lses) {
  const ViewList out_views = as_views(outs, "outs"), lse_views = as_views(lses, "lses");
  MergeStatesParams params = check_merge_states(out_views.views, lse_views.views);

  const torch::stable::accelerator::DeviceGuard guard(outs[0].get_device_index());
  Tensor out =
      new_empty(outs[0], {params.num_tokens, params.num_heads, params.head_dim}, params.dtype);
  Tensor lse = new_empty(outs[0], {params.num_tokens, params.num_heads}, DType::kFloat32);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (params.num_tokens == 0 || params.num_heads == 0) return {out, lse};

  const cudaStream_t stream = current_cuda_stream(outs[0]);
  dispatch_float(params.dtype, [&](auto element) {
    using Element = device_t<decltype(element)>;
    if (params.wide) {
      launch_merge_states<Element, 16 / sizeof(Element)>(params, stream);
    } else {
      launch_merge_states<Element, 1>(params, stream);
    }
  });
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("merge_states", TORCH_BOX(&merge_states_cuda));
}

}  // namespace effllm
