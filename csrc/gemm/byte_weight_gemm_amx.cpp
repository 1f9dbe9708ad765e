// The CPU's inner loop over e4m3 or int8 weights for bf16 x with AMX: either is exact in bf16, and
// tdpbf16ps adds exact products of pairs to fp32 sums. Bound by the bytes of W for up to some
// sixteen tokens, by tiles that go in and out of registers beyond.
//
// 32 rows and 256 columns of W are a unit, which becomes bf16 in L1: two look-ups in 128 bytes
// find the upper and the lower halves of 64 weights, and two interleavings are two "steps" of 32
// columns, into the order of which x is brought. 16 rows of a step are a tile register:
//
//                             x, 16 pairs of columns
//                           [ panel 0 ][ panel 1 ]   16 tokens each
//   W, 16 rows [ 32 columns ][  sums  ][  sums  ]
//      16 more [ 32 columns ][  sums  ][  sums  ]
//
// All panels meet the unit, two at a time, then the next unit. Their sums wait in memory for the
// next columns of these rows, those of groups after they have been scaled. All of that is the same
// whatever the number of tokens, so that results do not depend on it.
#include "gemm/byte_weight_gemm_amx.h"

#include "common/amx.h"
#include "gemm/amx_panel_tiles.h"

namespace effllm {
namespace {

constexpr int kRows = kAmxRows, kRowBytes = kAmxRowBytes;
constexpr int kStepColumns = 32;
constexpr int kLineColumns = 64;  // that are decoded at once
constexpr int kRowTiles = kByteAmxRows / kRows;
constexpr int kUnitColumns = 256;
constexpr int kUnitGroups = kUnitColumns / kByteAmxGroupK;
constexpr int kPanelTile = kLineColumns * kAmxPanelTokens;  // elements
constexpr int kGroupSteps = kByteAmxGroupK / kStepColumns;
static_assert(kLineColumns == kAmxPanelTileK && kRowTiles == 2);

// The weights of 16 rows and 32 columns.
struct alignas(64) Step {
  bfloat16 weights[kRows][kStepColumns];
};

// Upper and lower halves of what 128 codes are in bf16 but for the sign.
struct alignas(64) Tables {
  uint8_t upper[128] = {}, lower[128] = {};

  constexpr void set(int code, float value) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, value);
    upper[code] = static_cast<uint8_t>(bits >> 24);
    lower[code] = static_cast<uint8_t>(bits >> 16);
  }
};

// What codes look up by the lower seven bits of their index, and where the upper half is not zero.
struct E4M3Codes {
  static constexpr Tables kTables = [] {
    Tables tables;
    for (int code = 0; code < 128; ++code) {
      tables.set(code, to_float(float8_e4m3{static_cast<uint8_t>(code)}));
    }
    return tables;
  }();

  static __m512i index(__m512i codes) { return codes; }
  static __mmask64 upper_lanes(__m512i index) { return ~__mmask64{0}; }
};

// By magnitude. There are 129 of them: 0 looks up what 128 does, but has no upper half.
struct Int8Codes {
  static constexpr Tables kTables = [] {
    Tables tables;
    tables.set(0, 128.0f);
    for (int code = 1; code < 128; ++code) tables.set(code, static_cast<float>(code));
    return tables;
  }();

  static __m512i index(__m512i codes) { return _mm512_abs_epi8(codes); }
  static __mmask64 upper_lanes(__m512i index) { return _mm512_test_epi8_mask(index, index); }
};

template <class Codes>
class Decoder {
 public:
  // 64 columns of a row, in two steps.
  void operator()(__m512i codes, bfloat16* first, bfloat16* second) const {
    const __m512i index = Codes::index(codes);
    const __m512i lower = _mm512_permutex2var_epi8(lower_[0], index, lower_[1]);
    const __m512i magnitude =
        _mm512_maskz_permutex2var_epi8(Codes::upper_lanes(index), upper_[0], index, upper_[1]);
    constexpr int kOrAnd = 0xf8;  // magnitude | (codes & 0x80)
    const __m512i upper = _mm512_ternarylogic_epi32(magnitude, codes, sign_, kOrAnd);
    _mm512_store_si512(first, _mm512_unpacklo_epi8(lower, upper));
    _mm512_store_si512(second, _mm512_unpackhi_epi8(lower, upper));
  }

