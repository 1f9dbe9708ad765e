// The matmul kernel on mma.sync (sm_80 and later) for weights that become 16-bit floats in
// registers, or int8: right for every shape. packed_gemm_sm80.cuh, fp8_gemm_sm80.cuh,
// int8_gemm_sm80.cuh and w4a8_gemm_sm80.cuh have the weights.
//
// Roofline: for few tokens the bytes of weights are all that counts and each is read once, as the A
// fragment it becomes part of; for many tokens the tensor cores' 2 M N K operations count.
//
// A CTA computes 64 rows of W (one strip) times 8 * kTokenTiles tokens:
//
//                 K ->  tile 0   tile 1   tile 2   tile 3 ...     64 columns each, or 128 of int8
//   rows  0..15  warp 0 [slice 0][slice 1][slice 0][slice 1]      kSlices groups of 4 warps take
//   rows 16..31  warp 1 [   .   ][   .   ][   .   ][   .   ]      tiles in turn and are added in
//   rows 32..47  warp 2 [   .   ][   .   ][   .   ][   .   ]      fixed order at the end
//   rows 48..63  warp 3 [   .   ][   .   ][   .   ][   .   ]
//
// W is mma's A operand (16 rows x 16 columns), x^T its B operand (16 columns x 8 tokens), so a
// lane's sums are rows (g, g + 8) x tokens (2 c, 2 c + 1), with g = lane / 4, c = lane % 4.
//
// An op brings its `Operands`: how x and weights become fragments, and what a lane knows of its two
// rows. A tile is four k-steps; which columns a step takes is theirs to say.
//   InT, Sum, OutT, Params         type of mma's operands, 16 bits or int8_t, whose products are
//                                  added up in int32 ("partial"); of what they are added to; of
//                                  out, void: params.out_dtype; the op's arguments
//   Codes                          what a lane holds of a tile's weights
//   Operands(params, strip, thread), load_codes(params, tile)     thread is one of 128
//   XChunk, load_x(params, m, k)   from column k on of a token, 16 bytes of InT, as they lie in
//                                  memory, else zeros
//   x_values(chunk)                the same as InT
//   kScaleSteps                    k-steps that are scaled together: 1, 2 or 4
//   load_scales(params, row, k)    those of column k and on; whole warps call it together
//   weight_fragment(codes, step, c, columns_left, a)   columns_left: of the tile, before K
//   kXSteps, x_fragments(x_smem, step, c, b)           of a token, for that many k-steps at once
//   add(params, first_token, partial, sums)            sums += scales * partial
//   finish(params, m, n, sum)      the output, but for bias and rounding
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/dispatch.h"
#include "common/math.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "ptx/mma.cuh"

namespace effllm {

inline constexpr int kStripRows = 64;

// Tile shapes. `token_tiles` counts 8-token columns of one CTA's 64-row strip; `k_slices` warps per
// 16 rows share the work along K, which is what keeps enough loads in flight for few tokens.
struct StripGemmConfig {
  int token_tiles, k_slices;
};

inline constexpr std::array<StripGemmConfig, 3> kStripGemmConfigs{{
    {1, 8},  // decode: up to 8 tokens
    {4, 4},  // up to 32 tokens: small batches, verification
    {8, 2},  // prefill
}};

constexpr int select_strip_gemm_config(int64_t m) { return m <= 8 ? 0 : m <= 32 ? 1 : 2; }

template <class Operands_, int kTokenTiles_, int kSlices_>
struct StripGemmSm80 {
  using Operands = Operands_;
  using Params = typename Operands::Params;
  using InT = typename Operands::InT;
  using Partial = std::conditional_t<std::is_integral_v<InT>, int32_t, float>;
  using Sum = typename Operands::Sum;
  static constexpr int kTokenTiles = kTokenTiles_;
  static constexpr int kSlices = kSlices_;
  static constexpr int kTokens = 8 * kTokenTiles;
  static constexpr int kTileK = 128 / sizeof(InT);
  static constexpr int kChunkK = 16 / sizeof(InT);
  static constexpr int kSliceThreads = 128;
  static constexpr int kThreads = kSliceThreads * kSlices;
  // Rows of 144 bytes: a B fragment's 8 tokens x 4 words then fall into 32 different banks, and so
  // do 2 tokens x 4 words of 16 bytes.
  static constexpr int kRowElements = (128 + 16) / 2;
  static constexpr int kChunks = kTokens * 8;  // 16 bytes each of a slice's x tile
  static constexpr int kChunksPerThread = ceil_div(kChunks, kSliceThreads);

