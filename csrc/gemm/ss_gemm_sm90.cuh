// GEMM with both operands in shared memory (wgmma "SS", sm_90): a persistent kernel with a producer
// warp, for weights that need no conversion.
//
// Roofline: 2 M N K operations of the tensor cores. A tile of 128 rows by 256 tokens takes 48 KB of
// W and x for 1024 clocks of products. The two CTAs of a cluster share their x, which leaves 32
// bytes per clock and multiprocessor to come from L2.
//
//                  tokens ->
//   rows of W   [ CTA 0, warpgroup 0 ]     a cluster's tiles of the output: next to each other, for
//               [ CTA 0, warpgroup 1 ]     the same tokens
//               [ CTA 1, warpgroup 0 ]
//               [ CTA 1, warpgroup 1 ]
//
//   stage of the ring, 128 bytes of K:  [ x: kTokens rows | W: kRows rows ]   128-byte swizzle
//
//   warp 8            one lane fills the ring by TMA: its CTA's rows of W, and its part of the
//                     tokens, which TMA writes into both CTAs
//   warpgroups 0, 1   wgmma, one stage of products on their way while the next is awaited
//
// A stage is filled again when the math warps of both CTAs have released it. The ring goes on from
// tile to tile: the next tile's first stages arrive while this one is stored.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/pipeline.cuh"
#include "cuda/tensor_map.h"
#include "gemm/tile_epilogue_sm90.cuh"
#include "gemm/tile_schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"

namespace effllm {

template <class InT_, int kTokens_, int kRowBlocks_, int kStages_, int kCluster_, int kOutTokens_>
struct SsGemm {
  using InT = InT_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kRowBlocks = kRowBlocks_;
  static constexpr int kStages = kStages_;
  static constexpr int kCluster = kCluster_;
  static constexpr int kOutTokens = kOutTokens_;  // stored in one turn
  static constexpr int kRowBytes = 128;           // of a stage
  static constexpr int kTileK = kRowBytes / sizeof(InT);
  static constexpr int kStrips = kMathGroups * kRowBlocks;
  static constexpr int kRows = 64 * kStrips;
  static constexpr int kClusterRows = kCluster * kRows;
  static constexpr int kLoadTokens = kTokens / kCluster;  // of which a CTA fetches x
  static constexpr int kXBytes = kTokens * kRowBytes;
  static constexpr int kWeightBytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kXBytes + kWeightBytes;
  static constexpr int kOutStripBytes = kOutTokens * 64 * 2;
  static constexpr int kThreads = kMathThreads + 128;
  static constexpr int kSmemBytes = 1024 + kStages * kStageBytes + kStrips * kOutStripBytes;
  static_assert(kSmemBytes <= 227 * 1024 && kTokens <= 256 && kRows <= 256);
};

// Params are the op's arguments: m, n, k, and what store_tile wants of them.
template <class Params>
struct SsGemmArgs {
  Params params;
  CUtensorMap x_map, weight_map, out_map;
  int cluster_row_tiles, token_tiles, k_tiles;
};

template <class C>
struct SsGemmShared {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it
  uint64_t *full, *empty;

