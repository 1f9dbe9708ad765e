// How the extend kernel is launched: in which clusters, of how many teams.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

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

// The largest clusters that are even: nothing but their parts has to go through memory. If none is,
// clusters of two where pairs are few; and where pairs are as many as teams, each team has its own.
// Measured on an H100, B from 1 to 64. With several row tiles each has its own clusters.
template <class Config>
ExtendShape choose_extend_shape(const PagedAttentionArgs& args, const AttentionContext& context) {
  const int64_t num_sms = context.attribute(cudaDevAttrMultiProcessorCount);
  const int64_t num_teams = num_sms * Config::kTeamsPerSm;
  const int64_t pairs = args.num_seqs * args.num_kv_heads;
  const int64_t row_tiles = count_row_tiles<Config>(args);
  const std::array<int, 4> resident = resident_extend_clusters<Config>(context);
  // With a split_size the batch must not show in how a piece is shared out.
  if (args.split_size > 0 || resident[3] == 0) return {1, 1, num_teams};
  const auto suits = [&](size_t i) {
    const int64_t shares = resident[i] / row_tiles;
    return shares * row_tiles * kExtendClusters[i] * 10 >= num_sms * 9 && is_even(pairs, shares);
  };
  size_t best = pairs * row_tiles < num_sms && resident[2] >= row_tiles ? 2 : 3;
  for (size_t i = resident.size(); i-- > 0;) {
    if (suits(i)) best = i;
  }
  const int64_t teams = num_teams / row_tiles;
  if (!suits(best) && is_even(pairs, teams) && teams < 2 * pairs) return {1, 1, num_teams};
  return {kExtendClusters[best], Config::kMaxTeams, resident[best]};
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

template <class Element, class Kv>
void launch_paged_extend(const PagedAttentionArgs& args, const AttentionContext& context) {
  if (args.head_dim <= 64) {
    launch_paged_extend<PagedExtendConfig<Element, 64, Kv>>(args, context);
  } else if (args.head_dim <= 128) {
    launch_paged_extend<PagedExtendConfig<Element, 128, Kv>>(args, context);
  } else {
    launch_paged_extend<PagedExtendConfig<Element, 256, Kv>>(args, context);
  }
}

// Compiled in a file for each Kv: paged_extend.cu and paged_extend_<dtype>.cu.
extern template void launch_paged_extend<float16, float16>(const PagedAttentionArgs&,
                                                           const AttentionContext&);
extern template void launch_paged_extend<bfloat16, bfloat16>(const PagedAttentionArgs&,
                                                             const AttentionContext&);
extern template void launch_paged_extend<float16, KvE4M3>(const PagedAttentionArgs&,
                                                          const AttentionContext&);
extern template void launch_paged_extend<bfloat16, KvE4M3>(const PagedAttentionArgs&,
                                                           const AttentionContext&);
extern template void launch_paged_extend<float16, KvInt8>(const PagedAttentionArgs&,
                                                          const AttentionContext&);
extern template void launch_paged_extend<bfloat16, KvInt8>(const PagedAttentionArgs&,
                                                           const AttentionContext&);
extern template void launch_paged_extend<float16, KvInt4>(const PagedAttentionArgs&,
                                                          const AttentionContext&);
extern template void launch_paged_extend<bfloat16, KvInt4>(const PagedAttentionArgs&,
                                                           const AttentionContext&);

}  // namespace effllm
