// Matmuls over weights of a byte in plain rows with a 16-bit x for few tokens (sm_90), up to 8, or
// 16 with groups: weights go from global memory straight into registers, where they become the A
// fragments of mma.sync.
//
// Roofline: N * K bytes of weights, each read once: 13 bytes per clock and multiprocessor at 3
// TB/s. That leaves a scheduler 630 clocks for a step of 16 x 128 weights, which takes some 200
// instructions; what counts is to have 40 KB and more on their way to every multiprocessor, from
// the first clock to the last.
//
//                  K ->
//   turn 0         CTA 0 of the cluster         CTA 1
//   16 rows      [ warp 0 | warp 1 | warp 2 ] [ warp 0 | warp 1 | warp 2 ]   sums: to CTA 0
//   16 rows      [ warp 3 | warp 4 | warp 5 ] [ warp 3 | warp 4 | warp 5 ]   sums: to CTA 1
//   turn 1, for other rows
//     ...
//
// A cluster takes turns, of `row_warps` blocks of 16 rows each. A warp does the same part of K in
// all of them, in steps of 128 columns, kDepth of which are on their way to its registers. The
// columns of x that the CTA needs arrive by one bulk copy per token and stay in its shared memory.
// Cutting K between CTAs makes x fit there, and the time to fetch it short.
//
// A row's 16 bytes from column 16 c on are lane c's, and count as columns 2 c, 2 c + 1, 2 c + 8 and
// 2 c + 9 of four products: mma only asks that x has the same order, so that a lane reads 16
// neighbours of a token, too.
//
// After its part a warp puts its sums into shared memory of the CTA that they are for, which adds
// them up, in order of K, while its warps are at the next turn. No warp waits for another that is
// less than a turn behind, there is no workspace, and no result depends on the order in which CTAs
// run.
//
// A launch may start while the kernel ahead of it still runs. It uses the time to bring its first
// weights into L2, and no further: they could be what the other one writes.
#pragma once

#include <cstdint>

#include "common/math.h"
#include "cuda/vec.cuh"
#include "gemm/byte_weight_gemm_direct_sm90.h"
#include "gemm/fp8_scale.cuh"
#include "ptx/cluster.cuh"
#include "ptx/grid.cuh"
#include "ptx/load.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/mma.cuh"
#include "ptx/tma.cuh"
#include "ptx/warp_roles.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// `Dequant_` is that of dequant.cuh which decodes the weights; `kGrouped`: whether sums of 128
// columns are scaled one by one.
template <class T_, template <class> class Dequant_, int kTokenTiles_, bool kGrouped_>
struct ByteWeightDirect {
  using T = T_;
  using Dequant = Dequant_<T>;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr bool kGrouped = kGrouped_;
  static constexpr int kDepth = 2;
  static constexpr int kWarps = kByteWeightDirectWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockRows = 16;
  static constexpr int kStepK = kByteWeightDirectStepK;
  // Products wait for the one before in their chain; two chains are enough.
  static constexpr int kChains = kTokenTiles == 1 ? 2 : 1;

  struct Step {
    uint4 codes[2][2];  // rows g and g + 8; 64 columns each
    uint32_t scale[2];  // as they lie in memory
  };
};

struct ByteWeightDirectArgs {
  Fp8GemmParams params;
  ByteWeightDirectCut cut;
  int groups;                    // of cut.row_warps blocks of 16 rows
  int part_steps, longer_parts;  // the first `longer_parts` parts of K have a step more
  int x_row_bytes, inbox_bytes;
  int prefetch_steps;
};

// What barriers and sums have of shared memory; x follows.
struct ByteWeightDirectBarriers {
  uint64_t x_full;
  uint64_t full[2][kByteWeightDirectWarps];  // sums of a block are there
  uint64_t empty[2];                         // sums of all blocks of a turn have been read
};
static_assert(sizeof(ByteWeightDirectBarriers) <= kByteWeightDirectBarrierBytes);

// Steps of K [begin, end) of one of the parts.
struct ByteWeightDirectPart {
  int begin, end;

  __device__ __forceinline__ ByteWeightDirectPart(const ByteWeightDirectArgs& args, int part)
      : begin(part * args.part_steps + min(part, args.longer_parts)),
        end(begin + args.part_steps + (part < args.longer_parts ? 1 : 0)) {}
  __device__ __forceinline__ int steps() const { return end - begin; }
};

// Where a warp is: its cluster, its block of rows in a turn and its part of K.
struct ByteWeightDirectPlace {
  int cluster, num_clusters, rank, block, part;

