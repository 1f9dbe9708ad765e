// int4_gemm on wgmma (sm_90a) for many tokens: a persistent kernel with a producer warpgroup.
//
// Roofline: 2 M N K operations of the tensor cores. A row of W is converted once per 64 .. 256
// tokens, which is what keeps the conversion (about 60 instructions per 64 x 64 codes and warp,
// most of them two cycles each) below the time of the products.
//
//                     tokens ->
//   rows of W    [ warpgroup 0, row block 0 ]     a tile of the output: 2 * kRowBlocks strips of 64
//                [ warpgroup 0, row block 1 ]     rows by kTokens
//                [ warpgroup 1, row block 0 ]
//                [ warpgroup 1, row block 1 ]
//
//   stage of the ring, 64 columns of K:  [ x: kTokens x 128 bytes | codes: 2 KB a strip | scales ]
//
//   warpgroup 2  fills the ring: warp w copies strips w, w + 4, ..., one of them x by TMA; all
//                lanes read scales and zero points a group ahead and leave them ready for use
//   warpgroups 0, 1  codes -> registers -> weights in the type of x -> wgmma with x
//
// A whole tile goes out through shared memory by TMA while the next is computed. A tile whose K is
// shared by a cluster is summed through distributed shared memory, slice after slice.
#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/pipeline.cuh"
#include "cuda/tensor_map.h"
#include "cuda/vec.cuh"
#include "gemm/int4_gemm_sm90.h"
#include "gemm/tile_epilogue_sm90.cuh"
#include "gemm/tile_schedule.cuh"
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"
#include "quant/dequant.cuh"

namespace effllm {
namespace {

constexpr const char* kOp = "int4_gemm";
constexpr int kTileK = kInt4GemmTileK;
constexpr int kTileBytes = kInt4TileWords * 4;
constexpr int kThreads = kMathThreads + 128;
constexpr int kProducerWarps = 4;

template <class InT_, int kShape, bool kExactScales>
struct Config {
  using InT = InT_;
  using Sum = float;
  using Weights = ScaledInt4<InT, kExactScales>;
  static constexpr Int4GemmWideShape kDims = kInt4GemmWideShapes[kShape];
  static constexpr int kTokens = kDims.tokens;
  static constexpr int kRowBlocks = kDims.row_blocks;
  static constexpr int kStages = kDims.stages;
  static constexpr int kCtasPerSm = kDims.ctas_per_sm;
  static constexpr int kStrips = kDims.strips();
  static constexpr int kRows = kDims.rows();
  static constexpr int kXBytes = kTokens * kTileK * 2;
  static constexpr int kCodeBytes = kStrips * kTileBytes;
  static constexpr int kRingBytes = kStages * (kXBytes + kCodeBytes);
  static constexpr int kCols = kTokens;
  static constexpr int kOutCols = kCols;  // stored in one turn
  static constexpr int kOutStripBytes = kOutCols * kInt4StripRows * 2;
  static constexpr int kNeighbours = 1;
  static constexpr bool kTokenRows = false;
  static constexpr int kOutBytes = kStrips * kOutStripBytes;
  static constexpr int kGroupBytes = kRows * static_cast<int>(sizeof(uint2));
  static constexpr int kSmemBytes = 1024 + kRingBytes + kOutBytes + kStages * kGroupBytes;
  static_assert(SliceSums<Config>::kSmemBytes <= kRingBytes + kOutBytes);
  static_assert(kCtasPerSm * (kSmemBytes + 1024) <= 228 * 1024);
  // wgmmas that are issued together: with two sets of A registers, one is filled meanwhile.
  static constexpr int kUnitSteps = 2;
  static constexpr int kUnits = 4 / kUnitSteps;
  // A CTA starts with 168 (80) registers per thread; what the producers give up, the others get.
  static constexpr int kProducerRegisters = kCtasPerSm == 1 ? 40 : 24;
  static constexpr int kMathRegisters = kCtasPerSm == 1 ? 232 : 104;
};

struct Args {
  Int4GemmParams params;
  CUtensorMap x_map, out_map;
  TileSchedule schedule;
  int group_tiles;  // 64-column tiles per scale
};

template <class C>
struct SharedMemory {
  uint8_t* base;  // 1024-byte aligned, as the swizzle wants it

  __device__ __forceinline__ uint8_t* x_tile(int stage) const { return base + stage * C::kXBytes; }
  __device__ __forceinline__ uint8_t* codes(int stage) const {
    return base + C::kStages * C::kXBytes + stage * C::kCodeBytes;
  }
  __device__ __forceinline__ uint2* row_groups(int stage) const {
    return reinterpret_cast<uint2*>(base + C::kRingBytes + C::kOutBytes + stage * C::kGroupBytes);
  }
};

// full: a producer warp each, one of which also expects the stage's bytes; empty: a math warp each.
struct Barriers {
  uint64_t *full, *empty;
};

// Counts tiles of K up to the next group of scales.
struct GroupCounter {
  int group_tiles, left;

