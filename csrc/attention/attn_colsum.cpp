// attn_colsum: schema and CPU implementation.
//
// Keys are outside, queries inside: a piece of the keys of a KV head, decoded once, meets all
// queries that see any of it, some rows at a time, and its sums are nobody else's.
#include "attention/attn_colsum.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>

#include "attention/paged_attention_cpu.h"
#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

constexpr int64_t kPieceTiles = 8;  // of kTileKeys, which share the queries that are loaded
constexpr int64_t kPieceKeys = kPieceTiles * kTileKeys;

// What one thread works in.
struct ColsumWorkspace {
  static int64_t size(int64_t dim) {
    return AttentionWorkspace::size(dim) + kPieceKeys * dim + kTileRows * kTileKeys;
  }

  ColsumWorkspace(float* memory, int64_t dim)
      : attention(memory, dim),
        keys(memory + AttentionWorkspace::size(dim)),
        scores(keys + kPieceKeys * dim) {}

  AttentionWorkspace attention;
  float* keys;    // [kPieceKeys, padded D]: decoded rows
  float* scores;  // [kTileRows, kTileKeys]
  KvRows key_rows[kPieceTiles];
};

// The sums of keys `piece` of a KV head, into `sums`, which are 0.
template <class T>
void sum_piece(const AttnColsumParams& params, const AttentionCall& call, const Sequence& seq,
               int64_t kv_head, KeyRange piece, ColsumWorkspace& work, float* sums) {
  const int64_t group = params.attention.num_q_heads / params.attention.num_kv_heads;
  // Of the queries that count, the first that sees a key.
  const int64_t first_query =
      std::max<int64_t>({seq.num_queries - params.last_n, piece.begin - seq.ahead(), int64_t{0}});
  if (piece.empty() || first_query >= seq.num_queries) return;
  const auto tile_at = [&](int64_t idx) {
    const int64_t begin = piece.begin + idx * kTileKeys;
    return piece & KeyRange{begin, begin + kTileKeys};
  };
  Task task{seq, kv_head, 0, kTileRows, {0, 0}, piece};
  const bool as_stored = call.reads_stored(kTileRows);
  for (int64_t idx = 0; !tile_at(idx).empty(); ++idx) {
    KvRows& rows = work.key_rows[idx];
    call.locate(params.attention, call.k_cache, task, tile_at(idx), 0, rows);
    if (as_stored) continue;
    call.decode_rows(tile_at(idx), work.attention.padded_row,
                     work.keys + idx * kTileKeys * call.dim, rows);
  }

  const auto update = as_stored ? call.kernels.update_rows : call.kernels.update_decoded_rows;
  const int64_t last_row = seq.num_queries * group;
  for (task.first_row = first_query * group; task.first_row < last_row;
       task.first_row += kTileRows) {
    task.num_rows = std::min(kTileRows, last_row - task.first_row);
    call.load_queries<T>(task, work.attention);
    float bases[kTileRows];
    for (int64_t idx = 0; idx < task.num_rows; ++idx) {
      const int64_t row = task.first_row + idx, head = kv_head * group + row % group;
      const int64_t token = seq.first_token + row / group;
      bases[idx] = weight_base(params.attention, head,
                               params.attention.lse[token * params.stride_lse_token + head]);
    }
    for (int64_t idx = 0; !tile_at(idx).empty(); ++idx) {
      const KeyRange tile = tile_at(idx);
      // What rows do not see stays -inf.
      std::fill_n(work.scores, task.num_rows * kTileKeys, -kInfinity);
      const AttentionTile operands{.dim = call.dim,
                                   .scale = params.attention.scale,
                                   .softcap = params.attention.softcap,
                                   .queries = work.attention.queries,
                                   .keys = &work.key_rows[idx],
                                   .values = nullptr,
                                   .next_keys = nullptr,
                                   .next_values = nullptr,
                                   .first_key = tile.begin,
                                   .alibi = nullptr,
                                   .scores = work.scores,
                                   .stride_scores = kTileKeys,
                                   .sums = nullptr,
                                   .maxima = nullptr,
                                   .totals = nullptr};
      call.update_tile(task, tile, update, operands);
      // Sums of few rows first: they lose fewer bits.
      float of_rows[kTileKeys] = {};
      call.kernels.add_weights(work.scores, kTileKeys, bases, task.num_rows, of_rows);
      float* const of_tile = sums + idx * kTileKeys;
      for (int64_t key = 0; key < tile.end - tile.begin; ++key) of_tile[key] += of_rows[key];
    }
  }
}

