// h2o_append: schema and CPU implementation.
#include "kvcache/h2o_append.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common/math.h"
#include "common/torch.h"
#include "kvcache/kv_append_cpu.h"

namespace effllm {
namespace {

// The slot of the lowest rank. Blocks that hold none as low as the best so far, almost all of them
// once some have been seen, cost a few vector instructions.
int64_t find_lowest(const EvictionRule& rule, const float* scores, const int32_t* slot_pos,
                    int64_t num_slots) {
  constexpr int64_t kBlock = 64;
  int64_t best = 0, best_rank = std::numeric_limits<int64_t>::max();
  int32_t best_order = std::numeric_limits<int32_t>::max();
  for (int64_t begin = 0; begin < num_slots; begin += kBlock) {
    int32_t orders[kBlock];
    const int64_t count = std::min(num_slots - begin, kBlock);
    for (int64_t idx = 0; idx < count; ++idx) {
      const int32_t token = slot_pos[begin + idx];
      orders[idx] = rule.order(rule.value(scores[begin + idx], token), token);
    }
    int32_t lowest = std::numeric_limits<int32_t>::max();
    for (int64_t idx = 0; idx < count; ++idx) lowest = std::min(lowest, orders[idx]);
    if (lowest > best_order) continue;
    for (int64_t idx = 0; idx < count; ++idx) {
      const int64_t rank = EvictionRule::rank(orders[idx], slot_pos[begin + idx]);
      if (rank >= best_rank) continue;
      best_rank = rank, best = begin + idx, best_order = orders[idx];
    }
  }
  return best;
}

// What tensors hold, before anything is written.
void check_values(const H2oAppendParams& params) {
  const int64_t max_slots = params.max_slots();
  for (int64_t seq = 0; seq < params.append.num_tokens; ++seq) {
    const int64_t position = params.positions[seq];
    if (position == -1) continue;
    if (!params.is_position(position)) {
      fail("h2o_append", "positions[" + std::to_string(seq) + "] must be -1 or in [0, 2^31), got " +
                             std::to_string(position));
    }
    for (int64_t head = 0; head < params.append.num_kv_heads; ++head) {
      const int32_t num_slots = params.seq_lens[seq * params.stride_seq_lens_seq + head];
      if (num_slots >= 0 && num_slots <= max_slots) continue;
      fail("h2o_append", "seq_lens[" + std::to_string(seq) + ", " + std::to_string(head) +
                             "] must be in [0, min(S, MAXP * P)] = [0, " +
                             std::to_string(max_slots) + "], got " + std::to_string(num_slots));
    }
  }
}

void check_page(const H2oAppendParams& params, int64_t seq, int64_t head, int64_t slot) {
  if (params.page_of(seq, head, slot) >= 0) return;
  const int64_t entry = slot / params.append.page_size;
  fail("h2o_append",
       "page_table[" + std::to_string(seq) + ", " + std::to_string(head) + ", " +
           std::to_string(entry) + "] must be in [0, NP) = [0, " +
           std::to_string(params.num_pages) + "), got " +
           std::to_string(params.page_table[seq * params.stride_page_table_seq +
                                            head * params.stride_page_table_head + entry]));
}

void h2o_append_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& scores, const Tensor& slot_pos, const Tensor& seq_lens,
                    const Tensor& page_table, const Tensor& positions,
                    const std::optional<Tensor>& k_scale, const std::optional<Tensor>& v_scale,
                    std::optional<int64_t> budget, int64_t recent, int64_t n_sink, bool normalize) {
  const H2oAppendParams params =
      check_h2o_append(as_view(k, "k"), as_view(v, "v"), as_mutable_view(k_cache, "k_cache"),
                       as_mutable_view(v_cache, "v_cache"), as_mutable_view(scores, "scores"),
                       as_mutable_view(slot_pos, "slot_pos"), as_mutable_view(seq_lens, "seq_lens"),
                       as_view(page_table, "page_table"), as_view(positions, "positions"),
                       as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"),
                       budget, recent, n_sink, normalize);
  check_values(params);

  const int64_t num_heads = params.append.num_kv_heads;
  const int64_t num_pairs = params.append.num_tokens * num_heads;
  const auto each_pair = [&](int64_t grain, const auto& body) {
    TorchThreads().for_each(num_pairs, grain, [&](int64_t pair) {
      const int64_t seq = pair / num_heads, head = pair % num_heads;
      if (params.positions[seq] >= 0) body(pair, seq, head);
    });
  };
  const auto scores_of = [&](int64_t seq, int64_t head) {
    return params.scores + seq * params.stride_scores_seq + head * params.stride_scores_head;
  };
  const auto slot_pos_of = [&](int64_t seq, int64_t head) {
    return params.slot_pos + seq * params.stride_slot_pos_seq + head * params.stride_slot_pos_head;
  };

  // Threads pay off from some ten thousand slots each, and from as many bytes of rows.
  std::vector<int64_t> slots(num_pairs);
  each_pair(ceil_div<int64_t>(int64_t{1} << 14, params.budget),
            [&](int64_t pair, int64_t seq, int64_t head) {
              const int32_t used = params.seq_lens[seq * params.stride_seq_lens_seq + head];
              slots[pair] = used < params.budget
                                ? used
                                : find_lowest(params.rule(params.positions[seq]),
                                              scores_of(seq, head), slot_pos_of(seq, head), used);
            });
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const int64_t seq = pair / num_heads;
    if (params.positions[seq] >= 0) check_page(params, seq, pair % num_heads, slots[pair]);
  }
  const RowWriter write_row = select_row_writer(params.append);
  each_pair(ceil_div<int64_t>(int64_t{1} << 15, 2 * params.append.row_bytes + 1),
            [&](int64_t pair, int64_t seq, int64_t head) {
              const int64_t slot = slots[pair], page = params.page_of(seq, head, slot);
              for (const KvAppendRows* rows : {&params.append.k, &params.append.v}) {
                write_row(
                    rows->tokens + seq * rows->stride_token_bytes + head * rows->stride_head_bytes,
                    rows->target(page, slot % params.append.page_size, head), params.append);
              }
              scores_of(seq, head)[slot] = 0.0f;
              slot_pos_of(seq, head)[slot] = static_cast<int32_t>(params.positions[seq]);
              int32_t& used = params.seq_lens[seq * params.stride_seq_lens_seq + head];
              if (used < params.budget) ++used;
            });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "h2o_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
      "Tensor(c!) scores, Tensor(d!) slot_pos, Tensor(e!) seq_lens, Tensor page_table, "
      "Tensor positions, Tensor(f!)? k_scale=None, Tensor(g!)? v_scale=None, *, "
      "int? budget=None, int recent, int n_sink=0, bool normalize=False) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("h2o_append", TORCH_BOX(&h2o_append_cpu)); }

}  // namespace effllm
