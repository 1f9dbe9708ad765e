// GEMM with both operands in shared memory (wgmma "SS", sm_90): a persistent kernel with a producer
// warp, for weights that need no conversion.
//
// Roofline: for many tokens 2 M N K operations of the tensor cores, at the clock that their power
// leaves (1.3 GHz on an H100), and shared memory's 128 bytes a clock. A stage of 128 by 256 takes
// 1024 clocks; TMA writes 48 KB of it, and wgmma reads 80 KB with 256 columns, 96 KB with 128: so
// 1035 clocks were measured, and 1075. For few tokens the bytes of W, of which a CTA's ring keeps
// some 80 KB on their way; what the next kernel will need first, it asks for while the one ahead of
// it finishes.
//
//                 columns of B ->
//   rows of A   [ CTA 0, warpgroup 0 ]     tiles of neighbours in a cluster: next to each other, of
//               [ CTA 0, warpgroup 1 ]     the same columns
//               [ CTA 1, warpgroup 0 ]
//               [ CTA 1, warpgroup 1 ]
//
//   stage of the ring, 128 bytes of K:  [ B: kCols rows | A: kRows rows ]   128-byte swizzle
//
//   warp 8            one lane fills the ring by TMA: its CTA's part of A, and its share of B,
//                     which TMA writes into all neighbours
//   warpgroups 0, 1   wgmma, one stage of products on their way while the next is awaited
//
// A stage is filled again when the math warps of all CTAs that it was written to have released it.
// The ring goes on from tile to tile: the next tile's first stages arrive while this one is stored.
// A is W and B is x, whose tokens may then be few; the other way round a warp knows 2 tokens and
// all features, which is less to scale by.
//
// An op brings types:
//   InT, Params    of the operands, int8 summed up in int32; the op's arguments, with x, weight,
//                  stride_weight_n, m, n, k
//   Finish         what becomes of sums (tile_epilogue_sm90.cuh), made of Params
//   kSplits        whether tiles may share K, where their shape allows it
//   Promotion<C>   NoPromotion, or how the tensor core's sums of one stage are added up outside:
//     kStageBytes                           of shared memory that it wants beside a stage
//     produce(params, smem, full, work, k_tile)   fills them
//     Promotion(params, work)               at a tile's begin
//     enter(tile)                           while the first products of the tile's stage are made
//     load(smem, block)                     while those of a block of rows are
//     add(smem, partial, sums)              sums += scales * partial, of that block
//     stages()                              how many the tensor core may sum up for one add, which
//                                           then needs no memory; asked for one block of rows
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/pipeline.cuh"
#include "cuda/tensor_map.h"
#include "gemm/ss_gemm_sm90.h"
#include "gemm/tile_epilogue_sm90.cuh"
#include "gemm/tile_schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"

namespace effllm {

template <class C>
struct NoPromotion {
  static constexpr int kStageBytes = 0;
};

template <class Op_, SsGemmShape kShape>
struct SsGemm {
  using Op = Op_;
  using InT = typename Op::InT;
  using Sum = std::conditional_t<std::is_integral_v<InT>, int32_t, float>;
  static constexpr int kCols = kShape.cols;
  static constexpr int kRowBlocks = kShape.row_blocks;
  static constexpr int kStages = kShape.stages;
  static constexpr int kCtasPerSm = kShape.ctas_per_sm;
  static constexpr int kNeighbours = kShape.neighbours;
  static constexpr int kOutCols = kShape.out_cols;
  static constexpr bool kTokenRows = kShape.token_rows;
  static constexpr int kTokens = kShape.tokens();
  static constexpr int kRowBytes = 128;  // of a stage
  static constexpr int kTileK = kRowBytes / sizeof(InT);
  static constexpr int kStrips = kMathGroups * kRowBlocks;
  static constexpr int kRows = kStrips * kBlockRows;
  static constexpr int kLoadCols = kCols / kNeighbours;  // of which a CTA fetches B
  static constexpr int kBBytes = kCols * kRowBytes;
  static constexpr int kABytes = kRows * kRowBytes;
  static constexpr int kStageBytes = kBBytes + kABytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kOutTokens = kTokenRows ? kBlockRows : kOutCols;  // of a strip
  static constexpr int kOutStripBytes = kOutTokens * 128;
  static constexpr int kOutBytes = kRows * kOutCols * 2;
  using Promotion = typename Op::template Promotion<SsGemm>;
  static constexpr bool kPromoted = !std::is_same_v<Promotion, NoPromotion<SsGemm>>;
  // Two sets of sums fit beside each other.
  static constexpr bool kPromotesStages =
      kPromoted && kRowBlocks == 1 && Promotion::kStageBytes == 0;
  static constexpr int kThreads = kMathThreads + 128;
  // A CTA starts with 168 (80) registers per thread; what the producers give up, the others get.
  static constexpr int kProducerRegisters = kCtasPerSm == 1 ? 40 : 32;
  static constexpr int kMathRegisters = kCtasPerSm == 1 ? 232 : 104;
  static constexpr int kSmemBytes =
      1024 + kRingBytes + kOutBytes + kStages * Promotion::kStageBytes;
  static_assert(kCtasPerSm * (kSmemBytes + 1024) <= 228 * 1024);
  static_assert(kCols <= 256 && kRows <= 256);
  static constexpr bool kSplits = Op::kSplits && kShape.splits();
  static_assert(!kSplits || SliceSums<SsGemm>::kSmemBytes <= kRingBytes);
};

template <class Params>
struct SsGemmArgs {
  Params params;
  CUtensorMap a_map, b_map, out_map;
  TileSchedule schedule;
  DType out_dtype;
  int prefetch_tiles;  // of K, whose weights are asked for before the kernel ahead has finished
};

template <class C>
struct SsGemmShared {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it
  uint64_t *full, *empty, *received;
  int neighbour;   // this CTA's place among them
  int first_rank;  // of the neighbours, in the cluster
  int group;       // of this math warp

