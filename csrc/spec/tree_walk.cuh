// How the CTAs of a cluster walk one tree of tree_verify. Each node on the path costs a pass over
// its row of logits, which finds the maximum, and where tokens are sampled two or three more, which
// L2 serves: one that sums weights, or collects the tokens that top_k or top_p may keep. There are
// few of those, so that the cuts, and all that follows, look at no others. Where there are many, as
// in a flat law, a cut takes a pass for each of its bits until it lies among few tokens.
//
// Weights and probabilities are summed as integers, fractions of the largest weight: a sum is then
// the same in any order, for any number of CTAs, and what is taken off one leaves no rounding.
#pragma once

#include <bit>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "common/math.h"
#include "cuda/row_elements.cuh"
#include "spec/cluster_words.cuh"
#include "spec/tree_verify.h"

namespace effllm {

inline constexpr int kMaxCandidates = 1024;

// A child that was not accepted. The factors made probabilities of weights when it was tried.
struct Rejected {
  double target_factor;
  double draft_factor;  // 0: the child was certain to be tried
  uint64_t removed;     // weight that such a child took with it
  uint32_t token;
};

// Of each CTA, in shared memory. After it as many Rejected as a tree has nodes.
template <int kThreads>
struct WalkStorage {
  RowQueue<kThreads> queue;
  typename ClusterWords<kThreads>::Storage words;
  uint64_t candidates[kMaxCandidates];  // orders
  uint64_t candidate_weights[kMaxCandidates];
  unsigned num_candidates[2];  // by turns; those of CTA 0 count
};

// Every CTA of the cluster comes to the same path and token; CTA 0 writes them.
template <class Element, int kThreads>
class TreeWalk {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps >= 2, "what is cut into a part per warp must become smaller");
  static constexpr uint64_t kNoOrder = ~uint64_t{0};  // above all
  // The high bits of a logit's key that tell logits of this type apart; lower ones say its sign.
  static constexpr int kKeyBits = sizeof(Element) == 4              ? 32
                                  : std::is_same_v<Element, __half> ? 19
                                                                    : 16;

 public:
  __device__ TreeWalk(const TreeVerifyParams& params, int64_t tree, WalkStorage<kThreads>& storage,
                      Rejected* rejected)
      : params_(params),
        storage_(storage),
        words_(storage.words),
        rejected_(rejected),
        tree_(tree),
        vocab_(static_cast<uint32_t>(params.vocab)),
        one_(uint64_t{1} << (62 - std::bit_width(vocab_))) {}

  __device__ void run() {
    if (threadIdx.x < 2) storage_.num_candidates[threadIdx.x] = 0;
    words_.sync();  // also: all CTAs are there
    const auto within = [&](int64_t row) { return min(max(row, int64_t{0}), params_.num_nodes); };
    begin_ = within(params_.cu_nodes[tree_]);
    num_nodes_ =
        min(max(within(params_.cu_nodes[tree_ + 1]) - begin_, int64_t{0}), params_.max_nodes);
    const float temperature = params_.temperature[tree_];
    const bool greedy = !(temperature > 0.f && temperature <= FLT_MAX);
    factor_ = 1.44269504f / temperature;

    int32_t* path = params_.accept_index + tree_ * params_.max_nodes;
    uint32_t next_token = 0;
    int64_t depth = 0;
    const bool is_writer = words_.rank == 0 && threadIdx.x == 0;
    for (int64_t node = num_nodes_ > 0 ? 0 : -1; node != -1; ++depth) {
      if (is_writer) path[depth] = static_cast<int32_t>(node);
      logits_ =
          static_cast<const Element*>(params_.logits) + (begin_ + node) * params_.stride_logits;
      node = greedy ? step_greedily(node, next_token) : step(node, depth, next_token);
    }
    if (words_.rank == 0) {
      for (int64_t i = depth + threadIdx.x; i < params_.max_nodes; i += kThreads) path[i] = -1;
    }
    if (is_writer) {
      params_.num_accepted[tree_] = static_cast<int32_t>(depth);
      params_.next_token[tree_] = next_token;
    }
    words_.sync();  // nobody leaves whose shared memory is still written to or read
  }

 private:
  // Of a row, tokens begin .. end - 1.
  struct Part {
    uint32_t begin, end;

    __device__ bool contains(uint32_t token) const { return token >= begin && token < end; }
  };

