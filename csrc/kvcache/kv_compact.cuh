// Roofline: bytes. Every row that moves is read once and written once; the paths of a batch are so
// short that the launch and the way to a row, path, table, then cache, are what they cost.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kvcache/kv_compact.h"

namespace effllm {

struct KvCompactArgs {
  // Caches of one layout: with them the arguments stay below the 4 KB that every driver takes.
  static constexpr int kMaxCaches = 400;

  KvCompactPaths paths;
  RowLayout layout;
  int32_t num_caches;
  char* caches[kMaxCaches];
};

// A block has one tree in one cache. A thread has the same word of a head in all nodes, so that its
// own order is all that the order of moves needs.
template <class Word>
__global__ void kv_compact_kernel(const __grid_constant__ KvCompactArgs args) {
  constexpr int32_t kInFlight = 8;
  const KvCompactPaths& paths = args.paths;
  const int64_t tree = blockIdx.x / args.num_caches;
  char* cache = args.caches[blockIdx.x % args.num_caches];
  const auto max_nodes = static_cast<int32_t>(paths.max_nodes);
  const int32_t num_accepted = min(paths.num_accepted[tree], max_nodes);
  const int32_t* nodes = paths.accept_index + tree * paths.stride_accept_index;
  const auto words_per_row = static_cast<uint32_t>(args.layout.row_bytes / sizeof(Word));
  const uint32_t num_words = static_cast<uint32_t>(paths.num_kv_heads) * words_per_row;

  for (uint32_t word = threadIdx.x; word < num_words; word += blockDim.x) {
    const int64_t head = word / words_per_row;
    const uint32_t column = word % words_per_row;
    const auto word_of = [&](int64_t offset) -> Word& {
      return reinterpret_cast<Word*>(cache + offset)[column];
    };
    for (int32_t first = 0; first < num_accepted; first += kInFlight) {
      Word words[kInFlight];
      int64_t places[kInFlight];
#pragma unroll
      for (int32_t i = 0; i < kInFlight; ++i) {
        const int32_t place = first + i;
        places[i] = -1;
        if (place >= num_accepted || nodes[place] == place) continue;
        const int64_t from = paths.row_offset(args.layout, tree, head, nodes[place]);
        if (from < 0) continue;
        places[i] = paths.row_offset(args.layout, tree, head, place);
        words[i] = word_of(from);
      }
#pragma unroll
      for (int32_t i = 0; i < kInFlight; ++i) {
        if (places[i] >= 0) word_of(places[i]) = words[i];
      }
    }
  }
}

}  // namespace effllm
