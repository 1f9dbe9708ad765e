// 16-bit x by weights of a byte each on wgmma (sm_90a): weights as the register operand, a
// persistent kernel with a producer warp.
//
// Roofline: for few tokens N * K bytes of weights, of which a CTA's ring keeps some 64 KB on their
// way; for many 2 M N K operations of the tensor cores, and shared memory's 128 bytes a clock. 128
// columns of a tile of 128 rows by 256 tokens take 2048 clocks of products; wgmma reads 128 KB of x
// meanwhile, TMA writes 64 KB of it and 16 KB of weights, and math warps read these twice: 240 KB
// of the 256 KB. A warp makes 16-bit floats of its 16 x 128 weights in 128 instructions, of which a
// scheduler has 256 to issue. By 128 tokens it is 144 KB of 128 KB: W is read again for fewer.
//
//                 tokens ->
//   rows of W   [ warpgroup 0 ]     a tile of the output: 64 rows for each by kCols tokens
//               [ warpgroup 1 ]
//
//   stage of the ring, kPanels * 64 columns of K:
//     [ x: a panel of kCols rows of 128 bytes ][ the next .. ][ W: 128 rows of 64 or 128 bytes ]
//     [ scales of its group ]
//
//   warp 8            one lane fills the ring by TMA
//   warp 9            the scales of groups, in float32 and in the order of the accumulators
//
//   warpgroups 0, 1   weights -> registers -> 16-bit floats -> wgmma with x: one half of a stage is
//                     converted while products of the other are made
//
// A register of wgmma's A has two neighbouring columns, the next one those 8 on, so that of each
// word that a lane loads it uses a half, and its neighbour the other:
//
//   columns of a step   0 1 2 3   4 5 6 7   8 9 10 11   12 13 14 15      a word each
//   lane c % 4          0 0 1 1   2 2 3 3   0 0  1  1    2  2  3  3
//
// x lies as it does in global memory, and to exchange halves between lanes costs as much as to load
// them twice.
//
// With groups of 128 columns, a stage each, a part of 64 tokens is multiplied at a time into one of
// two sets of sums, and added to those of all groups while the next is multiplied:
//
//   products    part 0   part 1   part 2       part 0 of the next group ..
//   scaling       -      part 0   part 1       part 2
//   converting  half 1                half 0   half 1
//
// The halves are those of the group's columns. 192 tokens leave shared memory no spare time: 192 KB
// for 1536 clocks of products. Registers have no room for the sums of more. Measured, 1024 tokens
// and more take 1.3 to 1.5 times as long with groups as without. Neither parts of 128 tokens in one
// set of sums nor warpgroups a quarter of a stage apart change that by more than 8 %. Scales
// multiplied into the weights, which are then rounded, were 3 to 10 % faster for 1024 tokens and 6
// to 11 % slower for 32.
//
// A launch may start while the kernel ahead of it still runs, and asks L2 for its first weights.
// They are loaded afterwards all the same, so that it does not matter if the other one writes them.
#pragma once

#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/math.h"
#include "cuda/pipeline.cuh"
#include "cuda/vec.cuh"
#include "gemm/byte_weight_gemm_sm90.h"
#include "gemm/fp8_scale.cuh"
#include "gemm/tile_epilogue_sm90.cuh"
#include "gemm/tile_schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// What becomes of sums that were not scaled yet.
template <class Dequant>
struct ByteWeightFinish {
  struct Feature {
    float scale, bias;
  };
  struct Token {};

  __device__ __forceinline__ explicit ByteWeightFinish(const Fp8GemmParams& params)
      : params(params), m(params.m), n(params.n), out(params.out) {}

  __device__ __forceinline__ Feature feature(int64_t feature) const {
    const int64_t row = min(feature, n - 1);
    const float bias = params.bias == nullptr ? 0.f
                                              : device_load_float(params.bias, params.bias_dtype,
                                                                  row * params.stride_bias);
    return {load_fp8_scale(params.w_scales, row, 0) * Dequant::kFactor, bias};
  }
  __device__ __forceinline__ Token token(int64_t) const { return {}; }
  __device__ __forceinline__ float apply(float sum, Feature feature, Token) const {
    return sum * feature.scale + feature.bias;
  }

  const Fp8GemmParams& params;
  const int64_t m, n;
  void* const out;
};

