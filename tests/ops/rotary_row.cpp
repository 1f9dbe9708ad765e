// The rows of rope_kv_append's kernel on a warp whose lanes take turns; test_rotary_row.py compiles
// it, and calls it with tensors.
#include "kvcache/rotary_row.cuh"

#include <cstdint>

#include "common/dispatch.h"
#include "kvcache/rope_kv_append.h"
#include "tensor_argument.h"

namespace {

constexpr int kRowsPerWarp = warp::kLanes / effllm::kRowLanes;

template <class T, class Codec, int kVector>
void run_rows(const effllm::RopeKvAppendParams& params) {
  const int64_t rows = params.num_heads + 2 * params.append.num_kv_heads;
  // As many warps past the last row as a block has.
  const int64_t end = (rows + 15) / 16 * 16;
  for (int64_t token = 0; token < params.append.num_tokens; ++token) {
    for (int64_t first = 0; first < end; first += kRowsPerWarp) {
      warp::run([&] {
        effllm::rope_kv_append_row<T, Codec, kVector>(
            params, token, static_cast<int>(first + threadIdx.x / effllm::kRowLanes),
            threadIdx.x % effllm::kRowLanes);
      });
    }
  }
}

template <class T, class Codec>
void run_vectors(const effllm::RopeKvAppendParams& params) {
  params.wide ? run_rows<T, Codec, 8>(params) : run_rows<T, Codec, 2>(params);
}

}  // namespace

// Tensors in the order of the schema. Returns whether rows went by vectors of 8.
extern "C" int rope_kv_append_rows(const TensorArgument* tensors, bool interleaved, void* out) {
  const auto view = [&](int idx) { return tensors[idx].view(); };
  effllm::RopeKvAppendParams params =
      effllm::check_rope_kv_append(*view(0), *view(1), *view(2), *view(3), *view(4), *view(5),
                                   *view(6), *view(7), *view(8), view(9), view(10), interleaved);
  params.out = static_cast<char*>(out);
  effllm::dispatch_float(params.append.dtype, [&](auto element) {
    using T = decltype(element);
    if (!params.append.quantizes()) return run_vectors<T, void>(params);
    effllm::dispatch_kv_codec(params.append.cache_dtype,
                              [&](auto codec) { run_vectors<T, decltype(codec)>(params); });
  });
  return params.wide;
}
