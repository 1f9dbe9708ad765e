// Matmuls over packed 4-bit codes on wgmma (sm_90a) for few tokens: weights as the register
// operand, many small CTAs.
//
// Roofline: N * K / 2 bytes of weights, each read once per 8 .. 32 tokens. An SM must keep some
// 32 KB of loads in flight to draw its share of 3 TB/s, hence the ring and several CTAs per SM. x
// comes out of L2 once per CTA, which for 16 tokens is as many bytes as the codes of one strip.
//
//                       K ->
//   one or two strips   [ stage 0 | stage 1 | ... ][                 ][                 ]
//   of 64 rows of W      CTA 0 of the cluster       CTA 1             CTA 2
//
//   last warp   copies stages: 2 KB of codes per 64 columns and strip, which are contiguous, and x
//               by TMA
//
//   the others  a warpgroup per strip: codes -> registers -> weights but for their scale -> wgmma
//               with x
//
//   at the end  every CTA leaves its sums in shared memory; CTA r adds those of all CTAs, in order,
//               for its share of the tokens, adds the bias and stores
//
// A group's products are added by the tensor core; its scale is applied to that sum.
//
// An op brings its `Weights`: what a lane knows of its two rows to make weights of their codes.
//   InT, Params, kOp       16-bit type of x and of the weights; the op's arguments and name
//   RowGroup               what it wants to know of a row and group, `scale` among it
//   load_rest<threads>(params, row_groups, count, offset)   into shared memory, all but the scales
//   enter(params, row)     before the first group of rows `row` and row + 8
//   set(half, row_group)   a group begins
//   fragment(word, a)      the A fragment of eight codes
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/pipeline.cuh"
#include "cuda/tensor_map.h"
#include "cuda/vec.cuh"
#include "gemm/packed_gemm_narrow_sm90.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"

namespace effllm {

// `kGroupTiles`: 64-column tiles per scale; 0 for a single group.
template <class Weights_, int kShape, int kGroupTiles_>
struct PackedGemmNarrow {
  using Weights = Weights_;
  using InT = typename Weights::InT;
  using Params = typename Weights::Params;
  using RowGroup = typename Weights::RowGroup;
  static constexpr int kGroupTiles = kGroupTiles_;
  static constexpr PackedGemmNarrowShape kDims = kPackedGemmNarrowShapes[kShape];
  static constexpr int kTokens = kDims.tokens;
  static constexpr int kStrips = kDims.strips;
  static constexpr int kRows = kDims.rows();
  static constexpr int kStageTiles = kDims.stage_tiles;
  static constexpr int kStages = kDims.stages;
  static constexpr int kCtasPerSm = kDims.ctas_per_sm;
  static constexpr int kMathThreads = 128 * kStrips;
  static constexpr int kThreads = kMathThreads + 32;
  static constexpr int kTileK = kPackedGemmNarrowTileK;
  static constexpr int kTileBytes = kInt4TileWords * 4;
  static constexpr int kXTileBytes = kTokens * kTileK * 2;
  static constexpr int kStageBytes = kDims.stage_bytes();
  // Tokens' sums 4 floats off a multiple of 32: a warp's stores then fall into 32 different banks.
  static constexpr int kSumStride = kRows + 4;
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageBytes, "sums reuse the stages");
  static_assert(sizeof(RowGroup) <= kPackedGemmRowGroupBytes);

  struct Args {
    Params params;
    CUtensorMap x_map;
    int k_slices;
    int tiles_per_slice;  // whole stages and whole groups
    int group_tiles;      // 64-column tiles per scale, counted from the slice's first
  };
};

// The tiles of K of a CTA. Its last stage may reach beyond K: x is zero there.
struct NarrowSlice {
  int begin, num_tiles, first_group, num_groups;

