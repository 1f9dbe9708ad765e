// Matmuls over packed 4-bit codes for up to 8 tokens (sm_90): codes go from global memory straight
// into registers, as the A fragments of mma.sync that they already are.
//
// Roofline: N * K / 2 bytes of codes, each read once: 13 bytes per clock and multiprocessor at 3
// TB/s. That leaves a scheduler 316 clocks for a step of 16 x 128 codes, which takes about 150
// instructions, half of them two clocks long. So every one counts: there is no ring, no barrier in
// the loop, and no address that is not one addition away.
//
//              K ->
//   16 rows     [ warp 0 | warp 1 | warp 2 | ... | warp 15 ]     a block of W: CTA 0
//   16 rows     [ warp 0 | warp 1 | warp 2 | ... | warp 15 ]     a block of W: CTA 1
//      ...
//   A CTA takes blocks blockIdx, blockIdx + gridDim, ... Of each, a warp does the same slice of K
//   in steps of 128 columns, kDepth of them on their way from memory; its columns of x, which
//   nobody else needs, stay in shared memory. Blocks are so small that every N in use occupies at
//   least 96 % of 132 multiprocessors without cutting K between CTAs.
//
//   At the end of a slice a warp leaves its sums [16 rows, tokens] in shared memory. After every
//   kBatch blocks the CTA meets, and each thread adds the warps' sums of one output, in order.
//   There is no workspace, and no result depends on the order in which CTAs run.
//
// A launch may start while the kernel ahead of it still runs. It uses the time to bring its first
// codes into L2, and no further: they could be what the other one writes.
//
// An op brings its `Weights`: what a lane knows of its two rows to make weights of their codes.
//   InT, Params     16-bit type of x and of the weights; the op's arguments
//   kGroups         scales of a row per step
//   Source          enter(params, row, group) goes to a group of rows `row` and row + 8;
//                   load_next(params) reads what belongs to it and goes on to the next, if there is
//   Raw             what was read, as it lies in memory: nothing waits before it is decoded
//   enter_block(params, row, is_first)   before the first step of rows `row` and row + 8
//   decode(params, raw), scale[2], fragment(word, a), kZeroPastK   as in packed_gemm_sm80.cuh
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "gemm/packed_gemm.h"
#include "ptx/barrier.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/grid.cuh"
#include "ptx/ldmatrix.cuh"
#include "ptx/load.cuh"
#include "ptx/mma.cuh"
#include "ptx/warp_roles.cuh"
#include "quant/dequant.cuh"

namespace effllm {

template <class Weights_, int kDepth_>
struct PackedGemmDirect {
  using Weights = Weights_;
  using InT = typename Weights::InT;
  using Params = typename Weights::Params;
  static constexpr int kDepth = kDepth_;
  static constexpr int kTokens = 8;
  static constexpr int kWarps = 16;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBlockRows = 16;
  static constexpr int kStepK = 128;
  static constexpr int kTileChunks = kInt4TileWords / 4;  // of 16 bytes, in a tile of 64 x 64 codes
  static constexpr int kPrefetchSteps = kDepth + 3;

  static constexpr int kBatch = 2;  // blocks whose sums are added together
  static constexpr int kBlockOutputs = kBlockRows * kTokens;
  static_assert(kBatch * kBlockOutputs <= kThreads);
  // Tokens' sums 20 floats apart: a warp's stores then fall into 32 different banks.
  static constexpr int kTokenStride = kBlockRows + 4;
  static constexpr int kSumFloats = kTokens * kTokenStride;  // of a warp and block
  static constexpr int kSumBytes = 2 * kBatch * kWarps * kSumFloats * 4;

  struct Args {
    Params params;
    int tokens, blocks;
    int slice_steps, longer_slices;  // the first `longer_slices` warps have a step more
    int whole_steps;                 // a step after these has one tile of 64 columns
    int x_row_bytes;  // of a warp's columns of one token, padded so that 8 rows take all banks
    int x_bytes;      // of all warps' columns
  };

