// lut4_gemm: schema and CPU implementation.
#include "gemm/lut4_gemm.h"

#include <algorithm>
#include <bit>
#include <type_traits>

#include "common/dispatch.h"
#include "common/torch.h"
#include "gemm/lut4_gemm_strip.h"
#include "gemm/packed_gemm_cpu.h"

namespace effllm {
namespace {

static_assert(kPlaneBytes == kCodebookSize && kTableFloats == kCodebookSize);

PackedStripKernel lut4_strip_kernel() {
  constexpr PackedStripKernel kBaseline = multiply_strip<CodebookDecoder, 4>;
  if constexpr (kHasX86Isas) {
    return select_strip_kernel(kBaseline, lut4_strip_avx2, lut4_strip_avx512);
  }
  return kBaseline;
}

// Codebooks of a strip as CodebookDecoder wants them, [groups, 64 slots, 16 floats or their
// planes], or only one where all rows or all groups share theirs.
class CodebookDecoding {
 public:
  using Loop = Fp32Loop;

  explicit CodebookDecoding(const Lut4GemmParams& params) : params_(params) {}

  // A last tile may have one group of two: its other half is padding, but reads a table, too.
  int64_t size() const { return (num_groups() + 1) * num_slots() * kTableFloats; }
  int64_t stride_slot() const { return shared_by_rows() ? 0 : kTableFloats; }
  int64_t stride_group() const { return shared_by_groups() ? 0 : num_slots() * kTableFloats; }

  void init(float* memory) const {
    if (shared_by_rows() && params_.num_groups > 0) load_rows(0, 1, memory);
  }

  void load(int64_t first_row, int64_t num_rows, float* memory) const {
    if (!shared_by_rows()) load_rows(first_row, num_rows, memory);
  }

  // A row's codebooks are few or one long stretch, which hardware prefetches.
  void prefetch(int64_t, int64_t) const {}

  void multiply(const PackedStrip& strip) const { kernel_(strip); }

 private:
  bool shared_by_rows() const { return params_.stride_codebook_n == 0; }
  bool shared_by_groups() const { return params_.stride_codebook_g == 0; }
  int64_t num_slots() const { return shared_by_rows() ? 1 : kPackedCpuRows; }
  int64_t num_groups() const { return shared_by_groups() ? 1 : params_.num_groups; }

  void load_rows(int64_t first_row, int64_t num_rows, float* memory) const {
    dispatch_float(params_.codebook_dtype, [&](auto stored) {
      dispatch_float(params_.dtype, [&](auto rounded) {
        load_tables<decltype(stored), decltype(rounded)>(first_row, num_rows, memory);
      });
    });
  }

  // T is the codebook's type, X that of x.
  template <class T, class X>
  void load_tables(int64_t first_row, int64_t num_rows, float* memory) const {
    const T* row = static_cast<const T*>(params_.codebook) + first_row * params_.stride_codebook_n;
    for (int64_t idx = 0; idx < num_rows; ++idx, row += params_.stride_codebook_n) {
      float* table = memory + Loop::slot_of_row(idx) * stride_slot();
      const T* entries = row;
      for (int64_t group = 0; group < num_groups(); ++group) {
        store_table<T, X>(entries, table);
        entries += params_.stride_codebook_g;
        table += stride_group();
      }
    }
  }

  template <class T, class X>
  void store_table(const T* entries, float* table) const {
    float values[kCodebookSize];
    for (int idx = 0; idx < kCodebookSize; ++idx) {
      const T entry = entries[idx * params_.stride_codebook_entry];
      values[idx] =
          std::is_same_v<T, X> ? to_float(entry) : to_float(from_float<X>(to_float(entry)));
    }
    if (!in_planes_) {
      std::copy(values, values + kCodebookSize, table);
      return;
    }
    auto* planes = reinterpret_cast<uint8_t*>(table);
    for (int plane = 0; plane < 4; ++plane) {
      for (int idx = 0; idx < kCodebookSize; ++idx) {
        const auto bits = std::bit_cast<uint32_t>(values[idx]);
        planes[plane * kPlaneBytes + idx] = static_cast<uint8_t>(bits >> (8 * plane));
      }
    }
  }

  const Lut4GemmParams& params_;
  const PackedStripKernel kernel_ = lut4_strip_kernel();
  const bool in_planes_ = cpu_isa() != CpuIsa::kBaseline;
};

Tensor lut4_gemm_cpu(const Tensor& x, const Tensor& qweight, const Tensor& codebook,
                     const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                     int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Lut4GemmParams params = check_lut4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"),
                                          as_view(codebook, "codebook"), as_view(scales, "scales"),
                                          as_view(bias, "bias"), group_size);
  Tensor out = new_empty_like_rows(x, params.n);
  params.out = out.mutable_data_ptr();
  dispatch_float(params.dtype, [&](auto element) {
    packed_gemm_cpu<decltype(element)>(params, CodebookDecoding(params), TorchThreads());
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "lut4_gemm(Tensor x, Tensor qweight, Tensor codebook, Tensor? scales=None, Tensor? "
      "bias=None, *, int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("lut4_gemm", TORCH_BOX(&lut4_gemm_cpu)); }

}  // namespace effllm