template <class InT_, template <class> class Dequant_, bool kGrouped_, ByteWeightShape kShape>
struct ByteWeightGemm {
  using InT = InT_;
  using Dequant = Dequant_<InT>;
  using Sum = float;
  static constexpr bool kGrouped = kGrouped_;
  using Finish = std::conditional_t<kGrouped, AddBias<Fp8GemmParams>, ByteWeightFinish<Dequant>>;
  static constexpr int kCols = kShape.tokens;
  static constexpr int kRowBlocks = 1;
  static constexpr int kPanels = kShape.panels;
  static constexpr int kStages = kShape.stages;
  static constexpr int kOutCols = kShape.out_tokens;
  static constexpr int kNeighbours = 1;
  static constexpr bool kTokenRows = false;
  static constexpr int kRows = kByteWeightRows;
  static constexpr int kTileK = 64 * kPanels;
  static_assert(!kGrouped || kTileK == kFp8GroupSize);
  static constexpr int kHalfSteps = kTileK / 32;  // of 16 columns, in half a stage
  static constexpr int kPanelBytes = kCols * 128;
  static constexpr int kXBytes = kPanels * kPanelBytes;
  static constexpr int kStageBytes = kXBytes + kRows * kTileK;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kOutStripBytes = kOutCols * 128;
  static constexpr int kScaleBytes = kGrouped ? kRows * 4 : 0;  // of a stage
  static constexpr int kSmemBytes =
      1024 + kRingBytes + kMathGroups * kOutStripBytes + kStages * kScaleBytes;
  static constexpr int kPartCols = kGrouped ? std::min(kCols, 64) : kCols;
  static constexpr int kParts = kCols / kPartCols;
  static constexpr int kSets = std::min(kParts, 2);  // of sums on their way
  static constexpr int kThreads = kMathThreads + 128;
  static constexpr int kProducers = kGrouped ? 2 : 1;  // of a stage
  // A CTA starts with 168 registers per thread; what the producers give up, the others get.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kMathRegisters = 232;
  static_assert(SliceSums<ByteWeightGemm>::kSmemBytes <= kRingBytes);
  static_assert(kSmemBytes + sizeof(TileTerms<ByteWeightGemm, Finish>) + 200 <= 227 * 1024);
};

struct ByteWeightArgs {
  Fp8GemmParams params;
  CUtensorMap x_map, weight_map, out_map;
  TileSchedule schedule;
  int prefetch_tiles;  // of K, whose weights are asked for before the kernel ahead has finished
};

template <class C>
struct ByteWeightShared {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it
  uint64_t *full, *empty, *received;

  __device__ __forceinline__ uint8_t* x(int stage) const { return base + stage * C::kStageBytes; }
  __device__ __forceinline__ uint8_t* weight(int stage) const { return x(stage) + C::kXBytes; }
  __device__ __forceinline__ uint8_t* out() const { return base + C::kRingBytes; }
  __device__ __forceinline__ float2* scales(int stage) const {
    return reinterpret_cast<float2*>(out() + kMathGroups * C::kOutStripBytes +
                                     stage * C::kScaleBytes);
  }
};

template <class C>
__device__ __forceinline__ void prefetch_weights(const ByteWeightArgs& args,
                                                 const TileSchedule::Work& work) {
  const int tiles = min(args.prefetch_tiles, work.num_k_tiles);
#pragma unroll 1
  for (int tile = 0; tile < tiles; ++tile) {
    ptx::tma_prefetch_2d(&args.weight_map, (work.first_k_tile + tile) * C::kTileK,
                         work.row_tile * C::kRows);
  }
}

// The producing lane's share of a piece of work.
template <class C>
__device__ __forceinline__ void produce(const ByteWeightArgs& args, const ByteWeightShared<C>& smem,
                                        const TileSchedule::Work& work, Ring<C::kStages>& ring) {
  // Weights that no other CTA wants leave L2 to those that will come.
  const bool once = args.schedule.col_tiles == 1;
  const uint64_t evict_first = ptx::l2_evict_first();
  const int row = work.row_tile * C::kRows;
#pragma unroll 1
  for (int tile = 0; tile < work.num_k_tiles; ++tile, ring.advance()) {
    ptx::mbarrier_wait(&smem.empty[ring.stage], ring.phase ^ 1);
    uint64_t* full = &smem.full[ring.stage];
    ptx::mbarrier_arrive_expect_bytes(full, C::kStageBytes);
    const int k = (work.first_k_tile + tile) * C::kTileK;
    if (once) {
      ptx::tma_load_2d(smem.weight(ring.stage), &args.weight_map, full, k, row, evict_first);
    } else {
      ptx::tma_load_2d(smem.weight(ring.stage), &args.weight_map, full, k, row);
    }
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      ptx::tma_load_2d(smem.x(ring.stage) + panel * C::kPanelBytes, &args.x_map, full,
                       k + 64 * panel, work.col_tile * C::kCols);
    }
  }
}

