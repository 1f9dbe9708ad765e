// CUDA's fp16 for a warp on the CPU: storage and conversions, by those of common/dtype.h.
#pragma once

#include "common/dtype.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) { return effllm::to_float(effllm::float16{value.bits}); }
inline __half __float2half_rn(float value) {
  return {effllm::from_float<effllm::float16>(value).bits};
}
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __half2half2(__half value) { return {value, value}; }
inline __half2 __high2half2(__half2 pair) { return {pair.y, pair.y}; }
inline float __low2float(__half2 pair) { return __half2float(pair.x); }
inline float __high2float(__half2 pair) { return __half2float(pair.y); }
inline float2 __half22float2(__half2 pair) { return {__low2float(pair), __high2float(pair)}; }
inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__low2float(a) + __low2float(b), __high2float(a) + __high2float(b));
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__low2float(a) - __low2float(b), __high2float(a) - __high2float(b));
}