 private:
  static constexpr const Tables& kTables = Codes::kTables;

  const __m512i lower_[2] = {_mm512_load_si512(kTables.lower),
                             _mm512_load_si512(kTables.lower + 64)};
  const __m512i upper_[2] = {_mm512_load_si512(kTables.upper),
                             _mm512_load_si512(kTables.upper + 64)};
  const __m512i sign_ = _mm512_set1_epi8(static_cast<char>(0x80));
};

// The first column, within its tile, of pair 16 step + 4 lane + i: unpacking goes by lanes.
constexpr int column_of_pair(int pair) {
  const int step = pair / 16, lane = pair % 16 / 4, i = pair % 4;
  return 16 * lane + 8 * step + 2 * i;
}

// Rows and columns of W that are decoded and multiplied at a time.
struct Unit {
  const uint8_t* weight;
  int num_rows, num_columns;
  int first_tile;  // of rows of the block
  int64_t first_column;
};

template <class Codes>
class BlockLoop {
 public:
  explicit BlockLoop(const ByteAmxBlock& block)
      : block_(block),
        width_(amx_panel_width(block.num_tokens)),
        num_panels_((block.num_tokens + kAmxPanelTokens - 1) / kAmxPanelTokens),
        tile_sums_(kRows * width_),
        x_is_near_(byte_amx_x_is_near(block.num_tokens, block.k)) {
    for (int idx = 0; idx < width_; ++idx) {
      const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i values = _mm512_add_epi32(lanes, _mm512_set1_epi32(16 * idx));
      row_of_value_[idx] = _mm512_srli_epi32(values, __builtin_ctz(width_));
    }
  }

  void run() {
    const int row_units = (block_.num_rows + kByteAmxRows - 1) / kByteAmxRows;
    if (block_.k == 0) {
      const int num_tiles = row_units * kRowTiles * num_panels_;
      for (int idx = 0; idx < num_tiles * tile_sums_; ++idx) block_.sums[idx] = 0.0f;
    }
    // All rows of some columns of x, which are in L2 then, before the next.
    const int64_t num_units = (block_.k + kUnitColumns - 1) / kUnitColumns * row_units;
    Unit unit = unit_at(0, row_units);
    for (int64_t idx = 0; idx < num_units; ++idx) {
      const Unit next = unit_at(idx + 1, row_units);
      decode(unit, idx + 1 < num_units ? next.weight : block_.next_weight);
      if (block_.group_scales != nullptr) load_scales(unit);
      for (int panel = 0; panel < num_panels_; panel += 2) {
        if (panel + 1 < num_panels_) {
          multiply<2>(unit, panel);
        } else {
          multiply<1>(unit, panel);
        }
      }
      unit = next;
    }
    store_out();
  }

 private:
  Unit unit_at(int64_t idx, int row_units) const {
    const int64_t row = idx % row_units * kByteAmxRows, column = idx / row_units * kUnitColumns;
    return {.weight = block_.weight + row * block_.stride_weight + column,
            .num_rows = static_cast<int>(smaller(block_.num_rows - row, kByteAmxRows)),
            .num_columns = static_cast<int>(smaller(block_.k - column, kUnitColumns)),
            .first_tile = static_cast<int>(row / kRows),
            .first_column = column};
  }

  float* sums(int row_tile, int panel) const {
    return block_.sums + (int64_t{row_tile} * num_panels_ + panel) * tile_sums_;
  }

  // Row tile after row tile, as 32 rows at once are more streams than processors follow. Rows from
  // `ahead` on are prefetched.
  void decode(const Unit& unit, const uint8_t* ahead) {
    const int64_t stride = block_.stride_weight;
    if (ahead == nullptr) ahead = unit.weight;
    for (int first_row = 0; first_row < unit.num_rows; first_row += kRows) {
      const int count = static_cast<int>(smaller(unit.num_rows - first_row, kRows));
      Step* const steps = weights_[first_row / kRows];
      for (int column = 0; column < unit.num_columns; column += kLineColumns) {
        const uint8_t* const from = unit.weight + first_row * stride + column;
        const uint8_t* const next = ahead + first_row * stride + column;
        Step* const two = steps + column / kStepColumns;
        const __mmask64 columns = first_lanes<__mmask64>(unit.num_columns - column);
        for (int row = 0; row < count; ++row) {
          __builtin_prefetch(next + row * stride, 0, 2);
          decoder_(_mm512_maskz_loadu_epi8(columns, from + row * stride), two[0].weights[row],
                   two[1].weights[row]);
        }
      }
    }
  }

