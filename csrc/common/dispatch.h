// Run-time values into compile-time ones, by templates.
#pragma once

#include <type_traits>
#include <utility>

#include "common/dtype.h"

namespace effllm {

// Calls `body` with a value of the C++ type of `dtype`; the caller has checked that it is a float.
template <class Body>
constexpr decltype(auto) dispatch_float(DType dtype, Body&& body) {
  switch (dtype) {
    case DType::kFloat16:
      return std::forward<Body>(body)(float16{});
    case DType::kBFloat16:
      return std::forward<Body>(body)(bfloat16{});
    default:
      return std::forward<Body>(body)(float{});
  }
}

// The same of the two 16-bit types.
template <class Body>
constexpr decltype(auto) dispatch_16bit(DType dtype, Body&& body) {
  if (dtype == DType::kFloat16) return std::forward<Body>(body)(float16{});
  return std::forward<Body>(body)(bfloat16{});
}

}  // namespace effllm