  __device__ __forceinline__ uint8_t* b(int stage) const { return base + stage * C::kStageBytes; }
  __device__ __forceinline__ uint8_t* a(int stage) const { return b(stage) + C::kBBytes; }
  __device__ __forceinline__ uint8_t* out() const { return b(C::kStages); }
  __device__ __forceinline__ uint8_t* promotion(int stage) const {
    return out() + C::kOutBytes + stage * C::Promotion::kStageBytes;
  }
};

// The producing lane's share of a piece of work.
template <class C, class Args>
__device__ __forceinline__ void produce(const Args& args, const SsGemmShared<C>& smem,
                                        const TileSchedule::Work& work, Ring<C::kStages>& ring) {
  // Weights that no other CTA wants leave L2 to those that will come. Other loads go without a
  // hint: x takes longer with one, even with the neutral "evict normal" (bench/results/README.md).
  const bool once = (C::kTokenRows ? args.schedule.row_tiles : args.schedule.col_tiles) == 1;
  const uint64_t evict_first = ptx::l2_evict_first();
  const int first_col = work.col_tile * C::kCols + smem.neighbour * C::kLoadCols;
#pragma unroll 1
  for (int tile = 0; tile < work.num_k_tiles; ++tile, ring.advance()) {
    ptx::mbarrier_wait(&smem.empty[ring.stage], ring.phase ^ 1);
    uint64_t* full = &smem.full[ring.stage];
    ptx::mbarrier_arrive_expect_bytes(full, C::kStageBytes + C::Promotion::kStageBytes);
    const int k_tile = work.first_k_tile + tile, k = k_tile * C::kTileK;
    const int row = work.row_tile * C::kRows;
    if (!C::kTokenRows && once) {
      ptx::tma_load_2d(smem.a(ring.stage), &args.a_map, full, k, row, evict_first);
    } else {
      ptx::tma_load_2d(smem.a(ring.stage), &args.a_map, full, k, row);
    }
    if constexpr (C::kNeighbours == 1) {
      if (C::kTokenRows && once) {
        ptx::tma_load_2d(smem.b(ring.stage), &args.b_map, full, k, first_col, evict_first);
      } else {
        ptx::tma_load_2d(smem.b(ring.stage), &args.b_map, full, k, first_col);
      }
    } else {
      const int ranks = ((1 << C::kNeighbours) - 1) << smem.first_rank;
      ptx::tma_load_2d_multicast(smem.b(ring.stage) + smem.neighbour * C::kLoadCols * C::kRowBytes,
                                 &args.b_map, full, k, first_col, static_cast<uint16_t>(ranks));
    }
    if constexpr (C::Promotion::kStageBytes > 0) {
      C::Promotion::produce(args.params, smem.promotion(ring.stage), full, work, k_tile);
    }
  }
}

// Asks L2 for the first weights of a piece of work. They are loaded afterwards all the same, so
// that it does not matter if the kernel ahead writes them.
template <class C, class Args>
__device__ __forceinline__ void prefetch_weights(const Args& args, const SsGemmShared<C>& smem,
                                                 const TileSchedule::Work& work) {
  const CUtensorMap* map = C::kTokenRows ? &args.b_map : &args.a_map;
  const int first_row = C::kTokenRows ? work.col_tile * C::kCols + smem.neighbour * C::kLoadCols
                                      : work.row_tile * C::kRows;
  const int tiles = min(args.prefetch_tiles, work.num_k_tiles);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::tma_prefetch_2d(map, (work.first_k_tile + tile) * C::kTileK, first_row);
  }
}

