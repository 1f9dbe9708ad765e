// What the matmuls over packed codes do on the CPU around their inner loops: x and scales of any
// type become what the loop takes, where it wants them, and threads share the strips.
//
// An op brings a `Decoding`, which prepares what its loop reads of a strip. Each thread has a copy:
//   Loop                                    of the kind of Fp32Loop
//   size()                                  floats, in each thread's memory
//   stride_slot(), stride_group()           where slots and groups lie in them
//   init(memory)                            once per thread
//   load(first_row, num_rows, memory)       per strip
//   prefetch(first_row, num_rows)           of the strip after the one that was loaded
//   multiply(strip)                         runs the loop
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/math.h"
#include "gemm/packed_gemm.h"
#include "gemm/packed_gemm_strip.h"

namespace effllm {

static_assert(kPackedCpuRows == kInt4StripRows && kPackedCpuTileWords == kInt4TileWords);

inline PackedStripKernel select_strip_kernel(PackedStripKernel baseline, PackedStripKernel avx2,
                                             PackedStripKernel avx512) {
  const CpuIsa isa = cpu_isa();
  return isa >= CpuIsa::kAvx512 ? avx512 : isa == CpuIsa::kAvx2 ? avx2 : baseline;
}

// Column, within its tile, of byte `byte` of the 16 words that hold a pair of rows.
constexpr int64_t column_of_byte(int word, int byte) {
  return kPackedCpuStep * (word % 4) + 2 * (word / 4) + 8 * (byte % 2) + byte / 2;
}

inline bool has_two_groups_per_tile(const PackedGemmParams& params) {
  return params.group_size < kPackedCpuTileK && params.num_groups > 1;
}

// A token's columns of a tile. Loads of a whole cache line that cross two would cost many tokens a
// fifth of their time.
template <class X>
struct alignas(64) TokenTile {
  X columns[kPackedCpuTileK];
};

constexpr int64_t kGatherTokens = 8;  // for fewer, threads cost more than they save

// A loop's gather, token by token: x as [num_tiles, M] in its type and order, padded with zeros to
// whole tiles.
template <class T, class Loop, class Threads>
void gather_tokens(const PackedGemmParams& params, int64_t num_tiles,
                   TokenTile<typename Loop::X>* x, const Threads& threads) {
  threads.for_each(params.m, kGatherTokens, [&](int64_t m) {
    const T* row = static_cast<const T*>(params.x) + m * params.k;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      const int64_t first = tile * kPackedCpuTileK;
      T columns[kPackedCpuTileK] = {};
      std::memcpy(columns, row + first,
                  std::min<int64_t>(params.k - first, kPackedCpuTileK) * sizeof(T));
      Loop::order(columns, x[tile * params.m + m].columns);
    }
  });
}

// What the code around a loop must know of it; here that of packed_gemm_strip.h, for x of any type.
struct Fp32Loop {
  using X = float;
  static constexpr int64_t kMaxTokens = kPackedCpuMaxTokens;

  static constexpr int64_t padded_tokens(int64_t num_tokens) { return num_tokens; }

  static constexpr int64_t slot_of_row(int64_t row) {
    return row / 16 * 16 + row % 8 * 2 + row % 16 / 8;
  }

  // The columns of a tile into fragment order.
  template <class T>
  static void order(const T* columns, float* x) {
    float values[kPackedCpuTileK];
    for (int idx = 0; idx < kPackedCpuTileK; ++idx) values[idx] = to_float(columns[idx]);
    for (int step = 0; step < kPackedCpuTileK; step += kPackedCpuStep) {
      for (int idx = 0; idx < kPackedCpuStep; ++idx) {
        x[step + idx] = values[step + column_of_byte(idx / 4 * 4, idx % 4)];
      }
    }
  }

  template <class T, class Threads>
  static void gather(const PackedGemmParams& params, int64_t num_tiles, TokenTile<float>* x,
                     const Threads& threads) {
    gather_tokens<T, Fp32Loop>(params, num_tiles, x, threads);
  }
};

// Floats per row of a table [64 slots, groups]: room for a last tile that has one group of two, and
// an odd number of cache lines. The 64 rows of a group would else compete for few sets of L1.
constexpr int64_t group_table_stride(int64_t num_groups) {
  return (ceil_div<int64_t>(num_groups + 1, 16) | 1) * 16;
}

