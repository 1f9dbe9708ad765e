// How the extend kernel is launched: in which clusters, of how many teams.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "attention/paged_extend.cuh"
#include "attention/share_keys.cuh"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "quant/dequant.cuh"

namespace effllm {

// How a part is shared out: in clusters of so many CTAs, of so many teams each; and how many of
// them run together.
struct ExtendShape {
  int ctas, teams;
  int64_t clusters;
};

// Teams that meet in shared memory, from the most on; their number is Config's.
inline constexpr std::array<int, 4> kExtendClusters = {8, 4, 2, 1};

template <class Config>
constexpr int extend_smem_bytes(int teams) {
  return static_cast<int>(sizeof(PagedRowTileStorage<Config>)) * teams;
}

// How many of these clusters run together. Earlier GPUs than Hopper have none.
template <class Config>
std::array<int, 4> resident_extend_clusters(const AttentionContext& context) {
  static PerDevice<std::array<int, 4>> known;
  return known.get(context.device, [&] {
    std::array<int, 4> resident{};
    if (context.attribute(cudaDevAttrComputeCapabilityMajor) < 9) return resident;
    for (size_t i = 0; i < resident.size(); ++i) {
      resident[i] = kExtendClusters[i] == 1
                        ? context.attribute(cudaDevAttrMultiProcessorCount)
                        : max_resident_clusters("paged_attention", paged_extend_kernel<Config>,
                                                Config::kTileThreads * Config::kMaxTeams,
                                                extend_smem_bytes<Config>(Config::kMaxTeams),
                                                kExtendClusters[i]);
    }
    return resident;
  });
}

// What a step takes, in us of an H100, if keys are as many as the page table has room for, and all
// pairs have as many: their bytes at the rate that so many teams reach, a start and, over each
// cluster, a merge; another in memory where a pair has several; and, where clusters have parts of
// several pairs, what each of these costs again. Fitted to 23 steps of 1 to 32 sequences of 4096
// and 32768 keys, 64 rows of 16 bits, which it misses by 5 % at most. Only which is least counts.
// Codes have to be decoded, too: all teams count.
template <class Config>
double extend_us(const PagedAttentionArgs& args, const ExtendShape& shape,
                 const AttentionContext& context) {
  const int64_t num_teams =
      int64_t{context.attribute(cudaDevAttrMultiProcessorCount)} * Config::kTeamsPerSm;
  const int64_t pairs = args.num_seqs * args.num_kv_heads * count_row_tiles<Config>(args);
  const auto share = static_cast<double>(shape.clusters) / static_cast<double>(pairs);
  const bool is_whole = shape.clusters % pairs == 0;
  const double busy = static_cast<double>(shape.clusters * shape.ctas * shape.teams) /
                      static_cast<double>(num_teams);
  const double rate = Config::kQuantized ? busy : std::min({1., 0.4 + 0.755 * busy, 1.58 * busy});
  const double loads = key_us(args) * count_row_tiles<Config>(args) / rate;
  const double start = (shape.teams == 1 ? 13 : 9.5) + 0.3 * shape.ctas;
  const double parts = !is_whole ? 4 + 7 / share : share > 1 ? 2 + 0.5 * share / shape.ctas : 0;
  return loads + start + parts;
}

// The quickest: of each size of clusters all, or as many as give each pair the same number, though
// multiprocessors are left over.
template <class Config>
ExtendShape choose_extend_shape(const PagedAttentionArgs& args, const AttentionContext& context) {
  const int64_t num_teams =
      int64_t{context.attribute(cudaDevAttrMultiProcessorCount)} * Config::kTeamsPerSm;
  const int64_t pairs = args.num_seqs * args.num_kv_heads * count_row_tiles<Config>(args);
  const std::array<int, 4> resident = resident_extend_clusters<Config>(context);
  const ExtendShape alone{1, 1, num_teams};
  // With a split_size the batch must not show in how a piece is shared out.
  if (args.split_size > 0 || resident[3] == 0) return alone;
  ExtendShape best = alone;
  const int64_t most =
      pairs * ceil_div<int64_t>(max_keys(args), Config::kMinBlocks * Config::kBlockKeys);
  const auto consider = [&](ExtendShape shape) {
    const auto us = [&](const ExtendShape& s) { return extend_us<Config>(args, s, context); };
    if (shape.clusters > 0 && us(shape) < us(best)) best = shape;
    shape.clusters -= shape.clusters % pairs;
    if (shape.clusters > 0 && us(shape) < us(best)) best = shape;
  };
  consider(alone);
  for (size_t i = 0; i < resident.size(); ++i) {
    consider({kExtendClusters[i], Config::kMaxTeams, std::min<int64_t>(resident[i], most)});
  }
  return best;
}

template <class Config>
void launch_paged_extend(PagedAttentionArgs args, const AttentionContext& context) {
  const ExtendShape shape = choose_extend_shape<Config>(args, context);
  share_keys<Config>(args, context, shape.clusters);
  const auto ctas = static_cast<unsigned>(args.num_shares * args.num_row_tiles * shape.ctas);
  const Launch launch{"paged_attention",
                      dim3(ctas),
                      dim3(static_cast<unsigned>(Config::kTileThreads * shape.teams)),
                      static_cast<size_t>(extend_smem_bytes<Config>(shape.teams)),
                      context.stream,
                      shape.ctas,
                      args.early_start};
  launch(paged_extend_kernel<Config>, args);
}

template <int kHeadDim>
using HeadDim = std::integral_constant<int, kHeadDim>;

// Calls `call` with the head dim, as a constant, that is compiled for D.
template <class Call>
auto dispatch_head_dim(const PagedAttentionArgs& args, Call call) {
  if (args.head_dim <= 64) return call(HeadDim<64>{});
  if (args.head_dim <= 128) return call(HeadDim<128>{});
  return call(HeadDim<256>{});
}

// Compiled in a file for each Kv: paged_extend.cu and paged_extend_<dtype>.cu.
template <class Element, class Kv>
struct PagedExtend {
  static void launch(const PagedAttentionArgs& args, const AttentionContext& context);
  // About what it will take, in us of an H100.
  static double estimate(const PagedAttentionArgs& args, const AttentionContext& context);
};

// Not in the class, where it would be compiled wherever it is called.
template <class Element, class Kv>
void PagedExtend<Element, Kv>::launch(const PagedAttentionArgs& args,
                                      const AttentionContext& context) {
  dispatch_head_dim(args, [&](auto head_dim) {
    launch_paged_extend<PagedExtendConfig<Element, head_dim, Kv>>(args, context);
  });
}

template <class Element, class Kv>
double PagedExtend<Element, Kv>::estimate(const PagedAttentionArgs& args,
                                          const AttentionContext& context) {
  return dispatch_head_dim(args, [&](auto head_dim) {
    using Config = PagedExtendConfig<Element, head_dim, Kv>;
    return extend_us<Config>(args, choose_extend_shape<Config>(args, context), context);
  });
}

extern template struct PagedExtend<float16, float16>;
extern template struct PagedExtend<bfloat16, bfloat16>;
extern template struct PagedExtend<float16, KvE4M3>;
extern template struct PagedExtend<bfloat16, KvE4M3>;
extern template struct PagedExtend<float16, KvInt8>;
extern template struct PagedExtend<bfloat16, KvInt8>;
extern template struct PagedExtend<float16, KvInt4>;
extern template struct PagedExtend<bfloat16, KvInt4>;

}  // namespace effllm
