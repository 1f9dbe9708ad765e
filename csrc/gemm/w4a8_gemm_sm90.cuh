// int8 x by 4-bit weights on wgmma (sm_90a): weights as the register operand, a persistent kernel
// with a producer warp.
//
// Roofline: for few tokens N * K / 2 bytes of codes, of which a multiprocessor's one ring keeps up
// to 144 KB on their way, some 90 beside 64 tokens; for many 2 M N K operations of the tensor
// cores. A stage of 128 rows by 256 tokens takes 1024 clocks of them; shared memory gives wgmma 64
// KB of x meanwhile, math warps 16 KB of codes, and takes 40 KB from TMA, at 128 bytes a clock. A
// warp makes int8 of its 16 x 128 codes in 36 instructions, 68 with zero points, 73 with a
// multiplier, which is all that it costs: in all a stage takes 130, whatever the number of tokens,
// and 89 without. A group's scale is applied to its sum, by two instructions for each of a thread's
// sums: a warp takes 383 instructions for such a stage, and two warps share a scheduler; of 128
// tokens 231, for 512 clocks of products.
//
//                 tokens ->
//   rows of W   [ warpgroup 0 ]     a tile of the output: 2 strips of 64 rows by kCols tokens
//               [ warpgroup 1 ]
//
//   stage of the ring, 128 columns of K:  [ x: kCols rows | codes: 4 KB a strip ]
//                                         [ of its groups: scales, zero points, multipliers ]
//
//   warp 8            one lane fills the ring: x by TMA, contiguous codes by bulk copies
//   warps 9 to 11     a stage each in turn: the scales, in float32 and in the order of the
//                     accumulators; a byte a row of zero points or multipliers
//
//   warpgroups 0, 1   codes -> registers -> int8 -> wgmma with x, in units of 64 columns: while one
//                     unit's products are made, the codes of the next are converted
//
// With scales of several groups a part of 64 tokens is multiplied at a time, into one of two sets
// of sums:
//
//   products    part 0   part 1   part 2   part 3   part 0 of the next group ..
//   scaling       -      part 0   part 1   part 2   part 3
//
// else both warpgroups, which wait for the same stages, would multiply at the same time and scale
// at the same time, and the tensor cores would be idle meanwhile.
//
// Measured, a stage of 256 tokens takes some 1560 clocks, not 1024. Neither waiting less between
// stages nor letting the warpgroups start half a stage apart changes that by more than 2 %. Of all
// executed instructions 60 % are the two for each sum, and the largest stall, a quarter of samples,
// is that of dispatch: what they and products of weights in registers need at the same time.
//
// x lies in shared memory as it does in global memory: words of codes are brought into its order
// (w4a8_codes.cuh), by one instruction for 8 codes and a second load from shared memory. To permute
// x there would be as many bytes again as wgmma reads.
//
// A launch may start while the kernel ahead of it still runs, and asks L2 for its first codes. They
// are loaded afterwards all the same, so that it does not matter if the other one writes them.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/pipeline.cuh"
#include "cuda/vec.cuh"
#include "gemm/ss_gemm_sm90.h"
#include "gemm/tile_epilogue_sm90.cuh"
#include "gemm/tile_schedule.cuh"
#include "gemm/w4a8_codes.cuh"
#include "gemm/w4a8_finish.cuh"
#include "gemm/w4a8_gemm_sm90.h"
#include "gemm/w4a8_groups_sm90.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"
#include "ptx/load.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/prmt.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"