  template <class Args>
  __device__ __forceinline__ NarrowSlice(const Args& args, int slice_idx) {
    const int tiles = static_cast<int>(ceil_div<int64_t>(args.params.k, kPackedGemmNarrowTileK));
    begin = slice_idx * args.tiles_per_slice;
    num_tiles = max(0, min(args.tiles_per_slice, tiles - begin));
    first_group = min(begin / args.group_tiles, static_cast<int>(args.params.num_groups) - 1);
    num_groups = ceil_div(num_tiles, args.group_tiles);
  }
};

template <class C>
struct NarrowMemory {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it

  __device__ __forceinline__ uint8_t* x_tile(int stage, int tile) const {
    return base + (stage * C::kStageTiles + tile) * C::kXTileBytes;
  }
  __device__ __forceinline__ uint8_t* codes(int stage, int strip) const {
    return base + C::kStages * C::kStageTiles * C::kXTileBytes +
           (stage * C::kStrips + strip) * C::kStageTiles * C::kTileBytes;
  }
  __device__ __forceinline__ typename C::RowGroup* row_groups() const {
    return reinterpret_cast<typename C::RowGroup*>(base + C::kStages * C::kStageBytes);
  }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(base); }
};

// One thread fills the ring.
template <class C>
__device__ __forceinline__ void produce(const typename C::Args& args, const NarrowMemory<C>& smem,
                                        uint64_t* full, uint64_t* empty, const NarrowSlice& slice,
                                        int first_strip, int first_token) {
  const uint64_t once = ptx::l2_evict_first(), often = ptx::l2_evict_last();
  const uint8_t* codes[C::kStrips];
#pragma unroll
  for (int i = 0; i < C::kStrips; ++i) {
    // A strip past N is computed on another one's codes and never stored.
    const int strip = min(first_strip + i, static_cast<int>(int4_num_strips(args.params.n)) - 1);
    codes[i] = reinterpret_cast<const uint8_t*>(args.params.qweight +
                                                strip * args.params.stride_qweight_strip) +
               int64_t{slice.begin} * C::kTileBytes;
  }

  Ring<C::kStages> ring;
  for (int tile = 0; tile < slice.num_tiles; tile += C::kStageTiles, ring.advance()) {
    const int code_bytes = min(C::kStageTiles, slice.num_tiles - tile) * C::kTileBytes;
    ptx::mbarrier_wait(&empty[ring.stage], ring.phase ^ 1);
    ptx::mbarrier_arrive_expect_bytes(&full[ring.stage],
                                      C::kStrips * code_bytes + C::kStageTiles * C::kXTileBytes);
#pragma unroll
    for (int i = 0; i < C::kStrips; ++i) {
      ptx::bulk_load(smem.codes(ring.stage, i), codes[i] + int64_t{tile} * C::kTileBytes,
                     code_bytes, &full[ring.stage], once);
    }
#pragma unroll
    for (int i = 0; i < C::kStageTiles; ++i) {
      ptx::tma_load_2d(smem.x_tile(ring.stage, i), &args.x_map, &full[ring.stage],
                       (slice.begin + tile + i) * C::kTileK, first_token, often);
    }
  }
}

// Calls `store(i, load(i))` for the math threads' share of 0 .. count - 1, eight loads at a time:
// one by one, each would wait for memory.
template <int kMathThreads, class Load, class Store>
__device__ __forceinline__ void copy_batched(int count, const Load& load, const Store& store) {
  constexpr int kBatch = 8;
  for (int base = threadIdx.x; base < count; base += kBatch * kMathThreads) {
    decltype(load(0)) values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = base + i * kMathThreads;
      if (index < count) values[i] = load(index);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int index = base + i * kMathThreads;
      if (index < count) store(index, values[i]);
    }
  }
}