template <class T>
void run_colsum(const AttnColsumParams& params) {
  const PagedAttentionParams& attention = params.attention;
  const AttentionCall call(attention);
  const int64_t pieces = ceil_div(params.max_keys, kPieceKeys);
  const int64_t num_pieces = attention.num_seqs * attention.num_kv_heads * pieces;
  share_out(TorchThreads(), num_pieces, ColsumWorkspace::size(call.dim),
            [&](int64_t idx, float* memory) {
              ColsumWorkspace work(memory, call.dim);
              const int64_t pair = idx / pieces, first_key = idx % pieces * kPieceKeys;
              const int64_t head = pair % attention.num_kv_heads;
              const Sequence seq = sequence_at(attention, pair / attention.num_kv_heads, head);
              float* const sums = params.out + pair * params.max_keys + first_key;
              std::fill_n(sums, std::min(params.max_keys - first_key, kPieceKeys), 0.0f);
              const KeyRange piece{first_key, std::min(seq.num_keys, first_key + kPieceKeys)};
              sum_piece<T>(params, call, seq, head, piece, work, sums);
            });
}

void check_lengths(const AttnColsumParams& params) {
  const PagedAttentionParams& attention = params.attention;
  for (int64_t seq = 0; seq < attention.num_seqs; ++seq) {
    for (int64_t head = 0; head < attention.table_heads; ++head) {
      const int64_t keys = sequence_at(attention, seq, head).num_keys;
      if (keys <= params.max_keys) continue;
      fail("attn_colsum", "max_seqlen_k must be at least the longest of seq_lens, " +
                              std::to_string(keys) + ", got " + std::to_string(params.max_keys));
    }
  }
}

Tensor attn_colsum_cpu(const Tensor& q, const Tensor& k_cache, const Tensor& page_table,
                       const Tensor& seq_lens, const Tensor& cu_seqlens_q, const Tensor& lse,
                       const std::optional<Tensor>& k_scale, const std::optional<Tensor>& sinks,
                       int64_t max_seqlen_k, std::optional<int64_t> last_n,
                       std::optional<double> scale, double softcap) {
  AttnColsumParams params = check_attn_colsum(
      as_view(q, "q"), as_view(k_cache, "k_cache"), as_view(page_table, "page_table"),
      as_view(seq_lens, "seq_lens"), as_view(cu_seqlens_q, "cu_seqlens_q"), as_view(lse, "lse"),
      as_view(k_scale, "k_scale"), as_view(sinks, "sinks"), max_seqlen_k, last_n, scale, softcap);
  check_values("attn_colsum", params.attention);
  check_lengths(params);
  const PagedAttentionParams& attention = params.attention;
  Tensor out =
      new_empty(q, {attention.num_seqs, attention.num_kv_heads, params.max_keys}, DType::kFloat32);
  params.out = static_cast<float*>(out.mutable_data_ptr());
  dispatch_float(attention.dtype, [&](auto element) { run_colsum<decltype(element)>(params); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "attn_colsum(Tensor q, Tensor k_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor cu_seqlens_q, Tensor lse, Tensor? k_scale=None, Tensor? sinks=None, *, "
      "SymInt max_seqlen_k, int? last_n=None, float? scale=None, float softcap=0.) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("attn_colsum", TORCH_BOX(&attn_colsum_cpu)); }

}  // namespace effllm
