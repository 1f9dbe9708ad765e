// int4_gemm on wgmma (sm_90a) for few tokens: weights as the register operand, many small CTAs.
//
// Roofline: N * K / 2 bytes of weights, each read once per 8 .. 32 tokens. An SM must keep some
// 32 KB of loads in flight to draw its share of 3 TB/s, hence the ring and several CTAs per SM.
//
//             K ->
//   64 rows   [ stage 0 | stage 1 | ... ][                 ][                 ]   a strip of W
//              CTA 0 of the cluster       CTA 1             CTA 2
//
//   warp 4      copies stages: 2 KB of codes per 64 columns, which are contiguous, and x by TMA
//
//   warps 0-3   one warpgroup: codes -> registers -> exact integers (q - z) -> wgmma with x
//
//   at the end  every CTA leaves its sums in shared memory; CTA r adds those of all CTAs, in order,
//               for its share of the tokens, adds the bias and stores
//
// A group's integer products are added by the tensor core; its scale is applied to that sum.
#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/pipeline.cuh"
#include "cuda/tensor_map.h"
#include "cuda/vec.cuh"
#include "gemm/int4_gemm_sm90.h"
#include "ptx/barrier.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"
#include "quant/dequant.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "int4_gemm";
constexpr int kTileK = 64;
constexpr int kTileBytes = kInt4TileWords * 4;
constexpr int kMathThreads = 128;
constexpr int kThreads = kMathThreads + 32;

// Tile shapes by tokens: as many bytes of codes in flight as the CTAs of an SM leave room for.
struct Shape {
  int tokens, stage_tiles, stages, ctas_per_sm;  // a stage is a multiple of two groups of 128

  constexpr int stage_bytes() const { return stage_tiles * (kTileBytes + tokens * kTileK * 2); }
};

constexpr std::array<Shape, 3> kShapes{{
    {8, 4, 3, 4},
    {16, 4, 3, 3},
    {32, 4, 3, 2},
}};
static_assert(kShapes.back().tokens == kInt4GemmNarrowTokens);

// `kGroupTiles`: 64-column tiles per scale; 0 for a single group. `kSymmetric`: known to have no
// zero points.
template <class InT_, int kShape, int kGroupTiles_, bool kSymmetric_>
struct Config {
  using InT = InT_;
  static constexpr bool kSymmetric = kSymmetric_;
  static constexpr int kGroupTiles = kGroupTiles_;
  static constexpr int kTokens = kShapes[kShape].tokens;
  static constexpr int kStageTiles = kShapes[kShape].stage_tiles;
  static constexpr int kStages = kShapes[kShape].stages;
  static constexpr int kCtasPerSm = kShapes[kShape].ctas_per_sm;
  static constexpr int kXTileBytes = kTokens * kTileK * 2;
  static constexpr int kStageBytes = kShapes[kShape].stage_bytes();
  // Rows of sums 68 floats apart: a warp's stores then fall into 32 different banks.
  static constexpr int kSumStride = kInt4StripRows + 4;
  static_assert(kTokens * kSumStride * 4 <= kStages * kStageBytes, "sums reuse the stages");
};

struct Args {
  Int4GemmParams params;
  CUtensorMap x_map;
  int k_slices;
  int tiles_per_slice;  // whole stages and whole groups
  int group_tiles;      // 64-column tiles per scale, counted from the slice's first
};

// Scale and zero point (as the pair that dequantisation subtracts) of one row and group.
struct RowGroup {
  float scale;
  uint32_t zero_pair;
};

// The tiles of K of a CTA. Its last stage may reach beyond K: x is zero there.
struct Slice {
  int begin, num_tiles, first_group, num_groups;

  __device__ __forceinline__ Slice(const Args& args, int slice_idx) {
    const int tiles = static_cast<int>(ceil_div<int64_t>(args.params.k, kTileK));
    begin = slice_idx * args.tiles_per_slice;
    num_tiles = max(0, min(args.tiles_per_slice, tiles - begin));
    first_group = min(begin / args.group_tiles, static_cast<int>(args.params.num_groups) - 1);
    num_groups = ceil_div(num_tiles, args.group_tiles);
  }
};

template <class C>
struct SharedMemory {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it

  __device__ __forceinline__ uint8_t* x_tile(int stage, int tile) const {
    return base + (stage * C::kStageTiles + tile) * C::kXTileBytes;
  }
  __device__ __forceinline__ uint8_t* codes(int stage) const {
    return base + C::kStages * C::kStageTiles * C::kXTileBytes +
           stage * C::kStageTiles * kTileBytes;
  }
  __device__ __forceinline__ RowGroup* row_groups() const {
    return reinterpret_cast<RowGroup*>(base + C::kStages * C::kStageBytes);
  }
  __device__ __forceinline__ float* sums() const { return reinterpret_cast<float*>(base); }
};

