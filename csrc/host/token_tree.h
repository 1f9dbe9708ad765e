// Trees of draft tokens, for one pass of the target model over all of their branches.
//
//   node           0  1  2  3  4  5
//   tokens         7  4  9  4  2  9          7        node 0, the root: the last certain token
//   parents       -1  0  0  1  1  3         / .
//   depths         0  1  1  2  2  3        4   9      siblings, tried in node order: distinct
//   first_child    1  3 -1  5 -1 -1       / .
//   next_sibling  -1  2 -1  4 -1 -1      4   2
//   mask_bits      bit j of node i is    |
//                  set if j is i or an   9
//                  ancestor of i
//
// Parents come before their children, so a walk along first_child and next_sibling only ever goes
// up in number, and ends. A tree never changes.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "token.h"

namespace effllm {

using NodeId = int32_t;

class TokenTree {
 public:
  static constexpr int64_t kMaxNodes = 64;  // the bits of a mask word

  TokenTree(std::span<const Token> tokens, std::span<const NodeId> parents)
      : TokenTree("TokenTree", tokens, parents) {}

  static TokenTree chain(std::span<const Token> tokens);
  static TokenTree from_choices(Token root, const std::vector<std::vector<int64_t>>& choices,
                                const std::vector<std::vector<Token>>& candidates);
  static TokenTree best_first(Token root, const std::vector<std::vector<Token>>& candidates,
                              const std::vector<std::vector<double>>& probs, int64_t max_nodes);
  static TokenTree most_likely(std::span<const Token> tokens, std::span<const NodeId> parents,
                               std::span<const double> probs, int64_t max_nodes);
  static TokenTree prompt_lookup(std::span<const Token> context, int64_t max_ngram,
                                 int64_t max_draft, int64_t max_nodes);

  int64_t num_nodes() const { return std::ssize(tokens_); }
  const std::vector<Token>& tokens() const { return tokens_; }
  const std::vector<NodeId>& parents() const { return parents_; }
  const std::vector<NodeId>& depths() const { return depths_; }
  const std::vector<NodeId>& first_child() const { return first_child_; }
  const std::vector<NodeId>& next_sibling() const { return next_sibling_; }
  const std::vector<int64_t>& mask_bits() const { return mask_bits_; }

 private:
  // `verb` begins the texts of errors.
  TokenTree(const std::string& verb, std::span<const Token> tokens,
            std::span<const NodeId> parents);

  std::vector<Token> tokens_;
  std::vector<NodeId> parents_, depths_, first_child_, next_sibling_;
  std::vector<int64_t> mask_bits_;
};

}  // namespace effllm