// What the weights of the slice depend on but codes, converted once. [group][row]
template <class C>
__device__ __forceinline__ void load_row_groups(const typename C::Args& args,
                                                const NarrowMemory<C>& smem,
                                                const NarrowSlice& slice, int64_t first_row) {
  const typename C::Params& params = args.params;
  const int count = slice.num_groups * C::kRows;
  typename C::RowGroup* row_groups = smem.row_groups();
  // Rows past N are computed on padding and never stored: any scale in bounds will do.
  const auto offset = [&](int index, int64_t stride_n, int64_t stride_g) {
    const int64_t n = min(first_row + index % C::kRows, params.n - 1);
    return n * stride_n + (slice.first_group + index / C::kRows) * stride_g;
  };
  const auto load_scales = [&](auto type) {
    const auto* scales = static_cast<const decltype(type)*>(params.scales);
    copy_batched<C::kMathThreads>(
        count,
        [&](int i) { return scales[offset(i, params.stride_scales_n, params.stride_scales_g)]; },
        [&](int i, auto value) { row_groups[i].scale = device_to_float(value); });
  };
  if (params.scales == nullptr) {
    for (int i = threadIdx.x; i < count; i += C::kMathThreads) row_groups[i].scale = 1.0f;
  } else if (params.scales_dtype == DType::kFloat16) {
    load_scales(__half{});
  } else if (params.scales_dtype == DType::kBFloat16) {
    load_scales(__nv_bfloat16{});
  } else {
    load_scales(float{});
  }
  C::Weights::template load_rest<C::kMathThreads>(params, row_groups, count, offset);
}

// sums[64, tokens] of this CTA's slice. While wgmma multiplies one tile, the warps convert the
// codes of the next into the other register set. (Scaling a group meanwhile, from a second
// accumulator, would be better still, but ptxas serialises wgmma when any accumulator is read in
// between.)
template <class C>
__device__ __forceinline__ void mainloop(const typename C::Args& args, const NarrowMemory<C>& smem,
                                         uint64_t* full, uint64_t* empty, const NarrowSlice& slice,
                                         int64_t first_row, float (&sums)[C::kTokens / 2]) {
  const int strip = threadIdx.x / 128;
  const int lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;

  if (slice.num_tiles == 0) return;  // also spares ptxas a path on which it would serialise wgmma
  float partial[C::kTokens / 2] = {};
  float scale[2] = {};
  typename C::Weights weights;
  weights.enter(args.params, first_row + lane_row);
  uint32_t a[2][4][4];
  const auto load_group = [&](int group, float (&group_scale)[2]) {
    const typename C::RowGroup* row_groups = smem.row_groups() + group * C::kRows + lane_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const typename C::RowGroup row_group = row_groups[8 * half];
      group_scale[half] = row_group.scale;
      weights.set(half, row_group);
    }
  };
  const auto add_group = [&] {
    ptx::wgmma_wait<0>();
    ptx::pin_accumulators(partial);
#pragma unroll
    for (int r = 0; r < C::kTokens / 2; ++r) sums[r] += scale[r / 2 % 2] * partial[r];
  };

  Ring<C::kStages> ring;
  int read_stage = -1;  // wgmma may still read x from it
  if (C::kGroupTiles == 0) load_group(0, scale);
  for (int first_tile = 0; first_tile < slice.num_tiles;
       first_tile += C::kStageTiles, ring.advance()) {
    ptx::mbarrier_wait(&full[ring.stage], ring.phase);
#pragma unroll
    for (int i = 0; i < C::kStageTiles; ++i) {
      constexpr int kGroupTiles = C::kGroupTiles == 0 ? C::kStageTiles : C::kGroupTiles;
      const bool starts_group = C::kGroupTiles > 0 && i % kGroupTiles == 0;
      float next_scale[2];
      if (starts_group) {
        // Beyond K, where x is zero, any scale will do.
        load_group(min((first_tile + i) / kGroupTiles, slice.num_groups - 1), next_scale);
      }
      const uint4 words = reinterpret_cast<const uint4*>(smem.codes(ring.stage, strip) +
                                                         i * C::kTileBytes)[threadIdx.x % 128];
      const uint32_t steps[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int step = 0; step < 4; ++step) weights.fragment(steps[step], a[i % 2][step]);
      if (starts_group) {
        add_group();  // the group before; zeros at first
        scale[0] = next_scale[0], scale[1] = next_scale[1];
      }
      const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x_tile(ring.stage, i)));
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::Wgmma<typename C::InT, C::kTokens>::mma(partial, a[i % 2][step],
                                                     ptx::advance_descriptor(x, 32 * step),
                                                     !starts_group || step > 0);
      }
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();  // the tile before is done: its registers and its x are free
      if (i == 0) {
        __syncwarp();
        if (read_stage >= 0 && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[read_stage]);
        read_stage = ring.stage;
      }
    }
  }
  add_group();
}

