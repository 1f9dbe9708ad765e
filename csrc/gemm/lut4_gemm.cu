#include "common/torch.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "gemm/lut4_gemm.h"
#include "gemm/lut4_gemm_sm90.h"
#include "gemm/lut4_planes.cuh"
#include "gemm/packed_gemm_sm80.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// Weights of packed_gemm_sm80.cuh: scales and codebooks of two rows.
template <class InT_>
struct Lut4Weights {
  using InT = InT_;
  using Params = Lut4GemmParams;
  static constexpr bool kZeroPastK = true;

  __device__ __forceinline__ void load_group(const Params& params, int64_t row, int64_t k) {
    const int64_t group = k / params.group_size;
    if (group == group_idx) return;
    if (group >= params.num_groups) {  // the other half of a last tile: all weights are 0
      scale[0] = scale[1] = 0.0f;
      return;
    }
    const bool is_first = group_idx < 0;
    group_idx = group;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed on padding and never stored: any scale in bounds will do.
      const int64_t n = min(row + 8 * half, params.n - 1);
      scale[half] =
          params.scales == nullptr
              ? 1.0f
              : device_load_float(params.scales, params.scales_dtype,
                                  n * params.stride_scales_n + group * params.stride_scales_g);
      if (is_first || params.stride_codebook_g != 0) {
        load_lut4_planes<InT>(params, n, group, planes[half]);
      }
    }
  }

  __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) const {
    Lut4Dequant<InT>::fragment(word, planes[0], planes[1], a);
  }

  float scale[2];
  Lut4Planes planes[2];
  int64_t group_idx = -1;
};

namespace {

// The kernel for few tokens where the GPU has it and it takes the arguments, else the one that
// takes all.
void launch(const Lut4GemmParams& params, int device, cudaStream_t stream) {
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, "lut4_gemm") == 9 &&
      launch_lut4_gemm_sm90(params, device, stream)) {
    return;
  }
  launch_packed_gemm_sm80<Lut4Weights>("lut4_gemm", params, stream);
}

Tensor lut4_gemm_cuda(const Tensor& x, const Tensor& qweight, const Tensor& codebook,
                      const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                      int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Lut4GemmParams params = check_lut4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"),
                                          as_view(codebook, "codebook"), as_view(scales, "scales"),
                                          as_view(bias, "bias"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();

  launch(params, x.get_device_index(), current_cuda_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("lut4_gemm", TORCH_BOX(&lut4_gemm_cuda)); }

}  // namespace effllm