// Rows of data [num_rows, num_groups] into a table of slots, each number through `convert`.
template <class Loop, class T, class Convert>
void load_group_table(const T* data, int64_t stride_n, int64_t stride_g, int64_t num_rows,
                      int64_t num_groups, float* table, const Convert& convert) {
  for (int64_t row = 0; row < num_rows; ++row, data += stride_n) {
    float* out = table + Loop::slot_of_row(row) * group_table_stride(num_groups);
    for (int64_t group = 0; group < num_groups; ++group) {
      out[group] = convert(data[group * stride_g]);
    }
    // Columns past the last group are multiplied by x = 0; what scales them must be no NaN.
    out[num_groups] = 0.0f;
  }
}

// Brings such rows near: one by one, as load_group_table wants them, they would cost few tokens as
// much time as the codes do. Strided ones have to wait.
template <class T>
void prefetch_group_table(const T* data, int64_t stride_n, int64_t stride_g, int64_t num_rows,
                          int64_t num_groups) {
  constexpr int64_t kLine = 64 / sizeof(T);
  if (stride_g != 1) return;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t group = 0; group < num_groups; group += kLine) {
      __builtin_prefetch(data + row * stride_n + group, 0, 2);
    }
  }
}

// StripOf::padding.
inline std::vector<uint32_t> padding_words(int64_t k) {
  const int64_t last_columns = k - (ceil_div<int64_t>(k, kPackedCpuTileK) - 1) * kPackedCpuTileK;
  std::vector<uint32_t> words(2 * kPackedCpuStep);
  for (int word = 0; word < kPackedCpuStep; ++word) {
    for (int byte = 0; byte < 4; ++byte) {
      if (column_of_byte(word, byte) < last_columns) continue;
      words[kPackedCpuStep + word] |= kPackedCpuPadding << (8 * byte);
    }
  }
  return words;
}

// A block of tokens of one strip.
struct StripTask {
  int64_t strip, first_row, num_rows, first_token, num_tokens;
};

inline StripTask strip_task_at(const PackedGemmParams& params, int64_t index, int64_t num_blocks,
                               int64_t max_tokens) {
  const int64_t first_row = index / num_blocks * kPackedCpuRows;
  const int64_t first_token = index % num_blocks * max_tokens;
  return {index / num_blocks, first_row, std::min<int64_t>(params.n - first_row, kPackedCpuRows),
          first_token, std::min<int64_t>(params.m - first_token, max_tokens)};
}

// One thread at work: scales, bias and decoding of the strip that it has come to, and sums of a
// block of its tokens.
template <class T, class Decoding>
class StripWorker {
 public:
  using Loop = typename Decoding::Loop;
  using X = typename Loop::X;

  static int64_t memory_size(const PackedGemmParams& params, const Decoding& decoding) {
    return kPackedCpuRows * (scales_stride(params) + Loop::kMaxTokens + 1) + decoding.size();
  }

  // `memory` is uninitialised: its thread is the first to touch it. What rows past N leave so gives
  // sums that nobody reads.
  StripWorker(const PackedGemmParams& params, const Decoding& decoding, const TokenTile<X>* x,
              const uint32_t* padding, float* memory)
      : params_(params),
        decoding_(decoding),
        x_(x),
        padding_(padding),
        scales_(memory),
        sums_(scales_ + kPackedCpuRows * scales_stride(params)),
        bias_(sums_ + kPackedCpuRows * Loop::kMaxTokens),
        decoding_memory_(bias_ + kPackedCpuRows) {
    if (params.scales == nullptr) std::fill(scales_, sums_, 1.0f);
    std::fill(bias_, decoding_memory_, 0.0f);
    decoding_.init(decoding_memory_);
  }

  void load_strip(int64_t first_row, int64_t num_rows) {
    if (params_.num_groups > 0) {
      decoding_.load(first_row, num_rows, decoding_memory_);
      with_scales(first_row, [&](const auto* scales) {
        load_group_table<Loop>(scales, params_.stride_scales_n, params_.stride_scales_g, num_rows,
                               params_.num_groups, scales_,
                               [](auto scale) { return to_float(scale); });
      });
    }
    if (params_.bias != nullptr) {
      for (int64_t row = 0; row < num_rows; ++row) {
        bias_[row] =
            load_float(params_.bias, params_.bias_dtype, (first_row + row) * params_.stride_bias);
      }
    }
  }

  // What load_strip will want of the next strip, while this one is multiplied.
  void prefetch_strip(int64_t first_row) const {
    const int64_t num_rows = std::min<int64_t>(params_.n - first_row, kPackedCpuRows);
    if (num_rows <= 0) return;
    decoding_.prefetch(first_row, num_rows);
    with_scales(first_row, [&](const auto* scales) {
      prefetch_group_table(scales, params_.stride_scales_n, params_.stride_scales_g, num_rows,
                           params_.num_groups);
    });
  }

