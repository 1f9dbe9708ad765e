// CUDA's conversion to e4m3 for a warp on the CPU, by that of common/dtype.h.
#pragma once

#include "common/dtype.h"
#include "cuda_runtime.h"

enum __nv_saturation_t { __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3 };

inline uint8_t __nv_cvt_float_to_fp8(float value, __nv_saturation_t, __nv_fp8_interpretation_t) {
  return effllm::from_float<effllm::float8_e4m3>(value).bits;
}

inline uint16_t __nv_cvt_float2_to_fp8x2(float2 pair, __nv_saturation_t saturation,
                                         __nv_fp8_interpretation_t interpretation) {
  const int high = __nv_cvt_float_to_fp8(pair.y, saturation, interpretation);
  return static_cast<uint16_t>(high << 8 |
                               __nv_cvt_float_to_fp8(pair.x, saturation, interpretation));
}
