// paged_attention: schema and CPU implementation.
//
// The rows of one task, query tokens times the query heads of one KV head, share every key and
// value that they load. Keys come in tiles that begin at multiples of kTileKeys, wherever the first
// visible key is: a row's result then depends neither on the rows beside it nor on the batch, to
// the bit.
#include "attention/paged_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "attention/paged_attention_rows.h"
#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

constexpr int64_t kTileRows = 32;
constexpr int64_t kTileKeys = kAttentionTileKeys;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct KeyRange {
  int64_t begin, end;

  KeyRange operator&(const KeyRange& other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
  bool operator==(const KeyRange&) const = default;
  bool empty() const { return begin >= end; }
};

struct Sequence {
  int64_t index, first_token, num_queries, num_keys;

  // What query `query` of this sequence sees. Both ends grow with `query`.
  KeyRange visible_keys(const PagedAttentionParams& params, int64_t query) const {
    const int64_t position = num_keys - num_queries + query;
    return {std::max<int64_t>(position - params.window + 1, 0),
            params.causal ? std::min(position + 1, num_keys) : num_keys};
  }

  KeyRange visible_keys(const PagedAttentionParams& params, int64_t first, int64_t last) const {
    return {visible_keys(params, first).begin, visible_keys(params, last).end};
  }
};

Sequence sequence_at(const PagedAttentionParams& params, int64_t index) {
  const int32_t* starts = params.cu_seqlens_q + index;
  return {index, starts[0], starts[1] - starts[0], params.seq_lens[index]};
}

// Checks what the tensors hold, as far as it will be read. Nothing may throw once threads run.
void check_values(const PagedAttentionParams& params) {
  const Check check("paged_attention");
  const auto in_range = [&](const std::string& name, int64_t value, int64_t first, int64_t last,
                            const char* formula) {
    if (value >= first && value <= last) return;
    const int64_t bounds[] = {first, last};
    check.that(false, name + " must be in " + formula + " = " + format_list(bounds, 2) + ", got " +
                          std::to_string(value));
  };

  check.that(params.cu_seqlens_q[0] == 0,
             "cu_seqlens_q[0] must be 0, got " + std::to_string(params.cu_seqlens_q[0]));
  const int64_t longest_keys = params.max_pages_per_seq * params.page_size;
  int64_t longest_query = 0;
  for (int64_t idx = 0; idx < params.num_seqs; ++idx) {
    const std::string position = std::to_string(idx);
    const Sequence seq = sequence_at(params, idx);
    in_range("cu_seqlens_q[" + std::to_string(idx + 1) + "]", params.cu_seqlens_q[idx + 1],
             params.cu_seqlens_q[idx], params.num_tokens, "[the entry before it, T]");
    in_range("seq_lens[" + position + "]", seq.num_keys, 0, longest_keys, "[0, MAXP * P]");
    longest_query = std::max(longest_query, seq.num_queries);

    if (seq.num_queries == 0) continue;
    const KeyRange keys = seq.visible_keys(params, 0, seq.num_queries - 1);
    if (keys.empty()) continue;
    const int32_t* pages = params.page_table + idx * params.stride_page_table_seq;
    for (int64_t page = keys.begin / params.page_size; page * params.page_size < keys.end; ++page) {
      if (pages[page] >= 0 && pages[page] < params.num_pages) continue;
      in_range("page_table[" + position + ", " + std::to_string(page) + "]", pages[page], 0,
               params.num_pages - 1, "[0, NP - 1]");
    }
  }
  check.that(params.max_seqlen_q >= longest_query,
             "max_seqlen_q must be at least the longest query of cu_seqlens_q, " +
                 std::to_string(longest_query) + ", got " + std::to_string(params.max_seqlen_q));
}

// Up to kTileRows rows of one sequence and KV head. Row r is query token r / group of the sequence
// and query head r % group of the KV head.
struct Task {
  Sequence seq;
  int64_t kv_head, first_row, num_rows;
};

std::vector<Task> split_into_tasks(const PagedAttentionParams& params) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  std::vector<Task> tasks;
  for (int64_t idx = 0; idx < params.num_seqs; ++idx) {
    const Sequence seq = sequence_at(params, idx);
    const int64_t num_rows = seq.num_queries * group;
    for (int64_t row = 0; row < num_rows; row += kTileRows) {
      for (int64_t head = 0; head < params.num_kv_heads; ++head) {
        tasks.push_back({seq, head, row, std::min(kTileRows, num_rows - row)});
      }
    }
  }
  return tasks;
}

// What one thread works in, all in fp32.
struct Workspace {
  static int64_t size(int64_t dim) {
    return (2 * kTileRows + kAttentionKeyStride + kTileKeys) * dim;
  }

