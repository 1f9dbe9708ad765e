#include "common/torch.h"
#include "cuda/launch.h"
#include "cuda/vec.cuh"
#include "gemm/gather_columns.h"
#include "gemm/int4_gemm.h"
#include "gemm/int4_gemm_sm90.h"
#include "gemm/packed_gemm_sm80.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// Weights of packed_gemm_sm80.cuh: scale and zero point of two rows.
template <class InT_>
struct Int4Weights {
  using InT = InT_;
  using Params = Int4GemmParams;
  using Dequant = Int4Dequant<InT>;
  static constexpr bool kZeroPastK = false;

  __device__ __forceinline__ void load_group(const Params& params, int64_t row, int64_t k) {
    const int64_t group = min(k / params.group_size, params.num_groups - 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Rows past N are computed on padding and never stored: any scale in bounds will do.
      const int64_t n = min(row + 8 * half, params.n - 1);
      scale[half] = device_load_float(params.scales, params.scales_dtype,
                                      n * params.stride_scales_n + group * params.stride_scales_g);
      zero[half] = Dequant::zero_pair(
          params.zeros == nullptr
              ? kInt4PaddingCode
              : params.zeros[n * params.stride_zeros_n + group * params.stride_zeros_g]);
    }
  }

  __device__ __forceinline__ void fragment(uint32_t word, uint32_t (&a)[4]) const {
    // Register j holds rows g + 8 (j % 2).
#pragma unroll
    for (int j = 0; j < 4; ++j) a[j] = Dequant::codes(word, j, zero[j % 2]);
  }

  float scale[2];
  typename Dequant::Pair zero[2];
};

namespace {

constexpr const char* kOp = "int4_gemm";

// A kernel for Hopper where the GPU is one and it takes the arguments, else the one that takes all
// but permuted columns: for it, and for the tensor memory accelerator, x is put in order first.
// Gathered in the load, each of the 2-byte elements of a tile would be a sector of 32 bytes.
void launch(Int4GemmParams params, const Tensor& x, cudaStream_t stream) {
  const int device = x.get_device_index();
  const bool is_hopper = device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) == 9;
  if (is_hopper && launch_int4_gemm_sm90(params, device, stream)) return;
  Tensor ordered;  // freed on return: the allocator keeps the stream's order
  if (params.perm != nullptr) {
    ordered = new_empty(x, {params.m, params.k}, params.dtype);
    launch_gather_columns(
        kOp, {params.m, params.k, params.x, params.perm, ordered.mutable_data_ptr()}, stream);
    params.x = ordered.const_data_ptr();
    params.perm = nullptr;
    if (is_hopper && launch_int4_gemm_sm90(params, device, stream)) return;
  }
  launch_packed_gemm_sm80<Int4Weights>(kOp, params, stream);
}

Tensor int4_gemm_cuda(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                      const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& perm, int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Int4GemmParams params = check_int4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"),
                                          as_view(scales, "scales"), as_view(zeros, "zeros"),
                                          as_view(bias, "bias"), as_view(perm, "perm"), group_size);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  Tensor out = new_empty_like_rows(x, params.n);
  if (out.numel() == 0) return out;
  params.out = out.mutable_data_ptr();

  launch(params, x_rows, current_cuda_stream(x));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("int4_gemm", TORCH_BOX(&int4_gemm_cuda)); }

}  // namespace effllm