  struct Step {
    uint4 codes[2];  // of two tiles of 64 columns
    typename Weights::Raw raw[Weights::kGroups];
  };
};

// The steps of K of this warp.
struct DirectSlice {
  int begin, end;

  template <class Args>
  __device__ __forceinline__ DirectSlice(const Args& args, int warp)
      : begin(warp * args.slice_steps + min(warp, args.longer_slices)),
        end(begin + args.slice_steps + (warp < args.longer_slices ? 1 : 0)) {}
  __device__ __forceinline__ int steps() const { return end - begin; }
};

// For a `Source`: a row, or if it is past N the last one, as such rows are computed on padding and
// never stored; and where a matrix [row, group] has an element, as a 32-bit number of elements, so
// that a step's addresses are one instruction each.
__device__ __forceinline__ int direct_row(const PackedGemmParams& params, int row) {
  return min(row, static_cast<int>(params.n) - 1);
}

__device__ __forceinline__ uint32_t direct_position(int row, int group, int64_t stride_n,
                                                    int64_t stride_g) {
  return static_cast<uint32_t>(row) * static_cast<uint32_t>(stride_n) +
         group * static_cast<uint32_t>(stride_g);
}

// Loads a warp's steps ahead of their use, block after block.
template <class C>
struct DirectLoader {
  const typename C::Args& args;
  const DirectSlice slice;
  int block, steps_left;
  uint32_t chunk;  // this lane's next 16 bytes of codes
  typename C::Weights::Source source;

  __device__ __forceinline__ DirectLoader(const typename C::Args& args, const DirectSlice& slice)
      : args(args),
        slice(slice),
        block(static_cast<int>(blockIdx.x)),
        steps_left(slice.steps()),
        chunk(first_chunk(block)) {}

  __device__ __forceinline__ uint32_t first_chunk(int block) const {
    return static_cast<uint32_t>(block / 4) *
               static_cast<uint32_t>(args.params.stride_qweight_strip / 4) +
           slice.begin * 2 * C::kTileChunks + block % 4 * 32 + threadIdx.x % 32;
  }
  __device__ __forceinline__ const uint4* codes(uint32_t chunk) const {
    return reinterpret_cast<const uint4*>(args.params.qweight) + chunk;
  }
  __device__ __forceinline__ void enter_block() {
    source.enter(args.params, block * C::kBlockRows + threadIdx.x % 32 / 4,
                 slice.begin * C::Weights::kGroups);
  }

  // The first steps' codes into L2: a line of 128 bytes per lane and turn, eight lines a step.
  __device__ __forceinline__ void prefetch() const {
    const int lane = threadIdx.x % 32;
    const int tiles = min(2 * slice.end, 2 * args.whole_steps + 1) - 2 * slice.begin;
    for (int line = lane; line < 8 * C::kPrefetchSteps; line += 32) {
      const int turn = line / 4 / tiles, tile = line / 4 - turn * tiles;
      const int block = static_cast<int>(blockIdx.x + turn * gridDim.x);
      if (block >= args.blocks) return;
      ptx::prefetch_l2(codes(first_chunk(block) - lane + tile * C::kTileChunks + line % 4 * 8));
    }
  }

