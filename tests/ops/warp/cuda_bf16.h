// CUDA's bf16 for a warp on the CPU: storage and conversions, by those of common/dtype.h.
#pragma once

#include "common/dtype.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  return effllm::to_float(effllm::bfloat16{value.bits});
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {effllm::from_float<effllm::bfloat16>(value).bits};
}

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