  __device__ __forceinline__ uint8_t* x(int stage) const { return base + stage * C::kStageBytes; }
  __device__ __forceinline__ uint8_t* weight(int stage) const { return x(stage) + C::kXBytes; }
  __device__ __forceinline__ uint8_t* out() const { return x(C::kStages); }
};

// The item-th tile of this CTA; false when there is none. CTAs of a cluster have the same number.
template <class C, class Args>
__device__ __forceinline__ bool get_tile(const Args& args, int item, TileSchedule::Work& work) {
  const auto clusters = static_cast<int>(gridDim.x) / C::kCluster;
  const int tile = item * clusters + static_cast<int>(blockIdx.x) / C::kCluster;
  if (tile >= args.cluster_row_tiles * args.token_tiles) return false;
  const TileIdx idx = grouped_tile(tile, args.cluster_row_tiles, args.token_tiles);
  const int rank = static_cast<int>(blockIdx.x) % C::kCluster;
  work = {idx.row * C::kCluster + rank, idx.token, 0, args.k_tiles, false};
  return true;
}

// The producing lane's share of a tile.
template <class C, class Args>
__device__ __forceinline__ void produce(const Args& args, const SsGemmShared<C>& smem,
                                        const TileSchedule::Work& work, Ring<C::kStages>& ring) {
  constexpr auto kAllRanks = static_cast<uint16_t>((1 << C::kCluster) - 1);
  const uint64_t policy = ptx::l2_evict_normal();
  const int rank = static_cast<int>(blockIdx.x) % C::kCluster;
  const int first_token = work.token_tile * C::kTokens + rank * C::kLoadTokens;
  for (int tile = 0; tile < work.num_k_tiles; ++tile, ring.advance()) {
    ptx::mbarrier_wait(&smem.empty[ring.stage], ring.phase ^ 1);
    uint64_t* full = &smem.full[ring.stage];
    ptx::mbarrier_arrive_expect_bytes(full, C::kStageBytes);
    const int k = tile * C::kTileK;
    ptx::tma_load_2d(smem.weight(ring.stage), &args.weight_map, full, k, work.row_tile * C::kRows,
                     policy);
    uint8_t* x = smem.x(ring.stage) + rank * C::kLoadTokens * C::kRowBytes;
    if constexpr (C::kCluster == 1) {
      ptx::tma_load_2d(x, &args.x_map, full, k, first_token, policy);
    } else {
      ptx::tma_load_2d_multicast(x, &args.x_map, full, k, first_token, kAllRanks, policy);
    }
  }
}

// This warp has read the stage: all CTAs that write to it hear of it.
template <class C>
__device__ __forceinline__ void release(uint64_t* empty) {
  const int lane = threadIdx.x % 32;
  if constexpr (C::kCluster == 1) {
    if (lane == 0) ptx::mbarrier_arrive(empty);
  } else {
    if (lane < C::kCluster) ptx::mbarrier_arrive_cluster(empty, lane);
  }
}

// sums = W x^T of this warpgroup's rows.
template <class C>
__device__ __forceinline__ void mainloop(const SsGemmShared<C>& smem,
                                         const TileSchedule::Work& work, Ring<C::kStages>& ring,
                                         Accumulators<C>& sums) {
  constexpr int kStepBytes = 32;  // of K, in a wgmma
  const int group = threadIdx.x / 128;
  int read_stage = -1;  // wgmma may still read from it
  int tile = 0;
  do {  // a loop that could run zero times would make ptxas serialise wgmma
    ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
    const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x(ring.stage)));
    const uint64_t weight = ptx::wgmma_descriptor(ptx::smem_address(smem.weight(ring.stage)) +
                                                  group * C::kRowBlocks * 64 * C::kRowBytes);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < C::kRowBytes / kStepBytes; ++step) {
#pragma unroll
      for (int block = 0; block < C::kRowBlocks; ++block) {
        ptx::Wgmma<typename C::InT, C::kTokens>::mma(
            sums[block],
            ptx::advance_descriptor(weight, block * 64 * C::kRowBytes + step * kStepBytes),
            ptx::advance_descriptor(x, step * kStepBytes), true);
      }
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the products of the stage before are done
    if (read_stage >= 0) release<C>(&smem.empty[read_stage]);
    read_stage = ring.stage;
    ring.advance();
  } while (++tile < work.num_k_tiles);
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) ptx::pin_accumulators(sums[block]);
  release<C>(&smem.empty[read_stage]);
}

template <class C, class Params>
__global__ void __launch_bounds__(C::kThreads, 1)
    ss_gemm_kernel(const __grid_constant__ SsGemmArgs<Params> args) {
  extern __shared__ uint8_t dynamic_smem[];
  __shared__ uint64_t full[C::kStages], empty[C::kStages];
  const SsGemmShared<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u), full,
                             empty};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], C::kCluster * kMathThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }
  if constexpr (C::kCluster == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();  // nobody writes into a CTA whose barriers are not there
  }

  Ring<C::kStages> ring;
  TileSchedule::Work work;
  if (threadIdx.x >= kMathThreads) {
    ptx::shrink_registers<40>();
    if (ptx::uniform_warp_idx() == kMathThreads / 32 && ptx::elect_one()) {
      for (int item = 0; get_tile<C>(args, item, work); ++item) {
        produce<C>(args, smem, work, ring);
      }
    }
    __syncwarp();
  } else {
    ptx::grow_registers<232>();
    for (int item = 0; get_tile<C>(args, item, work); ++item) {
      Accumulators<C> sums = {};
      mainloop<C>(smem, work, ring, sums);
      if (item > 0 && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
      store_tile<C>(args.params, args.out_map, smem.out(), work, sums);
    }
    if (threadIdx.x % 128 == 0) ptx::bulk_wait();
  }
  // Nobody leaves whose shared memory or barriers others still write to.
  if constexpr (C::kCluster > 1) ptx::cluster_sync();
}

// `weight`: [N, K] with rows `stride_weight_n` elements apart; x and out contiguous.
template <class C, class Params>
void launch_ss_gemm(const char* op, const Params& params, int resident_clusters,
                    cudaStream_t stream) {
  SsGemmArgs<Params> args{params, {}, {}, {}, 0, 0, 0};
  args.x_map =
      make_tensor_map(params.x, params.dtype, params.m, params.k, params.k, C::kLoadTokens, op);
  args.weight_map = make_tensor_map(params.weight, params.dtype, params.n, params.k,
                                    params.stride_weight_n, C::kRows, op);
  args.out_map =
      make_tensor_map(params.out, params.dtype, params.m, params.n, params.n, C::kOutTokens, op);
  args.cluster_row_tiles = static_cast<int>(ceil_div<int64_t>(params.n, C::kClusterRows));
  args.token_tiles = static_cast<int>(ceil_div<int64_t>(params.m, C::kTokens));
  args.k_tiles = static_cast<int>(ceil_div<int64_t>(params.k, C::kTileK));
  const int clusters = std::min(resident_clusters, args.cluster_row_tiles * args.token_tiles);
  Launch{op,
         dim3(static_cast<unsigned>(clusters * C::kCluster)),
         dim3(C::kThreads),
         static_cast<size_t>(C::kSmemBytes),
         stream,
         C::kCluster}(ss_gemm_kernel<C, Params>, args);
}

}  // namespace effllm
