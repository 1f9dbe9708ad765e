// Multiplies random tiles of codes by random x as lanes of a warp do it with mma.m16n8k32, by the
// registers that w4a8_codes.cuh makes; test_w4a8_codes.py compiles it. Prints the first wrong sum
// and fails, or nothing.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>

#include "gemm/w4a8_codes.cuh"
#include "quant/int4_layout.h"

namespace {

using effllm::W4A8Decoding;

constexpr int kSize = 64;  // rows and columns of a tile

struct Tile {
  uint8_t codes[kSize][kSize], bytes[kSize];
  int8_t x[kSize];
  int32_t words[effllm::kInt4TileWords];

  explicit Tile(std::mt19937& random) : words{} {
    for (int n = 0; n < kSize; ++n) {
      bytes[n] = static_cast<uint8_t>(random());
      x[n] = static_cast<int8_t>(random());
      for (int k = 0; k < kSize; ++k) {
        codes[n][k] = random() % 16;
        words[effllm::int4_word(n, k)] |= codes[n][k] << effllm::int4_shift_of(n, k);
      }
    }
  }

  uint32_t word(int warp, int lane, int block) const {
    return static_cast<uint32_t>(words[4 * (32 * warp + lane) + block]);
  }

  int expected(W4A8Decoding decoding, int n, int first_column) const {
    const int zero = decoding == W4A8Decoding::kZeros ? std::min<int>(bytes[n], 128) : 8;
    const int multiplier = decoding == W4A8Decoding::kMultipliers ? bytes[n] % 16 : 1;
    int sum = 0;
    for (int k = first_column; k < first_column + 32; ++k) {
      sum += (codes[n][k] - zero) * multiplier * x[k];
    }
    return sum;
  }
};

// Of one lane: four bytes along k by four.
int dot(uint32_t a, uint32_t b) {
  int sum = 0;
  for (int i = 0; i < 4; ++i) {
    sum += static_cast<int8_t>(a >> (8 * i)) * static_cast<int8_t>(b >> (8 * i));
  }
  return sum;
}

uint4 chunk_of(const int8_t* x) {
  uint4 chunk;
  std::memcpy(&chunk, x, sizeof(chunk));
  return chunk;
}

uint32_t component(const uint4& chunk, int idx) {
  const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
  return words[idx];
}

// `in_order`: words are brought into the order of x, else x into theirs.
template <W4A8Decoding kDecoding>
bool check(const Tile& tile, bool in_order) {
  using Codes = effllm::W4A8Codes<kDecoding>;
  for (int warp = 0; warp < 4; ++warp) {
    for (int step = 0; step < 2; ++step) {
      for (int g = 0; g < 8; ++g) {
        int sums[2] = {};
        for (int c = 0; c < 4; ++c) {
          const int lane = 4 * g + c, row = 16 * warp + g;
          const effllm::W4A8Exchange exchange(lane);
          typename Codes::Rows rows{};
          if constexpr (kDecoding != W4A8Decoding::kMiddle) {
            rows = Codes::rows(Codes::pair(tile.bytes[row], tile.bytes[row + 8]));
          }
          for (int block = 2 * step; block < 2 * step + 2; ++block) {
            const uint32_t word = in_order
                                      ? exchange(tile.word(warp, exchange.first_lane, block),
                                                 tile.word(warp, exchange.first_lane + 1, block))
                                      : tile.word(warp, lane, block);
            const uint4 x = chunk_of(tile.x + 16 * block);
            const uint32_t b = component(in_order ? x : effllm::w4a8_x_order(x), c);
            uint32_t low, high;
            Codes::decode(word, rows, low, high);
            sums[0] += dot(low, b);
            sums[1] += dot(high, b);
          }
        }
        for (int half = 0; half < 2; ++half) {
          const int n = 16 * warp + g + 8 * half;
          const int expected = tile.expected(kDecoding, n, 32 * step);
          if (sums[half] == expected << Codes::kShift) continue;
          std::printf("decoding %d, in order %d, row %d, step %d: %d instead of %d\n",
                      static_cast<int>(kDecoding), in_order, n, step, sums[half],
                      expected << Codes::kShift);
          return false;
        }
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    const Tile tile(random);
    for (const bool in_order : {false, true}) {
      if (!check<W4A8Decoding::kMiddle>(tile, in_order)) return 1;
      if (!check<W4A8Decoding::kZeros>(tile, in_order)) return 1;
      if (!check<W4A8Decoding::kMultipliers>(tile, in_order)) return 1;
    }
  }
}
