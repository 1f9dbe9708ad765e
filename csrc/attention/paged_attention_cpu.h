// What ops over a paged cache share on the CPU: tasks (paged_attention_tasks.h) meet tiles of keys.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "attention/paged_attention_rows.h"
#include "attention/paged_attention_tasks.h"
#include "attention/row_states.h"
#include "common/dispatch.h"

namespace effllm {

inline constexpr int64_t kTileKeys = kAttentionTileKeys;
// Up to which keys and values are decoded as they are used, and not once for all rows beforehand.
inline constexpr int64_t kFewRows = 8;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of the processor and the dtypes. Defined in paged_attention.cpp, as the next one is.
AttentionKernels select_attention_kernels(const PagedAttentionParams& params);

// All of paged_attention on checked arguments, whose values are checked too.
void run_paged_attention(const PagedAttentionParams& params);

inline int64_t padded_dim(const PagedAttentionParams& params) {
  return (params.head_dim + kAttentionDimStep - 1) / kAttentionDimStep * kAttentionDimStep;
}

// What the weights of a row are exponentials against: its lse, with a sink's score in it. Where all
// scores are -inf, any finite number does.
inline float weight_base(const PagedAttentionParams& params, int64_t head, float lse) {
  if (lse == -kInfinity) return 0.0f;
  return params.sinks != nullptr ? lse + std::log1p(std::exp(params.sinks[head] - lse)) : lse;
}

// Takes work one by one, as pieces differ in length, on as many threads as there are or pieces;
// each has so many floats to work in, zeros at first. Nothing may throw: an exception in a thread
// would end the process.
template <class Threads, class Body>
void share_out(const Threads& threads, int64_t num_pieces, int64_t floats, const Body& body) {
  const int64_t num_workers = std::min<int64_t>(threads.count(), num_pieces);
  std::vector<float> memory(num_workers * floats);
  std::atomic<int64_t> next_piece{0};
  threads.for_each(num_workers, 1, [&](int64_t worker) {
    for (int64_t idx = next_piece++; idx < num_pieces; idx = next_piece++) {
      body(idx, memory.data() + worker * floats);
    }
  });
}

// What one thread works in.
struct AttentionWorkspace {
  static int64_t size(int64_t dim) {
    return kTileRows * dim + 2 * RowStates::size(kTileRows, dim) + (2 * kTileKeys + 1) * dim;
  }

  AttentionWorkspace(float* memory, int64_t dim)
      : queries(memory),
        whole(queries + kTileRows * dim),
        split(whole + RowStates::size(kTileRows, dim)),
        keys(split + RowStates::size(kTileRows, dim)),
        values(keys + kTileKeys * dim),
        padded_row(values + kTileKeys * dim) {}

