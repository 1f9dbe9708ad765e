// 16-bit x by weights of a byte each on Hopper: the host side, for code compiled for any
// architecture.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/launch.h"
#include "gemm/fp8_gemm.h"

namespace effllm {

// A CTA's tile is kByteWeightRows of W by `tokens`, of which out_tokens at a time are stored; a
// stage of its ring has `panels` times 64 columns of K, each of which takes it `time` nanoseconds
// on an H100.
inline constexpr int kByteWeightRows = 128;
struct ByteWeightShape {
  int tokens, panels, stages, out_tokens, time;
};

// [slices - 1]: clusters of so many CTAs that run on a device at the same time.
using ByteWeightResidency = std::array<int, kMaxClusterCtas>;

struct ByteWeightPlan {
  size_t shape;
  int k_slices, ctas;
};

ByteWeightPlan plan_byte_weight_gemm(int64_t m, int64_t n, int64_t k,
                                     std::span<const ByteWeightShape> shapes,
                                     std::span<const ByteWeightResidency> residency);

// Launch the kernel if it takes these arguments. Not taken: rows of x, W or out that TMA cannot
// read or write, and few tokens.
bool launch_int8_weight_gemm_sm90(const Fp8GemmParams& params, int device, cudaStream_t stream);
bool launch_fp8_weight_gemm_sm90(const Fp8GemmParams& params, int device, cudaStream_t stream);

// The same of arguments that it takes: with one scale or one for each row of W, and with groups.
void launch_int8_weight_gemm_channel_sm90(const Fp8GemmParams& params, int device,
                                          cudaStream_t stream);
void launch_int8_weight_gemm_group_sm90(const Fp8GemmParams& params, int device,
                                        cudaStream_t stream);
void launch_fp8_weight_gemm_channel_sm90(const Fp8GemmParams& params, int device,
                                         cudaStream_t stream);
void launch_fp8_weight_gemm_group_sm90(const Fp8GemmParams& params, int device,
                                       cudaStream_t stream);

}  // namespace effllm
