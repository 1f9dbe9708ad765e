// Merges the partial results of the splits of decode attention.
//
// Roofline: bytes, but small: 4 * D + 4 per row and split, written shortly before and found in L2.
// What counts is latency: a CTA per row, its warps read every fourth split each, all loads at once.
#pragma once

#include <cstdint>

#include "attention/decode_split.cuh"
#include "attention/online_softmax.cuh"
#include "ptx/cvt.cuh"

namespace effllm {

// Four neighbouring elements of the final output.
template <class Element>
__device__ __forceinline__ void store_output(const PagedAttentionArgs& args, int64_t row, int dim,
                                             float4 value) {
  auto* dst = static_cast<Element*>(args.out) + row * args.head_dim + dim;
  *reinterpret_cast<uint2*>(dst) = make_uint2(ptx::pack_pair<Element>(value.x, value.y),
                                              ptx::pack_pair<Element>(value.z, value.w));
}

inline constexpr int kCombineWarps = 4;

// Outputs weighted by 2^(lse2 - maximum) and added in a fixed order: that of the splits within a
// warp, then that of the warps.
template <class Config>
__global__ void __launch_bounds__(kCombineWarps * 32)
    combine_kernel(const __grid_constant__ PagedAttentionArgs args) {
  __shared__ float output_smem[kCombineWarps][Config::kHeadDim];
  const auto num_kv_heads = static_cast<int>(args.num_kv_heads);
  const int head_dim = static_cast<int>(args.head_dim);
  const int warp_idx = threadIdx.x / 32, lane_idx = threadIdx.x % 32;
  int block = static_cast<int>(blockIdx.x);
  const int row = block % Config::kRows;
  block /= Config::kRows;
  const int row_tile = block % args.num_row_tiles;
  block /= args.num_row_tiles;
  const int kv_head = block % num_kv_heads, seq_idx = block / num_kv_heads;

  const Sequence sequence(args, seq_idx);
  const DecodeTile<Config> tile(args, sequence, row_tile);
  if (tile.first_row + row >= tile.num_rows) return;
  const int64_t partial = partial_row<Config>(args, seq_idx, kv_head, row_tile) + row;
  const float* lse2 = args.partial_lse + partial;

  // Every warp finds the row's maximum and sum of weights for itself.
  SoftmaxRow total;
  for (int split = lane_idx; split < tile.num_active_splits; split += 32) {
    total.maximum = fmaxf(total.maximum, lse2[split * Config::kRows]);
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    total.maximum = fmaxf(total.maximum, __shfl_xor_sync(~0u, total.maximum, lanes));
  }
  for (int split = lane_idx; split < tile.num_active_splits; split += 32) {
    total.sum += ptx::exp2_approx(lse2[split * Config::kRows] - total.maximum);
  }
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    total.sum += __shfl_xor_sync(~0u, total.sum, lanes);
  }

  for (int dim = lane_idx * 4; dim < head_dim; dim += 32 * 4) {
    float4 sum = {};
#pragma unroll 8
    for (int split = warp_idx; split < tile.num_active_splits; split += kCombineWarps) {
      const float weight = ptx::exp2_approx(lse2[split * Config::kRows] - total.maximum);
      const auto value = *reinterpret_cast<const float4*>(
          args.partial_out + (partial + split * Config::kRows) * head_dim + dim);
      sum.x += weight * value.x;
      sum.y += weight * value.y;
      sum.z += weight * value.z;
      sum.w += weight * value.w;
    }
    *reinterpret_cast<float4*>(&output_smem[warp_idx][dim]) = sum;
  }
  __syncthreads();

  const float inverse = total.inverse_sum();
  const int64_t out_row = output_row(args, sequence, kv_head, tile.first_row + row);
  for (int dim = threadIdx.x * 4; dim < head_dim; dim += kCombineWarps * 32 * 4) {
    float4 sum = {};
#pragma unroll
    for (int warp = 0; warp < kCombineWarps; ++warp) {
      const auto value = *reinterpret_cast<const float4*>(&output_smem[warp][dim]);
      sum.x += value.x;
      sum.y += value.y;
      sum.z += value.z;
      sum.w += value.w;
    }
    store_output<typename Config::Element>(
        args, out_row, dim, {sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse});
  }
  if (threadIdx.x == 0) args.lse[out_row] = total.lse2() * kLn2;
}

}  // namespace effllm
