// The kernel of silu_mul_fp8_quantize and silu_mul_int8_quantize.
//
// Roofline: bytes. gate and up are read once and one byte per element is written; with 16-bit
// inputs the some 50 instructions per element take nearly as long, on an H100, as their 5 bytes.
//
//   gate_up [M, 2K]   | gate: row m ........ | up: row m .......... |
//                        block m (of a piece) takes both, octet by octet, as code_rows.cuh draws it
#pragma once

#include "quant/code_rows.cuh"
#include "quant/silu_mul_rows.h"

namespace effllm {

// silu() of silu_mul_rows.h, without fused multiply-adds, for the bits to be those of the
// CPU. Only the reciprocal, which is rounded to nearest there, is found by them: two iterations of
// Newton's method from one that is nearly right, without the branch of the compiler's division.
__device__ __forceinline__ float device_silu(float g) {
  const float t = __fmul_rn(fminf(g, kLargestG), kMinusLog2E);
  const float rounded = __fadd_rn(t, kRounder);
  const float f = __fadd_rn(t, -__fadd_rn(rounded, -kRounder));
  float power = __fadd_rn(__fmul_rn(kPower5, f), kPower4);
  power = __fadd_rn(__fmul_rn(power, f), kPower3);
  power = __fadd_rn(__fmul_rn(power, f), kPower2);
  power = __fadd_rn(__fmul_rn(power, f), kPower1);
  power = __fadd_rn(__fmul_rn(power, f), 1.f);
  const uint32_t bits = __float_as_uint(power) + (__float_as_uint(rounded) << 23);
  const uint32_t sum_bits = __float_as_uint(__fadd_rn(1.f, __uint_as_float(bits))) & ~1u;
  const float sum = __uint_as_float(sum_bits);
  float sigmoid = __fdividef(1.f, sum);
#pragma unroll
  for (int i = 0; i < 2; ++i) sigmoid = fmaf(fmaf(-sum, sigmoid, 1.f), sigmoid, sigmoid);
  return __fmul_rn(g, g < __uint_as_float(kLeastGBits) ? 0.f : sigmoid);
}

struct SiluMulKernelParams : SiluMulParams {
  int64_t num_pieces;
};

template <class T>
struct GateUp {
  Octet<T> gate, up;
};

// Scale: the type of the codes (code_scale.cuh).
template <class Scale, class T, int kSlots>
__global__ void __launch_bounds__(kMaxRowLanes, kRowBlocksPerSm<kSlots>)
    silu_mul_rows_kernel(const __grid_constant__ SiluMulKernelParams params) {
  __shared__ int32_t of_warps[kMaxRowWarps];
  const CodeRows& rows = params.rows;
  store_given_scale(rows);
  const int k = static_cast<int>(rows.k);
  const RowPiece piece = piece_of_block(k, params.num_pieces);
  if (piece.row >= rows.m) return;
  const T* gate = static_cast<const T*>(params.gate.data) + piece.row * params.gate.stride;
  const T* up = static_cast<const T*>(params.up.data) + piece.row * params.up.stride;
  const bool wide = kSlots > 0 || (params.gate.wide && params.up.wide);

  const auto load = [&](int column) {
    GateUp<T> loaded;
    loaded.gate.load(gate, column, k, wide);
    loaded.up.load(up, column, k, wide);
    return loaded;
  };
  const auto make = [](const GateUp<T>& loaded, int) {
    float values[kOctet];
    Octet<T> y;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[i] = device_silu(loaded.gate.value(i));
    y.set(values);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) values[i] = __fmul_rn(y.value(i), loaded.up.value(i));
    y.set(values);
    return y;
  };
  if constexpr (kSlots > 0) {
    Octet<T> made[kSlots];
    make_octets(piece, made, load, make);
    quantize_piece<Scale, kSlots>(rows, piece, of_warps,
                                  [&](int slot, int) -> const Octet<T>& { return made[slot]; });
  } else {
    quantize_piece<Scale, 0>(rows, piece, of_warps,
                             [&](int, int column) { return make(load(column), column); });
  }
}

inline RowsLaunch silu_mul_rows_launch(const SiluMulParams& params) {
  const bool in_pieces = params.rows.is_grouped() || params.rows.given_scale != nullptr;
  const bool wide = params.gate.wide && params.up.wide;
  return rows_launch(params.rows, in_pieces, wide);
}

}  // namespace effllm
