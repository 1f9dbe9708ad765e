// Matmuls over packed 4-bit codes on mma.sync (sm_80 and later): right for every shape.
//
// Roofline: for few tokens the N * K / 2 bytes of weights are all that counts and each is read
// once, as the A fragment it already is; for many tokens the tensor cores' 2 M N K operations
// count.
//
// A CTA computes 64 rows of W (one strip) times 8 * kTokenTiles tokens:
//
//                 K ->  tile 0   tile 1   tile 2   tile 3 ...     64 columns each
//   rows  0..15  warp 0 [slice 0][slice 1][slice 0][slice 1]      kSlices groups of 4 warps take
//   rows 16..31  warp 1 [   .   ][   .   ][   .   ][   .   ]      tiles in turn and are added in
//   rows 32..47  warp 2 [   .   ][   .   ][   .   ][   .   ]      fixed order at the end
//   rows 48..63  warp 3 [   .   ][   .   ][   .   ][   .   ]
//
// W is mma's A operand (16 rows x 16 columns), x^T its B operand (16 columns x 8 tokens), so a
// lane's sums are rows (g, g + 8) x tokens (2 c, 2 c + 1), with g = lane / 4, c = lane % 4.
//
// An op brings its `Weights`: what a lane knows of its two rows to make weights of their codes.
//   InT, Params                      16-bit type of x and of the weights; the op's arguments
//   kZeroPastK                       whether a code may be no number: x = 0 then hides no padding
//   load_group(params, row, k)       for the group of column k; whole warps call it together
//   scale[2]                         of rows g and g + 8 in that group
//   fragment(word, a)                the A fragment of eight codes
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "gemm/packed_gemm.h"
#include "ptx/mma.cuh"
#include "quant/dequant.cuh"

namespace effllm {

template <class Weights_, int kTokenTiles_, int kSlices_>
struct PackedGemmSm80 {
  using Weights = Weights_;
  using InT = typename Weights::InT;
  using Params = typename Weights::Params;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kTileK = 64;
  static constexpr int kSliceThreads = 128;
  static constexpr int kThreads = kSliceThreads * kSlices;
  // Rows of 144 bytes: a B fragment's 8 tokens x 4 words then fall into 32 different banks.
  static constexpr int kRowElements = kTileK + 8;
  static constexpr int kChunks = kTokens * kTileK / 8;  // 16-byte pieces of a slice's x tile
  static constexpr int kChunksPerThread = ceil_div(kChunks, kSliceThreads);

  struct SharedStorage {
    union {
      uint16_t x[2][kSlices][kTokens][kRowElements];     // two stages: fill one, read the other
      float sums[kSlices][kTokens][kInt4StripRows + 1];  // after the mainloop
    };
  };
};

template <class Config>
struct PackedGemmFragments {
  uint4 codes;                        // four k-steps of one 64 x 64 tile
  uint4 x[Config::kChunksPerThread];  // this thread's part of the x tile, on its way to smem
};

// Columns k .. k + 7 of token m, zero outside of x. Rows of 16-byte multiples are read whole.
__device__ __forceinline__ uint4 load_x_chunk(const PackedGemmParams& params, int64_t m,
                                              int64_t k) {
  uint4 chunk = make_uint4(0, 0, 0, 0);
  if (m >= params.m || k >= params.k) return chunk;
  const uint16_t* x = static_cast<const uint16_t*>(params.x) + m * params.k + k;
  if (params.k % 8 == 0 && reinterpret_cast<uintptr_t>(params.x) % 16 == 0) {
    return *reinterpret_cast<const uint4*>(x);
  }
  auto* elements = reinterpret_cast<uint16_t*>(&chunk);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (k + i < params.k) elements[i] = x[i];
  }
  return chunk;
}

// Global memory -> registers for one tile of K; `strip` points at the strip's words.
template <class Config>
__device__ __forceinline__ void load_tile(const PackedGemmParams& params, const int32_t* strip,
                                          int64_t first_token, int64_t tile,
                                          PackedGemmFragments<Config>& fragments) {
  const int thread = threadIdx.x % Config::kSliceThreads;
  if (tile >= ceil_div<int64_t>(params.k, Config::kTileK)) return;
  fragments.codes = __ldcs(reinterpret_cast<const uint4*>(strip + tile * kInt4TileWords) + thread);
#pragma unroll
  for (int i = 0; i < Config::kChunksPerThread; ++i) {
    const int chunk = thread + i * Config::kSliceThreads;
    if (chunk < Config::kChunks) {
      fragments.x[i] =
          load_x_chunk(params, first_token + chunk / 8, tile * Config::kTileK + chunk % 8 * 8);
    }
  }
}

template <class Config>
__device__ __forceinline__ void store_x_tile(
    uint16_t (&x_smem)[Config::kTokens][Config::kRowElements],
    const PackedGemmFragments<Config>& fragments) {
  const int thread = threadIdx.x % Config::kSliceThreads;
#pragma unroll
  for (int i = 0; i < Config::kChunksPerThread; ++i) {
    const int chunk = thread + i * Config::kSliceThreads;
    if (chunk < Config::kChunks) {
      *reinterpret_cast<uint4*>(&x_smem[chunk / 8][chunk % 8 * 8]) = fragments.x[i];
    }
  }
}

