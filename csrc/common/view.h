// A tensor as the checks and kernels see it: a pointer and numbers, no torch.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace effllm {

struct Device {
  enum class Type : uint8_t { kCPU, kCUDA, kOther };
  Type type;
  int32_t index;

  bool operator==(const Device&) const = default;
};

// Borrowed: valid while the tensor it was made from lives. Strides count elements.
struct View {
  const char* name;  // the argument's name in the schema, for error messages
  void* data;
  DType dtype;
  Device device;
  int rank;
  const int64_t* sizes;
  const int64_t* strides;

  // A negative dimension counts from the end, as in Python.
  int64_t size(int dim) const { return sizes[dim < 0 ? dim + rank : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? dim + rank : dim]; }

  int64_t numel() const {
    int64_t count = 1;
    for (int dim = 0; dim < rank; ++dim) count *= sizes[dim];
    return count;
  }

  // Whether every slice along the last dimension starts at a multiple of `bytes`.
  bool has_aligned_rows(int64_t bytes, int64_t element_bytes) const {
    bool aligned = reinterpret_cast<uintptr_t>(data) % bytes == 0;
    for (int dim = 0; dim + 1 < rank; ++dim) {
      if (sizes[dim] > 1) aligned &= strides[dim] * element_bytes % bytes == 0;
    }
    return aligned || numel() == 0;
  }

  template <class T>
  T* data_as() const {
    return static_cast<T*>(data);
  }
};

}  // namespace effllm
