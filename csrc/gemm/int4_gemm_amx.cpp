// The CPU's inner loop of int4_gemm for bf16 x with AMX: q - z is an integer of at most eight bits,
// exact in bf16, and tdpbf16ps adds exact products of pairs to fp32 sums. Bound by the bytes of W
// for up to some sixteen tokens, by tiles that go in and out of registers beyond.
//
// Sixteen consecutive words of a tile of W hold two rows, n in the low and n + 8 in the high half
// of each byte. Look-ups of 16-bit halves make two "steps" of either row of them, 32 weights each,
// without a shuffle: of bytes 0 and 2 of the words, and of bytes 1 and 3. A zero point is but
// another table. 16 rows of a step are a tile register, and x is brought into that order:
//
//                             x, 16 pairs of columns
//                           [ panel 0 ] [ panel 1 ]  .   16 tokens each
//   W, 16 rows [ 32 columns ][  sums  ] [  sums  ]  .
//      16 more [     .      ][    .   ] [    .   ]  .
//
// Four tiles of sums at a time, of as many blocks of rows as there are panels too few. They are of
// one group, or of 128 columns of a long one; scaled, they are added to the sums of the strip.
// All of that is the same whatever the number of tokens, so that results do not depend on it.
//
// Two groups in a tile (g = 32) are a step each, for which two shuffles regroup the words.
#include "gemm/int4_gemm_amx.h"

#include <array>

#include "common/amx.h"
#include "gemm/amx_panel_tiles.h"

namespace effllm {
namespace {

constexpr int kRows = kAmxRows, kRowBytes = kAmxRowBytes;
constexpr int kStepColumns = 32;
constexpr int kMaxTiles = 2;  // of W that are decoded at a time
constexpr int kBlocks = kPackedCpuRows / kRows;
constexpr int kBlockWords = kPackedCpuTileWords / kBlocks;
constexpr int kRowPairWords = 16;
constexpr int kPanelElements = kAmxPanelTokens * kAmxPanelTileK;  // of a tile of x
static_assert(kAmxPanelTileK == kPackedCpuTileK);
constexpr int kPrefetchWords =
    3 * kPackedCpuTileWords;  // 6 KB: what hardware prefetches is too near

// -255 .. 15 as bf16: codes less a zero point are the 16 from 255 - zero on.
constexpr auto kIntegers = [] {
  std::array<uint16_t, 255 + 16> table{};
  for (int idx = 0; idx < 255 + 16; ++idx) {
    table[idx] = __builtin_bit_cast(uint32_t, static_cast<float>(idx - 255)) >> 16;
  }
  return table;
}();

// The weights of 16 rows and 32 columns.
struct alignas(64) Step {
  uint16_t weights[kRows][kStepColumns];
};

struct alignas(64) TileSums {
  float values[kRows * kAmxPanelTokens];  // [16 rows][panel's tokens]
};

// What the codes become by the lowest four of five bits.
inline __m512i load_table(int first) {
  return _mm512_broadcast_i64x4(
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kIntegers.data() + first)));
}

inline __m512i load_table(const float* decoding) {
  return load_table(__builtin_bit_cast(int, *decoding));
}

// 16 rows of one or two tiles of a group, or of a tile with two groups.
template <bool kTwoGroups, bool kZeros>
void decode(const int32_t* words, int num_tiles, const float* decoding, int64_t stride_slot,
            Step* steps) {
  const __m512i minus_eight = load_table(255 - 8);
  for (int row = 0; row < kRows / 2; ++row, words += kRowPairWords, decoding += stride_slot) {
    __m512i tables[2][2];  // [rows n and n + 8][steps]
    for (int high = 0; high < 2; ++high) {
      const float* from = decoding + high * 8 * stride_slot;
      tables[high][0] = kZeros ? load_table(from) : minus_eight;
      tables[high][1] = kZeros && kTwoGroups ? load_table(from + 1) : tables[high][0];
    }
    for (int tile = 0; tile < num_tiles; ++tile) {
      const int32_t* line = words + tile * kPackedCpuTileWords;
      __builtin_prefetch(line + kPrefetchWords, 0, 2);
      __m512i first = _mm512_loadu_si512(line), second = _mm512_srli_epi32(first, 8);
      if constexpr (kTwoGroups) {
        const __m512i even = first, odd = second;
        first = _mm512_mask_shuffle_epi32(even, 0xcccc, odd, _MM_PERM_BADC);
        second = _mm512_mask_shuffle_epi32(odd, 0x3333, even, _MM_PERM_BADC);
      }
      // Look-ups ignore what else there is in the halves, which spares the masks.
      const auto store = [&](int step, int to, __m512i bits, __m512i table) {
        _mm512_store_si512(steps[2 * tile + step].weights[to],
                           _mm512_permutexvar_epi16(bits, table));
      };
      store(0, row, first, tables[0][0]);
      store(1, row, second, tables[0][1]);
      store(0, row + 8, _mm512_srli_epi32(first, 4), tables[1][0]);
      store(1, row + 8, _mm512_srli_epi32(second, 4), tables[1][1]);
    }
  }
}