// sums += scale * weights * x over one 64-column tile. The smallest group is 32 columns: two
// k-steps.
template <class Config>
__device__ __forceinline__ void mma_tile(
    const typename Config::Params& params, int64_t row, int64_t tile, const uint4& codes,
    typename Config::Weights& weights,
    const uint16_t (&x_smem)[Config::kTokens][Config::kRowElements],
    float (&sums)[Config::kTokenTiles][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  const int64_t columns_left = params.k - tile * Config::kTileK;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    weights.load_group(params, row, tile * Config::kTileK + 32 * half);
    float partial[Config::kTokenTiles][4] = {};
#pragma unroll
    for (int step = 2 * half; step < 2 * half + 2; ++step) {
      uint32_t a[4];
      weights.fragment(words[step], a);
      if (Config::Weights::kZeroPastK && columns_left < Config::kTileK) {
        zero_past_k(a, columns_left - 16 * step - 2 * c);
      }
#pragma unroll
      for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
        const uint16_t* x = &x_smem[8 * token_tile + g][16 * step + 2 * c];
        ptx::mma_m16n8k16<typename Config::InT>(partial[token_tile], a,
                                                *reinterpret_cast<const uint32_t*>(x),
                                                *reinterpret_cast<const uint32_t*>(x + 8));
      }
    }
#pragma unroll
    for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[token_tile][i] += weights.scale[i / 2] * partial[token_tile][i];
      }
    }
  }
}

// Adds the slices in order, adds the bias, casts and stores; neighbouring threads own neighbouring
// rows of W, which are neighbours in `out`.
template <class Config>
__device__ __forceinline__ void store_output(const PackedGemmParams& params, int64_t first_row,
                                             int64_t first_token,
                                             const float (&sums)[Config::kTokenTiles][4],
                                             typename Config::SharedStorage& smem) {
  using OutT = device_t<typename Config::InT>;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int slice = threadIdx.x / Config::kSliceThreads;
  const int warp_row = threadIdx.x % Config::kSliceThreads / 32 * 16;
#pragma unroll
  for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      smem.sums[slice][8 * token_tile + 2 * c + i % 2][warp_row + g + 8 * (i / 2)] =
          sums[token_tile][i];
    }
  }
  __syncthreads();
  for (int index = threadIdx.x; index < Config::kTokens * kInt4StripRows;
       index += Config::kThreads) {
    const int row = index % kInt4StripRows, token = index / kInt4StripRows;
    const int64_t n = first_row + row, m = first_token + token;
    if (n >= params.n || m >= params.m) continue;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < Config::kSlices; ++i) sum += smem.sums[i][token][row];
    if (params.bias != nullptr) {
      sum += device_load_float(params.bias, params.bias_dtype, n * params.stride_bias);
    }
    static_cast<OutT*>(params.out)[m * params.n + n] = device_from_float<OutT>(sum);
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    packed_gemm_kernel(const __grid_constant__ typename Config::Params params) {
  __shared__ typename Config::SharedStorage smem;
  // Token tiles vary fastest: CTAs that run together share a strip of weights in L2.
  const int64_t num_token_tiles = ceil_div<int64_t>(params.m, Config::kTokens);
  const int64_t strip = blockIdx.x / num_token_tiles;
  const int64_t first_token = blockIdx.x % num_token_tiles * Config::kTokens;
  const int32_t* strip_words = params.qweight + strip * params.stride_qweight_strip;
  const int slice = threadIdx.x / Config::kSliceThreads;
  const int warp = threadIdx.x % Config::kSliceThreads / 32;
  const int64_t row = strip * kInt4StripRows + 16 * warp + threadIdx.x % 32 / 4;

  const int64_t num_tiles = ceil_div<int64_t>(params.k, Config::kTileK);
  float sums[Config::kTokenTiles][4] = {};
  typename Config::Weights weights;
  PackedGemmFragments<Config> next;
  load_tile<Config>(params, strip_words, first_token, slice, next);
  for (int64_t base = 0, stage = 0; base < num_tiles; base += Config::kSlices, stage ^= 1) {
    const int64_t tile = base + slice;
    auto& x_smem = smem.x[stage][slice];
    const uint4 codes = next.codes;
    if (tile < num_tiles) store_x_tile<Config>(x_smem, next);
    load_tile<Config>(params, strip_words, first_token, tile + Config::kSlices, next);
    // One barrier per round is enough: whoever fills this stage again has passed the next barrier,
    // which no warp reaches before it has read this one.
    __syncthreads();
    if (tile < num_tiles) mma_tile<Config>(params, row, tile, codes, weights, x_smem, sums);
  }
  __syncthreads();  // the sums take the place of the x tiles
  store_output<Config>(params, strip * kInt4StripRows, first_token, sums, smem);
}

template <class Config>
void launch_packed_gemm(const char* op, const typename Config::Params& params,
                        cudaStream_t stream) {
  const int64_t blocks = int4_num_strips(params.n) * ceil_div<int64_t>(params.m, Config::kTokens);
  const Launch launch{op, dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), 0, stream};
  launch(packed_gemm_kernel<Config>, params);
}

// Row `index` of kPackedGemmConfigs, compiled: the table is the one list of what exists.
template <class Weights, size_t... kIndices>
void launch_packed_gemm(const char* op, int index, const typename Weights::Params& params,
                        cudaStream_t stream, std::index_sequence<kIndices...>) {
  ((index == kIndices
        ? launch_packed_gemm<PackedGemmSm80<Weights, kPackedGemmConfigs[kIndices].token_tiles,
                                            kPackedGemmConfigs[kIndices].k_slices>>(op, params,
                                                                                    stream)
        : void()),
   ...);
}

template <template <class> class Weights, class Params>
void launch_packed_gemm_sm80(const char* op, const Params& params, cudaStream_t stream) {
  const int config = select_packed_gemm_config(params.m);
  constexpr std::make_index_sequence<kPackedGemmConfigs.size()> kConfigIndices;
  if (params.dtype == DType::kFloat16) {
    launch_packed_gemm<Weights<float16>>(op, config, params, stream, kConfigIndices);
  } else {
    launch_packed_gemm<Weights<bfloat16>>(op, config, params, stream, kConfigIndices);
  }
}

}  // namespace effllm