// The scales' warp's share of a piece of work: its lanes have two pairs of rows r and r + 8 each.
template <class C>
__device__ __forceinline__ void produce_scales(const ByteWeightArgs& args,
                                               const ByteWeightShared<C>& smem,
                                               const TileSchedule::Work& work,
                                               Ring<C::kStages>& ring) {
  const Fp8Scales& scales = args.params.w_scales;
  const int lane = threadIdx.x % 32;
  int64_t positions[2][2];
  uint32_t bits[2][2];  // of the next group: nothing waits for a load before it is used
  const auto load = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bits[i / 2][i % 2] = scales.dtype == DType::kFloat32
                               ? static_cast<const uint32_t*>(scales.data)[positions[i / 2][i % 2]]
                               : static_cast<const uint16_t*>(scales.data)[positions[i / 2][i % 2]];
      positions[i / 2][i % 2] += scales.stride_group;
    }
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    // Rows past N are computed on zeros and never stored: any scale will do.
    const int64_t row =
        work.row_tile * C::kRows + i / 2 * 64 + lane / 8 * 16 + lane % 8 + i % 2 * 8;
    positions[i / 2][i % 2] = scales.index(min(row, args.params.n - 1), work.first_k_tile);
  }
  load();
#pragma unroll 1
  for (int tile = 0; tile < work.num_k_tiles; ++tile, ring.advance()) {
    ptx::mbarrier_wait(&smem.empty[ring.stage], ring.phase ^ 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      smem.scales(ring.stage)[i * 32 + lane] = {
          device_bits_to_float(bits[i][0], scales.dtype) * C::Dequant::kFactor,
          device_bits_to_float(bits[i][1], scales.dtype) * C::Dequant::kFactor};
    }
    if (tile + 1 < work.num_k_tiles) load();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&smem.full[ring.stage]);
  }
}

// Weights as a math warp's lane reads them of a stage: in the order of wgmma's A, from words whose
// banks are all others, as TMA has swizzled them.
template <class C>
class WeightReader {
 public:
  __device__ __forceinline__ WeightReader() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int row = warp / 4 * kBlockRows + warp % 4 * 16 + lane / 4;
    const int chunk = C::kTileK == 128 ? row % 8 : row / 2 % 4;
    offset_ = row * C::kTileK + (chunk << 4) + lane % 4 / 2 * 4;
    pair_ = lane % 2 == 0 ? C::Dequant::kLowPair : C::Dequant::kHighPair;
  }

  __device__ __forceinline__ void operator()(const uint8_t* weight, int half,
                                             uint32_t (&a)[C::kHalfSteps][4]) const {
#pragma unroll
    for (int i = 0; i < C::kHalfSteps; ++i) {
      const int step = half * C::kHalfSteps + i;
      const uint8_t* rows = weight + (offset_ ^ (step << 4));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint8_t* word = rows + j % 2 * 8 * C::kTileK + j / 2 * 8;
        a[i][j] = C::Dequant::pair(*reinterpret_cast<const uint32_t*>(word), pair_);
      }
      ptx::pin_operand(a[i]);
    }
  }

 private:
  uint32_t offset_, pair_;
};

// x of a step of a stage.
template <class C>
__device__ __forceinline__ uint64_t x_step(uint64_t x, int step) {
  return ptx::advance_descriptor(x, step / 4 * C::kPanelBytes + step % 4 * 32);
}

// sums = W x^T of this warpgroup's rows.
template <class C>
__device__ __forceinline__ void mainloop(const ByteWeightShared<C>& smem,
                                         const TileSchedule::Work& work, Ring<C::kStages>& ring,
                                         Accumulators<C>& sums) {
  const WeightReader<C> read;
  const int lane = threadIdx.x % 32;
  uint32_t a[2][C::kHalfSteps][4];
  int read_stage = -1;  // wgmma may still read x from it
  int tiles_left = work.num_k_tiles;
  do {  // a loop that could run zero times would make ptxas serialise wgmma
    ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
    const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x(ring.stage)));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      read(smem.weight(ring.stage), half, a[half]);
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < C::kHalfSteps; ++i) {
        ptx::Wgmma<typename C::InT, C::kCols>::mma(sums[0], a[half][i],
                                                   x_step<C>(x, half * C::kHalfSteps + i), true);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the half before is done: its registers and its x are free
      if (half == 0) {
        __syncwarp();
        if (read_stage >= 0 && lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
        read_stage = ring.stage;
      }
    }
    ring.advance();
  } while (--tiles_left > 0);
  ptx::wgmma_wait<0>();
  ptx::pin_accumulators(sums[0]);
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
}

