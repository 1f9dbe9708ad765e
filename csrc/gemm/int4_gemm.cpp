// int4_gemm: schema and CPU implementation.
//
// There are three loops. packed_gemm_strip.h, compiled once per instruction set, multiplies in
// fp32; int4_gemm_avx512bf16.cpp and int4_gemm_amx.cpp take x as bf16, which it must be, and need
// what their names say. The choice is by dtype and processor, never by shape, as each has its own
// order of additions: a token's result does not depend on the batch.
#include "gemm/int4_gemm.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "common/dispatch.h"
#include "common/torch.h"
#include "gemm/int4_gemm_amx.h"
#include "gemm/int4_gemm_bf16_strip.h"
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

// Zero points in a table like that of the scales.
class ZerosTable {
 public:
  explicit ZerosTable(const Int4GemmParams& params) : params_(params) {}

  int64_t size() const { return kPackedCpuRows * stride_slot(); }
  int64_t stride_slot() const { return group_table_stride(params_.num_groups); }
  int64_t stride_group() const { return 1; }

  void prefetch(int64_t first_row, int64_t num_rows) const {
    if (params_.zeros == nullptr) return;
    prefetch_group_table(params_.zeros + first_row * params_.stride_zeros_n, params_.stride_zeros_n,
                         params_.stride_zeros_g, num_rows, params_.num_groups);
  }

 protected:
  template <class Loop, class Convert>
  void load_zeros(int64_t first_row, int64_t num_rows, float* memory,
                  const Convert& convert) const {
    load_group_table<Loop>(params_.zeros + first_row * params_.stride_zeros_n,
                           params_.stride_zeros_n, params_.stride_zeros_g, num_rows,
                           params_.num_groups, memory, convert);
  }

  const Int4GemmParams& params_;
};

// As Int4Decoder wants them.
class Fp32Decoding : public ZerosTable {
 public:
  using Loop = Fp32Loop;
  using ZerosTable::ZerosTable;

  void init(float* memory) const {
    if (params_.zeros != nullptr) return;
    std::fill(memory, memory + size(), kInt4PaddingCode + kInt4CpuCodeBias);
  }

  void load(int64_t first_row, int64_t num_rows, float* memory) const {
    if (params_.zeros == nullptr) return;
    load_zeros<Loop>(first_row, num_rows, memory,
                     [](uint8_t zero) { return zero + kInt4CpuCodeBias; });
  }

  void multiply(const PackedStrip& strip) const { kernel_(strip); }

 private:
  const PackedStripKernel kernel_ = int4_strip_kernel();
};

// The loop of int4_gemm_avx512bf16.cpp, for x that is bf16 already. It never leaves the order of
// rows.
struct Bf16Loop {
  using X = bfloat16;
  static constexpr int64_t kMaxTokens = kInt4Bf16MaxTokens;

  static constexpr int64_t padded_tokens(int64_t num_tokens) { return num_tokens; }

  static constexpr int64_t slot_of_row(int64_t row) { return row; }

  static void order(const bfloat16* columns, bfloat16* x) {
    constexpr int kPairs = kPackedCpuTileK / 2;
    uint32_t pairs[kPairs], ordered[kPairs];
    std::memcpy(pairs, columns, sizeof(pairs));
    for (int idx = 0; idx < kPairs; ++idx) ordered[idx] = pairs[int4_bf16_pair(idx)];
    std::memcpy(x, ordered, sizeof(ordered));
  }

  template <class T, class Threads>
  static void gather(const PackedGemmParams& params, int64_t num_tiles, TokenTile<bfloat16>* x,
                     const Threads& threads) {
    gather_tokens<T, Bf16Loop>(params, num_tiles, x, threads);
  }
};

// As Int4Bf16Strip wants them.
class Bf16Decoding : public ZerosTable {
 public:
  using Loop = Bf16Loop;
  using ZerosTable::ZerosTable;

  void init(float*) const {}

  void load(int64_t first_row, int64_t num_rows, float* memory) {
    if (params_.zeros == nullptr) return;
    uint8_t largest = 0;
    load_zeros<Loop>(first_row, num_rows, memory, [&](uint8_t zero) {
      largest = std::max(largest, zero);
      return std::bit_cast<float>(static_cast<uint8_t>(16 - zero) * 0x01010101u);
    });
    kind_ = largest <= 16 ? Int4Zeros::kUpTo16 : Int4Zeros::kUpTo255;
  }

  void multiply(const Int4Bf16Strip& strip) const { int4_strip_avx512bf16(strip, kind_); }

 private:
  // Of the strip, not of all: to find that out would take another pass over the tensor.
  Int4Zeros kind_ = Int4Zeros::kEight;
};

// The loop of int4_gemm_amx.cpp, which has its own order of tokens, too.
struct AmxLoop {
  using X = bfloat16;
  static constexpr int64_t kMaxTokens = kInt4AmxMaxTokens;

