// h2o_append: writes the key and value of one new token for each sequence into a cache of limited
// size; a head that has no room evicts the token that got the least attention and takes its slot.
//
//   k, v         [B, HKV, D]           the new token of each sequence
//   k_cache, v_cache, k_scale, v_scale: as in kv_append.h
//   scores       [B, HKV, S] fp32      attention that the token in each slot has got;
//   h2o_attention.h slot_pos     [B, HKV, S] int32     position of that token in the text seq_lens
//   [B, HKV] int32        slots in use; all three are changed in place page_table   [B, HKV, MAXP]
//   int32  page of each P slots; that of heads may be the same positions    [B] int64 of the new
//   token in the text; -1: there is none budget                             slots that a head may
//   use, at most S and MAXP * P
//
// With n = seq_lens[b, h] < budget the token takes slot n, and n grows by one. Else it takes the
// slot of the token with the lowest score among those that may go, neither one of the first n_sink
// of the text nor of the last `recent`, the new one included:
//
//   n_sink <= slot_pos <= position - recent
//
// Of equal scores the lowest position goes; NaN counts as above all numbers. Where none may go, the
// one with the lowest position goes that is not one of the first n_sink, if need be one of these.
// With `normalize` a score is divided by how many queries have seen the token, position - slot_pos.
// The slot's score becomes 0 and its slot_pos the new position. A head that uses more than the
// budget keeps what it uses.
//
// Positions never move: what is in the cache keeps the rotation that it came with. Heads choose for
// themselves, also where they share pages, for each has its own rows there.
//
// Lengths, tables and positions are data: the CPU raises on one out of range before it writes
// anything; the GPU, which cannot raise, leaves out the heads concerned.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "common/check.h"
#include "common/view.h"
#include "kvcache/kv_append.h"

namespace effllm {

// Which token of a head goes: the one of the lowest rank, and of the lowest slot if ranks are
// equal.
struct EvictionRule {
  int32_t first, last, position;  // those at first .. last may go; that of the new token
  bool normalize;

  // Those beyond the scores, whose largest is NaN's: of what is protected, the first tokens go
  // last.
  static constexpr int32_t kNaN = 0x7f800001, kRecent = 0x7ffffffe, kFirst = 0x7fffffff;

  // What tokens are compared by.
  constexpr float value(float score, int32_t slot_pos) const {
    if (!normalize || slot_pos < first || slot_pos > last) return score;
    const int32_t queries = position - slot_pos;
    return score / static_cast<float>(queries > 1 ? queries : 1);
  }

  // In the order of values; of an infinite one, less than that of NaN.
  constexpr int32_t order(float value, int32_t slot_pos) const {
    if (slot_pos < first) return kFirst;
    if (slot_pos > last) return kRecent;
    const auto bits = std::bit_cast<int32_t>(value + 0.0f);  // -0 is 0
    return value != value ? kNaN : bits ^ (bits >> 31 & 0x7fffffff);
  }

  static constexpr int64_t rank(int32_t order, int32_t slot_pos) {
    return static_cast<int64_t>(order) * (int64_t{1} << 32) + static_cast<uint32_t>(slot_pos);
  }
};

struct H2oAppendParams {
  KvAppendParams append;  // without slots
  int64_t num_pages, max_pages_per_seq, num_score_slots;
  float* scores;
  int64_t stride_scores_seq, stride_scores_head;
  int32_t* slot_pos;
  int64_t stride_slot_pos_seq, stride_slot_pos_head;
  int32_t* seq_lens;
  int64_t stride_seq_lens_seq;  // from head to head it is 1
  const int32_t* page_table;
  int64_t stride_page_table_seq, stride_page_table_head;
  const int64_t* positions;
  int32_t budget, recent, n_sink;
  bool normalize;

  // The most slots that a head can use.
  constexpr int64_t max_slots() const {
    const int64_t of_table = max_pages_per_seq * append.page_size;
    return of_table < num_score_slots ? of_table : num_score_slots;
  }

  constexpr bool is_position(int64_t position) const {
    return position >= 0 && position <= INT32_MAX;
  }

