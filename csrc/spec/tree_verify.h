// tree_verify: which branch of a tree of draft tokens the target model keeps, and its next token.
//
//   logits        [T, V]              of the target model at every node, trees one after the other;
//                                     any strides with stride(-1) == 1
//   tokens        [T] int64           node 0 of a tree, its root, is the last token that is certain
//   first_child   [T] int32           node numbers within the tree, -1 for none; greater than the
//   next_sibling  [T] int32           node's own. Children are tried in this order
//   cu_nodes      [B + 1] int32       tree b has nodes cu_nodes[b] .. cu_nodes[b + 1] - 1
//   temperature   [B] fp32            0: the likeliest token, else logits are divided by it
//   top_k         [B] int32           keep the k likeliest tokens; 0: all
//   top_p         [B] fp32            of those the likeliest whose probabilities reach it; 1: all
//   seed          [B] int64           of the request
//   position      [B] int64           of the root in its text
//   draft_probs   [T, V] fp32         row i: what the children of node i were drawn from, without
//                                     replacement; strides as logits
//   accept_index  [B, W] int32        the accepted path, node numbers, root first; then -1
//   num_accepted  [B] int32           nodes on it; 0 for a tree without nodes
//   next_token    [B] int64           the token after the path; 0 for a tree without nodes
//
// At a node, p is the law of the next token: softmax(logits / temperature) over the tokens that
// top_k and then top_p keep, likeliest first, of equal ones the lower index. Greedily, a child that
// is the likeliest token is accepted. Otherwise children x are tried in order, each with a coin u
// of its own in [0, 1):
//
//   q(x) > 0   drawn from q, its row of draft_probs: accepted if u q(x) < p(x); else
//              p <- max(p - q, 0), q(x) <- 0, and both are normalised again
//   q(x) = 0   or no draft_probs: it was certain to be tried. Accepted if u < p(x); else p(x) <- 0,
//              and p is normalised again
//
// and if none is accepted the next token is drawn from what p has become (if rounding left nothing,
// from p as it was). Each rule gives, over all coins, a next token that is distributed as p: the
// text has the law of sampling without drafts, if the tree was made without regard to these coins.
// A token outside the kept ones never comes out, as comparisons are strict.
//
// Coins are Philox numbers with the seed as key and (node's position, draw) as counter: a request
// draws the same ones in any batch, and no coin serves twice. Only rows on the accepted path are
// read. NaN among logits counts as -inf; a row of equal logits, even of -inf, is a uniform law.
// A GPU rounds probabilities to fractions of the largest one, of 2^-45 if V is 128256.
//
// Trees and sampling parameters are data: the CPU raises on those out of range; the GPU, which
// cannot raise, takes a link out of range for none, such a temperature for 0, such a top_k or top_p
// for all, and never accepts a token outside the vocabulary.
#pragma once

#include <bit>
#include <cstdint>
#include <optional>
#include <string>

#include "common/check.h"
#include "common/view.h"
#include "spec/philox.h"

namespace effllm {

struct TreeVerifyParams {
  static constexpr int64_t kMaxNodes = 1024;  // what a GPU keeps of rejected children, bounded

  int64_t num_nodes, vocab, num_trees, max_nodes;  // T, V, B, W
  DType dtype;
  const void* logits;
  int64_t stride_logits;
  const int64_t* tokens;
  const int32_t *first_child, *next_sibling, *cu_nodes;
  const float* temperature;
  const int32_t* top_k;
  const float* top_p;
  const int64_t *seed, *position;
  const float* draft_probs;  // null: all children are certain to be tried
  int64_t stride_draft_probs;