  // Both steps give the child that is accepted, or -1 and the next token.
  __device__ int64_t step_greedily(int64_t node, uint32_t& next_token) {
    next_token = static_cast<uint32_t>(token_of_order(likeliest(find_maxima(kWarpSize)), vocab_));
    for (node = first_child(node); node != -1; node = next_sibling(node)) {
      if (params_.tokens[begin_ + node] == next_token) break;
    }
    return node;
  }

  __device__ int64_t step(int64_t node, int64_t depth, uint32_t& next_token) {
    set_target();
    num_rejected_ = 0;
    draft_probs_ = nullptr;
    const int64_t seed = params_.seed[tree_], position = params_.position[tree_] + depth;
    int64_t child = first_child(node);
    uint64_t draft_sum = 0, target_sum = 0, sum_at_first = 0;
    if (params_.draft_probs != nullptr && child != -1) draft_sum = set_draft(node);

    bool is_stale = true;  // what target_sum says
    for (uint32_t draw = 0;; child = next_sibling(child), ++draw) {
      if (is_stale) {
        target_sum = total(sum_target(row(), is_listed()));
      }
      if (draw == 0) sum_at_first = target_sum;
      is_stale = false;
      if (child == -1 || target_sum == 0) break;
      const int64_t token = params_.tokens[begin_ + child];
      if (token < 0 || token >= vocab_) continue;
      const auto x = static_cast<uint32_t>(token);
      const bool is_gone = was_rejected(x);
      const uint64_t left = is_gone ? 0 : target(x, device_to_float(logits_[x]));
      const uint64_t drafted = is_gone ? 0 : draft(x);
      const double draft_prob =
          drafted > 0 ? static_cast<double>(drafted) / static_cast<double>(draft_sum) : 1.0;
      const double target_prob = static_cast<double>(left) / static_cast<double>(target_sum);
      // Strictly below: a coin of 0 must not accept what has no probability.
      if (verify_coin(seed, position, draw) * draft_prob < target_prob) return child;

      if (threadIdx.x == 0) {
        rejected_[num_rejected_] = {1 / static_cast<double>(target_sum),
                                    drafted > 0 ? 1 / static_cast<double>(draft_sum) : 0.0, left,
                                    x};
      }
      __syncthreads();
      ++num_rejected_;
      is_stale = drafted > 0;
      draft_sum -= drafted;
      target_sum -= left;
    }

    if (target_sum == 0) {
      num_rejected_ = 0;
      target_sum = sum_at_first;
    }
    next_token = sample(verify_draw(seed, position), target_sum);
    return -1;
  }

  // Of the row: its maximum, the cut, and the candidates, if they are few.
  __device__ void set_target() {
    const int64_t top_k = params_.top_k[tree_];
    const float top_p = params_.top_p[tree_];
    const bool cuts_k = top_k > 0 && top_k < vocab_, cuts_p = top_p > 0.f && top_p < 1.f;
    cut_ = 0;
    num_listed_ = -1;

    // Each group of lanes has its maximum. As many tokens as groups have a higher one are above it,
    // and most often hardly more.
    const int width = cuts_k || cuts_p ? static_cast<int>(2 * words_.num_ctas) : kWarpSize;
    const Words maxima = find_maxima(width);
    maximum_ = logit_of_order(likeliest(maxima));
    if (!cuts_k && !cuts_p) return;

    const auto weight = [&](uint32_t token, float logit) { return this->weight(token, logit); };
    // Without top_k, as many as may well hold what top_p asks for.
    const int64_t count = cuts_k ? top_k : ClusterWords<kThreads>::kMaxGroups / 4 * 3;
    const bool collects = count <= maxima.count;
    uint64_t lowest = 0, sum_of_row = 0;
    if (collects) {
      lowest = lowest_kept(maxima.of_groups, maxima.count, static_cast<uint64_t>(count),
                           [](int) { return uint64_t{1}; });
    }
    if (!cuts_k) sum_of_row = total(sum(row(), false, weight));
    if (collects) collect(lowest, kNoOrder);
    if (cuts_k) cut_ = find_cut<false>(static_cast<uint64_t>(top_k), vocab_);
    if (!cuts_p) return;
    const uint64_t listed = total(sum(row(), is_listed(), weight));
    const uint64_t whole = cuts_k ? listed : sum_of_row;
    const auto needed = static_cast<uint64_t>(ceil(double{top_p} * static_cast<double>(whole)));
    if (listed < needed) num_listed_ = -1;
    cut_ = find_cut<true>(max(needed, uint64_t{1}), whole);
  }

