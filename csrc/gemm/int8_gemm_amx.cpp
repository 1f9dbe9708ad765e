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

#include <immintrin.h>

#include <cstring>

namespace effllm {
namespace {

constexpr int kTileRows = 16, kTileBytes = 64;

// Rows and bytes of each tile register, as LDTILECFG reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Intrinsics of some compilers do not say that they read and write memory.
inline void memory_barrier() { asm volatile("" ::: "memory"); }

// Rows of W that a tile lacks are none of its.
void configure(int num_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    const bool lower = tile == 2 || tile == 3 || tile == 5;
    int rows = kTileRows;
    if (tile < 6) rows = lower ? num_rows - kTileRows : num_rows;
    if (rows <= 0) continue;
    config.rows[tile] = static_cast<uint8_t>(rows < kTileRows ? rows : kTileRows);
    config.row_bytes[tile] = kTileBytes;
  }
  memory_barrier();
  _tile_loadconfig(&config);
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

// From [row][token] to [token][row].
void turn(const int32_t (&tile)[kTileRows][kInt8AmxTokens], int num_rows, int32_t* sums) {
  for (int token = 0; token < kInt8AmxTokens; ++token) {
    for (int row = 0; row < num_rows; ++row) sums[token * kInt8AmxRows + row] = tile[row][token];
  }
}

// Two panels at most.
template <int kRowTiles, int kPanels>
void multiply_panels(const Int8AmxBlock& block, const int8_t* x, int64_t panel_bytes,
                     int32_t* sums) {
  _tile_zero(0);
  if constexpr (kPanels == 2) _tile_zero(1);
  if constexpr (kRowTiles == 2) _tile_zero(2);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_zero(3);

  const int64_t steps = block.k / kTileBytes, rest = block.k % kTileBytes;
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<kRowTiles, kPanels>(block.weight + step * kTileBytes, block.stride_weight,
                                      x + step * kInt8AmxTileBytes, panel_bytes);
  }
  if (rest > 0) {
    // Where x is zero any weights will do, but not those of memory that is not there.
    alignas(64) int8_t ends[kInt8AmxRows][kTileBytes] = {};
    for (int row = 0; row < block.num_rows; ++row) {
      std::memcpy(ends[row], block.weight + row * block.stride_weight + steps * kTileBytes, rest);
    }
    memory_barrier();
    multiply_step<kRowTiles, kPanels>(ends[0], kTileBytes, x + steps * kInt8AmxTileBytes,
                                      panel_bytes);
    memory_barrier();  // they are there until here
  }

  alignas(64) int32_t tiles[4][kTileRows][kInt8AmxTokens];
  _tile_stored(0, tiles[0], kTileBytes);
  if constexpr (kPanels == 2) _tile_stored(1, tiles[1], kTileBytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, tiles[2], kTileBytes);
  if constexpr (kRowTiles == 2 && kPanels == 2) _tile_stored(3, tiles[3], kTileBytes);
  memory_barrier();
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    const int first_row = row_tile * kTileRows;
    const int rows =
        block.num_rows - first_row < kTileRows ? block.num_rows - first_row : kTileRows;
    for (int panel = 0; panel < kPanels; ++panel) {
      turn(tiles[2 * row_tile + panel], rows,
           sums + panel * kInt8AmxTokens * kInt8AmxRows + first_row);
    }
  }
}

}  // namespace

void int8_block_amx(const Int8AmxBlock& block) {
  const int64_t panel_bytes =
      (block.k + kInt8AmxTileK - 1) / kInt8AmxTileK * int64_t{kInt8AmxTileBytes};
  configure(block.num_rows);
  for (int panel = 0; panel < block.num_panels; panel += 2) {
    const bool two_rows = block.num_rows > kTileRows, two_panels = panel + 1 < block.num_panels;
    const auto multiply = two_rows ? (two_panels ? multiply_panels<2, 2> : multiply_panels<2, 1>)
                                   : (two_panels ? multiply_panels<1, 2> : multiply_panels<1, 1>);
    multiply(block, block.x + panel * panel_bytes, panel_bytes,
             block.sums + panel * kInt8AmxTokens * kInt8AmxRows);
  }
  _tile_release();  // registers that are in use cost every switch of threads
}

}  // namespace effllm
