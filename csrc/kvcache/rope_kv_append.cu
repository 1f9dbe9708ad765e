// Roofline: bytes. q, k and v are read once and written once, where two launches would write k and
// read it again; a step of decoding moves so little that the launch is what it costs. A lane finds
// the partners of its elements in the neighbour's vector, which is in L1 by then, as are the tables
// of a token after the first of its heads.
//
//   block (t, y)   16 rows of token t: |  HQ rows of q  |  HKV of k  |  HKV of v  |
//   a row          D elements by 16 lanes in vectors of 8; the first R = 2 * half rotate
//
//     halves       [ a0 a1 .. | .. b0 b1 .. | as it is ]     vector d with vector d +- half
//     interleaved  [ a0 b0 a1 b1 ..         | as it is ]     pairs in one vector
#include <cstdint>
#include <optional>
#include <string>
#include <type_traits>

#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "kvcache/rope_kv_append.h"
#include "kvcache/rotary_row.cuh"

namespace effllm {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / kRowLanes;  // of a block

// Codec: of a quantised cache, or void.
template <class T, class Codec, int kVector>
__global__ void __launch_bounds__(kThreads)
    rope_kv_append_kernel(const __grid_constant__ RopeKvAppendParams params) {
  rope_kv_append_row<T, Codec, kVector>(
      params, blockIdx.x, blockIdx.y * kRows + threadIdx.x / kRowLanes, threadIdx.x % kRowLanes);
}

template <class T, class Codec>
void launch_rope_kv_append(const RopeKvAppendParams& params, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const KvAppendParams& append = params.append;
  const int64_t rows = params.num_heads + 2 * append.num_kv_heads;
  const int64_t groups = ceil_div<int64_t>(rows, kRows);
  if (append.num_tokens > INT32_MAX || groups > kMaxGridY || append.head_dim > INT32_MAX / 8) {
    fail("rope_kv_append",
         "T must be below 2^31, HQ + 2 * HKV at most 2^20 - 16 and D below 2^28, got " +
             std::to_string(append.num_tokens) + ", " + std::to_string(rows) + " and " +
             std::to_string(append.head_dim));
  }
  const dim3 grid(static_cast<unsigned>(append.num_tokens), static_cast<unsigned>(groups));
  const Launch launch{"rope_kv_append", grid, dim3(kThreads), 0, stream};
  if (params.wide) {
    launch(rope_kv_append_kernel<T, Codec, 8>, params);
  } else {
    launch(rope_kv_append_kernel<T, Codec, 2>, params);
  }
}

Tensor rope_kv_append_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                           const Tensor& sin, const Tensor& positions, const Tensor& k_cache,
                           const Tensor& v_cache, const Tensor& slot_mapping,
                           const std::optional<Tensor>& k_scale,
                           const std::optional<Tensor>& v_scale, bool interleaved) {
  RopeKvAppendParams params = check_rope_kv_append(
      as_view(q, "q"), as_view(k, "k"), as_view(v, "v"), as_view(cos, "cos"), as_view(sin, "sin"),
      as_view(positions, "positions"), as_mutable_view(k_cache, "k_cache"),
      as_mutable_view(v_cache, "v_cache"), as_view(slot_mapping, "slot_mapping"),
      as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"), interleaved);
  const KvAppendParams& append = params.append;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  Tensor out = new_empty(q, {append.num_tokens, params.num_heads, append.head_dim}, append.dtype);
  const int64_t rows = params.num_heads + 2 * append.num_kv_heads;
  if (append.num_tokens == 0 || rows == 0 || append.row_bytes == 0) return out;

  params.out = static_cast<char*>(out.mutable_data_ptr());
  const cudaStream_t stream = current_cuda_stream(q);
  dispatch_float(append.dtype, [&](auto element) {
    using T = decltype(element);
    if (!append.quantizes()) return launch_rope_kv_append<T, void>(params, stream);
    dispatch_kv_codec(append.cache_dtype, [&](auto codec) {
      launch_rope_kv_append<T, decltype(codec)>(params, stream);
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("rope_kv_append", TORCH_BOX(&rope_kv_append_cuda));
}

}  // namespace effllm