namespace effllm {

// `kGroupSteps`: wgmmas of 32 columns per scale or multiplier; 0 for a single scale alone.
template <int kGroupSteps_, W4A8Decoding kDecoding, SsGemmShape kShape>
struct W4A8Gemm {
  static constexpr int kGroupSteps = kGroupSteps_;
  static constexpr bool kMultiplies = kDecoding == W4A8Decoding::kMultipliers;
  static constexpr bool kGrouped = kGroupSteps > 0 && !kMultiplies;  // a scale for each group's sum
  static constexpr bool kHasZeros = kDecoding == W4A8Decoding::kZeros;
  static constexpr bool kHasBytes = kGroupSteps > 0 && (kHasZeros || kMultiplies);
  using Decode = W4A8Codes<kDecoding>;
  using Finish = W4A8Finish<kGrouped, Decode::kShift>;
  using Sum = std::conditional_t<kGrouped, float, int32_t>;
  static constexpr int kCols = kShape.cols;
  static constexpr int kStages = kShape.stages;
  static constexpr int kCtasPerSm = 1;  // two, with half the ring each, are slower
  static constexpr int kOutCols = kShape.out_cols;
  static constexpr int kRowBlocks = 1, kNeighbours = 1;
  static constexpr bool kTokenRows = false;
  static_assert(kShape.row_blocks == 1 && kShape.ctas_per_sm == 1 && kShape.neighbours == 1 &&
                !kShape.token_rows);
  static constexpr int kStrips = kMathGroups;
  static constexpr int kRows = kShape.rows();
  static constexpr int kTileK = 128;
  static constexpr int kUnits = 2;      // of 64 columns, in a stage
  static constexpr int kUnitSteps = 2;  // wgmmas of 32 columns
  static constexpr int kGroupUnits = kGrouped ? kGroupSteps / kUnitSteps : 0;
  static constexpr int kUnitBytes = kInt4TileWords * 4;
  static constexpr int kXBytes = kCols * kTileK;
  static constexpr int kStripBytes = kUnits * kUnitBytes;
  static constexpr int kStageBytes = kXBytes + kStrips * kStripBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kOutStripBytes = kOutCols * 128;
  static constexpr int kStageGroups = kGroupSteps > 0 ? kUnits * kUnitSteps / kGroupSteps : 0;
  static constexpr int kScaleBytes = kGrouped ? kRows * 4 : 0;  // of a group
  static constexpr int kGroupBytes = kScaleBytes + (kHasBytes ? kRows : 0);
  static constexpr int kSmemBytes =
      1024 + kRingBytes + kStrips * kOutStripBytes + kStages * kStageGroups * kGroupBytes;
  // Of wide tiles' tokens a part at a time is multiplied: sums of one are scaled while those of
  // the next are made.
  static constexpr int kPartCols = kGrouped ? std::min(kCols, 64) : kCols;
  static constexpr int kParts = kCols / kPartCols;
  static constexpr int kSets = std::min(kParts, 2);  // of sums on their way
  static constexpr int kThreads = kMathThreads + 128;
  static constexpr int kProducers = kStageGroups > 0 ? 33 : 1;  // lanes that fill a stage
  static constexpr int kScaleWarps = kStageGroups > 0 ? 3 : 0;  // warps left beside the producer
  // A CTA starts with 168 registers per thread; what the producers give up, the others get.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kMathRegisters = 232;
  // Of 256 tokens, and groups of 64 columns, no registers are left for it.
  static constexpr bool kSplits =
      kShape.splits() && !(kGrouped && kGroupSteps == 2 && kCols == 256);
  static_assert(!kSplits || SliceSums<W4A8Gemm>::kSmemBytes <= kRingBytes);
  static_assert(kSmemBytes + sizeof(TileTerms<W4A8Gemm, Finish>) + 2048 <= 228 * 1024);
};

struct W4A8GemmArgs {
  W4A8GemmParams params;
  CUtensorMap x_map, out_map;
  TileSchedule schedule;
  int prefetch_tiles;  // of K, whose codes are asked for before the kernel ahead has finished
};

template <class C>
struct W4A8Shared {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it
  uint64_t *full, *empty, *received;

  __device__ __forceinline__ uint8_t* x(int stage) const { return base + stage * C::kStageBytes; }
  __device__ __forceinline__ uint8_t* codes(int stage, int strip) const {
    return x(stage) + C::kXBytes + strip * C::kStripBytes;
  }
  __device__ __forceinline__ uint8_t* out() const { return base + C::kRingBytes; }
  __device__ __forceinline__ uint8_t* scales(int stage, int group) const {
    return out() + C::kStrips * C::kOutStripBytes +
           (stage * C::kStageGroups + group) * C::kGroupBytes;
  }
};

// Where the codes of a tile's strips begin, and how many of these there are.
template <class C>
struct W4A8Strips {
  const uint8_t* codes;
  int64_t stride_bytes;
  int count;

