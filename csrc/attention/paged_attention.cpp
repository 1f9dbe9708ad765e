// paged_attention: schema and CPU implementation.
//
// The rows of one task, query tokens times the query heads of one KV head, share every key and
// value that they load. Keys come in tiles and tiles in splits, which begin at multiples of
// kTileKeys and kSplitKeys wherever the first visible key is. Every split is an online softmax of
// its own, merged in the order of keys: a row's result depends neither on the rows beside it, nor
// on the batch, nor on which threads took its splits, to the bit.
#include "attention/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "attention/paged_attention_rows.h"
#include "attention/paged_attention_tasks.h"
#include "attention/row_states.h"
#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

constexpr int64_t kTileKeys = kAttentionTileKeys;
// Up to which keys and values are decoded as they are used, and not once for all rows beforehand.
constexpr int64_t kFewRows = 8;
constexpr int64_t kTasksPerThread = 4;  // with fewer, threads share tasks
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t padded_dim(const PagedAttentionParams& params) {
  return (params.head_dim + kAttentionDimStep - 1) / kAttentionDimStep * kAttentionDimStep;
}

// What one thread works in.
struct Workspace {
  static int64_t size(int64_t dim) {
    return kTileRows * dim + 2 * RowStates::size(kTileRows, dim) + (2 * kTileKeys + 1) * dim;
  }

