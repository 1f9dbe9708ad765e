// The kernel of kv_append for caches in 8 or 4 bits: rows of k and v become codes and a word each.
//
// Roofline: bytes. A row is read twice, the second time from L1, and its codes are written once.
#pragma once

#include <cstdint>
#include <string>

#include "common/math.h"
#include "cuda/launch.h"
#include "kvcache/kv_append.h"
#include "kvcache/kv_row.cuh"

namespace effllm {

inline constexpr int kQuantizeThreads = 256;

// Rows in the order [T, {k, v}, HKV].
template <class T, class Codec, int kVector>
__global__ void __launch_bounds__(kQuantizeThreads)
    kv_quantize_kernel(const __grid_constant__ KvAppendParams params) {
  constexpr int kRows = kQuantizeThreads / kRowLanes;
  const int64_t row = int64_t{blockIdx.x} * kRows + threadIdx.x / kRowLanes;
  const int64_t token = row / (2 * params.num_kv_heads);
  const int64_t within_token = row % (2 * params.num_kv_heads);
  const int64_t head = within_token % params.num_kv_heads;
  const KvAppendRows& rows = within_token < params.num_kv_heads ? params.k : params.v;
  const int64_t slot = token < params.num_tokens ? params.slot_mapping[token] : -1;
  const bool valid = slot >= 0 && slot < params.num_slots;
  const int64_t page = valid ? slot / params.page_size : 0, offset = slot - page * params.page_size;
  const auto dim = static_cast<int>(valid ? params.head_dim : 0);
  const auto* source = reinterpret_cast<const device_t<T>*>(
      rows.tokens + token * rows.stride_token_bytes + head * rows.stride_head_bytes);
  quantize_row<Codec, kVector>(threadIdx.x % kRowLanes, dim, rows.target(page, offset, head),
                               [&](int d) { return RowVector<T, kVector>::load(source, d, dim); });
}

template <class T, class Codec>
void launch_kv_quantize(const KvAppendParams& params, cudaStream_t stream) {
  const int64_t rows = 2 * params.num_tokens * params.num_kv_heads;
  const int64_t blocks = ceil_div<int64_t>(rows, kQuantizeThreads / kRowLanes);
  if (blocks > INT32_MAX || params.head_dim > INT32_MAX / 8) {
    fail("kv_append", "2 * T * HKV must be below 2^35 and D below 2^28, got " +
                          std::to_string(rows) + " and " + std::to_string(params.head_dim));
  }
  const Launch launch{"kv_append", dim3(static_cast<unsigned>(blocks)), dim3(kQuantizeThreads), 0,
                      stream};
  if (params.word_bytes == 16) {
    launch(kv_quantize_kernel<T, Codec, 8>, params);
  } else {
    launch(kv_quantize_kernel<T, Codec, 2>, params);
  }
}

}  // namespace effllm