  __device__ __forceinline__ GroupCounter(const Args& args, int first_k_tile)
      : group_tiles(args.group_tiles), left(group_tiles - first_k_tile % group_tiles) {}
  __device__ __forceinline__ bool next_tile_starts_group() {
    if (--left > 0) return false;
    left = group_tiles;
    return true;
  }
};

// The scales and zero points of this producer thread's rows, group after group: loaded for one,
// used later.
template <class C>
struct RowGroupLoader {
  static constexpr int kOwn = ceil_div(C::kRows, 128);

  const Int4GemmParams& params;
  int64_t groups_left;
  const uint8_t *next_scale[kOwn], *next_zero[kOwn];
  uint32_t scales[kOwn];  // their bits: nothing waits for a load before it is used
  int zeros[kOwn];

  __device__ __forceinline__ RowGroupLoader(const Int4GemmParams& params, int64_t first_row,
                                            int64_t group)
      : params(params), groups_left(params.num_groups - group) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      // Rows past N are computed on what is there and never stored: any scale in bounds will do.
      const int64_t n = min(first_row + i * 128 + threadIdx.x % 128, params.n - 1);
      const int64_t scale = n * params.stride_scales_n + group * params.stride_scales_g;
      next_scale[i] = static_cast<const uint8_t*>(params.scales) + scale * scale_bytes();
      next_zero[i] = params.zeros + n * params.stride_zeros_n + group * params.stride_zeros_g;
      zeros[i] = kInt4PaddingCode;
    }
  }

  __device__ __forceinline__ int scale_bytes() const {
    return params.scales_dtype == DType::kFloat32 ? 4 : 2;
  }

  __device__ __forceinline__ void load_next() {
    if (--groups_left < 0) return;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      scales[i] = device_load_bits(next_scale[i], params.scales_dtype);
      next_scale[i] += params.stride_scales_g * scale_bytes();
      if (params.zeros != nullptr) {
        zeros[i] = *next_zero[i];
        next_zero[i] += params.stride_zeros_g;
      }
    }
  }

  __device__ __forceinline__ void store(uint2* row_groups) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      row_groups[i * 128 + threadIdx.x % 128] =
          C::Weights::encode(device_bits_to_float(scales[i], params.scales_dtype), zeros[i]);
    }
  }
};

// The producer warpgroup's share of a piece of work.
template <class C>
__device__ __forceinline__ void produce(const Args& args, const SharedMemory<C>& smem,
                                        const Barriers& barriers, const TileSchedule::Work& work,
                                        Ring<C::kStages>& ring) {
  const Int4GemmParams& params = args.params;
  const int warp = ptx::uniform_warp_idx() % kProducerWarps;
  const int first_strip = work.row_tile * C::kStrips;
  const int strips = min(C::kStrips, static_cast<int>(int4_num_strips(params.n)) - first_strip);
  // Codes that other CTAs will want, for other tokens, are not thrown out of L2.
  const uint64_t often = ptx::l2_evict_last();
  const uint64_t codes_policy =
      args.schedule.col_tiles == 1 ? ptx::l2_evict_first() : ptx::l2_evict_normal();
  const auto* codes = reinterpret_cast<const uint8_t*>(
      params.qweight + (first_strip + warp) * params.stride_qweight_strip +
      work.first_k_tile * kInt4TileWords);
  const int64_t codes_stride = kProducerWarps * params.stride_qweight_strip * 4;
  // With two strips a warp without codes fetches x; with four, each has codes and the first does.
  constexpr int kXWarp = C::kStrips < kProducerWarps ? kProducerWarps - 1 : 0;

  RowGroupLoader<C> loader(params, work.row_tile * int64_t{C::kRows},
                           work.first_k_tile / args.group_tiles);
  loader.load_next();
  bool starts_group = true;
  GroupCounter counter(args, work.first_k_tile);
  for (int tile = 0; tile < work.num_k_tiles; ++tile, ring.advance(), codes += kTileBytes) {
    ptx::mbarrier_wait(&barriers.empty[ring.stage], ring.phase ^ 1);
    if (starts_group) {
      loader.store(smem.row_groups(ring.stage));
      loader.load_next();
    }
    starts_group = counter.next_tile_starts_group();
    // The elected lane's arrival releases what all lanes of its warp have stored.
    __syncwarp();
    if (!ptx::elect_one()) continue;
    uint64_t* full = &barriers.full[ring.stage];
    if (warp == 0) {
      ptx::mbarrier_arrive_expect_bytes(full, C::kXBytes + strips * kTileBytes);
    } else {
      ptx::mbarrier_arrive(full);
    }
#pragma unroll
    for (int i = 0; i < C::kStrips; i += kProducerWarps) {
      if (warp + i < strips) {
        ptx::bulk_load(smem.codes(ring.stage) + (warp + i) * kTileBytes,
                       codes + i / kProducerWarps * codes_stride, kTileBytes, full, codes_policy);
      }
    }
    if (warp == kXWarp) {
      ptx::tma_load_2d(smem.x_tile(ring.stage), &args.x_map, full,
                       (work.first_k_tile + tile) * kTileK, work.col_tile * C::kTokens, often);
    }
  }
}

