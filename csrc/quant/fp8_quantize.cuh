// fp8_quantize's kernel.
//
// Roofline: bytes. x is read once and one byte per element is written; the activations of a
// decoding step are so few that the launch is what it costs.
//
//   x [M, K]   | row m ........................ |   block m (of a piece), octet by octet, as
//                                                   fp8_rows.cuh draws it
#pragma once

#include "quant/fp8_quantize.h"
#include "quant/fp8_rows.cuh"

namespace effllm {

struct Fp8QuantizeKernelParams : Fp8QuantizeParams {
  int64_t num_pieces;
};

template <class T, int kSlots>
__global__ void __launch_bounds__(kMaxRowLanes, kRowBlocksPerSm<kSlots>)
    fp8_quantize_kernel(const __grid_constant__ Fp8QuantizeKernelParams params) {
  __shared__ int32_t of_warps[kMaxRowWarps];
  const Fp8Rows& rows = params.rows;
  const int k = static_cast<int>(rows.k);
  const RowPiece piece = piece_of_block(k, params.num_pieces);
  const T* x = static_cast<const T*>(params.x.data) + piece.row * params.x.stride;
  const bool wide = kSlots > 0 || params.x.wide;

  const auto load = [&](int column) {
    Octet<T> loaded;
    loaded.load(x, column, k, wide);
    return loaded;
  };
  if constexpr (kSlots > 0) {
    Octet<T> row[kSlots];
    make_octets(piece, row, load, [](const Octet<T>& loaded, int) { return loaded; });
    quantize_piece<kSlots>(rows, piece, of_warps,
                           [&](int slot, int) -> const Octet<T>& { return row[slot]; });
  } else {
    quantize_piece<0>(rows, piece, of_warps, [&](int, int column) { return load(column); });
  }
}

inline RowsLaunch fp8_quantize_launch(const Fp8QuantizeParams& params) {
  return rows_launch(params.rows, params.rows.is_grouped(), params.x.wide);
}

}  // namespace effllm