  void run(const StripTask& task, int64_t num_tiles) const {
    decoding_.multiply({
        .words = params_.qweight + task.strip * params_.stride_qweight_strip,
        .num_tiles = num_tiles,
        .num_rows = static_cast<int>(task.num_rows),
        .x = x_[task.first_token].columns,
        .stride_x_tile = Loop::padded_tokens(params_.m) * kPackedCpuTileK,
        .num_tokens = static_cast<int>(task.num_tokens),
        .scales = scales_,
        .stride_scales = scales_stride(params_),
        .decoding = decoding_memory_,
        .stride_decoding_slot = decoding_.stride_slot(),
        .stride_decoding_group = decoding_.stride_group(),
        .tiles_per_group = ceil_div<int64_t>(params_.group_size, kPackedCpuTileK),
        .two_groups_per_tile = has_two_groups_per_tile(params_),
        .padding = padding_,
        .sums = sums_,
    });
    for (int64_t token = 0; token < task.num_tokens; ++token) {
      const float* sums = sums_ + token * kPackedCpuRows;
      T* out = static_cast<T*>(params_.out) + (task.first_token + token) * params_.n;
      for (int64_t row = 0; row < task.num_rows; ++row) {
        out[task.first_row + row] = from_float<T>(sums[Loop::slot_of_row(row)] + bias_[row]);
      }
    }
  }

 private:
  static int64_t scales_stride(const PackedGemmParams& params) {
    return group_table_stride(params.num_groups);
  }

  // Calls `body` with a pointer to the scales of a row, if there are any.
  template <class Body>
  void with_scales(int64_t row, const Body& body) const {
    if (params_.scales == nullptr) return;
    dispatch_float(params_.scales_dtype, [&](auto element) {
      body(static_cast<const decltype(element)*>(params_.scales) + row * params_.stride_scales_n);
    });
  }

  const PackedGemmParams& params_;
  Decoding decoding_;
  const TokenTile<X>* x_;
  const uint32_t* padding_;
  float* scales_;           // [64 slots, scales_stride]
  float* sums_;             // [kMaxTokens, 64 slots]
  float* bias_;             // [64 rows]
  float* decoding_memory_;  // the decoding's own
};

// For x and out of type T. `threads` has count(), and for_each(n, grain, body), which calls body(0)
// .. body(n - 1) in any order, `grain` of them at least on each thread.
template <class T, class Decoding, class Threads>
void packed_gemm_cpu(const PackedGemmParams& params, const Decoding& decoding,
                     const Threads& threads) {
  using Worker = StripWorker<T, Decoding>;
  using Loop = typename Decoding::Loop;
  const int64_t num_tiles = ceil_div<int64_t>(params.k, kPackedCpuTileK);
  std::vector<TokenTile<typename Loop::X>> x(num_tiles * Loop::padded_tokens(params.m));
  Loop::template gather<T>(params, num_tiles, x.data(), threads);
  const std::vector<uint32_t> padding = padding_words(params.k);

  // All memory is there before the threads start: an exception in one of them would end the
  // process.
  const int64_t num_blocks = ceil_div<int64_t>(params.m, Loop::kMaxTokens);
  const int64_t num_tasks = int4_num_strips(params.n) * num_blocks;
  const int64_t num_workers = std::min<int64_t>(threads.count(), num_tasks);
  const int64_t memory_size = Worker::memory_size(params, decoding);
  const std::unique_ptr<float[]> memory(new float[num_workers * memory_size]);

  // Cores are not equally fast: each takes a few chunks, one when it is done with another. A
  // strip's tasks follow each other, and strips in the order in which they lie in memory.
  const int64_t chunk = num_workers == 0 ? 1 : ceil_div<int64_t>(num_tasks, 4 * num_workers);
  std::atomic<int64_t> next_task = 0;
  threads.for_each(num_workers, 1, [&](int64_t idx) {
    Worker worker(params, decoding, x.data(), padding.data(), memory.get() + idx * memory_size);
    int64_t loaded_strip = -1;
    for (int64_t task_idx = 0, last = 0;; ++task_idx) {
      if (task_idx == last) {
        task_idx = next_task.fetch_add(chunk);
        last = std::min(task_idx + chunk, num_tasks);
        if (task_idx >= num_tasks) return;
      }
      const StripTask task = strip_task_at(params, task_idx, num_blocks, Loop::kMaxTokens);
      if (task.strip != loaded_strip) {
        worker.load_strip(task.first_row, task.num_rows);
        worker.prefetch_strip(task.first_row + kPackedCpuRows);
      }
      loaded_strip = task.strip;
      worker.run(task, num_tiles);
    }
  });
}

}  // namespace effllm
