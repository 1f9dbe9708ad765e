// Codes of a quantised cache as 16-bit floats of any type, for kernels that multiply in that type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx/cvt.cuh"
#include "quant/dequant.cuh"

namespace effllm {

// 8 Elements, in their order, from the words of an octet of codes. Exact.
template <class Octet, class Element>
__device__ __forceinline__ uint4 elements_of_codes(const uint32_t* codes,
                                                   typename Octet::Bias bias) {
  uint32_t pairs[4];
  Octet::decode(codes, bias, pairs);
  float x[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
    const int d = Octet::kPairDistance == 1 ? 2 * i : i;
    x[d] = pair.x, x[d + Octet::kPairDistance] = pair.y;
  }
  return {ptx::pack_pair<Element>(x[0], x[1]), ptx::pack_pair<Element>(x[2], x[3]),
          ptx::pack_pair<Element>(x[4], x[5]), ptx::pack_pair<Element>(x[6], x[7])};
}

}  // namespace effllm
