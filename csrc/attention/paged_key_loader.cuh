// K and V on their way to shared memory, for a tile of rows.
//
// Rows of quantised caches arrive in registers; their codes, exact as Elements, go on to shared
// memory. The scales of K meet the scores, those of V the weights, as in decode_kv.cuh.
#pragma once

#include <cstdint>

#include "attention/code_chunk.cuh"
#include "attention/paged_row_tile_storage.cuh"
#include "attention/paged_sequence.cuh"
#include "common/math.h"
#include "ptx/cp_async.cuh"
#include "ptx/load.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// Tile `t` of a range of keys begins at its key t * kBlockN. All threads of the tile's team call
// together.
template <class Config>
class PagedKeyLoader {
  using Element = typename Config::Element;
  using Octet = KvOctet<typename Config::Kv>;
  using Storage = PagedRowTileStorage<Config>;
  // Of a tile of K or V: thread i copies chunk i % kChunks of every kRowsPerPass-th row.
  static constexpr int kRowsPerPass = Config::kTileThreads / Config::kChunks;
  static constexpr int kPasses = Config::kBlockN / kRowsPerPass;
  static constexpr int64_t kCacheElementBytes = Config::kQuantized ? 1 : sizeof(Element);

 public:
  __device__ __forceinline__ PagedKeyLoader(const PagedAttentionArgs& args, Storage& smem,
                                            const Sequence& sequence, int kv_head)
      : args_(args), smem_(smem), sequence_(sequence), kv_head_(kv_head) {}

  // One thread per key finds its row for all threads that will copy it: three steps, each of which
  // asks for what the next one needs, so that none waits for memory. Keys past the end are neither
  // looked up nor read: their slots may hold anything, NaN too.
  __device__ __forceinline__ void find_pages(KeyRange keys, int tile) {
    const int key = key_of(keys, tile);
    if (thread_idx() >= Config::kBlockN || key >= keys.end) return;
    page_ = sequence_.page_row[args_.page_size_divisor.quotient(key)];
  }

  __device__ __forceinline__ void locate_keys(KeyRange keys, int tile) {
    if (thread_idx() >= Config::kBlockN) return;
    const int key = key_of(keys, tile);
    const char *k_row = nullptr, *v_row = nullptr;
    k_word_ = v_word_ = 0;
    if (key < keys.end) {
      const auto entry = args_.page_size_divisor.quotient(key);
      const KeyLocation location(args_, page_, key - entry * args_.page_size);
      k_row = static_cast<const char*>(args_.k_cache) +
              location.k_offset(args_, kv_head_) * kCacheElementBytes;
      v_row = static_cast<const char*>(args_.v_cache) +
              location.v_offset(args_, kv_head_) * kCacheElementBytes;
      if constexpr (Config::kQuantized) {
        k_word_ = location.word(args_.k_scales, kv_head_);
        v_word_ = location.word(args_.v_scales, kv_head_);
      }
    }
    smem_.k_row[slot(tile)][thread_idx()] = k_row;
    smem_.v_row[slot(tile)][thread_idx()] = v_row;
  }

  __device__ __forceinline__ void store_words(int tile) {
    if constexpr (Config::kQuantized) {
      if (thread_idx() >= Config::kBlockN) return;
      smem_.k_word[slot(tile)][thread_idx()] = k_word_;
      smem_.v_word[slot(tile)][thread_idx()] = v_word_;
    }
  }

  // Load `idx` is K of tile idx / 2, or its V; of tiles past the last nothing. Where arithmetic is
  // the bound there is code for whole tiles, which have nothing to check: all but the last may be.
  __device__ __forceinline__ void begin(int idx, int num_tiles) {
    constexpr bool kChecksLess = !Config::kTrees;
    const int tile = idx / 2, stage = tile % Config::kStages;
    if (tile < num_tiles) {
      const bool is_key = idx % 2 == 0;
      Tile& dst = is_key ? smem_.k[stage] : smem_.v[stage];
      const char* const* const rows = is_key ? smem_.k_row[slot(tile)] : smem_.v_row[slot(tile)];
      if (kChecksLess && tile + 1 < num_tiles && args_.head_dim == Config::kHeadDim) {
        load<true>(dst, rows);
      } else {
        load<false>(dst, rows);
      }
    }
    ptx::cp_async_commit();
  }

  // Of a tile that nobody reads any more. It is there after the next barrier, and all that was
  // copied before it began.
  __device__ __forceinline__ void finish_keys(int tile) {
    finish_load(smem_.k[tile % Config::kStages], smem_.k_word[slot(tile)]);
  }
  __device__ __forceinline__ void finish_values(int tile) {
    finish_load(smem_.v[tile % Config::kStages], smem_.v_word[slot(tile)]);
  }

 private:
  using Tile = typename Storage::KeyTile;

  static __device__ __forceinline__ int thread_idx() { return thread_in_team<Config>(); }

  static __device__ __forceinline__ int slot(int tile) { return Storage::slot(tile); }

  // This thread's row of a pass, and its chunk there.
  static __device__ __forceinline__ int row_of(int pass) {
    return pass * kRowsPerPass + thread_idx() / Config::kChunks;
  }
  static __device__ __forceinline__ uint4& place(Tile& tile, int pass) {
    constexpr int kSameOrder = ceil_div(8, kRowsPerPass);  // rows that differ by multiples of 8
    uint4& first = chunk_of(tile, row_of(pass % kSameOrder), thread_idx() % Config::kChunks);
    return (&first)[pass / kSameOrder * kSameOrder * kRowsPerPass * 8];
  }

  // Of this thread.
  static __device__ __forceinline__ int key_of(KeyRange keys, int tile) {
    return keys.begin + tile * Config::kBlockN + thread_idx();
  }

  // Zeros where there is no key, or no such dims: a weight of 0 does not silence a NaN in V.
  template <bool kWhole>
  __device__ __forceinline__ void load(Tile& tile, const char* const* rows) {
    constexpr int kBytes = Config::kQuantized ? Octet::kWords * 4 : 16;
    const int chunk = thread_idx() % Config::kChunks;
    const bool has_dims = chunk < static_cast<int>(args_.head_dim) / 8;
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
      const char* src = rows[row_of(pass)];
      const bool valid = kWhole || (src != nullptr && has_dims);
      src += chunk * kBytes;
      if constexpr (Config::kQuantized) {
#pragma unroll
        for (uint32_t& word : codes_[pass]) word = 0;
        if (valid) ptx::load_streaming<Octet::kWords>(codes_[pass], src);
      } else if constexpr (kWhole) {
        ptx::cp_async_16(&place(tile, pass), src);
      } else {
        ptx::cp_async_16(&place(tile, pass), src, valid);
      }
    }
  }

  __device__ __forceinline__ void finish_load(Tile& tile, const uint32_t* words) {
    if constexpr (Config::kQuantized) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        place(tile, pass) =
            elements_of_codes<Octet, Element>(codes_[pass], Octet::bias(words[row_of(pass)]));
      }
    }
    // Of K and V of the other stages later groups than the tile's are on the way.
    ptx::cp_async_wait<2 * (Config::kStages - 1)>();
  }

  const PagedAttentionArgs& args_;
  Storage& smem_;
  const Sequence& sequence_;
  const int kv_head_;
  int32_t page_;  // of this thread's key of the next tile to be located
  // Of quantised caches: the words of the last one, and the thread's part of the K or V on its way.
  uint32_t k_word_, v_word_;
  uint32_t codes_[kPasses][Octet::kWords];
};

}  // namespace effllm
