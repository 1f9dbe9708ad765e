// The 16-bit floats in device code: CUDA's own types, and conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/dtype.h"

namespace effllm {

// CUDA's own types of our storage types: same bits, with arithmetic.
template <class T>
struct DeviceType;

template <>
struct DeviceType<float16> {
  using type = __half;
};

template <>
struct DeviceType<bfloat16> {
  using type = __nv_bfloat16;
};

template <>
struct DeviceType<float> {
  using type = float;
};

template <class T>
using device_t = typename DeviceType<T>::type;

__device__ __forceinline__ float device_to_float(float value) { return value; }
__device__ __forceinline__ float device_to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float device_to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}

template <class T>
__device__ __forceinline__ T device_from_float(float value);

template <>
__device__ __forceinline__ float device_from_float<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ __half device_from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <>
__device__ __forceinline__ __nv_bfloat16 device_from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// A float of any type as it lies in memory. To convert it waits for the load, so that is left for
// later.
__device__ __forceinline__ uint32_t device_load_bits(const void* data, DType dtype) {
  if (dtype == DType::kFloat32) return *static_cast<const uint32_t*>(data);
  return *static_cast<const uint16_t*>(data);
}

__device__ __forceinline__ float device_bits_to_float(uint32_t bits, DType dtype) {
  if (dtype == DType::kFloat32) return __uint_as_float(bits);
  if (dtype == DType::kBFloat16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
}

// Element `index` of a buffer whose type is known only at run time (scales, bias).
__device__ __forceinline__ float device_load_float(const void* data, DType dtype, int64_t index) {
  switch (dtype) {
    case DType::kFloat16:
      return __half2float(static_cast<const __half*>(data)[index]);
    case DType::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

}  // namespace effllm