  int32_t* accept_index;  // [B, W], contiguous
  int32_t* num_accepted;
  int64_t* next_token;
};

// Everything but the results, which the op allocates afterwards.
inline TreeVerifyParams check_tree_verify(const View& logits, const View& tokens,
                                          const View& first_child, const View& next_sibling,
                                          const View& cu_nodes, const View& temperature,
                                          const View& top_k, const View& top_p, const View& seed,
                                          const View& position,
                                          const std::optional<View>& draft_probs,
                                          int64_t max_nodes) {
  Check check("tree_verify");
  Sym nodes("T"), vocab("V"), trees("B");
  check(logits)
      .dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32})
      .shape({nodes, vocab})
      .last_stride_one();
  check.that(*vocab >= 1 && *vocab <= INT32_MAX,
             "logits must have 1 to 2^31 - 1 columns, got " + std::to_string(*vocab));
  check(tokens).dtype({DType::kInt64}).shape({nodes}).last_stride_one();
  check(first_child).dtype({DType::kInt32}).shape({nodes}).last_stride_one();
  check(next_sibling).dtype({DType::kInt32}).shape({nodes}).last_stride_one();
  check(temperature).dtype({DType::kFloat32}).shape({trees}).last_stride_one();
  check(cu_nodes).dtype({DType::kInt32}).shape({{"B + 1", *trees + 1}}).last_stride_one();
  check(top_k).dtype({DType::kInt32}).shape({trees}).last_stride_one();
  check(top_p).dtype({DType::kFloat32}).shape({trees}).last_stride_one();
  check(seed).dtype({DType::kInt64}).shape({trees}).last_stride_one();
  check(position).dtype({DType::kInt64}).shape({trees}).last_stride_one();
  if (draft_probs) {
    check(*draft_probs).dtype({DType::kFloat32}).shape({nodes, vocab}).last_stride_one();
  }
  constexpr int64_t kMaxNodes = TreeVerifyParams::kMaxNodes;
  check.that(max_nodes >= 1 && max_nodes <= kMaxNodes, "max_nodes must be in [1, " +
                                                           std::to_string(kMaxNodes) + "], got " +
                                                           std::to_string(max_nodes));

  TreeVerifyParams params{};
  params.num_nodes = *nodes;
  params.vocab = *vocab;
  params.num_trees = *trees;
  params.max_nodes = max_nodes;
  params.dtype = logits.dtype;
  params.logits = logits.data;
  params.stride_logits = logits.stride(0);
  params.tokens = tokens.data_as<int64_t>();
  params.first_child = first_child.data_as<int32_t>();
  params.next_sibling = next_sibling.data_as<int32_t>();
  params.cu_nodes = cu_nodes.data_as<int32_t>();
  params.temperature = temperature.data_as<float>();
  params.top_k = top_k.data_as<int32_t>();
  params.top_p = top_p.data_as<float>();
  params.seed = seed.data_as<int64_t>();
  params.position = position.data_as<int64_t>();
  if (draft_probs) {
    params.draft_probs = draft_probs->data_as<float>();
    params.stride_draft_probs = draft_probs->stride(0);
  }
  return params;
}

// A float as an integer of the same order. NaN is as -inf, and -0 as 0.
constexpr uint32_t logit_key(float logit) {
  // A comparison that NaN fails; adding 0 turns -0 into 0.
  const uint32_t bits = logit == logit ? std::bit_cast<uint32_t>(logit + 0.f) : 0xff800000u;
  return bits ^ ((0u - (bits >> 31)) | 0x80000000u);
}

// Tokens of a row in one order without ties, the likeliest highest: the key of its logit above its
// index counted from the end.
constexpr uint64_t token_order(float logit, int64_t token, int64_t vocab) {
  return (uint64_t{logit_key(logit)} << 32) | static_cast<uint32_t>(vocab - 1 - token);
}

constexpr int64_t token_of_order(uint64_t order, int64_t vocab) {
  return vocab - 1 - static_cast<int64_t>(order & 0xffffffffu);
}

constexpr float logit_of_order(uint64_t order) {
  const auto key = static_cast<uint32_t>(order >> 32);
  return std::bit_cast<float>(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The coin of a node's `draw`-th child, and the number that draws its next token.
constexpr double verify_coin(int64_t seed, int64_t position, uint32_t draw) {
  const auto where = static_cast<uint64_t>(position);
  return philox_uniform(static_cast<uint64_t>(seed), {static_cast<uint32_t>(where),
                                                      static_cast<uint32_t>(where >> 32), draw, 0});
}

constexpr double verify_draw(int64_t seed, int64_t position) {
  const auto where = static_cast<uint64_t>(position);
  return philox_uniform(static_cast<uint64_t>(seed),
                        {static_cast<uint32_t>(where), static_cast<uint32_t>(where >> 32), 0, 1});
}

}  // namespace effllm