  __device__ __forceinline__ ByteWeightDirectPlace(const ByteWeightDirectArgs& args, int warp) {
    const int k_warps = args.cut.k_warps();
    cluster = static_cast<int>(blockIdx.x) / args.cut.slices;
    num_clusters = static_cast<int>(gridDim.x) / args.cut.slices;
    rank = static_cast<int>(blockIdx.x) - cluster * args.cut.slices;
    block = warp / k_warps;
    part = rank * k_warps + warp - block * k_warps;
  }
  __device__ __forceinline__ int turns(const ByteWeightDirectArgs& args) const {
    return ceil_div(args.groups - cluster, num_clusters);
  }
  // The first row of a block of a turn.
  __device__ __forceinline__ int64_t row(const ByteWeightDirectArgs& args, int turn,
                                         int block) const {
    return (int64_t{cluster + turn * num_clusters} * args.cut.row_warps + block) * 16;
  }
};

// Loads a warp's steps ahead of their use, turn after turn.
template <class C>
struct ByteWeightDirectLoader {
  const ByteWeightDirectArgs& args;
  const ByteWeightDirectPlace place;
  const ByteWeightDirectPart part;
  const int turns;
  int turn = 0, steps_left;
  const uint8_t* codes[2];   // this lane's next bytes of its two rows
  const uint8_t* scales[2];  // of its next step

  __device__ __forceinline__ ByteWeightDirectLoader(const ByteWeightDirectArgs& args,
                                                    const ByteWeightDirectPlace& place)
      : args(args), place(place), part(args, place.part), turns(place.turns(args)) {}

  // Rows past N are computed on the last one's weights and never stored.
  __device__ __forceinline__ int64_t row(int turn, int row_of_block) const {
    return min(place.row(args, turn, place.block) + row_of_block, args.params.n - 1);
  }
  __device__ __forceinline__ const uint8_t* step_codes(int64_t row, int step) const {
    return args.params.weight + row * args.params.stride_weight_n + int64_t{step} * C::kStepK;
  }
  __device__ __forceinline__ int scale_bytes() const {
    return args.params.w_scales.dtype == DType::kFloat32 ? 4 : 2;
  }

  // The first steps' weights into L2, 128 bytes of a row by each lane at a time.
  __device__ __forceinline__ void prefetch() const {
    const int steps = part.steps();
    for (int line = threadIdx.x % 32; line < 16 * args.prefetch_steps; line += 32) {
      const int ahead = line / 16 / steps;
      if (ahead >= turns) return;
      ptx::prefetch_l2(step_codes(row(ahead, line % 16), part.begin + line / 16 - ahead * steps));
    }
  }

  __device__ __forceinline__ void enter_turn() {
    steps_left = part.steps();
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = row(turn, lane / 4 + 8 * half);
      codes[half] = step_codes(n, part.begin) + lane % 4 * 16;
      if constexpr (C::kGrouped) {
        const Fp8Scales& w_scales = args.params.w_scales;
        scales[half] = static_cast<const uint8_t*>(w_scales.data) +
                       w_scales.index(n, part.begin) * scale_bytes();
      }
    }
  }

  __device__ __forceinline__ void load(typename C::Step& step) {
    if (steps_left == 0) {
      if (turn + 1 >= turns) return;
      ++turn;
      enter_turn();
    }
    --steps_left;
    const int cols_left = static_cast<int>(args.params.k) - (part.end - steps_left - 1) * C::kStepK;
    if (cols_left >= C::kStepK) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          step.codes[half][i] = ptx::load_streaming_16(codes[half] + 64 * i);
        }
      }
    } else {
      // Past K, where x is zero, the row's last bytes: if they are NaN so is its result.
      const int last = cols_left - 16 - static_cast<int>(threadIdx.x) % 4 * 16;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          step.codes[half][i] = ptx::load_streaming_16(codes[half] + min(64 * i, last));
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      codes[half] += C::kStepK;
      if constexpr (C::kGrouped) {
        step.scale[half] = device_load_bits(scales[half], args.params.w_scales.dtype);
        scales[half] += args.params.w_scales.stride_group * scale_bytes();
      }
    }
  }
};

// The CTA's columns of x, zeros past K. Whole warp 0 calls it.
__device__ __forceinline__ void load_activations(const ByteWeightDirectArgs& args, int first_step,
                                                 int last_step, uint8_t* x_smem, uint64_t* full) {
  const int lane = threadIdx.x % 32;
  const int64_t begin = int64_t{first_step} * kByteWeightDirectStepK;
  const int64_t end = int64_t{last_step} * kByteWeightDirectStepK;
  const int bytes = static_cast<int>(min(end, args.params.k) - begin) * 2;
  const int padding = static_cast<int>(end - begin) * 2 - bytes;
  const auto tokens = static_cast<int>(args.params.m);
  if (lane == 0) ptx::mbarrier_arrive_expect_bytes(full, tokens * bytes);
  __syncwarp();
  if (lane >= tokens) return;
  uint8_t* row = x_smem + lane * args.x_row_bytes;
  ptx::bulk_load(row, static_cast<const uint16_t*>(args.params.x) + lane * args.params.k + begin,
                 bytes, full, ptx::l2_evict_last());
  for (int byte = 0; byte < padding; byte += 16) {
    *reinterpret_cast<uint4*>(row + bytes + byte) = uint4{};
  }
}

