// Paged attention for many query rows: prefill, chunked prefill and mixed batches, on mma.sync.
//
// Roofline: arithmetic. A CTA takes 128 packed rows (query, head in group) of one (sequence, KV
// head) and does 4 * 128 * D operations for each key's 4 * D bytes, which all row tiles but the
// first find in L2. mma.sync reaches about 60 % of the tensor rate of an H100.
//
//             keys ...
//   rows  0 [ x . . . . . ]     a CTA for each tile of rows; under a causal mask the late ones are
//         1 [ x x x . . . ]     the longest and start first
//         2 [ x x x x x . ]     within a tile: paged_row_tile.cuh
#pragma once

#include <climits>
#include <cstdint>
#include <string>

#include "attention/paged_row_tile.cuh"
#include "cuda/launch.h"

namespace effllm {

// A fragment of K or V that a warp reads serves 32 rows, so that shared memory keeps pace with the
// tensor cores. The output of D = 256 leaves registers for 16; codes on their way take some, too.
template <class Element, int kHeadDim, class Kv = Element>
struct PagedPrefillConfig
    : PagedRowTileConfig<Element, kHeadDim, Kv,
                         kHeadDim <= 128 && std::is_same_v<Element, Kv> ? 2 : 1> {
  static constexpr bool kTrees = false;
  static constexpr int kMaxTeams = 1;
  static constexpr bool kRunsOnce = false;  // but for keys of the head and those behind it
  static constexpr int kStages = 1;
  // Where the compiler has to be told that fewer registers would do; 0: it finds out itself.
  static constexpr int kMinCtasPerSm = !std::is_same_v<Element, Kv> && kHeadDim == 128 ? 3 : 0;
};

template <class Config>
__global__ void __launch_bounds__(Config::kTileThreads, Config::kMinCtasPerSm)
    paged_prefill_kernel(const __grid_constant__ PagedAttentionArgs args) {
  extern __shared__ __align__(1024) uint4 smem_raw[];
  auto& smem = *reinterpret_cast<PagedRowTileStorage<Config>*>(smem_raw);
  const auto heads = static_cast<uint32_t>(args.heads_per_table);
  const auto num_tables = static_cast<uint32_t>(args.num_tables);
  const uint32_t pair = blockIdx.x / heads;
  const int row_tile = args.num_row_tiles - 1 - static_cast<int>(pair / num_tables);
  const Sequence sequence(args, static_cast<int>(pair % num_tables));
  if (!sequence.is_taken(args)) return;
  const int kv_head = sequence.first_kv_head + static_cast<int>(blockIdx.x % heads);
  const int first_row = row_tile * Config::kBlockM;
  if (first_row == 0) clear_unowned_tokens<typename Config::Element>(args, sequence, kv_head);
  if (first_row >= sequence.num_queries * args.group) return;
  PagedRowTile<Config> tile(args, smem, sequence, kv_head, first_row);
  const SeenKeys seen = tile.seen_keys();
#pragma unroll 1
  for (int i = 0; i < 2; ++i) tile.run(i == 0 ? KeyRange{0, seen.head_end} : seen.keys);
  tile.store();
}

template <class Config>
void launch_paged_prefill(const PagedAttentionArgs& problem, cudaStream_t stream) {
  PagedAttentionArgs args = problem;
  const int64_t rows = args.group * args.max_seqlen_q;
  args.num_row_tiles = static_cast<int32_t>(ceil_div<int64_t>(rows, Config::kBlockM));
  const int64_t blocks = args.num_row_tiles * args.num_kv_heads * args.num_seqs;
  if (rows > INT_MAX - Config::kBlockM || blocks > INT_MAX) {
    fail("paged_attention",
         "HQ / HKV * max_seqlen_q and the number of tiles must be below 2^31, got " +
             std::to_string(rows) + " and " + std::to_string(blocks));
  }
  const Launch launch{"paged_attention", dim3(static_cast<unsigned>(blocks)),
                      dim3(Config::kTileThreads), sizeof(PagedRowTileStorage<Config>), stream};
  launch(paged_prefill_kernel<Config>, args);
}

}  // namespace effllm