  float* queries;      // [kTileRows, padded D]
  float* whole;        // memory of RowStates
  float* split;        // likewise
  float* keys;         // [kTileKeys, padded D]: decoded rows
  float* values;       // likewise
  float* padded_row;   // [padded D], of a cache whose rows are shorter; zeros behind
  KvRows key_rows[2];  // of this tile and the next
  KvRows value_rows[2];
  AlibiRow alibi[kTileRows];
};

// One of the two caches.
struct PagedCache {
  const void* data;
  int64_t stride_page, stride_slot, stride_head;
  const KvScales* scales;
};

// Where rows of `range`, which lies in one tile, are, and what decodes them: each `shift` places
// behind its position.
template <class Kv>
void locate_rows(const PagedAttentionParams& params, const PagedCache& cache, const Task& task,
                 KeyRange range, int64_t shift, KvRows& rows) {
  const KvScales scales = *cache.scales;
  const int64_t page_size = params.page_size;
  int64_t entry = (range.begin + shift) / page_size, slot = (range.begin + shift) % page_size;
  for (int64_t position = range.begin; position < range.end; slot = 0, ++entry) {
    // The rows of one page.
    const int64_t last = std::min(range.end, position + page_size - slot),
                  page = task.seq.pages[entry];
    const char* row =
        static_cast<const char*>(cache.data) +
        (page * cache.stride_page + slot * cache.stride_slot + task.kv_head * cache.stride_head) *
            static_cast<int64_t>(sizeof(Kv));
    const int64_t stride = cache.stride_slot * static_cast<int64_t>(sizeof(Kv));
    int64_t word =
        page * scales.stride_page + slot * scales.stride_slot + task.kv_head * scales.stride_head;
    for (; position < last; ++position, row += stride, word += scales.stride_slot) {
      const int64_t key = position % kTileKeys;
      rows.rows[key] = row;
      KvDecoding decoding{1.0f, 0.0f};
      if constexpr (requires { Kv::decoding; }) decoding = Kv::decoding(scales.words[word]);
      rows.scales[key] = decoding.scale * KvVectors<Kv>::kPower;
      rows.zeros[key] = decoding.zero;
    }
  }
}

using RowLocator = decltype(&locate_rows<float>);

inline RowLocator select_locator(const PagedAttentionParams& params) {
  if (is_quantized_kv(params.kv_dtype)) {
    return dispatch_kv_codec(params.kv_dtype,
                             [](auto codec) -> RowLocator { return locate_rows<decltype(codec)>; });
  }
  return dispatch_float(params.kv_dtype,
                        [](auto element) -> RowLocator { return locate_rows<decltype(element)>; });
}

// A call: the params and what their dtypes choose.
struct AttentionCall {
  explicit AttentionCall(const PagedAttentionParams& params)
      : params(params),
        dim(padded_dim(params)),
        locate(select_locator(params)),
        kernels(select_attention_kernels(params)),
        k_cache{params.k_cache, params.stride_k_page, params.stride_k_slot, params.stride_k_head,
                &params.k_scales},
        v_cache{params.v_cache, params.stride_v_page, params.stride_v_slot, params.stride_v_head,
                &params.v_scales} {}

  // Where element d is in a padded row of queries and sums.
  int64_t lane_of(int64_t d) const {
    return kernels.splits_neighbours ? d / 2 + d % 2 * (dim / 2) : d;
  }

  template <class T>
  void load_queries(const Task& task, AttentionWorkspace& work) const {
    const int64_t group = params.num_q_heads / params.num_kv_heads;
    std::fill_n(work.queries, task.num_rows * dim, 0.0f);
    for (int64_t idx = 0; idx < task.num_rows; ++idx) {
      const int64_t row = task.first_row + idx;
      const T* query = static_cast<const T*>(params.q) +
                       (task.seq.first_token + row / group) * params.stride_q_token +
                       (task.kv_head * group + row % group) * params.stride_q_head;
      for (int64_t d = 0; d < params.head_dim; ++d) {
        work.queries[idx * dim + lane_of(d)] = to_float(query[d]);
      }
      if (params.alibi_slopes != nullptr) {
        work.alibi[idx] = {params.alibi_slopes[task.kv_head * group + row % group],
                           task.seq.position(row / group)};
      }
    }
  }

  // Of row `idx` of a task, in [T * HQ].
  int64_t output_row(const Task& task, int64_t idx) const {
    const int64_t group = params.num_q_heads / params.num_kv_heads;
    const int64_t row = task.first_row + idx;
    return (task.seq.first_token + row / group) * params.num_q_heads + task.kv_head * group +
           row % group;
  }