template <class C>
__device__ __forceinline__ void store_sums(const NarrowMemory<C>& smem,
                                           const float (&sums)[C::kTokens / 2]) {
  const int lane = threadIdx.x % 32;
  const int row = threadIdx.x / 32 * 16 + lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < C::kTokens / 2; ++i) {
    smem.sums()[(i / 4 * 8 + token + i % 2) * C::kSumStride + row + i / 2 % 2 * 8] = sums[i];
  }
}

// This CTA's share of the tokens: adds the slices in order, adds the bias, casts and stores.
template <class C>
__device__ __forceinline__ void store_output(const typename C::Args& args,
                                             const NarrowMemory<C>& smem, int slice_idx,
                                             int64_t first_row, int first_token) {
  using OutT = device_t<typename C::InT>;
  const typename C::Params& params = args.params;
  const int tokens = static_cast<int>(min(params.m - first_token, int64_t{C::kTokens}));
  for (int i = threadIdx.x + slice_idx * C::kMathThreads; i < tokens * C::kRows;
       i += args.k_slices * C::kMathThreads) {
    const int row = i % C::kRows, token = i / C::kRows;
    const int64_t n = first_row + row;
    if (n >= params.n) continue;
    const float* own = smem.sums() + token * C::kSumStride + row;
    float sum = 0.0f;
    if (args.k_slices == 1) {
      sum = *own;
    } else {
      float slices[kMaxClusterCtas];
#pragma unroll
      for (int rank = 0; rank < kMaxClusterCtas; ++rank) {
        slices[rank] = rank < args.k_slices ? ptx::load_cluster_smem(own, rank) : 0.0f;
      }
#pragma unroll
      for (int rank = 0; rank < kMaxClusterCtas; ++rank) sum += slices[rank];
    }
    if (params.bias != nullptr) {
      sum += device_load_float(params.bias, params.bias_dtype, n * params.stride_bias);
    }
    static_cast<OutT*>(params.out)[(first_token + token) * params.n + n] =
        device_from_float<OutT>(sum);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, C::kCtasPerSm)
    packed_gemm_narrow_kernel(const __grid_constant__ typename C::Args args) {
  extern __shared__ uint8_t dynamic_smem[];
  __shared__ uint64_t full[C::kStages], empty[C::kStages];
  const NarrowMemory<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u)};
  // Slices, then token tiles vary fastest: CTAs that run together share a strip of W in L2.
  const auto num_token_tiles = static_cast<int>(ceil_div<int64_t>(args.params.m, C::kTokens));
  const int slice_idx = static_cast<int>(blockIdx.x) % args.k_slices;
  const int block = static_cast<int>(blockIdx.x) / args.k_slices;
  const int first_token = block % num_token_tiles * C::kTokens;
  const int first_strip = block / num_token_tiles * C::kStrips;
  const int64_t first_row = first_strip * kInt4StripRows;
  const NarrowSlice slice(args, slice_idx);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], C::kMathThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  float sums[C::kTokens / 2] = {};
  if (threadIdx.x >= C::kMathThreads) {
    if (ptx::elect_one()) produce<C>(args, smem, full, empty, slice, first_strip, first_token);
    __syncwarp();
  } else {
    load_row_groups<C>(args, smem, slice, first_row);
    ptx::named_barrier_sync<1, C::kMathThreads>();
    mainloop<C>(args, smem, full, empty, slice, first_row, sums);
    // All stages have been read by all warps before their memory takes the sums.
    ptx::named_barrier_sync<1, C::kMathThreads>();
    store_sums<C>(smem, sums);
  }
  const bool is_producer = threadIdx.x >= C::kMathThreads;
  if (args.k_slices == 1) {
    if (is_producer) return;
    ptx::named_barrier_sync<1, C::kMathThreads>();
  } else {
    ptx::cluster_sync();
  }
  if (!is_producer) store_output<C>(args, smem, slice_idx, first_row, first_token);
  // Nobody may leave, and free its shared memory, while others read it.
  if (args.k_slices > 1) ptx::cluster_sync_relaxed();
}