  __device__ __forceinline__ void load(typename C::Step& step) {
    if (steps_left == 0) {
      const int next = block + static_cast<int>(gridDim.x);
      if (next >= args.blocks) return;
      block = next;
      steps_left = slice.steps();
      chunk = first_chunk(block);
      enter_block();
    }
    --steps_left;
    const uint4* tile = codes(chunk);
    step.codes[0] = ptx::load_streaming_16(tile);
    // Past K x is zero: any codes will do.
    if (steps_left > 0 || slice.end <= args.whole_steps) {
      step.codes[1] = ptx::load_streaming_16(tile + C::kTileChunks);
    }
    chunk += 2 * C::kTileChunks;
#pragma unroll
    for (auto& raw : step.raw) raw = source.load_next(args.params);
  }
};

// This warp's columns of x: [token][column] from `smem` on, zeros past K.
template <class C>
__device__ __forceinline__ void load_activations(const typename C::Args& args,
                                                 const DirectSlice& slice, uint8_t* smem) {
  const int begin = slice.begin * C::kStepK, cols = slice.steps() * C::kStepK;
  const int valid_cols = static_cast<int>(args.params.k) - begin;
  const uint16_t* x = static_cast<const uint16_t*>(args.params.x) + begin;
#pragma unroll 1
  for (int token = 0; token < args.tokens; ++token) {
#pragma unroll 1
    for (int col = 8 * (threadIdx.x % 32); col < cols; col += 8 * 32) {
      const bool valid = col < valid_cols;
      ptx::cp_async_16(smem + 2 * col, x + (valid ? col : 0), valid);
    }
    x += args.params.k;
    smem += args.x_row_bytes;
  }
  ptx::cp_async_commit();
}

// Where x is permuted any warp may want any column: all rows first come as they are.
template <class C>
__device__ __forceinline__ void stage_activations(const typename C::Args& args, uint8_t* staged) {
  const auto* x = static_cast<const uint8_t*>(args.params.x);
  const int bytes = args.tokens * static_cast<int>(args.params.k) * 2;
#pragma unroll 1
  for (int byte = 16 * threadIdx.x; byte < bytes; byte += 16 * C::kThreads) {
    ptx::cp_async_16(staged + byte, x + byte, true);
  }
  ptx::cp_async_commit();
}

// This warp's columns of staged rows, as load_activations leaves them.
template <class C>
__device__ __forceinline__ void gather_activations(const typename C::Args& args,
                                                   const DirectSlice& slice, const uint8_t* staged,
                                                   uint8_t* smem) {
  constexpr int kAhead = 4;  // entries of perm are a memory's latency away: so many at once
  const int begin = slice.begin * C::kStepK, cols = slice.steps() * C::kStepK;
  const auto k = static_cast<int>(args.params.k);
#pragma unroll 1
  for (int first = 2 * (threadIdx.x % 32); first < cols; first += kAhead * 64) {
    int from[kAhead][2];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int col = begin + min(first + 64 * i, cols - 2);
#pragma unroll
      for (int j = 0; j < 2; ++j) from[i][j] = args.params.perm[min(col + j, k - 1)];
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int col = first + 64 * i;
      if (col >= cols) break;
      const bool valid = begin + col < k;  // as is col + 1: K is even
      const auto* row = reinterpret_cast<const uint16_t*>(staged);
      const uint16_t* low = row + min(max(from[i][0], 0), k - 1);
      const uint16_t* high = row + min(max(from[i][1], 0), k - 1);
      uint8_t* to = smem + 2 * col;
#pragma unroll 1
      for (int token = 0; token < args.tokens; ++token) {
        *reinterpret_cast<uint32_t*>(to) = valid ? *low | static_cast<uint32_t>(*high) << 16 : 0;
        low += k, high += k, to += args.x_row_bytes;
      }
    }
  }
}