  template <class T>
  void store_rows(const Task& task, const RowStates& states) const {
    const int64_t group = params.num_q_heads / params.num_kv_heads;
    for (int64_t idx = 0; idx < task.num_rows; ++idx) {
      const int64_t head = task.kv_head * group + (task.first_row + idx) % group;
      const int64_t out_row = output_row(task, idx);
      const float total = states.totals[idx];
      params.lse[out_row] = states.maxima[idx] + std::log(total);  // log(0) = -inf: no key
      const float sink = params.sinks != nullptr ? params.sinks[head] : -kInfinity;
      const float divisor = total + std::exp(sink - states.maxima[idx]);
      T* out = static_cast<T*>(params.out) + out_row * params.head_dim;
      for (int64_t d = 0; d < params.head_dim; ++d) {
        const float sum = states.sums[idx * states.dim + lane_of(d)];
        out[d] = from_float<T>(total == 0.0f ? 0.0f : sum / divisor);
      }
    }
  }

  void locate_tile(const Task& task, KeyRange tile, KvRows& keys, KvRows& values) const {
    locate(params, k_cache, task, tile, 0, keys);
    locate(params, v_cache, task, tile, 0, values);
  }

  // The same of a text that ends with a query of a tree: its path stands where it would stand if
  // it had been all that was appended. Tokens that neighbour in the cache are found together.
  void locate_path(const Task& task, int64_t query, KeyRange tile, KvRows& keys,
                   KvRows& values) const {
    for (int64_t begin = tile.begin, end; begin < tile.end; begin = end) {
      const int64_t shift = task.seq.shift(query, begin);
      for (end = begin + 1; end < tile.end && task.seq.shift(query, end) == shift; ++end) {
      }
      locate(params, k_cache, task, {begin, end}, shift, keys);
      locate(params, v_cache, task, {begin, end}, shift, values);
    }
  }

  // Puts decoded rows in place of a tile's rows.
  void decode_rows(KeyRange tile, float* padded_row, float* decoded, KvRows& rows) const {
    const int64_t row_bytes = params.head_dim * kernels.element_bits / 8;
    for (int64_t position = tile.begin; position < tile.end; ++position) {
      const int64_t key = position % kTileKeys;
      const void* row = rows.rows[key];
      if (params.head_dim != dim) row = std::memcpy(padded_row, row, row_bytes);
      kernels.decode_row(row, rows.zeros[key], dim, decoded + key * dim);
      rows.rows[key] = decoded + key * dim;
    }
  }

  // Whether so many rows read a tile's rows as they are stored.
  bool reads_stored(int64_t num_rows) const {
    const bool needs_no_decoding = kernels.update_rows == kernels.update_decoded_rows;
    return params.head_dim == dim && (num_rows <= kFewRows || needs_no_decoding);
  }

  AttentionTile operands_of(const Task& task, int64_t first_key, const KvRows* keys,
                            const KvRows* values, const AttentionWorkspace& work,
                            const RowStates& states) const {
    return {.dim = dim,
            .scale = params.scale,
            .softcap = params.softcap,
            .queries = work.queries,
            .keys = keys,
            .values = values,
            .next_keys = nullptr,
            .next_values = nullptr,
            .first_key = first_key,
            .alibi = params.alibi_slopes != nullptr ? work.alibi : nullptr,
            .scores = params.logits != nullptr
                          ? params.logits + output_row(task, 0) * params.stride_logits + first_key
                          : nullptr,
            .stride_scores = params.stride_logits,
            .sums = states.sums,
            .maxima = states.maxima,
            .totals = states.totals};
  }

  // What a row of the task sees of `keys`, which are of the head or behind it.
  KeyRange visible_keys(const Task& task, int64_t row, KeyRange keys) const {
    const int64_t query = task.query(params, row);
    return keys & (keys.begin < params.sink_tokens ? task.seq.head_keys(params, query)
                                                   : task.seq.visible_keys(params, query));
  }

  // The online softmax of a task's rows over `keys`, from the beginning. In a tree, the tiles that
  // have keys of its tokens are each query's own.
  void attend(const Task& task, KeyRange keys, AttentionWorkspace& work, RowStates& states) const {
    states.clear();
    if (task.seq.tree_mask == nullptr) return attend_shared(task, keys, work, states);
    const int64_t first_own = task.seq.base() / kTileKeys * kTileKeys;
    attend_shared(task, keys & KeyRange{0, first_own}, work, states);
    attend_paths(task, keys & KeyRange{first_own, keys.end}, work, states);
  }

