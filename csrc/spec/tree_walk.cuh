// How a CTA of kWarps warps walks one tree of tree_verify. For each node on its path it passes over
// the node's row of logits: once to find the maximum, once per sum of weights, and once per bit of
// the token at which top_k or top_p cuts.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/math.h"
#include "cuda/vec.cuh"
#include "spec/tree_verify.h"

namespace effllm {

inline constexpr int kWarpSize = 32;

// A child that was not accepted, and what the laws summed to when it was tried.
struct Rejected {
  double target_sum;
  double draft_sum;  // 0: the child was certain to be tried
  int64_t token;
};

// Of the CTA, in shared memory.
template <int kWarps>
struct WalkScratch {
  static constexpr int kThreads = kWarps * kWarpSize;

  double warp_sums[kWarps];
  uint64_t warp_orders[kWarps];
  int64_t sampled;
};

// The law of the token after a node, up to a factor, worked out anew wherever it is asked for.
template <class Element>
struct NodeLaw {
  const Element* logits;
  const float* draft_probs;  // may be null
  int64_t vocab;
  float maximum, inverse_temperature;
  uint64_t cut;  // the order of the last token that is kept
  const Rejected* rejected;
  int num_rejected;

  __device__ uint64_t order(int64_t token) const {
    return token_order(device_to_float(logits[token]), token, vocab);
  }

  // Before any child was rejected.
  __device__ double weight(uint64_t order) const {
    if (order < cut) return 0.0;
    const float logit = logit_of_order(order);
    // Also right where both are infinite.
    return logit == maximum ? 1.0 : double{expf((logit - maximum) * inverse_temperature)};
  }

  __device__ double draft(int64_t token) const {
    if (draft_probs == nullptr) return 0.0;
    for (int idx = 0; idx < num_rejected; ++idx) {
      if (rejected[idx].token == token) return 0.0;
    }
    const float prob = draft_probs[token];
    return prob > 0.f ? double{prob} : 0.0;
  }

  __device__ double target(int64_t token) const {
    double left = weight(order(token));
    const float prob = draft_probs == nullptr ? 0.f : draft_probs[token];
    const double draft = prob > 0.f ? double{prob} : 0.0;
    for (int idx = 0; idx < num_rejected && left > 0; ++idx) {
      const Rejected& child = rejected[idx];
      if (child.draft_sum > 0) {
        // 0 for the child itself, whose draft was above its target: it needs no case of its own.
        left = fmax(left / child.target_sum - draft / child.draft_sum, 0.0);
      } else if (child.token == token) {
        left = 0;
      }
    }
    return left;
  }
};

// The sum over all tokens of body(token), the same in every thread; in a fixed order.
template <int kWarps, class Body>
__device__ double block_sum(int64_t vocab, WalkScratch<kWarps>& scratch, const Body& body) {
  double sum = 0;
  for (int64_t token = threadIdx.x; token < vocab; token += scratch.kThreads) sum += body(token);
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  __syncthreads();  // whoever still reads the last sums
  if (threadIdx.x % kWarpSize == 0) scratch.warp_sums[threadIdx.x / kWarpSize] = sum;
  __syncthreads();
  sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += scratch.warp_sums[warp];
  return sum;
}

// The highest order of a row.
template <class Element, int kWarps>
__device__ uint64_t likeliest(const NodeLaw<Element>& law, WalkScratch<kWarps>& scratch) {
  uint64_t best = 0;
  for (int64_t token = threadIdx.x; token < law.vocab; token += scratch.kThreads) {
    best = max(best, law.order(token));
  }
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    best = max(best, __shfl_xor_sync(0xffffffffu, best, lanes));
  }
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) scratch.warp_orders[threadIdx.x / kWarpSize] = best;
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) best = max(best, scratch.warp_orders[warp]);
  return best;
}

