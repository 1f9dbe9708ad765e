// The tile registers of AMX, for files that are compiled for it (*_amx.cpp). In internal linkage,
// as vector.h is.
#pragma once

#include <cstdint>

#include "common/x86_intrinsics.h"

namespace effllm {
namespace {

inline constexpr int kAmxRows = 16, kAmxRowBytes = 64;  // of a tile register, at most

// Intrinsics of some compilers do not say that they read and write memory.
inline void memory_barrier() { __atomic_signal_fence(__ATOMIC_SEQ_CST); }

// Rows and bytes of each tile register, as LDTILECFG reads them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int num_rows, int num_bytes) {
    rows[tile] = static_cast<uint8_t>(num_rows);
    row_bytes[tile] = static_cast<uint16_t>(num_bytes);
  }
};

// The tile registers, for as long as it lives: while they are in use they cost every switch of
// threads.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) {
    memory_barrier();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace
}  // namespace effllm
