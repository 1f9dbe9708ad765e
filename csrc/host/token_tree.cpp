#include "token_tree.h"

#include <algorithm>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <tuple>

namespace effllm {
namespace {

void require(bool condition, const std::string& verb, const std::string& message) {
  if (!condition) throw std::invalid_argument(verb + ": " + message);
}

std::string at(const std::string& name, int64_t index) {
  return name + "[" + std::to_string(index) + "]";
}

void check_token(const std::string& verb, const std::string& name, Token token) {
  require(token >= 0, verb, name + " must not be negative, got " + std::to_string(token));
}

void check_prob(const std::string& verb, const std::string& name, double prob) {
  // Written so that NaN fails.
  require(prob >= 0 && prob <= 1, verb, name + " must be in [0, 1], got " + std::to_string(prob));
}

void check_max_nodes(const std::string& verb, int64_t max_nodes) {
  require(max_nodes >= 1 && max_nodes <= TokenTree::kMaxNodes, verb,
          "max_nodes must be in [1, " + std::to_string(TokenTree::kMaxNodes) + "], got " +
              std::to_string(max_nodes));
}

// That these are one tree, of any size.
void check_tree(const std::string& verb, std::span<const Token> tokens,
                std::span<const NodeId> parents) {
  require(!tokens.empty(), verb, "tokens must hold the root at least, got none");
  require(parents.size() == tokens.size(), verb,
          "parents must be as many as tokens, " + std::to_string(tokens.size()) + ", got " +
              std::to_string(parents.size()));
  for (int64_t node = 0; node < std::ssize(tokens); ++node) {
    check_token(verb, at("tokens", node), tokens[node]);
    const NodeId parent = parents[node];
    if (node == 0) {
      require(parent == -1, verb,
              "parents[0] must be -1, the root has none, got " + std::to_string(parent));
    } else {
      require(parent >= 0 && parent < node, verb,
              at("parents", node) + " must be in [0, " + std::to_string(node) +
                  "), a node before it, got " + std::to_string(parent));
    }
  }
}

}  // namespace

TokenTree::TokenTree(const std::string& verb, std::span<const Token> tokens,
                     std::span<const NodeId> parents)
    : tokens_(tokens.begin(), tokens.end()), parents_(parents.begin(), parents.end()) {
  require(num_nodes() <= kMaxNodes, verb,
          "tokens must be at most " + std::to_string(kMaxNodes) + ", the root included, got " +
              std::to_string(num_nodes()));
  check_tree(verb, tokens, parents);
  depths_.assign(num_nodes(), 0);
  first_child_.assign(num_nodes(), -1);
  next_sibling_.assign(num_nodes(), -1);
  mask_bits_.assign(num_nodes(), 1);
  for (NodeId node = 1; node < num_nodes(); ++node) {
    const NodeId parent = parents_[node];
    depths_[node] = depths_[parent] + 1;
    mask_bits_[node] = mask_bits_[parent] | static_cast<int64_t>(uint64_t{1} << node);
    NodeId* link = &first_child_[parent];
    while (*link != -1) {
      // Equal siblings would be tried twice, which no rule of acceptance allows for.
      require(tokens_[*link] != tokens_[node], verb,
              "tokens of siblings must differ: " + at("tokens", *link) + " and " +
                  at("tokens", node) + ", both below node " + std::to_string(parent) + ", are " +
                  std::to_string(tokens_[node]));
      link = &next_sibling_[*link];
    }
    *link = node;
  }
}

TokenTree TokenTree::chain(std::span<const Token> tokens) {
  std::vector<NodeId> parents(tokens.size());
  std::iota(parents.begin(), parents.end(), -1);
  return {"TokenTree.chain", tokens, parents};
}

TokenTree TokenTree::from_choices(Token root, const std::vector<std::vector<int64_t>>& choices,
                                  const std::vector<std::vector<Token>>& candidates) {
  const std::string verb = "TokenTree.from_choices";
  check_token(verb, "root", root);
  // Short before long puts parents first; among siblings the likelier, of lower rank, comes first.
  std::vector<size_t> order(choices.size());
  std::iota(order.begin(), order.end(), 0);
  std::ranges::stable_sort(order, [&](size_t a, size_t b) {
    const auto &left = choices[a], &right = choices[b];
    return left.size() != right.size() ? left.size() < right.size() : left < right;
  });

  std::vector<std::span<const int64_t>> paths{{}};  // of each node
  std::vector<Token> tokens{root};
  std::vector<NodeId> parents{-1};
  for (size_t idx : order) {
    const std::span<const int64_t> path = choices[idx];
    const std::string name = at("choices", idx);
    require(!path.empty(), verb, name + " must name a rank at least, got an empty path");
    require(path.size() <= candidates.size(), verb,
            name + " must be at most as long as candidates, " + std::to_string(candidates.size()) +
                ", got " + std::to_string(path.size()));
    const std::vector<Token>& ranked = candidates[path.size() - 1];
    const int64_t rank = path.back();
    require(rank >= 0 && rank < std::ssize(ranked), verb,
            name + " must end in a rank in [0, " + std::to_string(ranked.size()) + "), got " +
                std::to_string(rank));
    const auto is = [&](std::span<const int64_t> wanted) {
      return [wanted](std::span<const int64_t> path) { return std::ranges::equal(path, wanted); };
    };
    require(std::ranges::none_of(paths, is(path)), verb, name + " must differ from other choices");
    const auto parent = std::ranges::find_if(paths, is(path.first(path.size() - 1)));
    require(parent != paths.end(), verb,
            name + " must have the path before its last rank among choices, found none");
    parents.push_back(static_cast<NodeId>(parent - paths.begin()));
    tokens.push_back(ranked[rank]);
    paths.push_back(path);
  }
  return {verb, tokens, parents};
}

TokenTree TokenTree::best_first(Token root, const std::vector<std::vector<Token>>& candidates,
                                const std::vector<std::vector<double>>& probs, int64_t max_nodes) {
  const std::string verb = "TokenTree.best_first";
  check_token(verb, "root", root);
  check_max_nodes(verb, max_nodes);
  require(probs.size() == candidates.size(), verb,
          "probs must be as many lists as candidates, " + std::to_string(candidates.size()) +
              ", got " + std::to_string(probs.size()));
  for (size_t depth = 0; depth < probs.size(); ++depth) {
    require(probs[depth].size() == candidates[depth].size(), verb,
            at("probs", depth) + " must be as many as " + at("candidates", depth) + ", " +
                std::to_string(candidates[depth].size()) + ", got " +
                std::to_string(probs[depth].size()));
    for (size_t rank = 0; rank < probs[depth].size(); ++rank) {
      check_prob(verb, at(at("probs", depth), rank), probs[depth][rank]);
    }
  }

  // What may be added next: the children of all nodes. On equal products the one found first.
  using Entry = std::tuple<double, NodeId, int64_t>;  // product, -parent, -rank
  std::priority_queue<Entry> frontier;
  std::vector<Token> tokens;
  std::vector<NodeId> parents, depths;
  const auto add = [&](Token token, NodeId parent, NodeId depth, double product) {
    const auto node = static_cast<NodeId>(tokens.size());
    tokens.push_back(token);
    parents.push_back(parent);
    depths.push_back(depth);
    if (depth == std::ssize(probs)) return;
    for (int64_t rank = 0; rank < std::ssize(probs[depth]); ++rank) {
      const double below = product * probs[depth][rank];
      if (below > 0) frontier.emplace(below, -node, -rank);
    }
  };
  add(root, -1, 0, 1.0);
  while (std::ssize(tokens) < max_nodes && !frontier.empty()) {
    const auto [product, minus_parent, minus_rank] = frontier.top();
    frontier.pop();
    const NodeId depth = depths[-minus_parent];
    add(candidates[depth][-minus_rank], -minus_parent, depth + 1, product);
  }
  return {verb, tokens, parents};
}

TokenTree TokenTree::most_likely(std::span<const Token> tokens, std::span<const NodeId> parents,
                                 std::span<const double> probs, int64_t max_nodes) {
  const std::string verb = "TokenTree.most_likely";
  check_max_nodes(verb, max_nodes);
  check_tree(verb, tokens, parents);
  require(probs.size() == tokens.size(), verb,
          "probs must be as many as tokens, " + std::to_string(tokens.size()) + ", got " +
              std::to_string(probs.size()));
  std::vector<double> products(tokens.size(), 1.0);
  for (size_t node = 1; node < tokens.size(); ++node) {
    check_prob(verb, at("probs", node), probs[node]);
    products[node] = products[parents[node]] * probs[node];
  }
  // Stable: of equal products the lower number, so that no node comes before its parent.
  std::vector<NodeId> kept(tokens.size());
  std::iota(kept.begin(), kept.end(), 0);
  std::stable_sort(kept.begin() + 1, kept.end(),
                   [&](NodeId a, NodeId b) { return products[a] > products[b]; });
  kept.resize(std::min<size_t>(kept.size(), max_nodes));
  while (products[kept.back()] == 0) kept.pop_back();  // never of the root, which has 1

  std::vector<NodeId> renamed(tokens.size(), -1), kept_parents;
  std::vector<Token> kept_tokens;
  for (NodeId node : kept) {
    renamed[node] = static_cast<NodeId>(kept_tokens.size());
    kept_tokens.push_back(tokens[node]);
    kept_parents.push_back(node == 0 ? -1 : renamed[parents[node]]);
  }
  return {verb, kept_tokens, kept_parents};
}

TokenTree TokenTree::prompt_lookup(std::span<const Token> context, int64_t max_ngram,
                                   int64_t max_draft, int64_t max_nodes) {
  const std::string verb = "TokenTree.prompt_lookup";
  require(!context.empty(), verb, "context must hold a token at least, got none");
  require(max_ngram >= 1, verb, "max_ngram must be at least 1, got " + std::to_string(max_ngram));
  require(max_draft >= 0, verb, "max_draft must not be negative, got " + std::to_string(max_draft));
  check_max_nodes(verb, max_nodes);

  const int64_t size = std::ssize(context);
  struct Match {
    int64_t length, next;  // tokens that agree; where what followed them begins
  };
  std::vector<Match> matches;  // the most recent first
  for (int64_t next = size - 1; next > 0; --next) {
    int64_t length = 0;
    const int64_t longest = std::min(max_ngram, next);
    while (length < longest && context[next - 1 - length] == context[size - 1 - length]) ++length;
    if (length > 0) matches.push_back({length, next});
  }
  std::ranges::stable_sort(matches, std::greater{}, &Match::length);

  std::vector<Token> tokens{context.back()};
  std::vector<NodeId> parents{-1};
  for (const Match& match : matches) {
    if (std::ssize(tokens) == max_nodes) break;
    // Drafts meet as far as they agree.
    NodeId node = 0;
    const int64_t period = size - match.next;
    for (int64_t step = 0; step < max_draft; ++step) {
      // A draft that comes to the end of the context goes on with its own beginning: what repeats
      // itself is expected to do so again.
      const Token token = context[match.next + step % period];
      NodeId child = node + 1;
      while (child < std::ssize(tokens) && (parents[child] != node || tokens[child] != token)) {
        ++child;
      }
      if (child == std::ssize(tokens)) {
        if (child == max_nodes) break;
        tokens.push_back(token);
        parents.push_back(node);
      }
      node = child;
    }
  }
  return {verb, tokens, parents};
}

}  // namespace effllm
