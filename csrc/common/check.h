// Argument checks written as patterns. A contract reads as its documentation does:
//
//   Check check("kv_append");
//   Sym tokens("T"), heads("HKV"), dim("D");
//   check(k).dtype({DType::kFloat16, DType::kBFloat16}).shape({tokens, heads, dim});
//   check(v).dtype({k.dtype}).shape({tokens, heads, dim});
//
// The first match binds a symbol, later ones must agree. Every failure throws std::runtime_error
// (RuntimeError in Python) that names op, argument, what was needed and what was found:
//
//   effllm::kv_append: v must be [T, HKV, D] = [17, 8, 128], got [17, 8, 64]
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

#include "common/view.h"

namespace effllm {

// A dimension that the first tensor matched against it decides.
class Sym {
 public:
  explicit Sym(const char* name) : name_(name) {}

  int64_t operator*() const { return *value_; }
  const char* name() const { return name_; }

 private:
  friend class Match;
  const char* name_;
  std::optional<int64_t> value_;
};

// One entry of a shape pattern: a symbol, or a size that follows from others and how it is written.
struct Dim {
  Dim(Sym& symbol) : symbol(&symbol), label(symbol.name()) {}  // NOLINT: implicit by design
  Dim(const char* label, int64_t size) : label(label), size(size) {}

  Sym* symbol = nullptr;
  const char* label;
  int64_t size = -1;
};

inline std::string format_list(const int64_t* values, int count) {
  std::string text = "[";
  for (int i = 0; i < count; ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(values[i]);
  }
  return text + "]";
}

inline std::string format_device(Device device) {
  switch (device.type) {
    case Device::Type::kCPU:
      return "cpu";
    case Device::Type::kCUDA:
      return "cuda:" + std::to_string(device.index);
    case Device::Type::kOther:
      break;
  }
  return "another device";
}

[[noreturn]] inline void fail(const char* op, const std::string& message) {
  throw std::runtime_error("effllm::" + std::string(op) + ": " + message);
}

// The checks of one argument; each returns the match, so that they chain.
class Match {
 public:
  Match(const char* op, const View& view) : op_(op), view_(view) {}

  const Match& dtype(std::initializer_list<DType> allowed) const {
    for (DType candidate : allowed) {
      if (view_.dtype == candidate) return *this;
    }
    std::string list;
    for (DType candidate : allowed) {
      if (!list.empty()) list += candidate == *(allowed.end() - 1) ? " or " : ", ";
      list += dtype_name(candidate);
    }
    fail_argument("must be " + list + ", got " + dtype_name(view_.dtype));
  }

  const Match& shape(std::initializer_list<Dim> pattern) const {
    bool matches = view_.rank == static_cast<int>(pattern.size());
    int axis = 0;
    for (const Dim& dim : pattern) {
      if (!matches) break;
      const int64_t found = view_.sizes[axis++];
      if (dim.symbol != nullptr && !dim.symbol->value_) dim.symbol->value_ = found;
      matches = found == (dim.symbol != nullptr ? *dim.symbol->value_ : dim.size);
    }
    if (!matches) fail_shape(pattern);
    return *this;
  }

  // For [..., K]: any number of leading dimensions, at least none.
  const Match& last_dim(Sym& symbol) const {
    if (view_.rank == 0)
      fail_argument("must be [..., " + std::string(symbol.name()) + "], got a scalar");
    const int64_t found = view_.size(-1);
    if (!symbol.value_) symbol.value_ = found;
    if (found != *symbol.value_) {
      fail_argument("must be [..., " + std::string(symbol.name()) + "] with " + symbol.name() +
                    " = " + std::to_string(*symbol.value_) + ", got " +
                    format_list(view_.sizes, view_.rank));
    }
    return *this;
  }

  const Match& same_shape(const View& other) const {
    bool matches = view_.rank == other.rank;
    for (int dim = 0; matches && dim < view_.rank; ++dim) {
      matches = view_.sizes[dim] == other.sizes[dim];
    }
    if (!matches) {
      fail_argument("must be " + format_list(other.sizes, other.rank) + " as " + other.name +
                    " is, got " + format_list(view_.sizes, view_.rank));
    }
    return *this;
  }

  const Match& last_stride_one() const {
    if (view_.size(-1) > 1 && view_.stride(-1) != 1) {
      fail_argument("must have stride 1 in its last dimension, got strides " +
                    format_list(view_.strides, view_.rank));
    }
    return *this;
  }

  // Kernels read `bytes` at once from the start of every slice along the last dimension.
  const Match& aligned(int64_t bytes, int64_t element_bytes) const {
    if (!view_.has_aligned_rows(bytes, element_bytes)) {
      fail_argument("must have rows that start at multiples of " + std::to_string(bytes) +
                    " bytes, got strides " + format_list(view_.strides, view_.rank) + " of " +
                    std::to_string(element_bytes) + " bytes from address offset " +
                    std::to_string(reinterpret_cast<uintptr_t>(view_.data) % bytes));
    }
    return *this;
  }

 private:
  [[noreturn]] void fail_argument(const std::string& message) const {
    fail(op_, std::string(view_.name) + " " + message);
  }

  [[noreturn]] void fail_shape(std::initializer_list<Dim> pattern) const {
    std::string labels = "[", sizes = "[";
    for (const Dim& dim : pattern) {
      if (labels.size() > 1) labels += ", ", sizes += ", ";
      labels += dim.label;
      const bool known = dim.symbol == nullptr || dim.symbol->value_;
      sizes += known ? std::to_string(dim.symbol != nullptr ? *dim.symbol->value_ : dim.size) : "?";
    }
    fail_argument("must be " + labels + "] = " + sizes + "], got " +
                  format_list(view_.sizes, view_.rank));
  }

  const char* op_;
  const View& view_;
};

class Check {
 public:
  explicit Check(const char* op) : op_(op) {}

  // Starts the checks of `view`. All arguments of an op live on one device: the first decides.
  Match operator()(const View& view) {
    if (first_ == nullptr) first_ = &view;
    if (view.device != first_->device) {
      fail(op_, std::string(view.name) + " must be on " + format_device(first_->device) + " as " +
                    first_->name + " is, got " + format_device(view.device));
    }
    return Match(op_, view);
  }

  // A condition that is not about one tensor's type or shape; `message` says needed and found.
  void that(bool condition, const std::string& message) const {
    if (!condition) fail(op_, message);
  }

 private:
  const char* op_;
  const View* first_ = nullptr;
};

}  // namespace effllm