// The order of the token at which the sum of `measure` over the likeliest tokens reaches `needed`,
// which is above 0: bit by bit, the greatest number at or above which there is as much. 0 if all
// tokens together have less, as rounding may want it.
template <class Element, int kWarps, class Measure>
__device__ uint64_t find_cut(const NodeLaw<Element>& law, double needed,
                             WalkScratch<kWarps>& scratch, const Measure& measure) {
  uint64_t found = 0;
  const int token_bits = 64 - __clzll(law.vocab - 1);
  for (int bit = 63; bit >= 0; --bit) {
    if (bit < 32 && bit >= token_bits) continue;  // indices have none of these
    const uint64_t candidate = found | uint64_t{1} << bit;
    const double reached = block_sum(law.vocab, scratch, [&](int64_t token) {
      const uint64_t order = law.order(token);
      return order < candidate ? 0.0 : measure(order);
    });
    if (reached >= needed) found = candidate;
  }
  return found;
}

// The token at which the cumulative weight exceeds `share` of the whole; -1 if all weights are 0.
template <class Element, int kWarps>
__device__ int64_t sample(const NodeLaw<Element>& law, double share, WalkScratch<kWarps>& scratch) {
  // Warps sum stretches of the row, then the one in whose stretch the threshold lies looks closer.
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int64_t stretch = ceil_div<int64_t>(law.vocab, kWarps);
  const int64_t begin = warp * stretch, end = min(begin + stretch, law.vocab);
  double sum = 0;
  for (int64_t token = begin + lane; token < end; token += kWarpSize) sum += law.target(token);
#pragma unroll
  for (int lanes = kWarpSize / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  }
  __syncthreads();
  if (lane == 0) scratch.warp_sums[warp] = sum;
  if (threadIdx.x == 0) scratch.sampled = -1;
  __syncthreads();

  double total = 0;
  for (int idx = 0; idx < kWarps; ++idx) total += scratch.warp_sums[idx];
  const double threshold = share * total;
  double reached = 0;
  int chosen = -1;
  for (int idx = 0; idx < kWarps && chosen < 0; ++idx) {
    if (reached + scratch.warp_sums[idx] > threshold) {
      chosen = idx;
    } else {
      reached += scratch.warp_sums[idx];
    }
  }
  if (warp == chosen) {
    int64_t token = -1;  // until it is found, the last one that can be it
    bool found = false;
    for (int64_t first = begin; first < end && !found; first += kWarpSize) {
      const double weight = first + lane < end ? law.target(first + lane) : 0.0;
      double cumulative = weight;
#pragma unroll
      for (int lanes = 1; lanes < kWarpSize; lanes *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, cumulative, lanes);
        if (lane >= lanes) cumulative += before;
      }
      const uint32_t possible = __ballot_sync(0xffffffffu, weight > 0);
      const uint32_t above =
          __ballot_sync(0xffffffffu, weight > 0 && reached + cumulative > threshold);
      found = above != 0;
      if (found) {
        token = first + __ffs(above) - 1;
      } else if (possible != 0) {
        token = first + kWarpSize - 1 - __clz(possible);
      }
      reached += __shfl_sync(0xffffffffu, cumulative, kWarpSize - 1);
    }
    if (lane == 0) scratch.sampled = token;
  }
  __syncthreads();
  return scratch.sampled;
}