// One thread fills the ring.
template <class C>
__device__ __forceinline__ void produce(const Args& args, const SharedMemory<C>& smem,
                                        uint64_t* full, uint64_t* empty, const Slice& slice,
                                        int64_t strip, int first_token) {
  const uint64_t once = ptx::l2_evict_first(), often = ptx::l2_evict_last();
  const auto* codes = reinterpret_cast<const uint8_t*>(args.params.qweight +
                                                       strip * args.params.stride_qweight_strip);
  Ring<C::kStages> ring;
  for (int tile = 0; tile < slice.num_tiles; tile += C::kStageTiles, ring.advance()) {
    const int code_bytes = min(C::kStageTiles, slice.num_tiles - tile) * kTileBytes;
    const int first_tile = slice.begin + tile;
    ptx::mbarrier_wait(&empty[ring.stage], ring.phase ^ 1);
    ptx::mbarrier_arrive_expect_bytes(&full[ring.stage],
                                      code_bytes + C::kStageTiles * C::kXTileBytes);
    ptx::bulk_load(smem.codes(ring.stage), codes + int64_t{first_tile} * kTileBytes, code_bytes,
                   &full[ring.stage], once);
#pragma unroll
    for (int i = 0; i < C::kStageTiles; ++i) {
      ptx::tma_load_2d(smem.x_tile(ring.stage, i), &args.x_map, &full[ring.stage],
                       (first_tile + i) * kTileK, first_token, often);
    }
  }
}

// Calls `store(i, load(i))` for the math threads' share of 0 .. count - 1, eight loads at a time:
// one by one, each would wait for memory.
template <class Load, class Store>
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

// Scales and zero points of the slice, converted once. [group][row of the strip]
template <class C>
__device__ __forceinline__ void load_row_groups(const Args& args, const SharedMemory<C>& smem,
                                                const Slice& slice, int64_t first_row) {
  using Dequant = Int4Dequant<typename C::InT>;
  const Int4GemmParams& params = args.params;
  const int count = slice.num_groups * kInt4StripRows;
  RowGroup* row_groups = smem.row_groups();
  // Rows past N are computed on padding and never stored: any scale in bounds will do.
  const auto offset = [&](int index, int64_t stride_n, int64_t stride_g) {
    const int64_t n = min(first_row + index % kInt4StripRows, params.n - 1);
    return n * stride_n + (slice.first_group + index / kInt4StripRows) * stride_g;
  };
  const auto load_scales = [&](auto type) {
    const auto* scales = static_cast<const decltype(type)*>(params.scales);
    copy_batched(
        count,
        [&](int i) { return scales[offset(i, params.stride_scales_n, params.stride_scales_g)]; },
        [&](int i, auto value) { row_groups[i].scale = device_to_float(value); });
  };
  switch (params.scales_dtype) {
    case DType::kFloat16:
      load_scales(__half{});
      break;
    case DType::kBFloat16:
      load_scales(__nv_bfloat16{});
      break;
    default:
      load_scales(float{});
      break;
  }
  const auto store_zero = [&](int i, uint8_t zero) {
    const auto pair = Dequant::template zero_pair<C::kSymmetric>(zero);
    row_groups[i].zero_pair = reinterpret_cast<const uint32_t&>(pair);
  };
  if (C::kSymmetric || params.zeros == nullptr) {
    for (int i = threadIdx.x; i < count; i += kMathThreads) store_zero(i, kInt4PaddingCode);
  } else {
    copy_batched(
        count,
        [&](int i) {
          return params.zeros[offset(i, params.stride_zeros_n, params.stride_zeros_g)];
        },
        store_zero);
  }
}