  // The law of the node's children; returns its sum.
  __device__ uint64_t set_draft(int64_t node) {
    draft_probs_ = params_.draft_probs + (begin_ + node) * params_.stride_draft_probs;
    float largest = 0.f;
    const Part part = own_part(row(), false);
    each_element(draft_probs_, part.begin, part.end, storage_.queue,
                 [&](uint32_t, float prob) { largest = fmaxf(largest, prob); });
    const uint64_t word = warp_fold(__float_as_uint(largest), kWarpSize, Maximum{});
    const Words maxima = words_.show(word, kWarpSize, false);
    draft_maximum_ = __uint_as_float(static_cast<uint32_t>(highest(maxima)));

    uint64_t sum = 0;
    each_element(draft_probs_, part.begin, part.end, storage_.queue,
                 [&](uint32_t, float prob) { sum += draft_of(prob); });
    return total(words_.show(warp_fold(sum, kWarpSize, Plus{}), kWarpSize, false));
  }

  // Before any child was rejected: of the likeliest token `one_`.
  __device__ uint64_t weight(uint32_t token, float logit) const {
    if (cut_ != 0 && token_order(logit, token, vocab_) < cut_) return 0;
    return weight(logit);
  }

  // Whether it is kept or not.
  __device__ uint64_t weight(float logit) const {
    logit = fmaxf(logit, -INFINITY);  // NaN is as -inf
    // Also right where both are infinite.
    if (logit == maximum_) return one_;
    return __float2ull_rn(exp2f((logit - maximum_) * factor_) * static_cast<float>(one_));
  }

  __device__ uint64_t draft_of(float prob) const {
    if (!(prob > 0.f)) return 0;
    // At least 1: it makes a difference whether a child was drawn.
    return max(__float2ull_rn(prob / draft_maximum_ * static_cast<float>(one_)), 1ull);
  }

  __device__ uint64_t draft(uint32_t token) const {
    return draft_probs_ == nullptr ? 0 : draft_of(draft_probs_[token]);
  }

  __device__ bool was_rejected(uint32_t token) const {
    for (int idx = 0; idx < num_rejected_; ++idx) {
      if (rejected_[idx].token == token) return true;
    }
    return false;
  }

  // What has been left of a token's weight, but for children that were certain to be tried, of
  // nodes where all were: see sum_target.
  __device__ uint64_t target(uint32_t token, float logit) const {
    const uint64_t whole = weight(token, logit);
    if (draft_probs_ == nullptr || num_rejected_ == 0 || whole == 0) return whole;
    return what_is_left(whole, draft(token), token, rejected_, num_rejected_, one_);
  }

  // As sum() does.
  __device__ Words sum_target(Part whole, bool alone) {
    const Part part = own_part(whole, alone);
    uint64_t sum =
        lane_sum(part, [&](uint32_t token, float logit) { return target(token, logit); });
    if (draft_probs_ == nullptr) {
      // Quicker than to look for every token among them.
      for (int i = threadIdx.x % kWarpSize; i < num_rejected_; i += kWarpSize) {
        if (part.contains(rejected_[i].token)) sum -= rejected_[i].removed;
      }
    }
    return words_.show(warp_fold(sum, kWarpSize, Plus{}), kWarpSize, alone);
  }

  // Called: in loops over rows it would be most of their code, and is not what they do most.
  __device__ static __noinline__ uint64_t what_is_left(uint64_t left, uint64_t draft,
                                                       uint32_t token, const Rejected* rejected,
                                                       int num_rejected, uint64_t one) {
    for (int idx = 0; idx < num_rejected && left > 0; ++idx) {
      const Rejected child = rejected[idx];
      if (child.token == token) return 0;
      if (child.draft_factor == 0) continue;
      const double prob = static_cast<double>(left) * child.target_factor -
                          static_cast<double>(draft) * child.draft_factor;
      left = __double2ull_rn(fmax(prob, 0.0) * static_cast<double>(one));
    }
    return left;
  }

  // The token at which the cumulative weight exceeds `share` of `target_sum`, which is above 0.
  __device__ uint32_t sample(double share, uint64_t target_sum) {
    auto threshold = static_cast<uint64_t>(share * static_cast<double>(target_sum));
    threshold = min(threshold, target_sum - 1);
    Part part = row();
    // Parts of parts; after the first ones, every CTA for itself.
    for (bool alone = is_listed(); part.end - part.begin > 1; alone = true) {
      const Words sums = sum_target(part, alone);
      int chosen = 0;
      while (chosen + 1 < sums.count && sums.of_groups[chosen] <= threshold) {
        threshold -= sums.of_groups[chosen++];
      }
      part = part_of(part, chosen, sums.count);
    }
    return part.begin;
  }