// Tree `tree`, by all threads of a CTA; `rejected` has room for as many as a tree has nodes.
template <class Element, int kWarps>
__device__ void walk_tree(const TreeVerifyParams& params, int64_t tree,
                          WalkScratch<kWarps>& scratch, Rejected* rejected) {
  const auto within = [&](int64_t row) { return min(max(row, int64_t{0}), params.num_nodes); };
  const int64_t begin = within(params.cu_nodes[tree]);
  const int64_t num_nodes =
      min(max(within(params.cu_nodes[tree + 1]) - begin, int64_t{0}), params.max_nodes);
  int32_t* path = params.accept_index + tree * params.max_nodes;
  for (int64_t idx = threadIdx.x; idx < params.max_nodes; idx += scratch.kThreads) path[idx] = -1;
  __syncthreads();  // the path is written below, by one thread

  const float temperature = params.temperature[tree];
  const bool greedy = !(temperature > 0.f && temperature <= FLT_MAX);
  const int64_t seed = params.seed[tree];
  const auto link = [&](int64_t from, int32_t to) {
    return to > from && to < num_nodes ? int64_t{to} : int64_t{-1};
  };
  const auto first_child = [&](int64_t node) {
    return link(node, params.first_child[begin + node]);
  };
  const auto next_sibling = [&](int64_t node) {
    return link(node, params.next_sibling[begin + node]);
  };

  int64_t next_token = 0;
  int32_t depth = 0;
  for (int64_t node = num_nodes > 0 ? 0 : -1; node != -1; ++depth) {
    if (threadIdx.x == 0) path[depth] = static_cast<int32_t>(node);
    const int64_t row = begin + node;
    NodeLaw<Element> law{};
    law.logits = static_cast<const Element*>(params.logits) + row * params.stride_logits;
    law.vocab = params.vocab;
    law.rejected = rejected;
    const uint64_t best = likeliest(law, scratch);
    if (greedy) {
      next_token = token_of_order(best, params.vocab);
      node = first_child(node);
      while (node != -1 && params.tokens[begin + node] != next_token) node = next_sibling(node);
      continue;
    }

    if (params.draft_probs != nullptr) {
      law.draft_probs = params.draft_probs + row * params.stride_draft_probs;
    }
    law.maximum = logit_of_order(best);
    law.inverse_temperature = 1.f / temperature;
    const auto weight = [&](uint64_t order) { return law.weight(order); };
    const auto whole = [&](int64_t token) { return law.weight(law.order(token)); };
    const int64_t top_k = params.top_k[tree];
    if (top_k > 0 && top_k < params.vocab) {
      const auto count = [](uint64_t) { return 1.0; };
      law.cut = find_cut(law, static_cast<double>(top_k), scratch, count);
    }
    const float top_p = params.top_p[tree];
    if (top_p > 0.f && top_p < 1.f) {
      const double total = block_sum(params.vocab, scratch, whole);
      law.cut = max(law.cut, find_cut(law, top_p * total, scratch, weight));
    }

    const int64_t position = params.position[tree] + depth;
    const auto target = [&](int64_t token) { return law.target(token); };
    const auto draft = [&](int64_t token) { return law.draft(token); };
    const bool drawn = law.draft_probs != nullptr;
    double target_sum = block_sum(params.vocab, scratch, target);
    double draft_sum = drawn ? block_sum(params.vocab, scratch, draft) : 0.0;
    int64_t child = first_child(node);
    for (uint32_t draw = 0; child != -1 && target_sum > 0; child = next_sibling(child), ++draw) {
      const int64_t token = params.tokens[begin + child];
      const bool known = token >= 0 && token < params.vocab;
      const double coin = verify_coin(seed, position, draw);
      const double draft_prob = known && draft_sum > 0 ? law.draft(token) / draft_sum : 0.0;
      const double target_prob = known ? law.target(token) / target_sum : 0.0;
      // Strictly below: a coin of 0 must not accept what has no probability.
      if (coin * (draft_prob > 0 ? draft_prob : 1.0) < target_prob) break;
      // block_sum has let every thread read what is written here.
      __syncthreads();
      if (threadIdx.x == 0) {
        rejected[law.num_rejected] = {target_sum, draft_prob > 0 ? draft_sum : 0.0, token};
      }
      __syncthreads();
      ++law.num_rejected;
      target_sum = block_sum(params.vocab, scratch, target);
      if (draft_prob > 0) draft_sum = block_sum(params.vocab, scratch, draft);
    }
    if (child == -1 || !(target_sum > 0)) {
      child = -1;
      const double share = verify_draw(seed, position);
      next_token = sample(law, share, scratch);
      if (next_token < 0) {
        law.num_rejected = 0;
        next_token = sample(law, share, scratch);
      }
    }
    node = child;
  }
  if (threadIdx.x == 0) {
    params.num_accepted[tree] = depth;
    params.next_token[tree] = next_token;
  }
}

}  // namespace effllm
