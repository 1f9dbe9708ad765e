// int8 x by 4-bit weights on wgmma (sm_90a): weights as the register operand, a persistent kernel
// with a producer warp.
//
// Roofline: for few tokens N * K / 2 bytes of codes, of which a CTA's ring keeps some 64 KB on
// their way; for many 2 M N K operations of the tensor cores. A stage of 128 rows by 256 tokens
// takes 1024 clocks of them; shared memory gives wgmma 64 KB of x meanwhile, and takes 40 KB from
// TMA, at 128 bytes a clock. A warp makes int8 of its 16 x 128 codes in 36 instructions, 68 with
// zero points. A group's scale is applied to its sum, by two instructions for each of a thread's
// sums: with 128 rows by 128 tokens a warp takes some 250 instructions for a stage in all, two
// warps share a scheduler, and the products take 512 clocks. One warpgroup scales while the other
// multiplies.
//
//                 tokens ->
//   rows of W   [ warpgroup 0 ]     a tile of the output: 2 strips of 64 rows by kCols tokens
//               [ warpgroup 1 ]
//
//   stage of the ring, 128 columns of K:  [ x: kCols rows | codes: 4 KB a strip ]
//
//   warp 8            one lane fills the ring: x by TMA, contiguous codes by bulk copies
//
//   warpgroups 0, 1   codes -> registers -> int8 -> wgmma with x, in units of 64 columns: while one
//                     unit's products are made, the codes of the next are converted
//
// x lies in shared memory as it does in global memory: words of codes are brought into its order
// (w4a8_codes.cuh), by one instruction for 8 codes and a second load from shared memory. To permute
// x there would be as many bytes again as wgmma reads.
//
// A launch may start while the kernel ahead of it still runs, and asks L2 for its first codes. They
// are loaded afterwards all the same, so that it does not matter if the other one writes them.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/pipeline.cuh"
#include "cuda/vec.cuh"
#include "gemm/int8_finish.cuh"
#include "gemm/ss_gemm_sm90.h"
#include "gemm/tile_epilogue_sm90.cuh"
#include "gemm/tile_schedule.cuh"
#include "gemm/w4a8_codes.cuh"
#include "gemm/w4a8_gemm_sm90.h"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"
#include "ptx/load.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "ptx/wgmma.cuh"

namespace effllm {

// What becomes of a tile's sums. With one group they are exact: int8_gemm.h's operations follow.
template <bool kGrouped, int kShift>
struct W4A8Finish;

struct W4A8FinishBase {
  struct Token {
    float scale;
  };

  __device__ __forceinline__ explicit W4A8FinishBase(const W4A8GemmParams& params)
      : params(params), m(params.m), n(params.n), out(params.out) {}

  __device__ __forceinline__ Token token(int64_t token) const {
    return {load_int8_scale(params.x_scales, min(token, m - 1))};
  }
  __device__ __forceinline__ float bias(int64_t feature) const {
    if (params.bias == nullptr) return 0.0f;
    return device_load_float(params.bias, params.bias_dtype, feature * params.stride_bias);
  }

  const W4A8GemmParams& params;
  const int64_t m, n;
  void* const out;
};

template <int kShift>
struct W4A8Finish<false, kShift> : W4A8FinishBase {
  struct Feature {
    float scale, bias;
  };
  using W4A8FinishBase::W4A8FinishBase;

  __device__ __forceinline__ Feature feature(int64_t feature) const {
    const int64_t row = min(feature, n - 1);
    return {device_load_float(params.scales, params.scales_dtype, row * params.stride_scales_n),
            bias(row)};
  }
  __device__ __forceinline__ float apply(int32_t sum, Feature feature, Token token) const {
    const float exact = __int2float_rn(sum >> kShift);
    return __fadd_rn(__fmul_rn(exact, __fmul_rn(feature.scale, token.scale)), feature.bias);
  }
};

template <int kShift>
struct W4A8Finish<true, kShift> : W4A8FinishBase {
  using Feature = float;  // its bias
  using W4A8FinishBase::W4A8FinishBase;

