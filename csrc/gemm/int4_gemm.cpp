// int4_gemm: schema and CPU implementation.
#include "gemm/int4_gemm.h"

#include <algorithm>

#include "common/torch.h"
#include "gemm/int4_gemm_strip.h"
#include "gemm/packed_gemm_cpu.h"

namespace effllm {
namespace {

PackedStripKernel int4_strip_kernel() {
  constexpr PackedStripKernel kBaseline = multiply_strip<Int4Decoder, 4>;
  if constexpr (kHasX86Isas) {
    return select_strip_kernel(kBaseline, int4_strip_avx2, int4_strip_avx512);
  }
  return kBaseline;
}

// Zero points as Int4Decoder wants them, in a table like that of the scales.
class Int4Decoding {
 public:
  explicit Int4Decoding(const Int4GemmParams& params) : params_(params) {}

  int64_t size() const { return kPackedCpuRows * stride_slot(); }
  int64_t stride_slot() const { return group_table_stride(params_.num_groups); }
  int64_t stride_group() const { return 1; }

  void init(float* memory) const {
    std::fill(memory, memory + size(), kInt4PaddingCode + kInt4CpuCodeBias);
  }

  void load(int64_t first_row, int64_t num_rows, float* memory) const {
    if (params_.zeros == nullptr) return;
    load_group_table(params_.zeros + first_row * params_.stride_zeros_n, params_.stride_zeros_n,
                     params_.stride_zeros_g, num_rows, params_.num_groups, memory,
                     [](uint8_t zero) { return zero + kInt4CpuCodeBias; });
  }

 private:
  const Int4GemmParams& params_;
};

Tensor int4_gemm_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Int4GemmParams params =
      check_int4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"), as_view(scales, "scales"),
                      as_view(zeros, "zeros"), as_view(bias, "bias"), group_size);
  Tensor out = new_empty_like_rows(x, params.n);
  params.out = out.mutable_data_ptr();
  packed_gemm_cpu(params, Int4Decoding(params), int4_strip_kernel(), TorchThreads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "int4_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros=None, Tensor? bias=None, "
      "*, "
      "int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("int4_gemm", TORCH_BOX(&int4_gemm_cpu)); }

}  // namespace effllm
