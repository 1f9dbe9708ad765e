// The kernel of the ops that quantise an RMS norm, of rows as they are or of sums.
//
// Roofline: bytes. x is read once and one byte per element is written; with a residual, that is
// read and the sum written as well.
//
//   x [M, K]   | row m ........................ |   block m, octet by octet, as code_rows.cuh draws
//   it:
//              sum of squares -> 1 / rms -> largest magnitude -> codes, the row in registers
#pragma once

#include "quant/code_rows.cuh"
#include "quant/rms_norm_rows.h"

namespace effllm {

// x, and what is added to it.
template <class T, bool kAdd>
struct RmsNormLoad {
  Octet<T> x;
  Octet<T> residual;
};

template <class T>
struct RmsNormLoad<T, false> {
  Octet<T> x;
};

// h / rms, rounded, times the weight.
template <class T>
__device__ __forceinline__ Octet<T> normalised(const Octet<T>& h, const Octet<T>& weight,
                                               float inverse_rms) {
  Octet<T> y;
  float values[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = __fmul_rn(h.value(i), inverse_rms);
  y.set(values);
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = __fmul_rn(y.value(i), weight.value(i));
  y.set(values);
  return y;
}

// Scale: the type of the codes (code_scale.cuh).
template <class Scale, class T, int kSlots, bool kAdd>
__global__ void __launch_bounds__(kMaxRowLanes, kRowBlocksPerSm<kSlots>)
    rms_norm_rows_kernel(const __grid_constant__ RmsNormParams params) {
  __shared__ float sums_of_warps[kMaxRowWarps];
  __shared__ int32_t largest_of_warps[kMaxRowWarps];
  const CodeRows& rows = params.rows;
  store_given_scale(rows);
  const int k = static_cast<int>(rows.k);
  const RowPiece piece{blockIdx.x, 0, k};
  if (piece.row >= rows.m) return;
  const T* x = static_cast<const T*>(params.x.data) + piece.row * params.x.stride;
  const T* residual = static_cast<const T*>(params.residual.data);
  T* residual_out = static_cast<T*>(params.residual_out);
  if constexpr (kAdd) {
    residual += piece.row * params.residual.stride;
    residual_out += piece.row * rows.k;
  }
  const T* weight = static_cast<const T*>(params.weight);
  const bool wide = kSlots > 0 || params.wide();

  using Loaded = RmsNormLoad<T, kAdd>;
  const auto load = [&](int column) {
    Loaded loaded;
    loaded.x.load(x, column, k, wide);
    if constexpr (kAdd) loaded.residual.load(residual, column, k, wide);
    return loaded;
  };
  const auto add = [&](const Loaded& loaded) {
    if constexpr (kAdd) {
      float values[kOctet];
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        values[i] = __fadd_rn(loaded.x.value(i), loaded.residual.value(i));
      }
      Octet<T> h;
      h.set(values);
      return h;
    } else {
      return loaded.x;
    }
  };
  float sums[kOctet] = {};
  const auto make = [&](const Loaded& loaded, int column) {
    const Octet<T> h = add(loaded);
    if constexpr (kAdd) h.store(residual_out, column, k, wide);
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      sums[i] = __fadd_rn(sums[i], __fmul_rn(h.value(i), h.value(i)));
    }
    return h;
  };

  // Where registers are free, the weight comes along with x rather than after the sum.
  constexpr bool kWeightAhead = kSlots > 0 && kSlots * sizeof(T) <= 4;
  Octet<T> weights[kWeightAhead ? kSlots : 1];
  if constexpr (kWeightAhead) {
    for_each_slot<kSlots>(piece, [&](int slot, int column) {
      if (column < k) weights[slot].load(weight, column, k, wide);
    });
  }
  Octet<T> row[kSlots > 0 ? kSlots : 1];
  if constexpr (kSlots > 0) {
    make_octets(piece, row, load, make);
  } else {
    for_each_slot<0>(piece, [&](int, int column) {
      if (column < k) make(load(column), column);
    });
  }
#pragma unroll
  for (int half = kOctet / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] = __fadd_rn(sums[i], sums[i + half]);
  }
  const float sum =
      block_fold(sums[0], sums_of_warps, [](float a, float b) { return __fadd_rn(a, b); });
  const float mean = sum / static_cast<float>(k);
  const float inverse_rms = 1.f / sqrtf(__fadd_rn(mean, params.eps));

  const auto normalise = [&](const Octet<T>& h, int slot, int column) {
    Octet<T> w;
    if constexpr (kWeightAhead) {
      w = weights[slot];
    } else {
      w.load(weight, column, k, wide);
    }
    return normalised(h, w, inverse_rms);
  };
  if constexpr (kSlots > 0) {
    for_each_slot<kSlots>(piece, [&](int slot, int column) {
      if (column < k) row[slot] = normalise(row[slot], slot, column);
    });
    quantize_piece<Scale, kSlots>(rows, piece, largest_of_warps,
                                  [&](int slot, int) -> const Octet<T>& { return row[slot]; });
  } else {
    quantize_piece<Scale, 0>(rows, piece, largest_of_warps, [&](int, int column) {
      return normalise(add(load(column)), 0, column);
    });
  }
}

inline RowsLaunch rms_norm_rows_launch(const RmsNormParams& params) {
  return rows_launch(params.rows, false, params.wide());
}

}  // namespace effllm
