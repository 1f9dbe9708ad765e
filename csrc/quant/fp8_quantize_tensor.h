// fp8_quantize_tensor: x as e4m3 codes with one scale, x ~ code * scale.
//
//   x       [...]  fp16, bf16 or fp32, contiguous
//   scale   one element of any float dtype and shape, known beforehand; None: that of x
//   xq      [...]  e4m3, contiguous
//   result  [1]    fp32: the scale in use
//
// The scale of x is found as fp8_layout.h says: NaN or infinity anywhere makes it NaN. By a given
// one codes are what the division gives: NaN becomes NaN, infinity saturates as all else does.
#pragma once

#include <cstdint>
#include <optional>

#include "common/check.h"
#include "common/view.h"
#include "quant/fp8_layout.h"

namespace effllm {

struct Fp8QuantizeTensorParams {
  int64_t numel;
  DType dtype;
  const void* x;
  const void* given_scale;  // null: to be found
  DType given_scale_dtype;
  uint8_t* codes;
  float* scale;
};

// Everything but what is written.
inline Fp8QuantizeTensorParams check_fp8_quantize_tensor(const View& x,
                                                         const std::optional<View>& scale) {
  Check check("fp8_quantize_tensor");
  check(x).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
  Fp8QuantizeTensorParams params{};
  params.numel = x.numel();
  params.dtype = x.dtype;
  params.x = x.data;
  if (scale) {
    check(*scale).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});
    check.that(scale->numel() == 1,
               "scale must have one element, got " + format_list(scale->sizes, scale->rank));
    params.given_scale = scale->data;
    params.given_scale_dtype = scale->dtype;
  }
  return params;
}

}  // namespace effllm