  Workspace(float* memory, int64_t dim)
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

AttentionKernels select_kernels(const PagedAttentionParams& params) {
  if constexpr (kHasX86Isas) {
    if (cpu_isa() >= CpuIsa::kAvx512Bf16 && params.dtype == DType::kBFloat16) {
      return attention_kernels_avx512bf16(params.kv_dtype);
    }
    if (cpu_isa() >= CpuIsa::kAvx512) return attention_kernels_avx512(params.kv_dtype);
    if (cpu_isa() == CpuIsa::kAvx2) return attention_kernels_avx2(params.kv_dtype);
  }
  return attention_kernels<4>(params.kv_dtype);
}

// One of the two caches.
struct Cache {
  const void* data;
  int64_t stride_page, stride_slot, stride_head;
  const KvScales* scales;
};

// Where rows of `range`, which lies in one tile, are, and what decodes them: each `shift` places
// behind its position.
template <class Kv>
void locate_rows(const PagedAttentionParams& params, const Cache& cache, const Task& task,
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

RowLocator select_locator(const PagedAttentionParams& params) {
  if (is_quantized_kv(params.kv_dtype)) {
    return dispatch_kv_codec(params.kv_dtype,
                             [](auto codec) -> RowLocator { return locate_rows<decltype(codec)>; });
  }
  return dispatch_float(params.kv_dtype,
                        [](auto element) -> RowLocator { return locate_rows<decltype(element)>; });
}

// A call: the params and what their dtypes choose.
struct Call {
  explicit Call(const PagedAttentionParams& params)
      : params(params),
        dim(padded_dim(params)),
        locate(select_locator(params)),
        kernels(select_kernels(params)),
        k_cache{params.k_cache, params.stride_k_page, params.stride_k_slot, params.stride_k_head,
                &params.k_scales},
        v_cache{params.v_cache, params.stride_v_page, params.stride_v_slot, params.stride_v_head,
                &params.v_scales} {}

  // Where element d is in a padded row of queries and sums.
  int64_t lane_of(int64_t d) const {
    return kernels.splits_neighbours ? d / 2 + d % 2 * (dim / 2) : d;
  }

  template <class T>
  void load_queries(const Task& task, Workspace& work) const {
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

  template <class T>
  void store_rows(const Task& task, const RowStates& states) const {
    const int64_t group = params.num_q_heads / params.num_kv_heads;
    for (int64_t idx = 0; idx < task.num_rows; ++idx) {
      const int64_t row = task.first_row + idx;
      const int64_t head = task.kv_head * group + row % group;
      const int64_t out_row = (task.seq.first_token + row / group) * params.num_q_heads + head;
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

  AttentionTile operands_of(int64_t first_key, const KvRows* keys, const KvRows* values,
                            const Workspace& work, const RowStates& states) const {
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
  void attend(const Task& task, KeyRange keys, Workspace& work, RowStates& states) const {
    states.clear();
    if (task.seq.tree_mask == nullptr) return attend_shared(task, keys, work, states);
    const int64_t first_own = task.seq.base() / kTileKeys * kTileKeys;
    attend_shared(task, keys & KeyRange{0, first_own}, work, states);
    attend_paths(task, keys & KeyRange{first_own, keys.end}, work, states);
  }

  void attend_shared(const Task& task, KeyRange keys, Workspace& work, RowStates& states) const {
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
          operands_of(tile.begin / kTileKeys * kTileKeys, key_rows, value_rows, work, states);
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
  void attend_paths(const Task& task, KeyRange keys, Workspace& work, RowStates& states) const {
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
        update(operands_of(first, work.key_rows, work.value_rows, work, states), row, next - row,
               static_cast<int>(tile.begin - first), static_cast<int>(tile.end - first));
      }
    }
  }

  const PagedAttentionParams& params;
  int64_t dim;  // padded
  RowLocator locate;
  AttentionKernels kernels;
  Cache k_cache, v_cache;
};

// Takes work one by one, as pieces differ in length, on as many threads as there are or pieces.
// Nothing may throw: an exception in a thread would end the process.
template <class Body>
void share_out(int64_t num_pieces, int64_t dim, const Body& body) {
  const int64_t num_workers = std::min<int64_t>(torch::stable::get_num_threads(), num_pieces);
  std::vector<float> memory(num_workers * Workspace::size(dim));
  std::atomic<int64_t> next_piece{0};
  parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Workspace work(memory.data() + worker * Workspace::size(dim), dim);
      for (int64_t idx = next_piece++; idx < num_pieces; idx = next_piece++) body(idx, work);
    }
  });
}

// A thread for each task.
template <class T>
void run_tasks(const Call& call, const std::vector<Task>& tasks) {
  share_out(static_cast<int64_t>(tasks.size()), call.dim, [&](int64_t idx, Workspace& work) {
    const Task& task = tasks[idx];
    call.load_queries<T>(task, work);
    RowStates whole(work.whole, task.num_rows, call.dim);
    RowStates split(work.split, task.num_rows, call.dim);
    whole.clear();
    for (int64_t part = 0; part < task.num_splits(); ++part) {
      call.attend(task, task.split(part), work, split);
      whole.merge(split);
    }
    call.store_rows<T>(task, whole);
  });
}

// A thread for each split; the one that finishes a task merges its splits.
template <class T>
void run_splits(const Call& call, const std::vector<Task>& tasks) {
  struct Split {
    int64_t task, idx, state;  // where its RowStates lie
  };
  std::vector<Split> splits;
  std::vector<std::atomic<int64_t>> unfinished(tasks.size());
  int64_t num_floats = 0;
  for (size_t task = 0; task < tasks.size(); ++task) {
    unfinished[task] = tasks[task].num_splits();
    for (int64_t idx = 0; idx < tasks[task].num_splits(); ++idx) {
      splits.push_back({static_cast<int64_t>(task), idx, num_floats});
      num_floats += RowStates::size(tasks[task].num_rows, call.dim);
    }
  }
  std::vector<float> states(num_floats);
  share_out(static_cast<int64_t>(splits.size()), call.dim, [&](int64_t idx, Workspace& work) {
    const Split& split = splits[idx];
    const Task& task = tasks[split.task];
    const auto states_of = [&](int64_t part) {
      const int64_t size = RowStates::size(task.num_rows, call.dim);
      return RowStates(states.data() + split.state + (part - split.idx) * size, task.num_rows,
                       call.dim);
    };
    call.load_queries<T>(task, work);
    RowStates own = states_of(split.idx);
    call.attend(task, task.split(split.idx), work, own);
    if (--unfinished[split.task] > 0) return;
    RowStates whole(work.whole, task.num_rows, call.dim);
    whole.clear();
    for (int64_t part = 0; part < task.num_splits(); ++part) whole.merge(states_of(part));
    call.store_rows<T>(task, whole);
  });
}

template <class T>
void run_paged_attention(const PagedAttentionParams& params) {
  // Query tokens past the last sequence: rows without keys.
  const int64_t num_rows = params.num_tokens * params.num_q_heads;
  const int64_t first_unused = params.cu_seqlens_q[params.num_seqs] * params.num_q_heads;
  std::fill(static_cast<T*>(params.out) + first_unused * params.head_dim,
            static_cast<T*>(params.out) + num_rows * params.head_dim, T{});
  std::fill(params.lse + first_unused, params.lse + num_rows, -kInfinity);

  const Call call(params);
  const std::vector<Task> tasks = make_tasks(params);
  const int64_t enough = kTasksPerThread * torch::stable::get_num_threads();
  if (static_cast<int64_t>(tasks.size()) >= enough) {
    run_tasks<T>(call, tasks);
  } else {
    run_splits<T>(call, tasks);
  }
}

std::tuple<Tensor, Tensor> paged_attention_cpu(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
    const Tensor& seq_lens, const Tensor& cu_seqlens_q, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, const std::optional<Tensor>& sinks,
    const std::optional<Tensor>& alibi_slopes, const std::optional<Tensor>& tree_mask,
    int64_t max_seqlen_q, std::optional<double> scale, bool causal, std::optional<int64_t> window,
    double softcap, std::optional<int64_t> split_size, int64_t sink_tokens) {
  PagedAttentionParams params = check_paged_attention(
      as_view(q, "q"), as_view(k_cache, "k_cache"), as_view(v_cache, "v_cache"),
      as_view(page_table, "page_table"), as_view(seq_lens, "seq_lens"),
      as_view(cu_seqlens_q, "cu_seqlens_q"), as_view(k_scale, "k_scale"),
      as_view(v_scale, "v_scale"), as_view(sinks, "sinks"), as_view(alibi_slopes, "alibi_slopes"),
      as_view(tree_mask, "tree_mask"), max_seqlen_q, scale, causal, window, softcap, split_size,
      sink_tokens);
  check_values(params);

  Tensor out = new_empty(q, {params.num_tokens, params.num_q_heads, params.head_dim}, params.dtype);
  Tensor lse = new_empty(q, {params.num_tokens, params.num_q_heads}, DType::kFloat32);
  params.out = out.mutable_data_ptr();
  params.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (params.num_tokens > 0 && params.num_q_heads > 0) {
    dispatch_float(params.dtype,
                   [&](auto element) { run_paged_attention<decltype(element)>(params); });
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, "
      "Tensor seq_lens, Tensor cu_seqlens_q, Tensor? k_scale=None, Tensor? v_scale=None, "
      "Tensor? sinks=None, Tensor? alibi_slopes=None, Tensor? tree_mask=None, *, "
      "SymInt max_seqlen_q, float? scale=None, bool causal=True, int? window=None, "
      "float softcap=0., int? split_size=None, int sink_tokens=0) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
}

}  // namespace effllm
