// The kernel of int8_quantize_asymmetric.
//
// Roofline: bytes, as of int8_quantize: x is read once and one byte per element is written; of a
// decoding step the launch is what it costs.
//
//   x [M, K]   | row m ........................ |   block m, octet by octet, as code_rows.cuh
//                                                   draws it; both ends of its range in one fold
#pragma once

#include <cstdint>

#include "quant/code_rows.cuh"
#include "quant/int8_encode.cuh"
#include "quant/int8_quantize_asymmetric.h"

namespace effllm {

// Two magnitudes' bits in a word.
__device__ __forceinline__ uint64_t larger_of_both(uint64_t a, uint64_t b) {
  const auto high = max(static_cast<uint32_t>(a >> 32), static_cast<uint32_t>(b >> 32));
  const auto low = max(static_cast<uint32_t>(a), static_cast<uint32_t>(b));
  return uint64_t{high} << 32 | low;
}

template <class T, int kSlots>
__global__ void __launch_bounds__(kMaxRowLanes, kRowBlocksPerSm<kSlots>)
    int8_quantize_asymmetric_kernel(const __grid_constant__ AsymmetricRowsParams params) {
  __shared__ uint64_t of_warps[kMaxRowWarps];
  const CodeRows& rows = params.rows;
  const int k = static_cast<int>(rows.k);
  const RowPiece piece = piece_of_block(k, 1);
  const T* x = static_cast<const T*>(params.x.data) + piece.row * params.x.stride;
  const bool wide = kSlots > 0 || params.x.wide;
  uint8_t* codes = rows.codes + piece.row * rows.k;

  const auto load = [&](int column) {
    Octet<T> loaded;
    loaded.load(x, column, k, wide);
    return loaded;
  };
  const auto quantize = [&](const auto& read) {
    int32_t positive = 0, negative = 0;
    for_each_slot<kSlots>(piece, [&](int slot, int column) {
      if (column >= piece.end) return;
      const Octet<T>& octet = read(slot, column);
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        const int32_t bits = __float_as_int(octet.value(i));
        positive = max(positive, bits);
        negative = max(negative, bits ^ INT32_MIN);
      }
    });
    const uint64_t both = block_fold(
        uint64_t{static_cast<uint32_t>(positive)} << 32 | static_cast<uint32_t>(negative), of_warps,
        larger_of_both);
    const auto by =
        AsymmetricInt8Scale::of(static_cast<int32_t>(both >> 32), static_cast<int32_t>(both));
    if (threadIdx.x == 0) {
      rows.scales[piece.row] = by.scale;
      params.zeros[piece.row] = static_cast<int8_t>(by.zero);
    }
    for_each_slot<kSlots>(piece, [&](int slot, int column) {
      if (column < piece.end) {
        store_octet(read(slot, column), by, codes, column, k, kSlots > 0 || k % kOctet == 0);
      }
    });
  };
  if constexpr (kSlots > 0) {
    Octet<T> row[kSlots];
    make_octets(piece, row, load, [](const Octet<T>& loaded, int) { return loaded; });
    quantize([&](int slot, int) -> const Octet<T>& { return row[slot]; });
  } else {
    quantize([&](int, int column) { return load(column); });
  }
}

inline RowsLaunch asymmetric_rows_launch(const AsymmetricRowsParams& params) {
  return rows_launch(params.rows, false, params.x.wide);
}

}  // namespace effllm