template <class C>
void launch_packed_gemm_narrow(const typename C::Params& params, const PackedGemmNarrowPlan& plan,
                               cudaStream_t stream) {
  const PackedGemmNarrowSplit split(params, C::kDims, plan.k_slices);
  const typename C::Args args{params,
                              make_tensor_map(params.x, params.dtype, params.m, params.k, params.k,
                                              C::kTokens, C::Weights::kOp),
                              plan.k_slices, split.tiles_per_slice, split.group_tiles};
  const Launch launch{C::Weights::kOp,
                      dim3(static_cast<unsigned>(split.blocks * plan.k_slices)),
                      dim3(C::kThreads),
                      static_cast<size_t>(std::max(split.smem_bytes, plan.min_smem_bytes)),
                      stream,
                      plan.k_slices,
                      true};
  launch(packed_gemm_narrow_kernel<C>, args);
}

template <class Weights, int kShape>
void launch_packed_gemm_narrow(const typename Weights::Params& params,
                               const PackedGemmNarrowPlan& plan, cudaStream_t stream) {
  if (params.num_groups == 1) {
    launch_packed_gemm_narrow<PackedGemmNarrow<Weights, kShape, 0>>(params, plan, stream);
  } else if (params.group_size == 64) {
    launch_packed_gemm_narrow<PackedGemmNarrow<Weights, kShape, 1>>(params, plan, stream);
  } else {
    launch_packed_gemm_narrow<PackedGemmNarrow<Weights, kShape, 2>>(params, plan, stream);
  }
}

template <class Weights, size_t... kShapes>
void launch_packed_gemm_narrow(const typename Weights::Params& params,
                               const PackedGemmNarrowPlan& plan, cudaStream_t stream,
                               std::index_sequence<kShapes...>) {
  ((kShapes == plan.shape ? launch_packed_gemm_narrow<Weights, kShapes>(params, plan, stream)
                          : void()),
   ...);
}

template <class Weights>
void launch_packed_gemm_narrow_sm90(const typename Weights::Params& params,
                                    const PackedGemmNarrowPlan& plan, cudaStream_t stream) {
  constexpr std::make_index_sequence<kPackedGemmNarrowShapes.size()> kShapes;
  launch_packed_gemm_narrow<Weights>(params, plan, stream, kShapes);
}

// Of CTAs of which two fit on a multiprocessor.
template <class Weights>
PackedGemmNarrowResidency packed_gemm_narrow_residency() {
  using C = PackedGemmNarrow<Weights, 0, 1>;
  constexpr int kSmemBytes = 100 * 1024;
  PackedGemmNarrowResidency clusters;
  for (int slices = 1; slices <= kMaxClusterCtas; ++slices) {
    clusters[static_cast<size_t>(slices - 1)] = max_resident_clusters(
        C::Weights::kOp, packed_gemm_narrow_kernel<C>, C::kThreads, kSmemBytes, slices);
  }
  return clusters;
}

}  // namespace effllm