  struct alignas(16) SharedStorage {
    union {
      uint16_t x[2][kSlices][kTokens][kRowElements];  // two stages: fill one, read the other
      Sum sums[kSlices][kTokens][kStripRows + 1];     // after the mainloop
    };
  };
};

// Columns k .. k + 7 of token m of a 16-bit x, zero outside of it. Rows of 16-byte multiples are
// read whole.
template <class Params>
__device__ __forceinline__ uint4 load_x_chunk(const Params& params, int64_t m, int64_t k) {
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

// kBytes of memory of any alignment, from what the first `left` of them hold, zeros after.
template <int kBytes>
__device__ __forceinline__ void load_bytes(const void* from, int64_t left,
                                           uint32_t (&words)[kBytes / 4]) {
  const auto address = reinterpret_cast<uintptr_t>(from);
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) words[i] = 0;
  if (left >= kBytes && address % kBytes == 0) {
    if constexpr (kBytes == 16) {
      const uint4 value = __ldcs(static_cast<const uint4*>(from));
      words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
    } else {
      const uint2 value = *static_cast<const uint2*>(from);
      words[0] = value.x, words[1] = value.y;
    }
  } else if (left >= kBytes && address % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) words[i] = static_cast<const uint32_t*>(from)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i) {
      const uint32_t byte = i < left ? static_cast<const uint8_t*>(from)[i] : 0u;
      words[i / 4] |= byte << (8 * (i % 4));
    }
  }
}

template <class Config>
struct StripGemmFragments {
  typename Config::Operands::Codes codes;                         // of one 64 x 64 tile
  typename Config::Operands::XChunk x[Config::kChunksPerThread];  // on its way to smem
};

// Global memory -> registers for one tile of K.
template <class Config>
__device__ __forceinline__ void load_tile(const typename Config::Params& params,
                                          const typename Config::Operands& operands,
                                          int64_t first_token, int64_t tile,
                                          StripGemmFragments<Config>& fragments) {
  const int thread = threadIdx.x % Config::kSliceThreads;
  if (tile >= ceil_div<int64_t>(params.k, Config::kTileK)) return;
  fragments.codes = operands.load_codes(params, tile);
#pragma unroll
  for (int i = 0; i < Config::kChunksPerThread; ++i) {
    const int chunk = thread + i * Config::kSliceThreads;
    if (chunk < Config::kChunks) {
      fragments.x[i] = operands.load_x(params, first_token + chunk / 8,
                                       tile * Config::kTileK + chunk % 8 * Config::kChunkK);
    }
  }
}

template <class Config>
__device__ __forceinline__ void store_x_tile(
    uint16_t (&x_smem)[Config::kTokens][Config::kRowElements],
    const StripGemmFragments<Config>& fragments) {
  const int thread = threadIdx.x % Config::kSliceThreads;
#pragma unroll
  for (int i = 0; i < Config::kChunksPerThread; ++i) {
    const int chunk = thread + i * Config::kSliceThreads;
    if (chunk < Config::kChunks) {
      *reinterpret_cast<uint4*>(&x_smem[chunk / 8][chunk % 8 * 8]) =
          Config::Operands::x_values(fragments.x[i]);
    }
  }
}

template <class InT, class Sum>
__device__ __forceinline__ void mma_step(Sum (&sums)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<InT, int8_t>) {
    ptx::mma_m16n8k32(sums, a, b[0], b[1]);
  } else {
    ptx::mma_m16n8k16<InT>(sums, a, b[0], b[1]);
  }
}

// sums += scale * weights * x over one tile.
template <class Config>
__device__ __forceinline__ void mma_tile(
    const typename Config::Params& params, int64_t row, int64_t first_token, int64_t tile,
    const typename Config::Operands::Codes& codes, typename Config::Operands& operands,
    const uint16_t (&x_smem)[Config::kTokens][Config::kRowElements],
    typename Config::Sum (&sums)[Config::kTokenTiles][4]) {
  using Operands = typename Config::Operands;
  const int lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int64_t columns_left = params.k - tile * Config::kTileK;
#pragma unroll
  for (int first = 0; first < 4; first += Operands::kScaleSteps) {
    operands.load_scales(params, row, tile * Config::kTileK + Config::kTileK / 4 * first);
    typename Config::Partial partial[Config::kTokenTiles][4] = {};
#pragma unroll
    for (int step = first; step < first + Operands::kScaleSteps; step += Operands::kXSteps) {
      uint32_t a[Operands::kXSteps][4];
#pragma unroll
      for (int i = 0; i < Operands::kXSteps; ++i) {
        operands.weight_fragment(codes, step + i, c, columns_left, a[i]);
      }
#pragma unroll
      for (int token_tile = 0; token_tile < Config::kTokenTiles; ++token_tile) {
        uint32_t b[Operands::kXSteps][2];
        Operands::x_fragments(x_smem[8 * token_tile + g], step, c, b);
#pragma unroll
        for (int i = 0; i < Operands::kXSteps; ++i) {
          mma_step<typename Operands::InT>(partial[token_tile], a[i], b[i]);
        }
      }
    }
    operands.add(params, first_token, partial, sums);
  }
}

