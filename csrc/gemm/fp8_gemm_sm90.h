// fp8_gemm on Hopper: the host side, for code compiled for any architecture.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

#include "cuda/launch.h"
#include "gemm/fp8_gemm.h"
#include "gemm/ss_gemm_sm90.h"

namespace effllm {

// Whether there is a kernel for these arguments, but for the scales of x. Not taken: rows of x, W
// or out that TMA cannot read or write; float32 results, if they shall be more accurate than what
// the tensor cores keep of 128 products.
bool takes_fp8_gemm_sm90(const Fp8GemmParams& params, bool accurate);

// Whether sums that are scaled group by group can read these scales of x, by TMA: float32,
// [groups, M] in memory, every group 16-byte aligned. A single row has no stride that matters.
bool takes_fp8_group_scales_sm90(const Fp8Scales& scales, int64_t m);

// Of arguments that both have been asked about.
void launch_fp8_gemm_sm90(const Fp8GemmParams& params, bool accurate, int device,
                          cudaStream_t stream);

// Of a product whose output is bf16, the tensor core sums up so many columns where it shall be
// accurate: errors grow by 7 % at most (bench/fp8_accuracy.py).
inline constexpr int kFp8BFloat16Columns = 512;

// Where sums of 128 columns, or of these, come together: in the tensor core, in fp32, in fp32 after
// scaling.
enum class Fp8Summation { kTensorCore, kPlain, kScaled };

// The stage_time of an SsGemmCandidate for each summation; 0 where the shape is not compiled.
struct Fp8GemmShape {
  SsGemmShape tile;
  std::array<int, 3> stage_time;
};

inline constexpr std::array<Fp8GemmShape, 11> kFp8GemmShapes{{
    {{16, 1, 5, 2, 1, 16, false}, {0, 117, 137}},
    {{32, 1, 5, 2, 1, 32, false}, {0, 120, 208}},
    {{64, 1, 4, 2, 1, 32, false}, {0, 155, 330}},
    {{128, 1, 5, 1, 1, 128, false}, {281, 320, 618}},
    {{128, 1, 5, 1, 2, 128, false}, {0, 320, 0}},
    {{128, 2, 3, 1, 1, 128, false}, {0, 0, 1138}},
    {{128, 2, 3, 1, 2, 128, false}, {0, 859, 0}},
    {{256, 1, 3, 1, 2, 256, false}, {818, 0, 0}},
    {{128, 1, 5, 1, 1, 128, true}, {0, 0, 400}},
    {{128, 2, 3, 1, 2, 128, true}, {0, 0, 859}},
    {{192, 1, 4, 1, 2, 192, true}, {633, 652, 0}},
}};

// TMA writes boxes to multiples of 128 bytes: of so many scales of tokens, at least.
constexpr int fp8_scales_box(int tokens) { return std::max(tokens, 32); }

// Of each shape, on the current device.
using Fp8GemmResidency = std::array<SsGemmResidency, kFp8GemmShapes.size()>;

SsGemmChoice plan_fp8_gemm(const Fp8GemmParams& params, Fp8Summation summation, int num_sms,
                           const Fp8GemmResidency& residency);

// Of each summation, in a file of its own.
void launch_fp8_gemm_tensor_core(const Fp8GemmParams& params, const SsGemmChoice& plan,
                                 cudaStream_t stream);
void launch_fp8_gemm_plain(const Fp8GemmParams& params, const SsGemmChoice& plan,
                           cudaStream_t stream);
void launch_fp8_gemm_scaled(const Fp8GemmParams& params, const SsGemmChoice& plan,
                            cudaStream_t stream);
Fp8GemmResidency fp8_gemm_residency_tensor_core();
Fp8GemmResidency fp8_gemm_residency_plain();
Fp8GemmResidency fp8_gemm_residency_scaled();

}  // namespace effllm