// sums (+)= the products of a stage with 64 rows of A.
template <class C>
__device__ __forceinline__ void multiply(typename C::Sum (&sums)[C::kCols / 2], uint64_t a,
                                         uint64_t b, bool accumulate) {
  constexpr int kStepBytes = 32;  // of K, in a wgmma
#pragma unroll
  for (int step = 0; step < C::kRowBytes / kStepBytes; ++step) {
    ptx::Wgmma<typename C::InT, C::kCols>::mma(sums, ptx::advance_descriptor(a, step * kStepBytes),
                                               ptx::advance_descriptor(b, step * kStepBytes),
                                               accumulate || step > 0);
  }
}

// The ring as math warps read it: addresses in uniform registers, as wgmma wants them.
template <class C>
class StageReader {
 public:
  __device__ __forceinline__ explicit StageReader(const SsGemmShared<C>& smem)
      : full_(ptx::uniform(ptx::smem_address(smem.full))),
        empty_(ptx::uniform(ptx::smem_address(smem.empty))),
        b_(ptx::uniform(ptx::smem_address(smem.base))),
        a_(b_ + C::kBBytes + smem.group * C::kRowBlocks * kBlockRows * C::kRowBytes),
        first_rank_(smem.first_rank) {}

  __device__ __forceinline__ void wait(const Ring<C::kStages>& ring) const {
    ptx::mbarrier_wait(full_ + 8 * ring.stage, ring.phase);
  }

  // This warp has read the stage: all CTAs that write to it hear of it.
  __device__ __forceinline__ void release(int stage) const {
    const int lane = threadIdx.x % 32;
    if constexpr (C::kNeighbours == 1) {
      if (lane == 0) ptx::mbarrier_arrive(empty_ + 8 * stage);
    } else {
      const int rank = first_rank_ + lane;
      if (lane < C::kNeighbours) ptx::mbarrier_arrive_cluster(empty_ + 8 * stage, rank);
    }
  }

  __device__ __forceinline__ uint64_t a(int stage) const {
    return ptx::wgmma_descriptor(a_ + stage * C::kStageBytes);
  }
  __device__ __forceinline__ uint64_t b(int stage) const {
    return ptx::wgmma_descriptor(b_ + stage * C::kStageBytes);
  }

 private:
  const uint32_t full_, empty_, b_, a_;
  const int first_rank_;
};

// sums += A B^T of this warpgroup's rows, over stages that follow each other.
template <class C>
__device__ __forceinline__ void multiply_stages(const StageReader<C>& stages, int count,
                                                Ring<C::kStages>& ring, Accumulators<C>& sums,
                                                bool accumulate) {
  constexpr int kBlockBytes = kBlockRows * C::kRowBytes;
  int read_stage = -1;  // wgmma may still read from it
  do {                  // a loop that could run zero times would make ptxas serialise wgmma
    stages.wait(ring);
    const uint64_t a = stages.a(ring.stage), b = stages.b(ring.stage);
    ptx::wgmma_fence();
#pragma unroll
    for (int block = 0; block < C::kRowBlocks; ++block) {
      multiply<C>(sums[block], ptx::advance_descriptor(a, block * kBlockBytes), b, accumulate);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the products of the stage before are done
    if (read_stage >= 0) stages.release(read_stage);
    read_stage = ring.stage;
    accumulate = true;
    ring.advance();
  } while (--count > 0);
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) ptx::pin_accumulators(sums[block]);
  stages.release(read_stage);
}