// sums += scale * weights * x over one step. `x`: this lane's row of ldmatrix; `columns_left`: up
// to the end of K.
template <class C>
__device__ __forceinline__ void multiply(const typename C::Params& params,
                                         const typename C::Step& step, typename C::Weights& weights,
                                         const uint8_t* x, int columns_left, float (&sums)[4]) {
  constexpr int kWords = C::kStepK / 16, kGroupWords = kWords / C::Weights::kGroups;
  const int first_column = 2 * static_cast<int>(threadIdx.x % 4);  // of this lane in a fragment
  const uint32_t words[kWords] = {step.codes[0].x, step.codes[0].y, step.codes[0].z,
                                  step.codes[0].w, step.codes[1].x, step.codes[1].y,
                                  step.codes[1].z, step.codes[1].w};
#pragma unroll
  for (int group = 0; group < C::Weights::kGroups; ++group) {
    weights.decode(params, step.raw[group]);
    float partial[2][4] = {};  // in one chain each product would wait for the one before
#pragma unroll
    for (int word = group * kGroupWords; word < (group + 1) * kGroupWords; word += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, x + 32 * word);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t a[4];
        weights.fragment(words[word + i], a);
        if (C::Weights::kZeroPastK && columns_left < C::kStepK) {
          zero_past_k(a, columns_left - 16 * (word + i) - first_column);
        }
        ptx::mma_m16n8k16<typename C::InT>(partial[i], a, b[2 * i], b[2 * i + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += weights.scale[i / 2] * (partial[0][i] + partial[1][i]);
  }
}

// Adds what the warps have left, a batch of blocks at a time.
template <class C>
struct DirectReducer {
  const typename C::Args& args;
  float* smem;        // [2][kBatch][kWarps][kSumFloats]
  int num_blocks;     // of this CTA
  int block_idx = 0;  // how many have been left

  // Of two batches.
  __device__ __forceinline__ float* slot(int block_idx) const {
    return smem + block_idx % (2 * C::kBatch) * C::kWarps * C::kSumFloats;
  }

  // This warp's sums of a block.
  __device__ __forceinline__ void leave(const float (&sums)[4], int warp) {
    const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
    float* own = slot(block_idx) + warp * C::kSumFloats + 2 * c * C::kTokenStride + g;
#pragma unroll
    for (int i = 0; i < 4; ++i) own[i % 2 * C::kTokenStride + i / 2 * 8] = sums[i];
    ++block_idx;
    if (block_idx % C::kBatch == 0 || block_idx == num_blocks) {
      add((block_idx - 1) / C::kBatch * C::kBatch);
    }
  }

  // The batch that begins with block `first`. One barrier is enough: whoever fills these slots
  // again has passed the next one, which no warp reaches before it has read them.
  __device__ __forceinline__ void add(int first) const {
    using OutT = device_t<typename C::InT>;
    const typename C::Params& params = args.params;
    ptx::named_barrier_sync<0, C::kThreads>();
    const int output = threadIdx.x % C::kBlockOutputs;
    const int idx = first + static_cast<int>(threadIdx.x) / C::kBlockOutputs;
    const int row = output % C::kBlockRows, token = output / C::kBlockRows;
    const int n =
        (static_cast<int>(blockIdx.x) + idx * static_cast<int>(gridDim.x)) * C::kBlockRows + row;
    if (threadIdx.x >= C::kBatch * C::kBlockOutputs || token >= args.tokens) return;
    if (idx >= num_blocks || n >= params.n) return;
    const float* warp_sum = slot(idx) + token * C::kTokenStride + row;
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < C::kWarps; ++warp) sum += warp_sum[warp * C::kSumFloats];
    if (params.bias != nullptr) {
      sum += device_load_float(params.bias, params.bias_dtype, n * params.stride_bias);
    }
    static_cast<OutT*>(params.out)[token * params.n + n] = device_from_float<OutT>(sum);
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    packed_gemm_direct_kernel(const __grid_constant__ typename C::Args args) {
  extern __shared__ __align__(16) uint8_t smem[];
  const int warp = ptx::uniform_warp_idx(), lane = threadIdx.x % 32;
  const DirectSlice slice(args, warp);
  DirectLoader<C> loader(args, slice);
  loader.prefetch();
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();

  uint8_t* const x_smem = smem + C::kSumBytes + warp * args.tokens * args.x_row_bytes;
  uint8_t* const staged = smem + C::kSumBytes + args.x_bytes;
  if (args.params.perm == nullptr) {
    load_activations<C>(args, slice, x_smem);
  } else {
    stage_activations<C>(args, staged);
  }
  typename C::Step steps[C::kDepth] = {};
  loader.enter_block();
#pragma unroll
  for (auto& step : steps) loader.load(step);
  ptx::cp_async_wait<0>();
  if (args.params.perm != nullptr) {
    ptx::named_barrier_sync<0, C::kThreads>();
    gather_activations<C>(args, slice, staged, x_smem);
  }
  __syncwarp();

  const int num_blocks =
      ceil_div(args.blocks - static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  DirectReducer<C> reducer{args, reinterpret_cast<float*>(smem), num_blocks};
  typename C::Weights weights;
  // Tokens past M are never stored: any row will do.
  const uint8_t* const x_row =
      x_smem + min(lane % 8, args.tokens - 1) * args.x_row_bytes + lane / 8 * 16;
  const uint8_t* x = x_row;
  float sums[4] = {};
  int steps_left = slice.steps(), blocks_left = num_blocks;
  while (blocks_left > 0) {
#pragma unroll
    for (int i = 0; i < C::kDepth; ++i) {
      if (steps_left == slice.steps()) {
        const int block = static_cast<int>(blockIdx.x + reducer.block_idx * gridDim.x);
        weights.enter_block(args.params, block * C::kBlockRows + lane / 4, reducer.block_idx == 0);
      }
      multiply<C>(args.params, steps[i], weights, x,
                  static_cast<int>(args.params.k) - (slice.end - steps_left) * C::kStepK, sums);
      loader.load(steps[i]);
      x += 2 * C::kStepK;
      if (--steps_left > 0) continue;
      reducer.leave(sums, warp);
#pragma unroll
      for (float& sum : sums) sum = 0.0f;
      steps_left = slice.steps();
      x = x_row;
      if (--blocks_left == 0) break;
    }
  }
}

// Whether the last of so many elements (or chunks of 16 bytes) lies at a 32-bit position.
inline bool has_near_elements(int64_t rows, int64_t stride_n, int64_t groups, int64_t stride_g) {
  return (rows - 1) * stride_n + (groups - 1) * stride_g <= std::numeric_limits<uint32_t>::max();
}

template <class C>
struct DirectPlan {
  typename C::Args args;
  int ctas, smem_bytes;
};

// How the work is cut; nothing if K is too short for that many warps, or x too large for one CTA.
template <class C>
std::optional<DirectPlan<C>> plan_packed_gemm_direct(const typename C::Params& params,
                                                     int num_sms) {
  // More than half of a multiprocessor's: of two launches at the same time, each has one CTA on
  // every multiprocessor or waits. Two CTAs of one launch on some would make the others idle.
  constexpr int64_t kMinSmemBytes = 116 * 1024, kMaxSmemBytes = 227 * 1024;
  const int64_t steps = ceil_div<int64_t>(params.k, C::kStepK);
  if (params.m > C::kTokens || steps < C::kWarps) return std::nullopt;
  if (!has_near_elements(int4_num_strips(params.n), params.stride_qweight_strip / 4,
                         ceil_div<int64_t>(params.k, 64), C::kTileChunks)) {
    return std::nullopt;
  }
  const int64_t x_row_bytes = ceil_div<int64_t>(steps, C::kWarps) * C::kStepK * 2 + 16;
  const int64_t x_bytes = C::kWarps * params.m * x_row_bytes;
  const int64_t staged_bytes = params.perm == nullptr ? 0 : params.m * params.k * 2;
  const int64_t smem_bytes = C::kSumBytes + x_bytes + staged_bytes;
  if (smem_bytes > kMaxSmemBytes) return std::nullopt;

  DirectPlan<C> plan{{params}, 0, 0};
  plan.args.tokens = static_cast<int>(params.m);
  plan.args.blocks = static_cast<int>(ceil_div<int64_t>(params.n, C::kBlockRows));
  plan.args.slice_steps = static_cast<int>(steps / C::kWarps);
  plan.args.longer_slices = static_cast<int>(steps % C::kWarps);
  plan.args.whole_steps = static_cast<int>(ceil_div<int64_t>(params.k, 64) / 2);
  plan.args.x_row_bytes = static_cast<int>(x_row_bytes);
  plan.args.x_bytes = static_cast<int>(x_bytes);
  plan.ctas = std::min(plan.args.blocks, num_sms);
  plan.smem_bytes = static_cast<int>(std::max(smem_bytes, kMinSmemBytes));
  return plan;
}

template <class C>
void launch_packed_gemm_direct(const char* op, const DirectPlan<C>& plan, cudaStream_t stream) {
  const Launch launch{op,
                      dim3(static_cast<unsigned>(plan.ctas)),
                      dim3(C::kThreads),
                      static_cast<size_t>(plan.smem_bytes),
                      stream,
                      1,
                      true};
  launch(packed_gemm_direct_kernel<C>, plan.args);
}

}  // namespace effllm
