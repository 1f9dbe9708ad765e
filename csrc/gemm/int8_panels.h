// Tokens for the loops of int8_gemm_amx.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/cpu_isa.h"
#include "common/math.h"
#include "gemm/int8_gemm_amx.h"

namespace effllm {

// Whether the loops are there, and worth it.
inline bool takes_int8_panels(int64_t tokens) {
  return cpu_isa() >= CpuIsa::kAmx && tokens >= kInt8AmxMinTokens;
}

// Tokens [m, k] in the panels of int8_gemm_amx.h.
struct Int8Panels {
  struct alignas(64) Fours {  // of columns, of a panel's tokens
    int8_t columns[kInt8AmxTokens][4];
  };
  static constexpr int kTileFours = kInt8AmxTileK / 4;

  template <class Threads>
  Int8Panels(const int8_t* x, int64_t m, int64_t k, const Threads& threads)
      : count(ceil_div<int64_t>(m, kInt8AmxTokens)),
        fours_per_panel(ceil_div<int64_t>(k, kInt8AmxTileK) * kTileFours),
        fours(fours_per_panel * count) {
    threads.for_each(count, 1, [&](int64_t panel) {
      const int64_t first = panel * kInt8AmxTokens;
      const int64_t tokens = std::min<int64_t>(m - first, kInt8AmxTokens);
      Fours* const to = fours.data() + panel * fours_per_panel;
      for (int64_t column = 0; column < k; column += 4) {
        const auto bytes = static_cast<size_t>(std::min<int64_t>(k - column, 4));
        for (int64_t token = 0; token < tokens; ++token) {
          std::memcpy(to[column / 4].columns[token], x + (first + token) * k + column, bytes);
        }
      }
    });
  }

  const int8_t* panel(int64_t index) const {
    return reinterpret_cast<const int8_t*>(fours.data() + index * fours_per_panel);
  }

  int64_t count, fours_per_panel;
  std::vector<Fours> fours;
};

}  // namespace effllm
