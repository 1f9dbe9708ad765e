// Packed 4-bit codes for the kernel of strip_gemm_sm80.cuh.
//
// Roofline: a strip's words lie in memory in the order of A fragments, so a lane reads what it
// multiplies by, N * K / 2 bytes in all.
//
// An op brings its `Weights`: what a lane knows of its two rows to make weights of their codes.
//   InT, Params                      16-bit type of x and of the weights; the op's arguments
//   kZeroPastK                       whether a code may be no number: x = 0 then hides no padding
//   load_group(params, row, k)       for the group of column k; whole warps call it together
//   scale[2]                         of rows g and g + 8 in that group
//   fragment(word, a)                the A fragment of eight codes
#pragma once

#include <cstdint>

#include "gemm/packed_gemm.h"
#include "gemm/strip_gemm_sm80.cuh"
#include "quant/dequant.cuh"

namespace effllm {

static_assert(kStripRows == kInt4StripRows);

template <class Weights>
struct PackedOperands {
  using InT = typename Weights::InT;
  using Sum = float;
  using OutT = InT;
  using Params = typename Weights::Params;
  using Codes = uint4;  // one word per k-step
  using XChunk = uint4;
  static constexpr int kScaleSteps = 2;  // the smallest group is 32 columns
  static constexpr int kXSteps = 1;

  __device__ __forceinline__ PackedOperands(const Params& params, int64_t strip, int thread)
      : codes_gmem(
            reinterpret_cast<const uint4*>(params.qweight + strip * params.stride_qweight_strip) +
            thread) {}

  __device__ __forceinline__ Codes load_codes(const Params&, int64_t tile) const {
    return __ldcs(codes_gmem + tile * (kInt4TileWords / 4));
  }

  static __device__ __forceinline__ XChunk load_x(const Params& params, int64_t m, int64_t k) {
    return load_x_chunk(params, m, k);
  }

  static __device__ __forceinline__ uint4 x_values(const XChunk& chunk) { return chunk; }

  __device__ __forceinline__ void load_scales(const Params& params, int64_t row, int64_t k) {
    weights.load_group(params, row, k);
  }

  __device__ __forceinline__ void weight_fragment(const Codes& codes, int step, int c,
                                                  int64_t columns_left, uint32_t (&a)[4]) const {
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    weights.fragment(words[step], a);
    if (Weights::kZeroPastK && columns_left < 64) zero_past_k(a, columns_left - 16 * step - 2 * c);
  }

  static __device__ __forceinline__ void x_fragments(const uint16_t* x_smem, int step, int c,
                                                     uint32_t (&b)[kXSteps][2]) {
    const uint16_t* x = x_smem + 16 * step + 2 * c;
    b[0][0] = *reinterpret_cast<const uint32_t*>(x);
    b[0][1] = *reinterpret_cast<const uint32_t*>(x + 8);
  }

  template <int kTokenTiles>
  __device__ __forceinline__ void add(const Params&, int64_t,
                                      const float (&partial)[kTokenTiles][4],
                                      float (&sums)[kTokenTiles][4]) const {
#pragma unroll
    for (int token_tile = 0; token_tile < kTokenTiles; ++token_tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[token_tile][i] += weights.scale[i / 2] * partial[token_tile][i];
      }
    }
  }

  static __device__ __forceinline__ float finish(const Params&, int64_t, int64_t, float sum) {
    return sum;
  }

  const uint4* codes_gmem;
  Weights weights;
};

template <template <class> class Weights, class Params>
void launch_packed_gemm_sm80(const char* op, const Params& params, cudaStream_t stream) {
  if (params.dtype == DType::kFloat16) {
    launch_strip_gemm_sm80<PackedOperands<Weights<float16>>>(op, params, stream);
  } else {
    launch_strip_gemm_sm80<PackedOperands<Weights<bfloat16>>>(op, params, stream);
  }
}

}  // namespace effllm