// Adds the slices in order, adds the bias, casts and stores; neighbouring threads own neighbouring
// rows of W, which are neighbours in `out`.
template <class Config>
__device__ __forceinline__ void store_output(
    const typename Config::Params& params, int64_t first_row, int64_t first_token,
    const typename Config::Sum (&sums)[Config::kTokenTiles][4],
    typename Config::SharedStorage& smem) {
  using OutT = typename Config::Operands::OutT;
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
  for (int index = threadIdx.x; index < Config::kTokens * kStripRows; index += Config::kThreads) {
    const int row = index % kStripRows, token = index / kStripRows;
    const int64_t n = first_row + row, m = first_token + token;
    if (n >= params.n || m >= params.m) continue;
    typename Config::Sum sum = 0;
#pragma unroll
    for (int i = 0; i < Config::kSlices; ++i) sum += smem.sums[i][token][row];
    float result = Config::Operands::finish(params, m, n, sum);
    if (params.bias != nullptr) {
      result += device_load_float(params.bias, params.bias_dtype, n * params.stride_bias);
    }
    const auto store = [&](auto out) {
      using T = device_t<decltype(out)>;
      static_cast<T*>(params.out)[m * params.n + n] = device_from_float<T>(result);
    };
    if constexpr (std::is_void_v<OutT>) {
      dispatch_float(params.out_dtype, store);
    } else {
      store(OutT{});
    }
  }
}

template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    strip_gemm_kernel(const __grid_constant__ typename Config::Params params) {
  __shared__ typename Config::SharedStorage smem;
  // Token tiles vary fastest: CTAs that run together share a strip of weights in L2.
  const int64_t num_token_tiles = ceil_div<int64_t>(params.m, Config::kTokens);
  const int64_t strip = blockIdx.x / num_token_tiles;
  const int64_t first_token = blockIdx.x % num_token_tiles * Config::kTokens;
  const int slice = threadIdx.x / Config::kSliceThreads;
  const int warp = threadIdx.x % Config::kSliceThreads / 32;
  const int64_t row = strip * kStripRows + 16 * warp + threadIdx.x % 32 / 4;

  const int64_t num_tiles = ceil_div<int64_t>(params.k, Config::kTileK);
  typename Config::Sum sums[Config::kTokenTiles][4] = {};
  typename Config::Operands operands(params, strip, threadIdx.x % Config::kSliceThreads);
  StripGemmFragments<Config> next;
  load_tile<Config>(params, operands, first_token, slice, next);
  for (int64_t base = 0, stage = 0; base < num_tiles; base += Config::kSlices, stage ^= 1) {
    const int64_t tile = base + slice;
    auto& x_smem = smem.x[stage][slice];
    const auto codes = next.codes;
    if (tile < num_tiles) store_x_tile<Config>(x_smem, next);
    load_tile<Config>(params, operands, first_token, tile + Config::kSlices, next);
    // One barrier per round is enough: whoever fills this stage again has passed the next barrier,
    // which no warp reaches before it has read this one.
    __syncthreads();
    if (tile < num_tiles) {
      mma_tile<Config>(params, row, first_token, tile, codes, operands, x_smem, sums);
    }
  }
  __syncthreads();  // the sums take the place of the x tiles
  store_output<Config>(params, strip * kStripRows, first_token, sums, smem);
}

template <class Config>
void launch_strip_gemm(const char* op, const typename Config::Params& params, cudaStream_t stream) {
  const int64_t blocks =
      ceil_div<int64_t>(params.n, kStripRows) * ceil_div<int64_t>(params.m, Config::kTokens);
  const Launch launch{op, dim3(static_cast<unsigned>(blocks)), dim3(Config::kThreads), 0, stream};
  launch(strip_gemm_kernel<Config>, params);
}

// Row `index` of kStripGemmConfigs, compiled: the table is the one list of what exists.
template <class Operands, size_t... kIndices>
void launch_strip_gemm(const char* op, int index, const typename Operands::Params& params,
                       cudaStream_t stream, std::index_sequence<kIndices...>) {
  ((index == kIndices
        ? launch_strip_gemm<StripGemmSm80<Operands, kStripGemmConfigs[kIndices].token_tiles,
                                          kStripGemmConfigs[kIndices].k_slices>>(op, params, stream)
        : void()),
   ...);
}

template <class Operands>
void launch_strip_gemm_sm80(const char* op, const typename Operands::Params& params,
                            cudaStream_t stream) {
  launch_strip_gemm<Operands>(op, select_strip_gemm_config(params.m), params, stream,
                              std::make_index_sequence<kStripGemmConfigs.size()>());
}

}  // namespace effllm