  // Two tiles of rows times one or two panels. What rows past N leave uninitialised gives sums that
  // nobody reads.
  template <int kPanels>
  void multiply(const Unit& unit, int panel) {
    const bfloat16* x =
        block_.x + unit.first_column / kLineColumns * block_.stride_x_tile + panel * kPanelTile;
    const int num_steps = (unit.num_columns + kLineColumns - 1) / kLineColumns * 2;
    float *upper = sums(unit.first_tile, panel), *lower = sums(unit.first_tile + 1, panel);
    if (block_.group_scales == nullptr) {
      memory_barrier();
      if (unit.first_column == 0) {
        zero_tiles<kPanels>();
      } else {
        load_tiles<kPanels>(upper, lower);
      }
      multiply_steps<kPanels>(x, 0, num_steps);
      store_tiles<kPanels>(upper, lower);
      memory_barrier();
      return;
    }
    // Sums come from memory, and go there, once for all groups of the unit.
    int num_groups = 0;
    for (int step = 0; step < num_steps; step += kGroupSteps, ++num_groups) {
      memory_barrier();
      zero_tiles<kPanels>();
      multiply_steps<kPanels>(x, step, static_cast<int>(smaller(num_steps, step + kGroupSteps)));
      store_tiles<kPanels>(products_[0][num_groups], products_[1][num_groups]);
      memory_barrier();
    }
    const bool first = unit.first_column == 0;
    add_scaled<kPanels>(0, num_groups == 2, first, upper);
    add_scaled<kPanels>(1, num_groups == 2, first, lower);
  }

  template <int kPanels>
  static void zero_tiles() {
    _tile_zero(0);
    _tile_zero(2);
    if constexpr (kPanels == 2) {
      _tile_zero(1);
      _tile_zero(3);
    }
  }

  template <int kPanels>
  void load_tiles(const float* upper, const float* lower) const {
    const int64_t stride = 4 * width_;
    _tile_loadd(0, upper, stride);
    _tile_loadd(2, lower, stride);
    if constexpr (kPanels == 2) {
      _tile_loadd(1, upper + tile_sums_, stride);
      _tile_loadd(3, lower + tile_sums_, stride);
    }
  }

  template <int kPanels>
  void store_tiles(float* upper, float* lower) const {
    const int64_t stride = 4 * width_;
    _tile_stored(0, upper, stride);
    _tile_stored(2, lower, stride);
    if constexpr (kPanels == 2) {
      _tile_stored(1, upper + tile_sums_, stride);
      _tile_stored(3, lower + tile_sums_, stride);
    }
  }

  template <int kPanels>
  void multiply_steps(const bfloat16* x, int begin, int end) const {
    const int64_t stride_x = 4 * width_;
    for (int step = begin; step < end; ++step) {
      const bfloat16* const panel =
          x + step / 2 * block_.stride_x_tile + step % 2 * kStepColumns * width_;
      _tile_loadd(4, weights_[0][step].weights, kRowBytes);
      _tile_loadd(6, panel, stride_x);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(5, weights_[1][step].weights, kRowBytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kPanels == 2) {
        _tile_loadd(7, panel + kPanelTile, stride_x);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
        if (!x_is_near_) prefetch(panel + block_.stride_x_tile);
      }
    }
  }

  // A step of two panels. Inlined, as GCC leaves out calls of functions that but prefetch.
  __attribute__((always_inline)) static void prefetch(const bfloat16* x) {
    for (int at = 0; at < kPanelTile / 2; at += kRowBytes / 2) {
      __builtin_prefetch(x + at, 0, 3);
      __builtin_prefetch(x + kPanelTile + at, 0, 3);
    }
  }