using DecodeBlock = decltype(&decode<false, false>);

// The first column, within its tile, of pair 16 step + 4 q + i: that of word 4 q + i of a row.
constexpr int column_of_pair(int pair, bool two_groups) {
  const int step = pair / 16, q = pair % 16 / 4, i = pair % 4;
  return 2 * q + (two_groups ? 32 * step + 16 * (i % 2) + 8 * (i / 2) : 16 * i + 8 * step);
}

inline __m512i lanes() {
  return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

inline __m512i multiply_lanes(int64_t factor) {
  return _mm512_mullo_epi32(lanes(), _mm512_set1_epi32(static_cast<int>(factor)));
}

// Some blocks of rows in one or two tiles.
struct Slice {
  int64_t tile, group;
  int num_tiles, first_block;
};

// A strip, kRowBlocks x kPanels tiles of sums at a time: 4 x 1, 2 x 2, 1 x 3 or 1 x 4.
template <int kRowBlocks, int kPanels>
class StripLoop {
 public:
  StripLoop(const Int4AmxStrip& strip, int width, DecodeBlock decode_block)
      : strip_(strip),
        width_(width),
        num_blocks_((strip.num_rows + kRows - 1) / kRows),
        decode_(decode_block),
        slots_(multiply_lanes(strip.stride_scales)) {
    for (int idx = 0; idx < width; ++idx) {
      const __m512i values = _mm512_add_epi32(lanes(), _mm512_set1_epi32(16 * idx));
      row_of_value_[idx] = _mm512_srli_epi32(values, __builtin_ctz(width));
    }
  }

  void run() {
    // Weights that were stored just before are not yet where tiles are loaded from: meanwhile the
    // next ones are decoded.
    Slice slice{.tile = 0, .group = 0, .num_tiles = tiles_from(0), .first_block = 0};
    Slice last{};
    int idx = 0;
    for (; slice.tile < strip_.num_tiles; ++idx) {
      decode_slice(slice, weights_[idx % 2]);
      if (idx > 0) multiply_slice(last, weights_[(idx + 1) % 2]);
      last = slice;
      slice.first_block += kRowBlocks;
      if (slice.first_block < num_blocks_) continue;
      const int64_t tile = slice.tile + slice.num_tiles;
      slice = {.tile = tile,
               .group = two_groups() ? 2 * tile : tile / strip_.tiles_per_group,
               .num_tiles = tiles_from(tile),
               .first_block = 0};
    }
    if (idx > 0) multiply_slice(last, weights_[(idx + 1) % 2]);
    store_sums();
  }

 private:
  bool two_groups() const { return strip_.two_groups_per_tile; }

  int tiles_from(int64_t tile) const {
    const bool two = !two_groups() && tile + 1 < strip_.num_tiles &&
                     tile % strip_.tiles_per_group + 1 < strip_.tiles_per_group;
    return two ? 2 : 1;
  }

  // What rows past N leave uninitialised gives sums that nobody reads.
  int last_block(const Slice& slice) const {
    const int last = slice.first_block + kRowBlocks;
    return last < num_blocks_ ? last : num_blocks_;
  }

  void decode_slice(const Slice& slice, Step* weights) const {
    for (int block = slice.first_block; block < last_block(slice); ++block) {
      decode_(strip_.words + slice.tile * kPackedCpuTileWords + block * kBlockWords,
              slice.num_tiles,
              strip_.decoding + block * kRows * strip_.stride_decoding_slot + slice.group,
              strip_.stride_decoding_slot, weights);
      weights += 2 * slice.num_tiles;
    }
  }

  void multiply_slice(const Slice& slice, const Step* weights) {
    if constexpr (kPanels > 1) prefetch_x(slice);
    if (two_groups()) {
      multiply_steps(slice, weights, 0, 1, products_[0]);
      multiply_steps(slice, weights, 1, 2, products_[1]);
      add_scaled(slice, slice.group, products_[0]);
      add_scaled(slice, slice.group + 1, products_[1]);
    } else {
      multiply_steps(slice, weights, 0, 2 * slice.num_tiles, products_[0]);
      add_scaled(slice, slice.group, products_[0]);
    }
  }

  // Its blocks' share of x for the next slice: long rows and many tokens are not in L2. Inlined, as
  // GCC leaves out calls of functions that but prefetch.
  __attribute__((always_inline)) void prefetch_x(const Slice& slice) const {
    constexpr int kShare = kPanels * kPanelElements / kBlocks, kLine = kRowBytes / sizeof(bfloat16);
    for (int idx = 0; idx < slice.num_tiles; ++idx) {
      const int64_t tile = slice.tile + slice.num_tiles + idx;
      if (tile >= strip_.num_tiles) return;
      const bfloat16* x = strip_.x + tile * strip_.stride_x_tile + slice.first_block * kShare;
      for (int at = 0; at < kRowBlocks * kShare; at += kLine) __builtin_prefetch(x + at, 0, 3);
    }
  }

  void multiply_steps(const Slice& slice, const Step* weights, int first, int last,
                      TileSums* products) {
    const int64_t stride_x = 4 * width_;
    memory_barrier();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = first; step < last; ++step) {
      const auto rows = [&](int idx) { return weights[2 * idx * slice.num_tiles + step].weights; };
      const auto panel = [&](int idx) {
        return strip_.x + (slice.tile + step / 2) * strip_.stride_x_tile + idx * kPanelElements +
               step % 2 * kStepColumns * width_;
      };
      _tile_loadd(4, rows(0), kRowBytes);
      _tile_loadd(6, panel(0), stride_x);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kPanels == 1) {
        _tile_loadd(5, rows(1), kRowBytes);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(4, rows(2), kRowBytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(5, rows(3), kRowBytes);
        _tile_dpbf16ps(3, 5, 6);
      } else {
        _tile_loadd(7, panel(1), stride_x);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kPanels == 2) {
          _tile_loadd(5, rows(1), kRowBytes);
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        } else {
          _tile_loadd(6, panel(2), stride_x);
          _tile_dpbf16ps(2, 4, 6);
        }
        if constexpr (kPanels == 4) {
          _tile_loadd(7, panel(3), stride_x);
          _tile_dpbf16ps(3, 4, 7);
        }
      }
    }
    _tile_stored(0, products[0].values, stride_x);
    _tile_stored(1, products[1].values, stride_x);
    _tile_stored(2, products[2].values, stride_x);
    if constexpr (kPanels != 3) _tile_stored(3, products[3].values, stride_x);
    memory_barrier();
  }

  void add_scaled(const Slice& slice, int64_t group, const TileSums* products) {
    for (int block = slice.first_block; block < last_block(slice); ++block, products += kPanels) {
      const float* scales = strip_.scales + block * kRows * strip_.stride_scales + group;
      const auto add = [&](int panel, int idx, __m512 scale) {
        float* sums = sums_[block][panel].values + 16 * idx;
        const __m512 values = _mm512_load_ps(products[panel].values + 16 * idx);
        _mm512_store_ps(sums, _mm512_fmadd_ps(values, scale, _mm512_load_ps(sums)));
      };
      if (kPanels > 1 || width_ == kAmxPanelTokens) {
        for (int row = 0; row < kRows; ++row) {
          const __m512 scale = _mm512_set1_ps(scales[row * strip_.stride_scales]);
          for (int panel = 0; panel < kPanels; ++panel) add(panel, row, scale);
        }
      } else {
        const __m512 all = _mm512_i32gather_ps(slots_, scales, sizeof(float));
        for (int idx = 0; idx < width_; ++idx) {
          add(0, idx, _mm512_permutexvar_ps(row_of_value_[idx], all));
        }
      }
    }
  }

  // From [row][token] to [token][row].
  void store_sums() const {
    const __m512i rows = multiply_lanes(width_);
    for (int token = 0; token < strip_.num_tokens; ++token) {
      for (int block = 0; block < num_blocks_; ++block) {
        const float* from = sums_[block][token / kAmxPanelTokens].values + token % kAmxPanelTokens;
        _mm512_storeu_ps(strip_.sums + token * kPackedCpuRows + block * kRows,
                         _mm512_i32gather_ps(rows, from, sizeof(float)));
      }
    }
  }

  const Int4AmxStrip& strip_;
  const int width_, num_blocks_;
  const DecodeBlock decode_;
  const __m512i slots_;                    // where a group's scales are
  __m512i row_of_value_[kAmxPanelTokens];  // of a panel that is not whole
  TileSums sums_[kBlocks][kPanels] = {};
  TileSums products_[2][4];
  Step weights_[2][kRowBlocks * 2 * kMaxTiles];
};

}  // namespace

void int4_gather_amx(const AmxTokens& tokens, int64_t first_tile, int64_t last_tile,
                     bool two_groups_per_tile) {
  gather_panels(tokens, first_tile, last_tile,
                [=](int pair) { return column_of_pair(pair, two_groups_per_tile); });
}

void int4_strip_amx(const Int4AmxStrip& strip, bool has_zeros) {
  const int width = amx_panel_width(strip.num_tokens);
  const DecodeBlock decode_block = strip.two_groups_per_tile
                                       ? (has_zeros ? decode<true, true> : decode<true, false>)
                                       : (has_zeros ? decode<false, true> : decode<false, false>);
  const Tiles tiles(panel_tiles(width));
  switch ((strip.num_tokens + kAmxPanelTokens - 1) / kAmxPanelTokens) {
    case 1:
      StripLoop<4, 1>(strip, width, decode_block).run();
      break;
    case 2:
      StripLoop<2, 2>(strip, width, decode_block).run();
      break;
    case 3:
      StripLoop<1, 3>(strip, width, decode_block).run();
      break;
    default:
      StripLoop<1, 4>(strip, width, decode_block).run();
  }
}

}  // namespace effllm