// sums += scale * weights * x over one step. `x`: this lane's columns, of each tile's token.
template <class C>
__device__ __forceinline__ void multiply(const ByteWeightDirectArgs& args,
                                         const typename C::Step& step,
                                         const uint8_t* const (&x)[C::kTokenTiles], int x_offset,
                                         float (&sums)[C::kTokenTiles][4]) {
  float partial[C::kTokenTiles][C::kChains][4] = {};
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t words[2][4] = {
        {step.codes[0][i].x, step.codes[0][i].y, step.codes[0][i].z, step.codes[0][i].w},
        {step.codes[1][i].x, step.codes[1][i].y, step.codes[1][i].z, step.codes[1][i].w}};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint4 values[C::kTokenTiles];
#pragma unroll
      for (int tile = 0; tile < C::kTokenTiles; ++tile) {
        values[tile] = *reinterpret_cast<const uint4*>(x[tile] + x_offset + 128 * i + 16 * pair);
      }
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t word = words[half][2 * pair + odd];
          a[half] = C::Dequant::pair(word);
          a[half + 2] = C::Dequant::pair(word >> 16);
        }
#pragma unroll
        for (int tile = 0; tile < C::kTokenTiles; ++tile) {
          ptx::mma_m16n8k16<typename C::T>(partial[tile][odd % C::kChains], a,
                                           odd == 0 ? values[tile].x : values[tile].z,
                                           odd == 0 ? values[tile].y : values[tile].w);
        }
      }
    }
  }
  float scale[2] = {1.f, 1.f};
  if constexpr (C::kGrouped) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      scale[half] = device_bits_to_float(step.scale[half], args.params.w_scales.dtype);
    }
  }
#pragma unroll
  for (int tile = 0; tile < C::kTokenTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float sum = partial[tile][0][i];
      if constexpr (C::kChains == 2) sum += partial[tile][1][i];
      sums[tile][i] = C::kGrouped ? fmaf(scale[i / 2], sum, sums[tile][i]) : sums[tile][i] + sum;
    }
  }
}

// Brings the sums of a block's parts together: [turn % 2][own block][part][token tile][lane].
template <class C>
struct ByteWeightDirectExchange {
  const ByteWeightDirectArgs& args;
  const ByteWeightDirectPlace& place;
  ByteWeightDirectBarriers* barriers;
  uint8_t* inbox;
  int warp, turns;

  static constexpr int kPartBytes = C::kTokenTiles * 32 * 16;

  __device__ __forceinline__ uint8_t* part_sums(int turn, int own_block, int part) const {
    return inbox + turn % 2 * args.inbox_bytes +
           (own_block * args.cut.k_parts() + part) * kPartBytes + threadIdx.x % 32 * 16;
  }
  // Of the turn, this warp adds up the sums of one block, or none.
  __device__ __forceinline__ int finished_block() const {
    return warp * args.cut.slices + place.rank;
  }
  __device__ __forceinline__ bool finishes() const { return finished_block() < args.cut.row_warps; }
  __device__ __forceinline__ void expect(int turn) const {
    ptx::mbarrier_arrive_expect_bytes(&barriers->full[turn % 2][warp],
                                      args.cut.k_parts() * kPartBytes);
  }

  __device__ __forceinline__ void send(int turn, const float (&sums)[C::kTokenTiles][4]) const {
    if (turn == 0) ptx::cluster_wait();  // all barriers are there
    if (turn >= 2) ptx::mbarrier_wait(&barriers->empty[turn % 2], (turn / 2 - 1) & 1);
    const int own_block = place.block / args.cut.slices;
    const auto rank = static_cast<uint32_t>(place.block - own_block * args.cut.slices);
    uint8_t* to = part_sums(turn, own_block, place.part);
#pragma unroll
    for (int tile = 0; tile < C::kTokenTiles; ++tile) {
      const float4 value{sums[tile][0], sums[tile][1], sums[tile][2], sums[tile][3]};
      ptx::store_async_cluster(to + tile * 512, &barriers->full[turn % 2][own_block], rank, value);
    }
  }