  __device__ __forceinline__ W4A8Strips(const W4A8GemmParams& params,
                                        const TileSchedule::Work& work)
      : stride_bytes(params.stride_qweight_strip * 4) {
    const int first = work.row_tile * C::kStrips;
    codes = reinterpret_cast<const uint8_t*>(params.qweight) + first * stride_bytes +
            int64_t{work.first_k_tile} * C::kStripBytes;
    count = min(C::kStrips, static_cast<int>(int4_num_strips(params.n)) - first);
  }
};

// The producing warp's first codes of a piece of work into L2, a line for each lane.
template <class C>
__device__ __forceinline__ void prefetch_codes(const W4A8GemmArgs& args,
                                               const TileSchedule::Work& work) {
  const W4A8Strips<C> strips(args.params, work);
  const int bytes =
      min(min(args.prefetch_tiles, work.num_k_tiles) * C::kStripBytes,
          static_cast<int>(ceil_div<int64_t>(args.params.k, 64) - work.first_k_tile * C::kUnits) *
              C::kUnitBytes);
#pragma unroll 1
  for (int strip = 0; strip < strips.count; ++strip) {
    const uint8_t* codes = strips.codes + strip * strips.stride_bytes;
#pragma unroll 1
    for (int byte = threadIdx.x % 32 * 128; byte < bytes; byte += 32 * 128) {
      ptx::prefetch_l2(codes + byte);
    }
  }
}

// The producing lane's share of a piece of work.
template <class C>
__device__ __forceinline__ void produce(const W4A8GemmArgs& args, const W4A8Shared<C>& smem,
                                        const TileSchedule::Work& work, Ring<C::kStages>& ring) {
  const W4A8Strips<C> strips(args.params, work);
  // Codes that other CTAs will want, for other tokens, are not thrown out of L2.
  const uint64_t policy =
      args.schedule.col_tiles == 1 ? ptx::l2_evict_first() : ptx::l2_evict_normal();
  const uint8_t* codes = strips.codes;
  int units_left =
      static_cast<int>(ceil_div<int64_t>(args.params.k, 64)) - work.first_k_tile * C::kUnits;
#pragma unroll 1
  for (int tile = 0; tile < work.num_k_tiles; ++tile, ring.advance()) {
    ptx::mbarrier_wait(&smem.empty[ring.stage], ring.phase ^ 1);
    uint64_t* full = &smem.full[ring.stage];
    // Past K x is zero: what is left there of other codes will do.
    const int bytes = min(C::kUnits, units_left) * C::kUnitBytes;
    ptx::mbarrier_arrive_expect_bytes(full, C::kXBytes + strips.count * bytes);
#pragma unroll
    for (int strip = 0; strip < C::kStrips; ++strip) {
      if (strip < strips.count) {
        ptx::bulk_load(smem.codes(ring.stage, strip), codes + strip * strips.stride_bytes, bytes,
                       full, policy);
      }
    }
    ptx::tma_load_2d(smem.x(ring.stage), &args.x_map, full, (work.first_k_tile + tile) * C::kTileK,
                     work.col_tile * C::kCols);
    codes += C::kStripBytes;
    units_left -= C::kUnits;
  }
}

// A scales' warp's share of a piece of work, whose first `wait` stages are the others'. Turns go on
// from work to work: were a warp further ahead than the ring is long, it could not tell by parity
// that a stage is empty.
template <class C>
__device__ __forceinline__ void produce_scales(const W4A8GemmArgs& args, const W4A8Shared<C>& smem,
                                               const TileSchedule::Work& work,
                                               Ring<C::kStages>& ring, int& wait) {
  static_assert(C::kScaleWarps <= C::kStages);
  W4A8Groups<C> groups(args.params, work, wait);
  groups.load(0);
#pragma unroll 1
  for (int stages_left = work.num_k_tiles; stages_left > 0; --stages_left, ring.advance()) {
    if (--wait >= 0) continue;
    wait = C::kScaleWarps - 1;
    ptx::mbarrier_wait(&smem.empty[ring.stage], ring.phase ^ 1);
#pragma unroll 1
    for (int group = 0; group < C::kStageGroups; ++group) {
      groups.store(smem.scales(ring.stage, group));
      const bool is_last = group == C::kStageGroups - 1;
      // Each lane for itself: no slower than one for all, and racecheck sees what it orders.
      if (is_last) ptx::mbarrier_arrive(&smem.full[ring.stage]);
      __syncwarp();  // else ptxas spills, of 256 tokens
      // After the arrival: ptxas may move what is loaded, and so wait for it.
      groups.load(is_last ? (C::kScaleWarps - 1) * C::kStageGroups + 1 : 1);
    }
  }
}

// sums = W x^T of this warpgroup's strip.
template <class C>
__device__ __forceinline__ void mainloop(const W4A8GemmArgs& args, const W4A8Shared<C>& smem,
                                         const TileSchedule::Work& work, Ring<C::kStages>& ring,
                                         Accumulators<C>& sums) {
  const int warp = ptx::uniform_warp_idx(), lane = threadIdx.x % 32;
  const W4A8Exchange exchange(lane);
  const int first_chunk = warp % 4 * 32 + exchange.first_lane;
  const int pair = warp * 8 + lane / 4;  // of rows, of the tile's
  constexpr int kPartSums = C::kPartCols / 2;
  constexpr int kReleasingUnit = C::kParts > 1 ? 0 : 1;
  int32_t partial[C::kSets][kPartSums] = {};  // of a group, or of all
  float scale[2] = {};  // of what is being added up: nothing, before the first group
  typename C::Decode::Rows rows{};
  if constexpr (C::kHasZeros && !C::kGrouped) rows = load_channel_zeros<C>(args.params, work);
  uint32_t a[C::kUnits][C::kUnitSteps][4];

  const auto multiply = [&](int part, int unit, uint64_t x, bool accumulate) {
#pragma unroll
    for (int step = 0; step < C::kUnitSteps; ++step) {
      const int byte = part * C::kPartCols * C::kTileK + 32 * (unit * C::kUnitSteps + step);
      ptx::Wgmma<int8_t, C::kPartCols>::mma(partial[part % C::kSets], a[unit][step],
                                            ptx::advance_descriptor(x, byte),
                                            accumulate || step > 0);
    }
  };
  // Of a group whose products are done.
  const auto add_group = [&](int part) {
    int32_t (&products)[kPartSums] = partial[part % C::kSets];
    ptx::pin_accumulators(products);
#pragma unroll
    for (int i = 0; i < kPartSums; ++i) {
      sums[0][part * kPartSums + i] += scale[i / 2 % 2] * __int2float_rn(products[i]);
    }
  };

  int read_stage = -1;  // wgmma may still read x from it
  int tiles_left = work.num_k_tiles;
  do {  // a loop that could run zero times would make ptxas serialise wgmma
    ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
    const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x(ring.stage)));
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      const auto* chunks =
          reinterpret_cast<const uint4*>(smem.codes(ring.stage, warp / 4) + unit * C::kUnitBytes);
      const uint4 first = chunks[first_chunk], second = chunks[first_chunk + 1];
      const uint32_t words[4] = {exchange(first.x, second.x), exchange(first.y, second.y),
                                 exchange(first.z, second.z), exchange(first.w, second.w)};
      const int group_unit = unit % max(C::kGroupUnits, 1);
      const bool starts_group = C::kGrouped && group_unit == 0;
      const bool ends_group = C::kGrouped && group_unit == C::kGroupUnits - 1;
      const uint8_t* scales = smem.scales(ring.stage, unit / max(C::kGroupUnits, 1));
      uint16_t bytes[C::kUnitSteps] = {};  // of this thread's rows, where a group starts
      const auto starts_bytes = [&](int step) {
        return C::kHasBytes && (unit * C::kUnitSteps + step) % max(C::kGroupSteps, 1) == 0;
      };
#pragma unroll
      for (int step = 0; step < C::kUnitSteps; ++step) {
        if (!starts_bytes(step)) continue;
        const int group = (unit * C::kUnitSteps + step) / max(C::kGroupSteps, 1);
        bytes[step] = reinterpret_cast<const uint16_t*>(smem.scales(ring.stage, group) +
                                                        C::kScaleBytes)[pair];
      }
      if (C::kParts > 1 && starts_group) {
        ptx::wgmma_wait<0>();
      } else {
        ptx::wgmma_wait<1>();  // what was multiplied with these registers is done
      }
      if (unit == kReleasingUnit) {  // and all of the stage before
        __syncwarp();
        if (read_stage >= 0 && lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
        read_stage = ring.stage;
      }
#pragma unroll
      for (int step = 0; step < C::kUnitSteps; ++step) {
        if constexpr (C::kHasBytes) {
          if (starts_bytes(step)) rows = C::Decode::rows(bytes[step]);
        }
        uint32_t (&regs)[4] = a[unit][step];
        C::Decode::decode(words[2 * step], rows, regs[0], regs[1]);
        C::Decode::decode(words[2 * step + 1], rows, regs[2], regs[3]);
        ptx::pin_operand(regs);
      }
      const auto add_last_group = [&] {
        add_group(C::kParts - 1);
        const float2 next = reinterpret_cast<const float2*>(scales)[pair];
        scale[0] = next.x, scale[1] = next.y;
      };
      if (C::kParts == 1 && starts_group) {
        ptx::wgmma_wait<0>();
        add_last_group();
      }
      ptx::wgmma_fence();
      multiply(0, unit, x, !starts_group);
      ptx::wgmma_commit();
      if (C::kParts > 1 && ends_group) {
        add_last_group();
#pragma unroll
        for (int part = 1; part < C::kParts; ++part) {
          ptx::wgmma_fence();
#pragma unroll
          for (int i = unit - group_unit; i <= unit; ++i) {
            multiply(part, i, x, i > unit - group_unit);
          }
          ptx::wgmma_commit();
          ptx::wgmma_wait<1>();
          add_group(part - 1);
        }
      }
    }
    ring.advance();
  } while (--tiles_left > 0);
  ptx::wgmma_wait<0>();
  if constexpr (C::kGrouped) {
    add_group(C::kParts - 1);
  } else {
    ptx::pin_accumulators(partial[0]);
#pragma unroll
    for (int i = 0; i < kPartSums; ++i) sums[0][i] = partial[0][i];
  }
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
}