  // Scales of the groups of a unit, of rows that there are.
  void load_scales(const Unit& unit) {
    const int64_t first_row = block_.first_row + unit.first_tile * kRows;
    const int64_t first_group = unit.first_column / kByteAmxGroupK;
    for (int row = 0; row < unit.num_rows; ++row) {
      const float* from = block_.group_scales + first_group * block_.stride_scales_group +
                          ((first_row + row) >> block_.row_shift) * block_.stride_scales_row;
      for (int group = 0; group * kByteAmxGroupK < unit.num_columns; ++group) {
        scales_[row / kRows][group][row % kRows] = from[group * block_.stride_scales_group];
      }
    }
  }

  // The groups' products of 16 rows, times their scales, one after the other. Whole panels have a
  // row in a vector, whose scale a load spreads; look-ups compete with all else for one port.
  template <int kPanels>
  void add_scaled(int row_tile, bool has_second, bool first, float* sums) const {
    static_assert(kUnitGroups == 2);
    for (int idx = 0; idx < width_; ++idx) {
      __m512 scales[2];
      for (int group = 0; group < 2; ++group) {
        const float* const of_rows = scales_[row_tile][group];
        scales[group] = width_ == kAmxPanelTokens
                            ? _mm512_set1_ps(of_rows[idx])
                            : _mm512_permutexvar_ps(row_of_value_[idx], _mm512_load_ps(of_rows));
      }
      for (int panel = 0; panel < kPanels; ++panel) {
        const int at = panel * tile_sums_ + 16 * idx;
        const auto add = [&](int group, __m512 sum) {
          return _mm512_fmadd_ps(_mm512_load_ps(products_[row_tile][group] + at), scales[group],
                                 sum);
        };
        __m512 sum = add(0, first ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + at));
        if (has_second) sum = add(1, sum);
        _mm512_storeu_ps(sums + at, sum);
      }
    }
  }

  // From [row][token] to [token][row].
  void store_out() const {
    const __mmask16 tokens = first_lanes<__mmask16>(width_);
    for (int first_row = 0; first_row < block_.num_rows; first_row += kRows) {
      const __mmask16 rows = first_lanes<__mmask16>(block_.num_rows - first_row);
      for (int panel = 0; panel < num_panels_; ++panel) {
        const float* from = sums(first_row / kRows, panel);
        __m512i values[kRows];
        for (int row = 0; row < kRows; ++row) {
          const __m512 scale = _mm512_set1_ps(block_.scales[first_row + row]);
          const __m512 bias = _mm512_set1_ps(block_.biases[first_row + row]);
          const __m512 sum = _mm512_maskz_loadu_ps(tokens, from + row * width_);
          values[row] = _mm512_castps_si512(_mm512_add_ps(_mm512_mul_ps(sum, scale), bias));
        }
        transpose(values);
        const int first_token = panel * kAmxPanelTokens;
        bfloat16* out = block_.out + first_token * block_.stride_out + first_row;
        for (int token = 0; token < kRows && first_token + token < block_.num_tokens; ++token) {
          const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_castsi512_ps(values[token]));
          _mm256_mask_storeu_epi16(out + token * block_.stride_out, rows,
                                   reinterpret_cast<__m256i>(rounded));
        }
      }
    }
  }

  const ByteAmxBlock& block_;
  const int width_, num_panels_, tile_sums_;
  const bool x_is_near_;
  const Decoder<Codes> decoder_;
  __m512i row_of_value_[kAmxPanelTokens];
  Step weights_[kRowTiles][kUnitColumns / kStepColumns];
  alignas(64) float scales_[kRowTiles][kUnitGroups][kRows] = {};
  alignas(64) float products_[kRowTiles][kUnitGroups][2 * kRows * kAmxPanelTokens];
};

template <class Codes>
void multiply_block(const ByteAmxBlock& block) {
  const Tiles tiles(panel_tiles(amx_panel_width(block.num_tokens)));
  BlockLoop<Codes>(block).run();
}

}  // namespace

void byte_weight_gather_amx(const AmxTokens& tokens, int64_t first_tile, int64_t last_tile) {
  gather_panels(tokens, first_tile, last_tile, column_of_pair);
}

void multiply_e4m3_weight_amx(const ByteAmxBlock& block) { multiply_block<E4M3Codes>(block); }
void multiply_int8_weight_amx(const ByteAmxBlock& block) { multiply_block<Int8Codes>(block); }

}  // namespace effllm