// sums[64, tokens] of this CTA's slice. While wgmma multiplies one tile, the warps convert the
// codes of the next into the other register set. (Scaling a group meanwhile, from a second
// accumulator, would be better still, but ptxas serialises wgmma when any accumulator is read in
// between.)
template <class C>
__device__ __forceinline__ void mainloop(const Args& args, const SharedMemory<C>& smem,
                                         uint64_t* full, uint64_t* empty, const Slice& slice,
                                         float (&sums)[C::kTokens / 2]) {
  using InT = typename C::InT;
  using Dequant = Int4Dequant<InT>;
  using Pair = typename Dequant::Pair;
  const int lane_row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;

  if (slice.num_tiles == 0) return;  // also spares ptxas a path on which it would serialise wgmma
  float partial[C::kTokens / 2] = {};
  float scale[2] = {};
  Pair zero[2];
  uint32_t a[2][4][4];
  const auto load_group = [&](int group, float (&group_scale)[2]) {
    const RowGroup* row_groups = smem.row_groups() + group * kInt4StripRows + lane_row;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const RowGroup row_group = row_groups[8 * half];
      group_scale[half] = row_group.scale;
      zero[half] = reinterpret_cast<const Pair&>(row_group.zero_pair);
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
      const uint4 words =
          reinterpret_cast<const uint4*>(smem.codes(ring.stage) + i * kTileBytes)[threadIdx.x];
      const uint32_t steps[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          a[i % 2][step][j] = Dequant::template codes<C::kSymmetric>(steps[step], j, zero[j % 2]);
        }
      }
      if (starts_group) {
        add_group();  // the group before; zeros at first
        scale[0] = next_scale[0], scale[1] = next_scale[1];
      }
      const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x_tile(ring.stage, i)));
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        ptx::Wgmma<InT, C::kTokens>::mma(partial, a[i % 2][step],
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
__device__ __forceinline__ void store_sums(const SharedMemory<C>& smem,
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
__device__ __forceinline__ void store_output(const Args& args, const SharedMemory<C>& smem,
                                             int slice_idx, int64_t first_row, int first_token) {
  using OutT = device_t<typename C::InT>;
  const Int4GemmParams& params = args.params;
  const int tokens = static_cast<int>(min(params.m - first_token, int64_t{C::kTokens}));
  for (int i = threadIdx.x + slice_idx * kMathThreads; i < tokens * kInt4StripRows;
       i += args.k_slices * kMathThreads) {
    const int row = i % kInt4StripRows, token = i / kInt4StripRows;
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
__global__ void __launch_bounds__(kThreads, C::kCtasPerSm)
    int4_gemm_narrow_sm90_kernel(const __grid_constant__ Args args) {
  extern __shared__ uint8_t dynamic_smem[];
  __shared__ uint64_t full[C::kStages], empty[C::kStages];
  const SharedMemory<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u)};
  // Slices, then token tiles vary fastest: CTAs that run together share a strip of W in L2.
  const auto num_token_tiles = static_cast<int>(ceil_div<int64_t>(args.params.m, C::kTokens));
  const int slice_idx = static_cast<int>(blockIdx.x) % args.k_slices;
  const int block = static_cast<int>(blockIdx.x) / args.k_slices;
  const int first_token = block % num_token_tiles * C::kTokens;
  const int64_t strip = block / num_token_tiles, first_row = strip * kInt4StripRows;
  const Slice slice(args, slice_idx);

  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], 1);
      ptx::mbarrier_init(&empty[stage], kMathThreads / 32);
    }
    ptx::fence_mbarrier_init();
  }
  __syncthreads();

  float sums[C::kTokens / 2] = {};
  if (threadIdx.x >= kMathThreads) {
    if (ptx::elect_one()) produce<C>(args, smem, full, empty, slice, strip, first_token);
    __syncwarp();
  } else {
    load_row_groups<C>(args, smem, slice, first_row);
    ptx::named_barrier_sync<1, kMathThreads>();
    mainloop<C>(args, smem, full, empty, slice, sums);
    // All stages have been read by all warps before their memory takes the sums.
    ptx::named_barrier_sync<1, kMathThreads>();
    store_sums<C>(smem, sums);
  }
  const bool is_producer = threadIdx.x >= kMathThreads;
  if (args.k_slices == 1) {
    if (is_producer) return;
    ptx::named_barrier_sync<1, kMathThreads>();
  } else {
    ptx::cluster_sync();
  }
  if (!is_producer) store_output<C>(args, smem, slice_idx, first_row, first_token);
  // Nobody may leave, and free its shared memory, while others read it.
  if (args.k_slices > 1) ptx::cluster_sync_relaxed();
}

// How K is cut: whole stages and whole groups per slice. A stage has an even number of tiles, so
// that groups of one or two tiles are whole anyway; a single group has one scale in every slice.
struct Split {
  int tiles_per_slice, group_tiles;
  int64_t smem_bytes;

  Split(const Int4GemmParams& params, const Shape& shape, int k_slices) {
    const auto tiles = static_cast<int>(ceil_div<int64_t>(params.k, kTileK));
    tiles_per_slice = round_up(ceil_div(tiles, k_slices), shape.stage_tiles);
    group_tiles =
        params.num_groups == 1 ? tiles_per_slice : static_cast<int>(params.group_size / kTileK);
    smem_bytes =
        1024 + shape.stages * shape.stage_bytes() +
        tiles_per_slice / group_tiles * kInt4StripRows * static_cast<int64_t>(sizeof(RowGroup));
  }
};