// sums = W x^T of this warpgroup's strips. While wgmma multiplies one unit, the warps convert the
// codes of the next into the other register set.
template <class C>
__device__ __forceinline__ void mainloop(const Args& args, const SharedMemory<C>& smem,
                                         const Barriers& barriers, const TileSchedule::Work& work,
                                         Ring<C::kStages>& ring, Accumulators<C>& sums) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
  const int first_block = group * C::kRowBlocks;
  const int lane_row = first_block * kInt4StripRows + thread / 32 * 16 + lane / 4;
  typename C::Weights weights[C::kRowBlocks][2];
  uint32_t a[2][C::kUnitSteps][4];
  int read_stage = -1;  // wgmma may still read x from it
  bool starts_group = true;
  GroupCounter counter(args, work.first_k_tile);
  int tile = 0;
  do {  // a loop that could run zero times would make ptxas serialise wgmma
    ptx::mbarrier_wait(&barriers.full[ring.stage], ring.phase);
    // Scales lie in the stage with which their group starts, and stay in registers from then on.
    if (starts_group) {
      const uint2* row_groups = smem.row_groups(ring.stage) + lane_row;
#pragma unroll
      for (int block = 0; block < C::kRowBlocks; ++block) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          weights[block][half].decode(row_groups[block * kInt4StripRows + half * 8]);
        }
      }
    }
    starts_group = counter.next_tile_starts_group();
    const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x_tile(ring.stage)));
#pragma unroll
    for (int block = 0; block < C::kRowBlocks; ++block) {
      const uint4 words = reinterpret_cast<const uint4*>(
          smem.codes(ring.stage) + (first_block + block) * kTileBytes)[thread];
      const uint32_t steps[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int unit = 0; unit < C::kUnits; ++unit) {
        uint32_t (&regs)[C::kUnitSteps][4] = a[unit % 2];
#pragma unroll
        for (int i = 0; i < C::kUnitSteps; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            regs[i][j] = weights[block][j % 2].weights(steps[unit * C::kUnitSteps + i], j);
          }
        }
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < C::kUnitSteps; ++i) {
          const int step = unit * C::kUnitSteps + i;
          ptx::Wgmma<typename C::InT, C::kTokens>::mma(sums[block], regs[i],
                                                       ptx::advance_descriptor(x, 32 * step), true);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();  // the unit before is done: its registers and its x are free
        if (block == 0 && unit == 0) {
          __syncwarp();
          if (read_stage >= 0 && lane == 0) ptx::mbarrier_arrive(&barriers.empty[read_stage]);
          read_stage = ring.stage;
        }
      }
    }
    ring.advance();
  } while (++tile < work.num_k_tiles);
  // The last unit, and with it the last stage.
  ptx::wgmma_wait<0>();
#pragma unroll
  for (int block = 0; block < C::kRowBlocks; ++block) ptx::pin_accumulators(sums[block]);
  __syncwarp();
  if (lane == 0) ptx::mbarrier_arrive(&barriers.empty[read_stage]);
}