  Workspace(float* memory, int64_t dim)
      : queries(memory),
        sums(queries + kTileRows * dim),
        keys(sums + kTileRows * dim),
        values(keys + kAttentionKeyStride * dim) {}

  float* queries;           // [kTileRows, D]
  float* sums;              // [kTileRows, D], of exp(score - maximum) * value
  float* keys;              // [D, kAttentionKeyStride]
  float* values;            // [kTileKeys, D]
  float maxima[kTileRows];  // largest score of each row so far
  float totals[kTileRows];  // of exp(score - maximum)
};

AttentionRowsKernel select_rows_kernel() {
  if constexpr (kHasX86Isas) {
    if (cpu_isa() >= CpuIsa::kAvx512) return attention_rows_avx512;
    if (cpu_isa() == CpuIsa::kAvx2) return attention_rows_avx2;
  }
  return update_rows<4>;
}

template <class T>
void load_queries(const PagedAttentionParams& params, const Task& task, Workspace& work) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  for (int64_t idx = 0; idx < task.num_rows; ++idx) {
    const int64_t row = task.first_row + idx;
    const T* query = static_cast<const T*>(params.q) +
                     (task.seq.first_token + row / group) * params.stride_q_token +
                     (task.kv_head * group + row % group) * params.stride_q_head;
    for (int64_t d = 0; d < params.head_dim; ++d) {
      work.queries[idx * params.head_dim + d] = to_float(query[d]);
    }
  }
}

// One row of a cache in fp32. `Kv` is the cache's element, or the codec of a quantised one.
template <class Kv>
void load_row(const void* cache, int64_t offset, const KvScales& scales, int64_t scale_offset,
              int64_t dim, float* row) {
  if constexpr (requires { Kv::decode; }) {
    Kv::decode(static_cast<const uint8_t*>(cache) + offset, scales.words[scale_offset], dim, row);
  } else {
    const Kv* elements = static_cast<const Kv*>(cache) + offset;
    for (int64_t d = 0; d < dim; ++d) row[d] = to_float(elements[d]);
  }
}

// Keys (transposed) and values of `range`, which lies in the tile that begins at `tile_begin`.
template <class Kv>
void load_keys_and_values(const PagedAttentionParams& params, const Task& task, KeyRange range,
                          int64_t tile_begin, Workspace& work) {
  const auto scale_offset = [&](const KvScales& scales, int64_t page, int64_t slot) {
    return page * scales.stride_page + slot * scales.stride_slot +
           task.kv_head * scales.stride_head;
  };
  const int32_t* pages = params.page_table + task.seq.index * params.stride_page_table_seq;
  for (int64_t position = range.begin; position < range.end; ++position) {
    const int64_t page = pages[position / params.page_size];
    const int64_t slot = position % params.page_size;
    const int64_t k_offset = page * params.stride_k_page + slot * params.stride_k_slot +
                             task.kv_head * params.stride_k_head;
    const int64_t v_offset = page * params.stride_v_page + slot * params.stride_v_slot +
                             task.kv_head * params.stride_v_head;
    float key[kMaxHeadDim];
    load_row<Kv>(params.k_cache, k_offset, params.k_scales,
                 scale_offset(params.k_scales, page, slot), params.head_dim, key);
    float* key_column = work.keys + (position - tile_begin);
    for (int64_t d = 0; d < params.head_dim; ++d) key_column[d * kAttentionKeyStride] = key[d];
    load_row<Kv>(params.v_cache, v_offset, params.v_scales,
                 scale_offset(params.v_scales, page, slot), params.head_dim,
                 work.values + (position - tile_begin) * params.head_dim);
  }
}

template <class T>
void store_rows(const PagedAttentionParams& params, const Task& task, const Workspace& work) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  for (int64_t idx = 0; idx < task.num_rows; ++idx) {
    const int64_t row = task.first_row + idx;
    const int64_t out_row = (task.seq.first_token + row / group) * params.num_q_heads +
                            task.kv_head * group + row % group;
    const float total = work.totals[idx];
    params.lse[out_row] = work.maxima[idx] + std::log(total);  // log(0) = -inf: no key
    T* out = static_cast<T*>(params.out) + out_row * params.head_dim;
    for (int64_t d = 0; d < params.head_dim; ++d) {
      const float sum = work.sums[idx * params.head_dim + d];
      out[d] = from_float<T>(total == 0.0f ? 0.0f : sum / total);
    }
  }
}

using KeysAndValuesLoader = decltype(&load_keys_and_values<float>);