  __device__ __forceinline__ void finish(int turn) const {
    if (turn < 0 || !finishes()) return;
    using OutT = device_t<typename C::T>;
    const Fp8GemmParams& params = args.params;
    const int lane = threadIdx.x % 32;
    const int64_t first = place.row(args, turn, finished_block()) + lane / 4;
    float scale[2], bias[2] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t n = min(first + 8 * half, params.n - 1);
      scale[half] = C::Dequant::kFactor;
      if constexpr (!C::kGrouped) scale[half] *= load_fp8_scale(params.w_scales, n, 0);
      if (params.bias != nullptr) {
        bias[half] = device_load_float(params.bias, params.bias_dtype, n * params.stride_bias);
      }
    }
    ptx::mbarrier_wait(&barriers->full[turn % 2][warp], (turn / 2) & 1);
    if (lane == 0 && turn + 2 < turns) expect(turn);
    float sums[C::kTokenTiles][4] = {};
    const int parts = args.cut.k_parts();
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
      const uint8_t* from = part_sums(turn, warp, part);
#pragma unroll
      for (int tile = 0; tile < C::kTokenTiles; ++tile) {
        const float4 value = *reinterpret_cast<const float4*>(from + tile * 512);
        sums[tile][0] += value.x, sums[tile][1] += value.y;
        sums[tile][2] += value.z, sums[tile][3] += value.w;
      }
    }
    __syncwarp();
    if (turn + 2 < turns && lane < args.cut.slices) {
      ptx::mbarrier_arrive_cluster(ptx::smem_address(&barriers->empty[turn % 2]), lane);
    }
#pragma unroll
    for (int tile = 0; tile < C::kTokenTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t token = 8 * tile + lane % 4 * 2 + i % 2, n = first + i / 2 * 8;
        if (token >= params.m || n >= params.n) continue;
        static_cast<OutT*>(params.out)[token * params.n + n] =
            device_from_float<OutT>(fmaf(sums[tile][i], scale[i / 2], bias[i / 2]));
      }
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    byte_weight_gemm_direct_kernel(const __grid_constant__ ByteWeightDirectArgs args) {
  extern __shared__ __align__(128) uint8_t smem[];
  auto* const barriers = reinterpret_cast<ByteWeightDirectBarriers*>(smem);
  uint8_t* const inbox = smem + kByteWeightDirectBarrierBytes;
  uint8_t* const x_smem = inbox + 2 * args.inbox_bytes;
  const int warp = ptx::uniform_warp_idx(), lane = threadIdx.x % 32;
  const ByteWeightDirectPlace place(args, warp);
  ByteWeightDirectLoader<C> loader(args, place);
  loader.prefetch();
  const int turns = loader.turns;
  const ByteWeightDirectExchange<C> exchange{args, place, barriers, inbox, warp, turns};
  if (lane == 0) {
    if (warp == 0) {
      ptx::mbarrier_init(&barriers->x_full, 1);
      for (uint64_t& barrier : barriers->empty) ptx::mbarrier_init(&barrier, args.cut.row_warps);
    }
    if (exchange.finishes()) {
      for (int turn = 0; turn < 2; ++turn) ptx::mbarrier_init(&barriers->full[turn][warp], 1);
      for (int turn = 0; turn < 2; ++turn) exchange.expect(turn);
    }
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed();
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  const int k_warps = args.cut.k_warps();
  const int first_step = ByteWeightDirectPart(args, place.rank * k_warps).begin;
  const int last_step = ByteWeightDirectPart(args, (place.rank + 1) * k_warps - 1).end;
  if (warp == 0) load_activations(args, first_step, last_step, x_smem, &barriers->x_full);
  typename C::Step steps[C::kDepth] = {};
  loader.enter_turn();
#pragma unroll
  for (auto& step : steps) loader.load(step);

  // Tokens past M are never stored: any row will do.
  const uint8_t* x[C::kTokenTiles];
#pragma unroll
  for (int tile = 0; tile < C::kTokenTiles; ++tile) {
    x[tile] = x_smem +
              min(8 * tile + lane / 4, static_cast<int>(args.params.m) - 1) * args.x_row_bytes +
              (loader.part.begin - first_step) * 2 * C::kStepK + lane % 4 * 32;
  }
  __syncthreads();
  ptx::mbarrier_wait(&barriers->x_full, 0);

  float sums[C::kTokenTiles][4] = {};
  int turn = 0, steps_left = loader.part.steps(), x_offset = 0;
  while (turn < turns) {
#pragma unroll
    for (int i = 0; i < C::kDepth; ++i) {
      multiply<C>(args, steps[i], x, x_offset, sums);
      loader.load(steps[i]);
      x_offset += 2 * C::kStepK;
      if (--steps_left > 0) continue;
      exchange.send(turn, sums);
      exchange.finish(turn - 1);
#pragma unroll
      for (auto& tile : sums) {
#pragma unroll
        for (float& sum : tile) sum = 0.f;
      }
      steps_left = loader.part.steps(), x_offset = 0;
      if (++turn == turns) break;
    }
  }
  exchange.finish(turns - 1);
}

}  // namespace effllm