  // The lowest order that is kept, if the likeliest tokens are kept until their weights, or if not
  // kByWeight their number, reach `needed`; all have `whole`.
  template <bool kByWeight>
  __device__ uint64_t find_cut(uint64_t needed, uint64_t whole) {
    const auto lowest = [&](uint64_t of_these) {
      return lowest_kept(storage_.candidates, num_listed_, of_these,
                         [&](int i) { return kByWeight ? storage_.candidate_weights[i] : 1; });
    };
    if (is_listed()) return lowest(needed);
    // Bit by bit: the greatest number at or above which there is as much. It is `found` or above,
    // and below `end`; `reached` and `above` is what there is at or above these.
    uint64_t found = 0, reached = whole, end = kNoOrder, above = 0;
    for (int bit = 63; bit >= 0; --bit) {
      if (bit == 63 - kKeyBits && kKeyBits < 32) {
        // The bits that logits of this type lack are those of the sign.
        if (found >> 63 == 0) found |= ((uint64_t{1} << (32 - kKeyBits)) - 1) << 32;
        bit = 31;
      }
      if (bit < 32 && bit >= std::bit_width(vocab_ - 1)) continue;  // nor have indices any of these
      const uint64_t candidate = found | uint64_t{1} << bit;
      const Words sums = sum(row(), false, [&](uint32_t token, float logit) -> uint64_t {
        if (token_order(logit, token, vocab_) < candidate) return 0;
        return kByWeight ? weight(token, logit) : 1;
      });
      const uint64_t at_candidate = total(sums);
      if (at_candidate >= needed) {
        found = candidate, reached = at_candidate;
      } else {
        end = candidate, above = at_candidate;
      }
      // A token at or above `found` has as much as one at it. If so there are few of them, or of
      // those below `end`, the rest is up to these.
      const uint64_t each = kByWeight ? weight(logit_of_order(found)) : 1;
      if (each == 0 || (reached - above) / each > kMaxCandidates) continue;
      const bool all = reached / each <= kMaxCandidates;
      collect(max(found, cut_), all ? kNoOrder : end);
      if (!is_listed()) continue;
      found = lowest(all ? needed : needed - above);
      if (!all) num_listed_ = -1;  // those above are kept as well
      break;
    }
    return found;
  }