// The same with a group's scales in each stage.
template <class C>
__device__ __forceinline__ void grouped_mainloop(const ByteWeightShared<C>& smem,
                                                 const TileSchedule::Work& work,
                                                 Ring<C::kStages>& ring, Accumulators<C>& sums) {
  const WeightReader<C> read;
  const int lane = threadIdx.x % 32;
  const int pair = threadIdx.x / 32 * 8 + lane / 4;  // of rows, of the tile's
  constexpr int kPartSums = C::kPartCols / 2;
  constexpr bool kSharesSet = C::kParts % 2 == 1;  // the last part, with the next group's first
  float partial[C::kSets][kPartSums] = {};
  float scale[2] = {};  // of what is being added up: nothing, before the first group
  uint32_t a[2][C::kHalfSteps][4];

  const auto multiply = [&](int part, int half, uint64_t x) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < C::kHalfSteps; ++i) {
      const int step = half * C::kHalfSteps + i;
      ptx::Wgmma<typename C::InT, C::kPartCols>::mma(
          partial[part % C::kSets], a[half][i],
          ptx::advance_descriptor(x_step<C>(x, step), part * C::kPartCols * 128), step > 0);
    }
    ptx::wgmma_commit();
  };
  // Of a group whose products are done.
  const auto add_group = [&](int part) {
    float (&products)[kPartSums] = partial[part % C::kSets];
    ptx::pin_accumulators(products);
#pragma unroll
    for (int i = 0; i < kPartSums; ++i) {
      sums[0][part * kPartSums + i] += scale[i / 2 % 2] * products[i];
    }
  };
  int read_stage = -1;  // wgmma may still read x from it
  int tiles_left = work.num_k_tiles;
  ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
  read(smem.weight(ring.stage), 0, a[0]);
  do {
    const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x(ring.stage)));
    const float2 next_scale = smem.scales(ring.stage)[pair];
    const auto add_last_group = [&] {
      add_group(C::kParts - 1);
      scale[0] = next_scale.x, scale[1] = next_scale.y;
    };
    ptx::wgmma_wait<0>();  // all products of the group before
    __syncwarp();
    if (read_stage >= 0 && lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
    read_stage = ring.stage;
    if (kSharesSet) add_last_group();
    multiply(0, 0, x);
    if (!kSharesSet) add_last_group();
    __syncwarp();  // else ptxas puts loads between the products
    read(smem.weight(ring.stage), 1, a[1]);
    multiply(0, 1, x);
#pragma unroll
    for (int part = 1; part < C::kParts; ++part) {
      multiply(part, 0, x);
      multiply(part, 1, x);
      ptx::wgmma_wait<2>();
      add_group(part - 1);
    }
    ring.advance();
    ptx::wgmma_wait<1>();  // the registers of the first half are free
    if (tiles_left > 1) {
      ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
      read(smem.weight(ring.stage), 0, a[0]);
    }
  } while (--tiles_left > 0);
  ptx::wgmma_wait<0>();
  add_group(C::kParts - 1);
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    byte_weight_gemm_kernel(const __grid_constant__ ByteWeightArgs args) {
  extern __shared__ uint8_t dynamic_smem[];
  using Terms = TileTerms<C, typename C::Finish>;
  __shared__ uint64_t full[C::kStages], empty[C::kStages], received;
  __shared__ Terms terms;
  const int warp = ptx::uniform_warp_idx();
  const ByteWeightShared<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u), full,
                                 empty, &received};
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
    if (is_producer && more && ptx::elect_one()) prefetch_weights<C>(args, work);
    ptx::grid_dependency_wait();
    for (int item = 1; more; ++item) {
      if (is_producer && ptx::elect_one()) produce<C>(args, smem, work, ring);
      if constexpr (C::kGrouped) {
        if (warp == kMathThreads / 32 + 1) produce_scales<C>(args, smem, work, ring);
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
      if constexpr (C::kGrouped) {
        grouped_mainloop<C>(smem, work, ring, sums);
      } else {
        mainloop<C>(smem, work, ring, sums);
      }
      if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
      terms.keep(part);
      if (work.split) {
        const int slices = args.schedule.slices;
        const SliceSums<C> slice_sums(smem.base, smem.received, slices,
                                      static_cast<int>(blockIdx.x) % slices, 0);
        store_split_tile<C, typename C::InT>(finish, terms, slice_sums, phase, work, sums);
        __syncthreads();  // the ring may be filled again
      } else {
        store_tile<C, typename C::InT>(finish, terms, args.out_map, smem.out(), work, sums);
      }
      storing = !work.split;
      phase ^= work.split;
    }
    if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait();
  }
}

}  // namespace effllm