KeysAndValuesLoader select_loader(const PagedAttentionParams& params) {
  if (is_quantized_kv(params.kv_dtype)) {
    return dispatch_kv_codec(params.kv_dtype, [](auto codec) -> KeysAndValuesLoader {
      return load_keys_and_values<decltype(codec)>;
    });
  }
  return dispatch_float(params.kv_dtype, [](auto element) -> KeysAndValuesLoader {
    return load_keys_and_values<decltype(element)>;
  });
}

template <class T>
void run_task(const PagedAttentionParams& params, const Task& task, Workspace& work,
              KeysAndValuesLoader load_keys_and_values, AttentionRowsKernel update_rows) {
  const int64_t group = params.num_q_heads / params.num_kv_heads;
  load_queries<T>(params, task, work);
  std::fill_n(work.sums, task.num_rows * params.head_dim, 0.0f);
  std::fill_n(work.maxima, task.num_rows, -kInfinity);
  std::fill_n(work.totals, task.num_rows, 0.0f);

  const AttentionTile operands{.dim = params.head_dim,
                               .scale = params.scale,
                               .softcap = params.softcap,
                               .queries = work.queries,
                               .keys = work.keys,
                               .values = work.values,
                               .sums = work.sums,
                               .maxima = work.maxima,
                               .totals = work.totals};
  const KeyRange keys = task.seq.visible_keys(params, task.first_row / group,
                                              (task.first_row + task.num_rows - 1) / group);
  for (int64_t tile_begin = keys.begin / kTileKeys * kTileKeys; tile_begin < keys.end;
       tile_begin += kTileKeys) {
    const KeyRange tile = keys & KeyRange{tile_begin, tile_begin + kTileKeys};
    load_keys_and_values(params, task, tile, tile_begin, work);
    const auto visible_keys = [&](int64_t row) {
      return tile & task.seq.visible_keys(params, (task.first_row + row) / group);
    };
    // Rows that see the same keys of the tile go together.
    for (int64_t row = 0, next; row < task.num_rows; row = next) {
      const KeyRange visible = visible_keys(row);
      for (next = row + 1; next < task.num_rows && visible_keys(next) == visible; ++next) {
      }
      if (visible.empty()) continue;
      update_rows(operands, row, next - row, static_cast<int>(visible.begin - tile_begin),
                  static_cast<int>(visible.end - tile_begin));
    }
  }
  store_rows<T>(params, task, work);
}

template <class T>
void run_paged_attention(const PagedAttentionParams& params) {
  // Query tokens past the last sequence: rows without keys.
  const int64_t num_rows = params.num_tokens * params.num_q_heads;
  const int64_t first_unused = params.cu_seqlens_q[params.num_seqs] * params.num_q_heads;
  std::fill(static_cast<T*>(params.out) + first_unused * params.head_dim,
            static_cast<T*>(params.out) + num_rows * params.head_dim, T{});
  std::fill(params.lse + first_unused, params.lse + num_rows, -kInfinity);

  const AttentionRowsKernel rows_kernel = select_rows_kernel();
  const KeysAndValuesLoader loader = select_loader(params);
  // Tasks differ in length, so threads take the next one when they are done with theirs. All memory
  // is there before they start: an exception in a thread would end the process.
  const std::vector<Task> tasks = split_into_tasks(params);
  const int64_t num_workers =
      std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(tasks.size()));
  const int64_t workspace_size = Workspace::size(params.head_dim);
  std::vector<float> memory(num_workers * workspace_size);
  std::atomic<size_t> next_task{0};
  parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      Workspace work(memory.data() + worker * workspace_size, params.head_dim);
      for (size_t idx = next_task++; idx < tasks.size(); idx = next_task++) {
        run_task<T>(params, tasks[idx], work, loader, rows_kernel);
      }
    }
  });
}

std::tuple<Tensor, Tensor> paged_attention_cpu(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
    const Tensor& seq_lens, const Tensor& cu_seqlens_q, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, int64_t max_seqlen_q, std::optional<double> scale,
    bool causal, std::optional<int64_t> window, double softcap) {
  PagedAttentionParams params = check_paged_attention(
      as_view(q, "q"), as_view(k_cache, "k_cache"), as_view(v_cache, "v_cache"),
      as_view(page_table, "page_table"), as_view(seq_lens, "seq_lens"),
      as_view(cu_seqlens_q, "cu_seqlens_q"), as_view(k_scale, "k_scale"),
      as_view(v_scale, "v_scale"), max_seqlen_q, scale, causal, window, softcap);
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
      "Tensor seq_lens, Tensor cu_seqlens_q, Tensor? k_scale=None, Tensor? v_scale=None, *, "
      "SymInt max_seqlen_q, float? scale=None, bool causal=True, int? window=None, "
      "float softcap=0.) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cpu));
}

}  // namespace effllm