// sums = A B^T of this warpgroup's rows.
template <class C, class Args>
__device__ __forceinline__ void mainloop(const Args& args, const SsGemmShared<C>& smem,
                                         const StageReader<C>& stages,
                                         const TileSchedule::Work& work, Ring<C::kStages>& ring,
                                         Accumulators<C>& sums) {
  constexpr int kBlockBytes = kBlockRows * C::kRowBytes;
  if constexpr (!C::kPromoted) {
    multiply_stages<C>(stages, work.num_k_tiles, ring, sums, true);
  } else if constexpr (C::kPromotesStages) {
    const typename C::Promotion promotion(args.params, work);
    int left = work.num_k_tiles;
    do {
      const int count = min(left, promotion.stages());
      Accumulators<C> partial;
      multiply_stages<C>(stages, count, ring, partial, false);
      promotion.add(nullptr, partial[0], sums[0]);
      left -= count;
    } while (left > 0);
  } else {
    int tile = 0;
    typename C::Promotion promotion(args.params, work);
    float partial[C::kCols / 2];
    stages.wait(ring);
    uint64_t a = stages.a(ring.stage), b = stages.b(ring.stage);
    do {
      const int stage = ring.stage;
#pragma unroll
      for (int block = 0; block < C::kRowBlocks; ++block) {
        ptx::wgmma_fence();
        multiply<C>(partial, ptx::advance_descriptor(a, block * kBlockBytes), b, false);
        ptx::wgmma_commit();
        // All that can be done meanwhile: the tensor cores go idle if neither group is in time.
        if (block == 0) promotion.enter(tile);
        promotion.load(smem.promotion(stage), block);
        if (block == C::kRowBlocks - 1) {
          ring.advance();
          if (tile + 1 < work.num_k_tiles) stages.wait(ring);
          a = stages.a(ring.stage), b = stages.b(ring.stage);
        }
        ptx::wgmma_wait<0>();
        ptx::pin_accumulators(partial);
        if (C::Promotion::kStageBytes == 0 && block == C::kRowBlocks - 1) stages.release(stage);
        promotion.add(smem.promotion(stage), partial, sums[block]);
      }
      if constexpr (C::Promotion::kStageBytes > 0) {
        __syncwarp();
        stages.release(stage);
      }
    } while (++tile < work.num_k_tiles);
  }
}

template <class C, class Args, class Finish>
__device__ __forceinline__ void store(const Args& args, const SsGemmShared<C>& smem,
                                      const Finish& finish, const TileTerms<C, Finish>& terms,
                                      const TileSchedule::Work& work, uint32_t phase,
                                      const Accumulators<C>& sums) {
  if (!work.split) {
    dispatch_16bit(args.out_dtype, [&](auto out) {
      store_tile<C, decltype(out)>(finish, terms, args.out_map, smem.out(), work, sums);
    });
  } else if constexpr (C::kSplits) {
    const int slices = args.schedule.slices;
    const SliceSums<C> slice_sums(smem.base, smem.received, slices,
                                  static_cast<int>(blockIdx.x) / C::kNeighbours % slices,
                                  smem.neighbour);
    dispatch_float(args.out_dtype, [&](auto out) {
      store_split_tile<C, decltype(out)>(finish, terms, slice_sums, phase, work, sums);
    });
    __syncthreads();  // the ring may be filled again
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm)
    ss_gemm_kernel(const __grid_constant__ SsGemmArgs<typename C::Op::Params> args) {
  extern __shared__ uint8_t dynamic_smem[];
  using Terms = TileTerms<C, typename C::Op::Finish>;
  __shared__ uint64_t full[C::kStages], empty[C::kStages], received;
  __shared__ Terms terms;
  const auto cta = static_cast<int>(blockIdx.x);
  // Known to be the same in a whole warp, it leaves descriptors of shared memory in its uniform
  // registers, where wgmma reads them.
  const int warp = ptx::uniform_warp_idx();
  const SsGemmShared<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u),
                             full,
                             empty,
                             &received,
                             cta % C::kNeighbours,
                             cta / C::kNeighbours % args.schedule.slices * C::kNeighbours,
                             warp / 4};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], C::kNeighbours * kMathThreads / 32);
    }
    ptx::mbarrier_init(&received, 1);
    ptx::fence_mbarrier_init();
  }
  if constexpr (C::kNeighbours == 1) {
    __syncthreads();
  } else {
    ptx::cluster_sync();  // nobody writes into a CTA whose barriers are not there
  }

  Ring<C::kStages> ring;
  TileSchedule::Work work;
  const auto get_work = [&](int item) {
    return args.schedule.template get<C::kNeighbours>(item, work);
  };
  if (warp >= kMathThreads / 32) {
    ptx::shrink_registers<C::kProducerRegisters>();
    const bool produces = warp == kMathThreads / 32 && ptx::elect_one();
    if (produces) {
      ptx::prefetch_tensor_map(&args.a_map);
      ptx::prefetch_tensor_map(&args.b_map);
    }
    bool more = get_work(0);
    if (produces && more) prefetch_weights<C>(args, smem, work);
    ptx::grid_dependency_wait();
    for (int item = 1; more; ++item) {
      if (produces) produce<C>(args, smem, work, ring);
      const bool split = work.split;
      more = get_work(item);
      // The next kernel has the memory for its first loads now.
      if (produces && !more) ptx::grid_launch_dependents();
      __syncwarp();
      if (split) {  // the ring takes sums, until the math warps have added them
        ptx::cluster_sync_relaxed();
        __syncthreads();
      }
    }
  } else {
    ptx::grow_registers<C::kMathRegisters>();
    ptx::grid_dependency_wait();
    const typename C::Op::Finish finish(args.params);
    const StageReader<C> stages(smem);
    bool storing = false;
    uint32_t phase = 0;  // of sums received
    for (int item = 0; get_work(item); ++item) {
      const typename Terms::Part part = Terms::load(finish, work);
      Accumulators<C> sums = {};
      mainloop<C>(args, smem, stages, work, ring, sums);
      if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
      terms.keep(part);
      store<C>(args, smem, finish, terms, work, phase, sums);
      storing = !work.split;
      phase ^= work.split;
    }
    if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait();
  }
  // Nobody leaves whose shared memory or barriers others still write to.
  if constexpr (C::kNeighbours > 1) ptx::cluster_sync();
}