  __device__ __forceinline__ float feature(int64_t feature) const {
    return bias(min(feature, n - 1));
  }
  __device__ __forceinline__ float apply(float sum, float bias, Token token) const {
    return __fadd_rn(__fmul_rn(sum, token.scale), bias);
  }
};

// `kGroupUnits`: units of 64 columns per scale; 0 for a single group.
template <int kGroupUnits_, bool kHasZeros, SsGemmShape kShape>
struct W4A8Gemm {
  static constexpr int kGroupUnits = kGroupUnits_;
  static constexpr bool kGrouped = kGroupUnits > 0;
  using Decode = W4A8Codes<kHasZeros>;
  using Finish = W4A8Finish<kGrouped, Decode::kShift>;
  using Sum = std::conditional_t<kGrouped, float, int32_t>;
  static constexpr int kCols = kShape.cols;
  static constexpr int kStages = kShape.stages;
  static constexpr int kCtasPerSm = kShape.ctas_per_sm;
  static constexpr int kOutCols = kShape.out_cols;
  static constexpr int kRowBlocks = 1, kNeighbours = 1;
  static constexpr bool kTokenRows = false;
  static_assert(kShape.row_blocks == 1 && kShape.neighbours == 1 && !kShape.token_rows);
  static constexpr int kStrips = kMathGroups;
  static constexpr int kRows = kShape.rows();
  static constexpr int kTileK = 128;
  static constexpr int kUnits = 2;      // of 64 columns, in a stage
  static constexpr int kUnitSteps = 2;  // wgmmas of 32 columns
  static constexpr int kUnitBytes = kInt4TileWords * 4;
  static constexpr int kXBytes = kCols * kTileK;
  static constexpr int kStripBytes = kUnits * kUnitBytes;
  static constexpr int kStageBytes = kXBytes + kStrips * kStripBytes;
  static constexpr int kRingBytes = kStages * kStageBytes;
  static constexpr int kOutStripBytes = kOutCols * 128;
  static constexpr int kSmemBytes = 1024 + kRingBytes + kStrips * kOutStripBytes;
  static constexpr int kThreads = kMathThreads + 128;
  // A CTA starts with 168 (80) registers per thread; what the producers give up, the others get.
  static constexpr int kProducerRegisters = kCtasPerSm == 1 ? 40 : 32;
  static constexpr int kMathRegisters = kCtasPerSm == 1 ? 232 : 104;
  static constexpr bool kSplits = kShape.splits();
  static_assert(!kSplits || SliceSums<W4A8Gemm>::kSmemBytes <= kRingBytes);
  static_assert(kCtasPerSm * (kSmemBytes + sizeof(TileTerms<W4A8Gemm, Finish>) + 2048) <=
                228 * 1024);
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

// Scales and zero points of this thread's two rows: what of the next group is needed is on its way
// from memory while one is multiplied. With one group there are zero points alone.
template <class C>
class W4A8Groups {
 public:
  __device__ __forceinline__ W4A8Groups(const W4A8GemmParams& params,
                                        const TileSchedule::Work& work)
      : params_(params) {
    int group = 0;
    if constexpr (C::kGrouped) group = work.first_k_tile * C::kUnits / C::kGroupUnits;
    groups_left_ = static_cast<int>(params.num_groups) - group;
    const int first_row = work.row_tile * C::kRows + static_cast<int>(threadIdx.x) / 32 * 16;
    const int last_row = static_cast<int>(params.n) - 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed on what is there and never stored: any scale in bounds will do.
      const int row = min(first_row + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * half, last_row);
      scales_[half] = position(row, group, params.stride_scales_n, params.stride_scales_g);
      zeros_[half] = position(row, group, params.stride_zeros_n, params.stride_zeros_g);
    }
    load_zeros();
    load_scales();
    if constexpr (!C::kGrouped) enter();
  }

  // Before the codes of the next group are converted.
  __device__ __forceinline__ void enter() {
#pragma unroll
    for (int half = 0; half < 2; ++half) zero[half] = C::Decode::zero_bytes(zero_codes_[half]);
    load_zeros();
  }

  // When the sum of the group before has been scaled, and the next one's products are on their way.
  __device__ __forceinline__ void leave() {
    // A sum of 16-fold codes, exactly: the scale may be a sixteenth of itself.
    constexpr float kFactor = 1.f / (1 << C::Decode::kShift);
#pragma unroll
    for (int half = 0; half < 2; ++half) scale[half] = bits_to_float(scale_bits_[half]) * kFactor;
    load_scales();
  }

  float scale[2] = {};  // nothing has been added up before the first group
  uint32_t zero[2];

 private:
  // In elements; takes_w4a8_gemm_sm90 knows that 32 bits are enough.
  static __device__ __forceinline__ uint32_t position(int row, int group, int64_t stride_n,
                                                      int64_t stride_g) {
    return static_cast<uint32_t>(row) * static_cast<uint32_t>(stride_n) +
           static_cast<uint32_t>(group) * static_cast<uint32_t>(stride_g);
  }

  // device_bits_to_float without branches.
  __device__ __forceinline__ float bits_to_float(uint32_t bits) const {
    const float half = __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
    const int shift = params_.scales_dtype == DType::kBFloat16 ? 16 : 0;
    return params_.scales_dtype == DType::kFloat16 ? half : __uint_as_float(bits << shift);
  }