  constexpr EvictionRule rule(int64_t position) const {
    const int64_t last = position - recent;
    return {n_sink, last < -1 ? -1 : static_cast<int32_t>(last), static_cast<int32_t>(position),
            normalize};
  }

  // Where a slot below max_slots() lies: the entry of the page table, and the place in the page.
  constexpr std::pair<uint32_t, uint32_t> place_of(int64_t slot) const {
    // In 32 bits, which a GPU divides several times as fast.
    const auto size =
        static_cast<uint32_t>(append.page_size < INT32_MAX ? append.page_size : INT32_MAX);
    const auto idx = static_cast<uint32_t>(slot);
    return {idx / size, idx % size};
  }

  // -1 if it is none.
  constexpr int64_t valid_page(int64_t page) const {
    return page >= 0 && page < num_pages ? page : -1;
  }

  constexpr int64_t page_of(int64_t seq, int64_t head, int64_t slot) const {
    return valid_page(page_table[seq * stride_page_table_seq + head * stride_page_table_head +
                                 place_of(slot).first]);
  }
};

inline H2oAppendParams check_h2o_append(
    const View& k, const View& v, const View& k_cache, const View& v_cache, const View& scores,
    const View& slot_pos, const View& seq_lens, const View& page_table, const View& positions,
    const std::optional<View>& k_scale, const std::optional<View>& v_scale,
    std::optional<int64_t> budget, int64_t recent, int64_t n_sink, bool normalize) {
  Check check("h2o_append");
  Sym seqs("B"), kv_heads("HKV"), dim("D"), slots("S"), max_pages("MAXP");
  H2oAppendParams params{};
  params.append =
      check_kv_rows(check, k, v, k_cache, v_cache, k_scale, v_scale, seqs, kv_heads, dim);
  check(scores).dtype({DType::kFloat32}).shape({seqs, kv_heads, slots}).last_stride_one();
  check(slot_pos).dtype({DType::kInt32}).shape({seqs, kv_heads, slots}).last_stride_one();
  check(seq_lens).dtype({DType::kInt32}).shape({seqs, kv_heads}).last_stride_one();
  check(page_table).dtype({DType::kInt32}).shape({seqs, kv_heads, max_pages}).last_stride_one();
  check(positions).dtype({DType::kInt64}).shape({seqs}).last_stride_one();
  check.that(params.append.page_size > 0, "k_cache must have a page size of at least 1, got 0");

  params.num_pages = params.append.num_slots / params.append.page_size;
  params.max_pages_per_seq = *max_pages;
  params.num_score_slots = *slots;
  const int64_t max_slots = std::min<int64_t>(params.max_slots(), INT32_MAX);
  const int64_t used = budget.value_or(*slots);
  check.that(used >= 1 && used <= max_slots, "budget must be in [1, min(S, MAXP * P)] = [1, " +
                                                 std::to_string(max_slots) + "], got " +
                                                 std::to_string(used));
  check.that(recent >= 0, "recent must be at least 0, got " + std::to_string(recent));
  check.that(n_sink >= 0 && n_sink < used, "n_sink must be in [0, budget) = [0, " +
                                               std::to_string(used) + "), got " +
                                               std::to_string(n_sink));
  params.scores = scores.data_as<float>();
  params.stride_scores_seq = scores.stride(0);
  params.stride_scores_head = scores.stride(1);
  params.slot_pos = slot_pos.data_as<int32_t>();
  params.stride_slot_pos_seq = slot_pos.stride(0);
  params.stride_slot_pos_head = slot_pos.stride(1);
  params.seq_lens = seq_lens.data_as<int32_t>();
  params.stride_seq_lens_seq = seq_lens.stride(0);
  params.page_table = page_table.data_as<int32_t>();
  params.stride_page_table_seq = page_table.stride(0);
  params.stride_page_table_head = page_table.stride(1);
  params.positions = positions.data_as<int64_t>();
  params.budget = static_cast<int32_t>(used);
  params.recent = static_cast<int32_t>(std::min<int64_t>(recent, INT32_MAX));
  params.n_sink = static_cast<int32_t>(n_sink);
  params.normalize = normalize;
  return params;
}

}  // namespace effllm
