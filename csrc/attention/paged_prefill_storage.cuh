// What the prefill kernel is compiled for, and its shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "attention/alibi.cuh"

namespace effllm {

// kHeadDim is D rounded up to what is compiled; loads past D give zeros, the scale is that of D.
// `Kv_` is the cache's element, or the codec of a quantised one.
template <class Element_, int kHeadDim_, class Kv_ = Element_>
struct PagedPrefillConfig {
  using Element = Element_;
  using Kv = Kv_;
  static constexpr bool kQuantized = !std::is_same_v<Element, Kv>;
  static constexpr int kHeadDim = kHeadDim_;
  // A fragment of K or V that a warp reads serves 32 rows, so that shared memory keeps pace with
  // the tensor cores. The output of D = 256 leaves registers for 16 rows and 32 keys; codes on
  // their way take some, too.
  static constexpr int kRowTiles = kHeadDim <= 128 && !kQuantized ? 2 : 1;  // of 16 rows in a warp
  static constexpr int kBlockN = kHeadDim <= 128 ? 64 : 32;
  static constexpr int kWarps = 4;
  static constexpr int kWarpRows = kRowTiles * 16;
  static constexpr int kBlockM = kWarps * kWarpRows;
  static constexpr int kThreads = kWarps * 32;
  // Where the compiler has to be told that fewer registers would do; 0: it finds out itself.
  static constexpr int kMinCtasPerSm = kQuantized && kHeadDim == 128 ? 3 : 0;
  static constexpr int kChunks = kHeadDim / 8;
  static_assert(kHeadDim % 64 == 0, "rows must be multiples of 128 bytes for the swizzle");
};

template <class Config>
struct PagedPrefillStorage {
  uint4 q[Config::kBlockM][Config::kChunks];  // the output in the end
  uint4 k[Config::kBlockN][Config::kChunks];
  uint4 v[Config::kBlockN][Config::kChunks];
  // Element offsets of the keys of two tiles, kNoKey past the last.
  int64_t k_offset[2][Config::kBlockN];
  int64_t v_offset[2][Config::kBlockN];
  // Their words, of quantised caches: see quant/kv_layout.h.
  static constexpr int kNumWords = Config::kQuantized ? Config::kBlockN : 1;
  uint32_t k_word[2][kNumWords];
  uint32_t v_word[2][kNumWords];

  // Of each row.
  float sink[Config::kBlockM];      // kMaskedScore without sinks
  AlibiRow alibi[Config::kBlockM];  // unless there are no slopes

  static constexpr int64_t kNoKey = -1;
};

__device__ __forceinline__ int swizzled_chunk(int row, int chunk) { return chunk ^ (row & 7); }

}  // namespace effllm
