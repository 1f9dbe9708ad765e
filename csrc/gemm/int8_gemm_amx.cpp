// int8 weights with AMX. A tile register has 16 rows of 64 bytes: of W as it lies in memory, and of
// x four columns of 16 tokens, which is why panels are what they are. Rows of W cost as many loads
// as panels of x, so that two of each meet:
//
//                       x, panel 0   panel 1
//                       [ tile 6 ] [ tile 7 ]
//   W, 16 rows [tile 4] [ sums 0 ] [ sums 1 ]
//      16 more [tile 5] [ sums 2 ] [ sums 3 ]
//
// For many tokens 4 products of 16 clocks for 4 loads of 8; for few the bytes of W.
#include "gemm/int8_gemm_amx.h"

#include <cstring>

#include "common/amx.h"
#include "common/vector.h"

namespace effllm {
namespace {

constexpr int kTileRows = kAmxRows, kTileBytes = kAmxRowBytes;

// Rows of W that a tile lacks are none of its.
TileConfig tiles_of_rows(int num_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool lower = tile == 2 || tile == 3 || tile == 5;
    int rows = kTileRows;
    if (tile < 6) rows = lower ? num_rows - kTileRows : num_rows;
    if (rows <= 0) continue;
    config.set(tile, rows < kTileRows ? rows : kTileRows, kTileBytes);
  }
  return config;
}

template <int kRowTiles, int kPanels>
void multiply_step(const int8_t* weight, int64_t stride_weight, const int8_t* x,
                   int64_t panel_bytes) {
  _tile_loadd(6, x, kTileBytes);
  _tile_loadd(4, weight, stride_weight);
  _tile_dpbssd(0, 4, 6);
  if constexpr (kPanels == 2) {
    _tile_loadd(7, x + panel_bytes, kTileBytes);
    _tile_dpbssd(1, 4, 7);
  }
  if constexpr (kRowTiles == 2) {
    _tile_loadd(5, weight + kTileRows * stride_weight, stride_weight);
    _tile_dpbssd(2, 5, 6);
    if constexpr (kPanels == 2) _tile_dpbssd(3, 5, 7);
  }
}

struct alignas(64) TileSums {
  int32_t of[kTileRows][kInt8AmxTokens];
};

// Products of columns [begin, end), begin a multiple of 64, of up to two panels: [row tile][panel].
template <int kRowTiles, int kPanels>
void multiply_columns(const Int8AmxBlock& block, const int8_t* x, int64_t panel_bytes,
                      int64_t begin, int64_t end, TileSums (&sums)[2][2]) {
  _tile_zero(0);
  if constexpr (kPanels == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_zero(3);

  const int64_t rest = (end - begin) % kTileBytes, whole = end - rest;
  for (int64_t k = begin; k < whole; k += kTileBytes) {
    multiply_step<kRowTiles, kPanels>(block.weight + k, block.stride_weight, x + k * kInt8AmxTokens,
                                      panel_bytes);
  }
  if (rest > 0) {
    // Where x is zero any weights will do, but not those of memory that is not there.
    alignas(64) int8_t ends[kInt8AmxRows][kTileBytes] = {};
    for (int row = 0; row < block.num_rows; ++row) {
      std::memcpy(ends[row], block.weight + row * block.stride_weight + whole, rest);
    }
    memory_barrier();
    multiply_step<kRowTiles, kPanels>(ends[0], kTileBytes, x + whole * kInt8AmxTokens, panel_bytes);
    memory_barrier();  // they are there until here
  }

  _tile_stored(0, &sums[0][0], kTileBytes);
  if constexpr (kPanels == 2) _tile_stored(1, &sums[0][1], kTileBytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, &sums[1][0], kTileBytes);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_stored(3, &sums[1][1], kTileBytes);
  memory_barrier();
}

using Multiply = decltype(&multiply_columns<1, 1>);

Multiply multiply_of(int num_rows, int num_panels) {
  if (num_rows > kTileRows) {
    return num_panels == 2 ? multiply_columns<2, 2> : multiply_columns<2, 1>;
  }
  return num_panels == 2 ? multiply_columns<1, 2> : multiply_columns<1, 1>;
}

// f(first panel, how many, bytes of a panel, its multiply_columns) for pairs of panels.
template <class F>
void for_pairs_of_panels(const Int8AmxBlock& block, const F& f) {
  const int64_t panel_bytes = (block.k + kTileBytes - 1) / kTileBytes * kInt8AmxTileBytes;
  const Tiles tiles(tiles_of_rows(block.num_rows));
  for (int panel = 0; panel < block.num_panels; panel += 2) {
    const int count = panel + 1 < block.num_panels ? 2 : 1;
    f(panel, count, panel_bytes, multiply_of(block.num_rows, count));
  }
}

}  // namespace

void multiply_int8_amx(const Int8AmxBlock& block, int32_t* sums) {
  for_pairs_of_panels(block, [&](int first, int count, int64_t panel_bytes, Multiply multiply) {
    TileSums tiles[2][2];
    multiply(block, block.x + first * panel_bytes, panel_bytes, 0, block.k, tiles);
    for (int row = 0; row < block.num_rows; ++row) {
      for (int panel = 0; panel < count; ++panel) {
        const int32_t* of_row = tiles[row / kTileRows][panel].of[row % kTileRows];
        int32_t* to = sums + (first + panel) * kInt8AmxTokens * kInt8AmxRows + row;
        for (int token = 0; token < kInt8AmxTokens; ++token) {
          to[token * kInt8AmxRows] = of_row[token];
        }
      }
    }
  });
}

void multiply_int8_groups_amx(const Int8AmxBlock& block, int64_t group_k, const float* scales,
                              float* totals) {
  using Floats = FloatVector<kInt8AmxTokens>;
  constexpr int kStride = kInt8AmxPanels * kInt8AmxTokens;
  for_pairs_of_panels(block, [&](int first, int count, int64_t panel_bytes, Multiply multiply) {
    Floats sums[kInt8AmxRows][2] = {};
    const float* scale = scales;
    for (int64_t k = 0; k < block.k; k += group_k, scale += kInt8AmxRows) {
      TileSums tiles[2][2];
      const int64_t end = k + group_k < block.k ? k + group_k : block.k;
      multiply(block, block.x + first * panel_bytes, panel_bytes, k, end, tiles);
      for (int row = 0; row < block.num_rows; ++row) {
        for (int panel = 0; panel < count; ++panel) {
          const auto products = load_vector<Vector<int32_t, kInt8AmxTokens>>(
              tiles[row / kTileRows][panel].of[row % kTileRows]);
          sums[row][panel] += scale[row] * __builtin_convertvector(products, Floats);
        }
      }
    }
    for (int row = 0; row < block.num_rows; ++row) {
      for (int panel = 0; panel < count; ++panel) {
        store_vector(sums[row][panel], totals + row * kStride + (first + panel) * kInt8AmxTokens);
      }
    }
  });
}

}  // namespace effllm