// Of the current device.
template <class C>
SsGemmResidency ss_gemm_residency(const char* op) {
  return tile_gemm_residency<C>(op, ss_gemm_kernel<C>);
}

// `weight`: [N, K] with rows `stride_weight_n` elements apart; x and out contiguous. Only tiles
// that may be split can go out in float32. Of each CTA's first weights, `prefetch_bytes` are asked
// for early.
template <class C>
void launch_ss_gemm(const char* op, const typename C::Op::Params& params, DType out_dtype,
                    SsGemmPlan plan, int prefetch_bytes, cudaStream_t stream) {
  SsGemmArgs<typename C::Op::Params> args{params, {}, {}, {}, {}, out_dtype, 0};
  const auto x_map = [&](int rows) {
    return make_tensor_map(params.x, params.dtype, params.m, params.k, params.k, rows, op);
  };
  const auto weight_map = [&](int rows) {
    return make_tensor_map(params.weight, params.dtype, params.n, params.k, params.stride_weight_n,
                           rows, op);
  };
  args.a_map = C::kTokenRows ? x_map(C::kRows) : weight_map(C::kRows);
  args.b_map = C::kTokenRows ? weight_map(C::kLoadCols) : x_map(C::kLoadCols);
  const int64_t rows = C::kTokenRows ? params.m : params.n;
  const int64_t cols = C::kTokenRows ? params.n : params.m;
  TileSchedule& schedule = args.schedule;
  schedule.row_tiles = static_cast<int>(ceil_div<int64_t>(rows, C::kNeighbours * C::kRows));
  schedule.col_tiles = static_cast<int>(ceil_div<int64_t>(cols, C::kCols));
  schedule.k_tiles = static_cast<int>(ceil_div<int64_t>(params.k, C::kTileK));
  schedule.slices = plan.slices;
  const int tiles = schedule.row_tiles * schedule.col_tiles;
  const int pieces = plan.ctas / C::kNeighbours;
  if (out_dtype == DType::kFloat32) {  // store_tile rounds to 16 bits
    schedule.whole_tiles = 0;
  } else {
    args.out_map =
        make_tensor_map(params.out, out_dtype, params.m, params.n, params.n, C::kOutTokens, op);
    schedule.whole_tiles = plan.slices == 1 ? tiles : tiles / pieces * pieces;
  }
  args.prefetch_tiles = prefetch_bytes / ((C::kTokenRows ? C::kLoadCols : C::kRows) * C::kRowBytes);
  const int grid = std::min(pieces, tiles * plan.slices) * C::kNeighbours;
  Launch{op,
         dim3(static_cast<unsigned>(grid)),
         dim3(C::kThreads),
         static_cast<size_t>(C::kSmemBytes),
         stream,
         plan.slices * C::kNeighbours,
         true}(ss_gemm_kernel<C>, args);
}

}  // namespace effllm