template <class C>
__global__ void __launch_bounds__(kThreads, C::kCtasPerSm)
    int4_gemm_wide_sm90_kernel(const __grid_constant__ Args args) {
  extern __shared__ uint8_t dynamic_smem[];
  using Terms = TileTerms<C, AddBias<Int4GemmParams>>;
  __shared__ uint64_t full[C::kStages], empty[C::kStages], received;
  __shared__ Terms terms;
  const SharedMemory<C> smem{dynamic_smem + (-ptx::smem_address(dynamic_smem) & 1023u)};
  const Barriers barriers{full, empty};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kStages; ++stage) {
      ptx::mbarrier_init(&full[stage], kProducerWarps);
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
  if (threadIdx.x >= kMathThreads) {
    ptx::shrink_registers<C::kProducerRegisters>();
    for (int item = 0; args.schedule.get(item, work); ++item) {
      produce<C>(args, smem, barriers, work, ring);
      __syncwarp();
      if (work.split) {  // the ring takes sums, until the math warps have added them
        ptx::cluster_sync_relaxed();
        __syncthreads();
      }
    }
  } else {
    ptx::grow_registers<C::kMathRegisters>();
    const AddBias<Int4GemmParams> finish(args.params);
    const int slices = args.schedule.slices;
    const SliceSums<C> slice_sums(smem.base, &received, slices,
                                  static_cast<int>(blockIdx.x) % slices, 0);
    bool storing = false;
    uint32_t phase = 0;  // of sums received
    for (int item = 0; args.schedule.get(item, work); ++item) {
      const typename Terms::Part part = Terms::load(finish, work);
      Accumulators<C> sums = {};
      mainloop<C>(args, smem, barriers, work, ring, sums);
      if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait_read();
      terms.keep(part);
      if (work.split) {
        store_split_tile<C, typename C::InT>(finish, terms, slice_sums, phase, work, sums);
        __syncthreads();  // the ring may be filled again
      } else {
        store_tile<C, typename C::InT>(finish, terms, args.out_map, smem.base + C::kRingBytes, work,
                                       sums);
      }
      storing = !work.split;
      phase ^= work.split;
    }
    if (storing && threadIdx.x % 128 == 0) ptx::bulk_wait();
  }
}

template <class InT, int kShape, bool kExactScales>
void launch(const Int4GemmParams& params, const Int4GemmWidePlan& plan, cudaStream_t stream) {
  using C = Config<InT, kShape, kExactScales>;
  Args args{params, {}, {}, {}, 0};
  args.x_map =
      make_tensor_map(params.x, params.dtype, params.m, params.k, params.k, C::kTokens, kOp);
  args.out_map =
      make_tensor_map(params.out, params.dtype, params.m, params.n, params.n, C::kTokens, kOp);
  TileSchedule& schedule = args.schedule;
  schedule.row_tiles = static_cast<int>(ceil_div<int64_t>(params.n, C::kRows));
  schedule.col_tiles = static_cast<int>(ceil_div<int64_t>(params.m, C::kTokens));
  schedule.k_tiles = static_cast<int>(ceil_div<int64_t>(params.k, kTileK));
  schedule.slices = plan.k_slices;
  const int tiles = schedule.row_tiles * schedule.col_tiles;
  const int grid = plan.k_slices == 1 ? std::min(plan.ctas, tiles) : plan.ctas;
  schedule.whole_tiles = plan.k_slices == 1 ? tiles : tiles / grid * grid;
  args.group_tiles =
      params.num_groups == 1 ? schedule.k_tiles : static_cast<int>(params.group_size / kTileK);
  Launch{kOp,
         dim3(static_cast<unsigned>(grid)),
         dim3(kThreads),
         static_cast<size_t>(C::kSmemBytes),
         stream,
         plan.k_slices}(int4_gemm_wide_sm90_kernel<C>, args);
}

template <class InT, bool kExactScales, size_t... kShapes>
void launch(const Int4GemmParams& params, const Int4GemmWidePlan& plan, cudaStream_t stream,
            std::index_sequence<kShapes...>) {
  ((kShapes == plan.shape ? launch<InT, kShapes, kExactScales>(params, plan, stream) : void()),
   ...);
}

template <class InT>
void launch(const Int4GemmParams& params, const Int4GemmWidePlan& plan, cudaStream_t stream) {
  constexpr std::make_index_sequence<kInt4GemmWideShapes.size()> kShapes;
  if (params.scales_dtype == params.dtype) {
    launch<InT, true>(params, plan, stream, kShapes);
  } else {
    launch<InT, false>(params, plan, stream, kShapes);
  }
}

// [slices - 1]
template <class C>
std::array<int, kMaxClusterCtas> resident_clusters() {
  std::array<int, kMaxClusterCtas> clusters;
  for (int slices = 1; slices <= kMaxClusterCtas; ++slices) {
    clusters[static_cast<size_t>(slices - 1)] =
        max_resident_clusters(kOp, int4_gemm_wide_sm90_kernel<C>, kThreads, C::kSmemBytes, slices);
  }
  return clusters;
}

// Types and scales change neither registers nor shared memory.
template <size_t... kShapes>
Int4GemmResidency residency(std::index_sequence<kShapes...>) {
  return {resident_clusters<Config<bfloat16, kShapes, true>>()...};
}

}  // namespace

Int4GemmResidency int4_gemm_wide_residency() {
  return residency(std::make_index_sequence<kInt4GemmWideShapes.size()>());
}

void launch_int4_gemm_wide_sm90(const Int4GemmParams& params, const Int4GemmWidePlan& plan,
                                cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) {
    launch<float16>(params, plan, stream);
  } else {
    launch<bfloat16>(params, plan, stream);
  }
}

}  // namespace effllm