  void attend_shared(const Task& task, KeyRange keys, AttentionWorkspace& work,
                     RowStates& states) const {
    const bool as_stored = reads_stored(task.num_rows);
    const auto tile_at = [&](int64_t begin) { return keys & KeyRange{begin, begin + kTileKeys}; };
    KeyRange tile = tile_at(keys.begin / kTileKeys * kTileKeys);
    if (tile.empty()) return;
    KvRows *key_rows = work.key_rows, *next_key_rows = key_rows + 1;
    KvRows *value_rows = work.value_rows, *next_value_rows = value_rows + 1;
    locate_tile(task, tile, *key_rows, *value_rows);
    for (; !tile.empty(); tile = tile_at(tile.end)) {
      const KeyRange next = tile_at(tile.end);
      if (!next.empty()) locate_tile(task, next, *next_key_rows, *next_value_rows);
      if (!as_stored) {
        decode_rows(tile, work.padded_row, work.keys, *key_rows);
        decode_rows(tile, work.padded_row, work.values, *value_rows);
      }
      AttentionTile operands =
          operands_of(task, tile.begin / kTileKeys * kTileKeys, key_rows, value_rows, work, states);
      if (as_stored && !next.empty()) {
        operands.next_keys = next_key_rows;
        operands.next_values = next_value_rows;
      }
      update_tile(task, tile, as_stored ? kernels.update_rows : kernels.update_decoded_rows,
                  operands);
      std::swap(key_rows, next_key_rows);
      std::swap(value_rows, next_value_rows);
    }
  }

  // Rows that see the same keys of the tile go together.
  void update_tile(const Task& task, KeyRange tile,
                   decltype(AttentionKernels::update_rows) update_rows,
                   const AttentionTile& operands) const {
    for (int64_t row = 0, next; row < task.num_rows; row = next) {
      const KeyRange visible = visible_keys(task, row, tile);
      for (next = row + 1; next < task.num_rows && visible_keys(task, next, tile) == visible;
           ++next) {
      }
      if (visible.empty()) continue;
      update_rows(operands, row, next - row, static_cast<int>(visible.begin - operands.first_key),
                  static_cast<int>(visible.end - operands.first_key));
    }
  }

  // The rows of each query of a tree meet the text that ends with it. Tiles are those of that text,
  // so results are what decoding it token by token would give, to the bit.
  void attend_paths(const Task& task, KeyRange keys, AttentionWorkspace& work,
                    RowStates& states) const {
    for (int64_t row = 0, next; row < task.num_rows; row = next) {
      const int64_t query = task.query(params, row);
      for (next = row + 1; next < task.num_rows && task.query(params, next) == query; ++next) {
      }
      const KeyRange visible = visible_keys(task, row, keys);
      const bool as_stored = reads_stored(next - row);
      for (int64_t first = visible.begin / kTileKeys * kTileKeys; first < visible.end;
           first += kTileKeys) {
        const KeyRange tile = visible & KeyRange{first, first + kTileKeys};
        locate_path(task, query, tile, *work.key_rows, *work.value_rows);
        if (!as_stored) {
          decode_rows(tile, work.padded_row, work.keys, *work.key_rows);
          decode_rows(tile, work.padded_row, work.values, *work.value_rows);
        }
        const auto update = as_stored ? kernels.update_rows : kernels.update_decoded_rows;
        update(operands_of(task, first, work.key_rows, work.value_rows, work, states), row,
               next - row, static_cast<int>(tile.begin - first),
               static_cast<int>(tile.end - first));
      }
    }
  }

  const PagedAttentionParams& params;
  int64_t dim;  // padded
  RowLocator locate;
  AttentionKernels kernels;
  PagedCache k_cache, v_cache;
};

}  // namespace effllm