template <class C, class Terms>
__device__ __forceinline__ void store(const W4A8GemmArgs& args, const W4A8Shared<C>& smem,
                                      const typename C::Finish& finish, const Terms& terms,
                                      const TileSchedule::Work& work, uint32_t phase,
                                      const Accumulators<C>& sums) {
  if (!work.split) {
    dispatch_16bit(args.params.out_dtype, [&](auto out) {
      store_tile<C, decltype(out)>(finish, terms, args.out_map, smem.out(), work, sums);
    });
  } else if constexpr (C::kSplits) {
    const int slices = args.schedule.slices;
    const SliceSums<C> slice_sums(smem.base, smem.received, slices,
                                  static_cast<int>(blockIdx.x) % slices, 0);
    dispatch_float(args.params.out_dtype, [&](auto out) {
      store_split_tile<C, decltype(out)>(finish, terms, slice_sums, phase, work, sums);
    });
    __syncthreads();  // the ring may be filled again
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm)
    w4a8_gemm_kernel(const __grid_constant__ W4A8GemmArgs args) {
  extern __shared__ uint8_t dynamic_smem[];
  using Terms = TileTerms<C, typename C::Finish>;
  __shared__ uint64_t full[C::kStages], empty[C::kStages], received;
  __shared__ Terms terms;
  const int warp = ptx::uniform_warp_idx();
  const W4A8Shared<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u), full, empty,
                           &received};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], C::kProducers);
      ptx::mbarrier_init(&empty[stage], kMathThreads / 32);
    }
    ptx::mbarrier_init(&received, 1);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  // Both sides walk through the same work and the same ring, which goes on from tile to tile: the
  // first stages of the next tile are loaded while this one is stored.
  Ring<C::kStages> ring;
  TileSchedule::Work work;
  if (warp >= kMathThreads / 32) {
    ptx::shrink_registers<C::kProducerRegisters>();
    const bool is_producer = warp == kMathThreads / 32;
    bool more = args.schedule.get(0, work);
    if (is_producer && more) prefetch_codes<C>(args, work);
    int wait = warp - kMathThreads / 32 - 1;  // of a scales' warp, in stages
    if constexpr (C::kStageGroups > 0) {
      if (wait == 0 && more) W4A8Groups<C>(args.params, work, 0).prefetch();
    }
    ptx::grid_dependency_wait();
    for (int item = 1; more; ++item) {
      if (is_producer && ptx::elect_one()) produce<C>(args, smem, work, ring);
      if constexpr (C::kStageGroups > 0) {
        if (!is_producer) produce_scales<C>(args, smem, work, ring, wait);
      }
      __syncwarp();
      const bool split = work.split;
      more = args.schedule.get(item, work);
      // The next kernel has the memory for its first loads now.
      if (is_producer && !more) ptx::grid_launch_dependents();
      if (split) {  // the ring takes sums, until the math warps have added them
        ptx::cluster_sync_relaxed();
        __syncthreads();
      }
    }
  } else {
    ptx::grow_registers<C::kMathRegisters>();
    ptx::grid_dependency_wait();
    const typename C::Finish finish(args.params);
    bool storing = false;
    uint32_t phase = 0;  // of sums received
    for (int item = 0; args.schedule.get(item, work); ++item) {
      const typename Terms::Part part = Terms::load(finish, work);
      Accumulators<C> sums = {};
      mainloop<C>(args, smem, work, ring, sums);
      if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
      terms.keep(part);
      store<C>(args, smem, finish, terms, work, phase, sums);
      storing = !work.split;
      phase ^= work.split;
    }
    if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait();
  }
}

}  // namespace effllm
