// The only header that knows torch. It sees the stable ABI alone (torch/csrc/stable, headeronly),
// so a library built once runs under every later torch.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/check.h"
#include "common/view.h"

#ifdef USE_CUDA  // the CUDA library; the CPU library needs no toolkit
#include <cuda_runtime_api.h>
#endif

namespace effllm {

using torch::stable::parallel_for;
using torch::stable::Tensor;

inline DType as_dtype(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Byte:
      return DType::kUInt8;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat32;
    default:
      return DType::kOther;
  }
}

inline torch::headeronly::ScalarType as_scalar_type(DType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case DType::kUInt8:
      return ScalarType::Byte;
    case DType::kInt8:
      return ScalarType::Char;
    case DType::kInt32:
      return ScalarType::Int;
    case DType::kInt64:
      return ScalarType::Long;
    case DType::kFloat8E4M3:
      return ScalarType::Float8_e4m3fn;
    case DType::kFloat16:
      return ScalarType::Half;
    case DType::kBFloat16:
      return ScalarType::BFloat16;
    default:
      return ScalarType::Float;
  }
}

// For reading. The pointer loses its const so that one struct serves both; ops that write take
// `as_mutable_view`, which tells torch so (a lazily cloned tensor gets its own memory then).
inline View as_view(const Tensor& tensor, const char* name) {
  Device device{Device::Type::kOther, tensor.get_device_index()};
  if (tensor.is_cpu()) device = {Device::Type::kCPU, 0};
  if (tensor.is_cuda()) device.type = Device::Type::kCUDA;
  return {name,
          const_cast<void*>(tensor.const_data_ptr()),
          as_dtype(tensor.scalar_type()),
          device,
          static_cast<int>(tensor.dim()),
          tensor.sizes().data(),
          tensor.strides().data()};
}

inline std::optional<View> as_view(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor) return std::nullopt;
  return as_view(*tensor, name);
}

inline View as_mutable_view(const Tensor& tensor, const char* name) {
  View view = as_view(tensor, name);
  view.data = tensor.mutable_data_ptr();
  return view;
}

inline std::optional<View> as_mutable_view(const std::optional<Tensor>& tensor, const char* name) {
  if (!tensor) return std::nullopt;
  return as_mutable_view(*tensor, name);
}

// A contiguous, uninitialised tensor on the device of `like`.
inline Tensor new_empty(const Tensor& like, std::initializer_list<int64_t> sizes, DType dtype) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, as_scalar_type(dtype));
}

// [..., n] for x [..., K]: the output of a linear layer.
inline Tensor new_empty_like_rows(const Tensor& x, int64_t n, DType dtype) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = n;
  return torch::stable::new_empty(x, {sizes.data(), sizes.size()}, as_scalar_type(dtype));
}

inline Tensor new_empty_like_rows(const Tensor& x, int64_t n) {
  return new_empty_like_rows(x, n, as_dtype(x.scalar_type()));
}

// With all dimensions but the last in one: a view where strides allow it, else a copy.
inline Tensor flatten_rows(const Tensor& tensor) {
  return tensor.dim() > 2 ? torch::stable::flatten(tensor, 0, -2) : tensor;
}

// [M, K] for [..., K], neighbours in a row beside each other: a view where strides allow it, else a
// copy. One dimension stays one.
inline Tensor as_rows(const Tensor& tensor) {
  const Tensor rows = flatten_rows(tensor);
  return rows.stride(rows.dim() - 1) == 1 ? rows : torch::stable::contiguous(rows);
}

// The tensor, or a copy of it if not all of its rows start at multiples of so many bytes.
inline Tensor with_aligned_rows(const Tensor& tensor, int64_t bytes) {
  const auto element_bytes = static_cast<int64_t>(tensor.element_size());
  if (as_view(tensor, "").has_aligned_rows(bytes, element_bytes)) return tensor;
  return torch::stable::clone(torch::stable::contiguous(tensor));
}

// [N] of [N, K], contiguous.
inline Tensor sum_of_rows(const Tensor& matrix, DType dtype) {
  const int64_t last = 1;
  return torch::stable::sum(matrix, torch::headeronly::IntHeaderOnlyArrayRef(&last, 1), false,
                            as_scalar_type(dtype));
}

// Contiguous and uninitialised, in the shape of `like`.
inline Tensor new_empty_as(const Tensor& like, DType dtype) {
  return torch::stable::new_empty(like, like.sizes(), as_scalar_type(dtype));
}

// Scales in memory [groups, round_up(M, 4)] as [..., groups] for the M rows of x [..., K].
inline Tensor as_scales_of_rows(Tensor scales, const Tensor& x) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  int64_t rows = 1;
  for (size_t dim = 0; dim + 1 < sizes.size(); ++dim) rows *= sizes[dim];
  sizes.back() = scales.size(0);
  const Tensor by_row = torch::stable::transpose(torch::stable::narrow(scales, 1, 0, rows), 0, 1);
  return torch::stable::view(by_row, {sizes.data(), sizes.size()});
}

// Uninitialised ones.
inline Tensor new_scales_of_rows(const Tensor& x, int64_t groups, int64_t stride) {
  return as_scales_of_rows(new_empty(x, {groups, stride}, DType::kFloat32), x);
}

// Codes of `dtype` and scales for the rows of x, uninitialised; `rows` (quant/code_rows.h) learns
// where they are.
template <class Rows>
std::tuple<Tensor, Tensor> new_codes_of_rows(const Tensor& x, DType dtype, Rows& rows) {
  Tensor codes = new_empty_as(x, dtype);
  Tensor scales = rows.given_scale != nullptr
                      ? new_empty(x, {1}, DType::kFloat32)
                      : new_scales_of_rows(x, rows.num_groups, rows.stride_scales_group);
  rows.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  rows.scales = static_cast<float*>(scales.mutable_data_ptr());
  return {codes, scales};
}

// The views of a list argument, named "outs[0]", "outs[1]", ...
struct ViewList {
  ViewList() = default;
  ViewList(const ViewList&) = delete;  // the views point into `names`
  ViewList(ViewList&&) = default;

  std::vector<std::string> names;
  std::vector<View> views;
};

inline ViewList as_views(const std::vector<Tensor>& tensors, const std::string& name,
                         View (*view_of)(const Tensor&, const char*) = as_view) {
  ViewList list;
  for (size_t idx = 0; idx < tensors.size(); ++idx) {
    list.names.push_back(name + "[" + std::to_string(idx) + "]");
  }
  for (size_t idx = 0; idx < tensors.size(); ++idx) {
    list.views.push_back(view_of(tensors[idx], list.names[idx].c_str()));
  }
  return list;
}

inline std::vector<int64_t> element_bytes_of(const std::vector<Tensor>& tensors) {
  std::vector<int64_t> bytes;
  for (const Tensor& tensor : tensors) bytes.push_back(static_cast<int64_t>(tensor.element_size()));
  return bytes;
}

// torch's threads, for loops in headers that shall not see torch.
struct TorchThreads {
  int64_t count() const { return torch::stable::get_num_threads(); }

  // body(0) .. body(n - 1), in any order, `grain` of them at least on each thread.
  template <class Body>
  void for_each(int64_t n, int64_t grain, const Body& body) const {
    parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      for (int64_t idx = begin; idx < end; ++idx) body(idx);
    });
  }
};

#ifdef USE_CUDA
// The stream that torch launches on for the device of `tensor`.
inline cudaStream_t current_cuda_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace effllm
