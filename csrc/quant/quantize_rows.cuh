// The kernel of fp8_quantize and int8_quantize.
//
// Roofline: bytes. x is read once and one byte per element is written; the activations of a
// decoding step are so few that the launch is what it costs.
//
//   x [M, K]   | row m ........................ |   block m (of a piece), octet by octet, as
//                                                   code_rows.cuh draws it
#pragma once

#include "quant/code_rows.cuh"

namespace effllm {

struct QuantizeRowsKernelParams : QuantizeRowsParams {
  int64_t num_pieces;
};

// Scale: the type of the codes (code_scale.cuh).
template <class Scale, class T, int kSlots>
__global__ void __launch_bounds__(kMaxRowLanes, kRowBlocksPerSm<kSlots>)
    quantize_rows_kernel(const __grid_constant__ QuantizeRowsKernelParams params) {
  __shared__ int32_t of_warps[kMaxRowWarps];
  const CodeRows& rows = params.rows;
  store_given_scale(rows);
  const int k = static_cast<int>(rows.k);
  const RowPiece piece = piece_of_block(k, params.num_pieces);
  if (piece.row >= rows.m) return;
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
    quantize_piece<Scale, kSlots>(rows, piece, of_warps,
                                  [&](int slot, int) -> const Octet<T>& { return row[slot]; });
  } else {
    quantize_piece<Scale, 0>(rows, piece, of_warps, [&](int, int column) { return load(column); });
  }
}

inline RowsLaunch quantize_rows_launch(const QuantizeRowsParams& params) {
  const bool in_pieces = params.rows.is_grouped() || params.rows.given_scale != nullptr;
  return rows_launch(params.rows, in_pieces, params.x.wide);
}

}  // namespace effllm