  // Of the next group, if there is one: a stage may have columns past K, where x is zero.
  __device__ __forceinline__ void load_zeros() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      zero_codes_[half] = kInt4PaddingCode;
      if (C::Decode::kShift > 0 || groups_left_ <= 0) continue;
      zero_codes_[half] = params_.zeros[zeros_[half]];
      zeros_[half] += static_cast<uint32_t>(params_.stride_zeros_g);
    }
  }

  // Likewise, and counts it.
  __device__ __forceinline__ void load_scales() {
    const bool exists = --groups_left_ >= 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale_bits_[half] = 0;
      if (!C::kGrouped || !exists) continue;
      scale_bits_[half] = params_.scales_dtype == DType::kFloat32
                              ? static_cast<const uint32_t*>(params_.scales)[scales_[half]]
                              : static_cast<const uint16_t*>(params_.scales)[scales_[half]];
      scales_[half] += static_cast<uint32_t>(params_.stride_scales_g);
    }
  }

  const W4A8GemmParams& params_;
  uint32_t scales_[2], zeros_[2];
  int groups_left_;
  uint32_t scale_bits_[2];  // nothing waits for a load before it is used
  int zero_codes_[2];
};

// sums = W x^T of this warpgroup's strip.
template <class C>
__device__ __forceinline__ void mainloop(const W4A8GemmArgs& args, const W4A8Shared<C>& smem,
                                         const TileSchedule::Work& work, Ring<C::kStages>& ring,
                                         Accumulators<C>& sums) {
  const int strip = ptx::uniform_warp_idx() / 4, thread = threadIdx.x % 128;
  const int lane = threadIdx.x % 32;
  const W4A8Exchange exchange(lane);
  const int first_chunk = thread / 32 * 32 + exchange.first_lane;
  W4A8Groups<C> groups(args.params, work);
  int32_t partial[C::kCols / 2] = {};  // of a group, or of all
  const auto add_group = [&] {
    ptx::wgmma_wait<0>();
    ptx::pin_accumulators(partial);
#pragma unroll
    for (int i = 0; i < C::kCols / 2; ++i) {
      if constexpr (C::kGrouped) {
        sums[0][i] += groups.scale[i / 2 % 2] * __int2float_rn(partial[i]);
      } else {
        sums[0][i] = partial[i];
      }
    }
  };

  uint32_t a[C::kUnits][C::kUnitSteps][4];
  int read_stage = -1;  // wgmma may still read x from it
  int tiles_left = work.num_k_tiles;
  do {  // a loop that could run zero times would make ptxas serialise wgmma
    ptx::mbarrier_wait(&smem.full[ring.stage], ring.phase);
    const uint64_t x = ptx::wgmma_descriptor(ptx::smem_address(smem.x(ring.stage)));
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      const auto* chunks =
          reinterpret_cast<const uint4*>(smem.codes(ring.stage, strip) + unit * C::kUnitBytes);
      const uint4 first = chunks[first_chunk], second = chunks[first_chunk + 1];
      const uint32_t words[4] = {exchange(first.x, second.x), exchange(first.y, second.y),
                                 exchange(first.z, second.z), exchange(first.w, second.w)};
      const bool starts_group = C::kGrouped && unit % max(C::kGroupUnits, 1) == 0;
      if (starts_group) groups.enter();
#pragma unroll
      for (int step = 0; step < C::kUnitSteps; ++step) {
        uint32_t (&regs)[4] = a[unit][step];
        C::Decode::decode(words[2 * step], groups.zero, regs[0], regs[1]);
        C::Decode::decode(words[2 * step + 1], groups.zero, regs[2], regs[3]);
        ptx::pin_operand(regs);
      }
      if (starts_group) add_group();  // the one before; zeros at first
      ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < C::kUnitSteps; ++step) {
        ptx::Wgmma<int8_t, C::kCols>::mma(
            partial, a[unit][step], ptx::advance_descriptor(x, 32 * (unit * C::kUnitSteps + step)),
            !starts_group || step > 0);
      }
      ptx::wgmma_commit();
      if (starts_group) groups.leave();
      ptx::wgmma_wait<1>();  // the unit before is done: its registers and its x are free
      if (unit == 0) {
        __syncwarp();
        if (read_stage >= 0 && lane == 0) ptx::mbarrier_arrive(&smem.empty[read_stage]);
        read_stage = ring.stage;
      }
    }
    ring.advance();
  } while (--tiles_left > 0);
  add_group();  // the last unit is done, and with it the last stage
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
      ptx::mbarrier_init(&full[stage], 1);
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
    ptx::grid_dependency_wait();
    for (int item = 1; more; ++item) {
      if (is_producer && ptx::elect_one()) produce<C>(args, smem, work, ring);
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