  // Of `count` orders the lowest whose higher ones measure less than `needed` together.
  template <class Measure>
  __device__ uint64_t lowest_kept(const uint64_t* orders, int count, uint64_t needed,
                                  const Measure& measure) {
    uint64_t kept = 0;  // the complement, so that the lowest is the maximum
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const uint64_t own = orders[i];
      uint64_t above = 0;
#pragma unroll 4
      for (int j = 0; j < count; ++j) {
        if (orders[j] > own) above += measure(j);
      }
      if (above < needed) kept = max(kept, ~own);
    }
    return ~highest(words_.show(warp_fold(kept, kWarpSize, Maximum{}), kWarpSize, true));
  }

  // Makes the tokens of orders lowest .. end - 1 the candidates, if there is room for them. All
  // CTAs must have met since there were others.
  __device__ void collect(uint64_t lowest, uint64_t end) {
    const float lowest_logit = logit_of_order(lowest);
    unsigned* count = words_.peer(&storage_.num_candidates[collect_turn_], 0);
    const Part part = own_part(row(), false);
    each_element(logits_, part.begin, part.end, storage_.queue, [&](uint32_t token, float logit) {
      if (logit < lowest_logit) return;  // few go on
      const uint64_t order = token_order(logit, token, vocab_);
      if (order < lowest || order >= end) return;
      const unsigned place = atomicAdd(count, 1u);
      if (place >= kMaxCandidates) return;
#pragma unroll 1
      for (uint32_t cta = 0; cta < words_.num_ctas; ++cta) {
        *words_.peer(&storage_.candidates[place], cta) = order;
      }
    });
    words_.sync();
    const unsigned num_found = *count;
    // For the next time.
    collect_turn_ ^= 1;
    if (words_.rank == 0 && threadIdx.x == 0) storage_.num_candidates[collect_turn_] = 0;
    if (num_found > kMaxCandidates) return;
    num_listed_ = static_cast<int>(num_found);
    for (int i = threadIdx.x; i < num_listed_; i += kThreads) {
      const uint64_t order = storage_.candidates[i];
      const auto token = static_cast<uint32_t>(token_of_order(order, vocab_));
      storage_.candidate_weights[i] = weight(token, logit_of_order(order));
    }
    __syncthreads();
  }

  // The order of the likeliest token: if none is above -inf, of the first one.
  __device__ uint64_t likeliest(const Words& maxima) const {
    return max(highest(maxima), token_order(-INFINITY, 0, vocab_));
  }

  // The order of the likeliest token of each `width` lanes; 0 where these have none above -inf.
  __device__ Words find_maxima(int width) {
    float highest = -INFINITY;
    uint32_t highest_token = vocab_;
    const Part part = own_part(row(), false);
    each_element(logits_, part.begin, part.end, storage_.queue, [&](uint32_t token, float logit) {
      if (logit > highest) highest = logit, highest_token = token;
    });
    const uint64_t order = highest_token < vocab_ ? token_order(highest, highest_token, vocab_) : 0;
    return words_.show(warp_fold(order, width, Maximum{}), width, false);
  }

  // Sums body(token, logit) over equal parts of `whole`, one of each warp, of this CTA if `alone`,
  // else of the cluster; shown to as many.
  template <class Body>
  __device__ Words sum(Part whole, bool alone, const Body& body) {
    const uint64_t sum = lane_sum(own_part(whole, alone), body);
    return words_.show(warp_fold(sum, kWarpSize, Plus{}), kWarpSize, alone);
  }

  // A lane's share of a sum over the tokens of a warp's part: if there are candidates, over them.
  template <class Body>
  __device__ uint64_t lane_sum(Part part, const Body& body) const {
    uint64_t sum = 0;
    if (is_listed()) {
#pragma unroll 1
      for (int i = threadIdx.x % kWarpSize; i < num_listed_; i += kWarpSize) {
        const uint64_t order = storage_.candidates[i];
        const auto token = static_cast<uint32_t>(token_of_order(order, vocab_));
        if (part.contains(token)) sum += body(token, logit_of_order(order));
      }
    } else {
      each_element(logits_, part.begin, part.end, storage_.queue,
                   [&](uint32_t token, float logit) { sum += body(token, logit); });
    }
    return sum;
  }

  // Of a warp, of this CTA if `alone`, else of the cluster.
  __device__ Part own_part(Part whole, bool alone) const {
    const uint32_t warp = threadIdx.x / kWarpSize;
    if (alone) return part_of(whole, warp, kWarps);
    return part_of(whole, words_.rank * kWarps + warp, words_.num_ctas * kWarps);
  }

  __device__ static Part part_of(Part whole, uint32_t index, uint32_t num_parts) {
    constexpr uint32_t kVector = 16 / sizeof(Element);
    uint32_t tokens = ceil_div(whole.end - whole.begin, num_parts);
    // Parts of the row start with a vector if the row does.
    if (tokens > kVector) tokens = round_up(tokens, kVector);
    const uint32_t begin = min(whole.begin + index * tokens, whole.end);
    return {begin, min(begin + tokens, whole.end)};
  }

  __device__ Part row() const { return {0, vocab_}; }

  __device__ bool is_listed() const { return num_listed_ >= 0; }

  __device__ int64_t first_child(int64_t node) const {
    return link(node, params_.first_child[begin_ + node]);
  }
  __device__ int64_t next_sibling(int64_t node) const {
    return link(node, params_.next_sibling[begin_ + node]);
  }
  __device__ int64_t link(int64_t from, int32_t to) const {
    return to > from && to < num_nodes_ ? int64_t{to} : int64_t{-1};
  }

  const TreeVerifyParams& params_;
  WalkStorage<kThreads>& storage_;
  ClusterWords<kThreads> words_;
  Rejected* rejected_;
  const int64_t tree_;
  const uint32_t vocab_;
  const uint64_t one_;
  int64_t begin_, num_nodes_;
  float factor_;  // from differences of logits to exponents of 2
  int collect_turn_ = 0;

  // Of the node.
  const Element* logits_;
  const float* draft_probs_;  // null if its children were all certain to be tried
  float maximum_, draft_maximum_;
  uint64_t cut_;  // the order of the last token that is kept
  int num_listed_, num_rejected_;
};

}  // namespace effllm