  static constexpr int64_t padded_tokens(int64_t num_tokens) {
    return amx_padded_tokens(num_tokens, kMaxTokens);
  }

  static constexpr int64_t slot_of_row(int64_t row) { return row; }

  template <class T, class Threads>
  static void gather(const PackedGemmParams& params, int64_t num_tiles, TokenTile<X>* x,
                     const Threads& threads) {
    constexpr int64_t kTiles = 16;  // of a task
    const int64_t num_tasks = ceil_div(num_tiles, kTiles);
    for (int64_t token = 0; token < params.m; token += kMaxTokens) {
      const int64_t num_tokens = std::min<int64_t>(params.m - token, kMaxTokens);
      const AmxTokens tokens{
          .x = static_cast<const T*>(params.x) + token * params.k,
          .k = params.k,
          .num_tokens = static_cast<int>(num_tokens),
          .tiles = x[token].columns,
          .stride_tile = padded_tokens(params.m) * kPackedCpuTileK,
      };
      threads.for_each(num_tasks, ceil_div<int64_t>(64, num_tokens), [&](int64_t task) {
        int4_gather_amx(tokens, task * kTiles, std::min(num_tiles, (task + 1) * kTiles),
                        has_two_groups_per_tile(params));
      });
    }
  }
};

// As Int4AmxStrip wants them.
class AmxDecoding : public ZerosTable {
 public:
  using Loop = AmxLoop;
  using ZerosTable::ZerosTable;

  void init(float* memory) const {
    std::fill(memory, memory + size(), int4_amx_decoding(kInt4PaddingCode));
  }

  void load(int64_t first_row, int64_t num_rows, float* memory) const {
    if (params_.zeros == nullptr) return;
    load_zeros<Loop>(first_row, num_rows, memory, int4_amx_decoding);
  }

  void multiply(const Int4AmxStrip& strip) const {
    int4_strip_amx(strip, params_.zeros != nullptr);
  }
};

void run_int4_gemm(const Int4GemmParams& params) {
  if constexpr (kHasX86Isas) {
    if (params.dtype == DType::kBFloat16 && cpu_isa() >= CpuIsa::kAmx) {
      return packed_gemm_cpu<bfloat16>(params, AmxDecoding(params), TorchThreads());
    }
    if (params.dtype == DType::kBFloat16 && cpu_isa() >= CpuIsa::kAvx512Bf16) {
      return packed_gemm_cpu<bfloat16>(params, Bf16Decoding(params), TorchThreads());
    }
  }
  dispatch_float(params.dtype, [&](auto element) {
    packed_gemm_cpu<decltype(element)>(params, Fp32Decoding(params), TorchThreads());
  });
}

// x with its columns in the order of the codes.
Tensor gather_columns(const Tensor& x, const Tensor& perm) {
  const View from = as_view(x, "x");
  const int64_t k = from.size(-1), rows = k == 0 ? 0 : from.numel() / k;
  const int32_t* source = as_view(perm, "perm").data_as<int32_t>();
  for (int64_t idx = 0; idx < k; ++idx) {
    if (source[idx] < 0 || source[idx] >= k) {
      fail("int4_gemm", "perm must be a permutation of 0 .. K - 1 = " + std::to_string(k - 1) +
                            ", got " + std::to_string(source[idx]) + " at " + std::to_string(idx));
    }
  }
  Tensor ordered = new_empty_like_rows(x, k);
  dispatch_float(from.dtype, [&](auto element) {
    using T = decltype(element);
    const T* in = from.data_as<T>();
    T* out = static_cast<T*>(ordered.mutable_data_ptr());
    for (int64_t row = 0; row < rows; ++row, in += k, out += k) {
      for (int64_t idx = 0; idx < k; ++idx) out[idx] = in[source[idx]];
    }
  });
  return ordered;
}

Tensor int4_gemm_cpu(const Tensor& x, const Tensor& qweight, const Tensor& scales,
                     const std::optional<Tensor>& zeros, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& perm, int64_t group_size) {
  const Tensor x_rows = torch::stable::contiguous(x);
  Int4GemmParams params = check_int4_gemm(as_view(x_rows, "x"), as_view(qweight, "qweight"),
                                          as_view(scales, "scales"), as_view(zeros, "zeros"),
                                          as_view(bias, "bias"), as_view(perm, "perm"), group_size);
  Tensor ordered;  // lives as long as params point into it
  if (perm) {
    ordered = gather_columns(x_rows, *perm);
    params.x = ordered.const_data_ptr();
  }
  Tensor out = new_empty_like_rows(x, params.n);
  params.out = out.mutable_data_ptr();
  run_int4_gemm(params);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "int4_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros=None, Tensor? bias=None, "
      "Tensor? perm=None, *, int group_size) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("int4_gemm", TORCH_BOX(&int4_gemm_cpu)); }

}  // namespace effllm