template <class InT, int kShape, int kGroupTiles, bool kSymmetric>
void launch(const Int4GemmParams& params, int k_slices, cudaStream_t stream) {
  using C = Config<InT, kShape, kGroupTiles, kSymmetric>;
  const Split split(params, kShapes[kShape], k_slices);
  const Args args{params,
                  make_tensor_map(params.x, params.dtype, params.m, params.k, C::kTokens, kOp),
                  k_slices, split.tiles_per_slice, split.group_tiles};
  const int64_t blocks =
      int4_num_strips(params.n) * ceil_div<int64_t>(params.m, C::kTokens) * k_slices;
  Launch{kOp,
         dim3(static_cast<unsigned>(blocks)),
         dim3(kThreads),
         static_cast<size_t>(split.smem_bytes),
         stream,
         k_slices}(int4_gemm_narrow_sm90_kernel<C>, args);
}

template <class InT, int kShape, int kGroupTiles>
void launch(const Int4GemmParams& params, int k_slices, cudaStream_t stream) {
  if constexpr (std::is_same_v<InT, bfloat16>) {  // fp16 gains nothing
    if (params.zeros == nullptr) {
      return launch<InT, kShape, kGroupTiles, true>(params, k_slices, stream);
    }
  }
  launch<InT, kShape, kGroupTiles, false>(params, k_slices, stream);
}

template <class InT, int kShape>
void launch(const Int4GemmParams& params, int k_slices, cudaStream_t stream) {
  if (params.num_groups == 1) return launch<InT, kShape, 0>(params, k_slices, stream);
  if (params.group_size == 64) return launch<InT, kShape, 1>(params, k_slices, stream);
  launch<InT, kShape, 2>(params, k_slices, stream);
}

template <class InT, size_t... kIndices>
void launch(const Int4GemmParams& params, Int4GemmNarrowPlan plan, cudaStream_t stream,
            std::index_sequence<kIndices...>) {
  ((kShapes[kIndices].tokens == plan.tokens ? launch<InT, kIndices>(params, plan.k_slices, stream)
                                            : void()),
   ...);
}

}  // namespace

std::optional<Int4GemmNarrowPlan> plan_int4_gemm_narrow(const Int4GemmParams& params, int num_sms) {
  size_t index = 0;
  while (index + 1 < kShapes.size() && kShapes[index].tokens < params.m) ++index;
  const Shape& shape = kShapes[index];
  const int64_t tiles = ceil_div<int64_t>(params.k, kTileK);
  const int64_t blocks = int4_num_strips(params.n) * ceil_div<int64_t>(params.m, shape.tokens);

  // Nanoseconds, measured on an H100: the start of a CTA, what a slice adds to the reduction, a
  // tile alone on its multiprocessor, and a tile where CTAs share the memory (2 KB of codes) or L2
  // (x).
  const double tokens = shape.tokens;
  const double start = 1500, slice_cost = 150, lone_tile = 120 + 2 * tokens,
               shared_tile = std::max(90.0, 3 * tokens);
  constexpr int64_t kSmemPerSm = 227 * 1024;
  std::optional<Int4GemmNarrowPlan> best;
  double best_time = 1e30;
  for (int slices = 1; slices <= kMaxClusterCtas && slices <= tiles; slices *= 2) {
    const Split split(params, shape, slices);
    const int64_t ctas_per_sm =
        std::min<int64_t>(shape.ctas_per_sm, kSmemPerSm / (split.smem_bytes + 1024));
    if (ctas_per_sm == 0) continue;
    const int64_t slots = ctas_per_sm * num_sms, ctas = blocks * slices;
    const int64_t active = std::min(ctas_per_sm, ceil_div<int64_t>(ctas, num_sms));
    const double tile = std::max(lone_tile, static_cast<double>(active) * shared_tile);
    const double time = static_cast<double>(ceil_div(ctas, slots)) *
                        (start + slice_cost * slices + split.tiles_per_slice * tile);
    if (time < best_time) best_time = time, best = {shape.tokens, slices};
  }
  return best;
}

void launch_int4_gemm_narrow_sm90(const Int4GemmParams& params, Int4GemmNarrowPlan plan,
                                  cudaStream_t stream) {
  constexpr std::make_index_sequence<kShapes.size()> kIndices;
  if (params.dtype == DType::kFloat16) {
    launch<float16>(params, plan, stream, kIndices);
  } else {
    launch<bfloat16>(params, plan, stream, kIndices);
  }
}

}  // namespace effllm
