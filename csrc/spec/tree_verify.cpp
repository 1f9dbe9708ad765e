// tree_verify: schema and CPU implementation.
#include "spec/tree_verify.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/torch.h"

namespace effllm {
namespace {

// Trees and sampling parameters, before anything is computed.
void check_values(const TreeVerifyParams& params) {
  const auto require = [](bool condition, const char* name, int64_t index,
                          const std::string& needed, auto found) {
    if (condition) return;
    fail("tree_verify", std::string(name) + "[" + std::to_string(index) + "] must be " + needed +
                            ", got " + std::to_string(found));
  };
  for (int64_t tree = 0; tree < params.num_trees; ++tree) {
    const int64_t begin = params.cu_nodes[tree], end = params.cu_nodes[tree + 1];
    require(begin >= 0, "cu_nodes", tree, "at least 0", begin);
    require(end >= begin && end <= std::min(params.num_nodes, begin + params.max_nodes), "cu_nodes",
            tree + 1,
            "in [" + std::to_string(begin) + ", " +
                std::to_string(std::min(params.num_nodes, begin + params.max_nodes)) +
                "], at most max_nodes more than the one before",
            end);
    for (int64_t idx = begin; idx < end; ++idx) {
      const auto is_link = [&](int64_t link) {
        return link == -1 || (link > idx - begin && link < end - begin);
      };
      const std::string needed = "-1 or in (" + std::to_string(idx - begin) + ", " +
                                 std::to_string(end - begin) + "), a node after its own";
      require(is_link(params.first_child[idx]), "first_child", idx, needed,
              params.first_child[idx]);
      require(is_link(params.next_sibling[idx]), "next_sibling", idx, needed,
              params.next_sibling[idx]);
      // A root is never tried, so its token does not matter.
      require(idx == begin || (params.tokens[idx] >= 0 && params.tokens[idx] < params.vocab),
              "tokens", idx, "in [0, " + std::to_string(params.vocab) + ")", params.tokens[idx]);
    }
    const float temperature = params.temperature[tree], top_p = params.top_p[tree];
    require(temperature >= 0 && std::isfinite(temperature), "temperature", tree,
            "finite and at least 0", temperature);
    require(params.top_k[tree] >= 0, "top_k", tree, "at least 0", params.top_k[tree]);
    require(top_p > 0 && top_p <= 1, "top_p", tree, "in (0, 1]", top_p);
  }
}

// One tree on its way from the root; the vectors are scratch of one row each.
template <class T>
class TreeWalk {
 public:
  explicit TreeWalk(const TreeVerifyParams& params) : params_(params) {}

  void run(int64_t tree) {
    tree_ = tree;
    begin_ = params_.cu_nodes[tree];
    int32_t* path = params_.accept_index + tree * params_.max_nodes;
    std::fill_n(path, params_.max_nodes, -1);
    params_.num_accepted[tree] = 0;
    params_.next_token[tree] = 0;
    if (params_.cu_nodes[tree + 1] == begin_) return;

    int32_t node = 0;
    for (int32_t depth = 0; node != -1; ++depth) {
      path[depth] = node;
      params_.num_accepted[tree] = depth + 1;
      const bool greedy = params_.temperature[tree] == 0.f;
      node = greedy ? step_greedily(node) : step(node, params_.position[tree] + depth);
    }
  }

 private:
  // Both steps give the child that is accepted, or -1 with next_token set.
  int32_t step_greedily(int32_t node) {
    // In two loops, of which compilers make vector instructions of the long one.
    const T* logits = row(node);
    uint32_t highest = 0;
    for (int64_t token = 0; token < params_.vocab; ++token) {
      highest = std::max(highest, logit_key(to_float(logits[token])));
    }
    int64_t wanted = 0;
    while (logit_key(to_float(logits[wanted])) != highest) ++wanted;
    for (int32_t child = first_child(node); child != -1; child = next_sibling(child)) {
      if (params_.tokens[begin_ + child] == wanted) return child;
    }
    params_.next_token[tree_] = wanted;
    return -1;
  }

  int32_t step(int32_t node, int64_t position) {
    const int64_t seed = params_.seed[tree_], vocab = params_.vocab;
    set_target(node);
    double target_sum = std::reduce(target_.begin(), target_.end());
    double draft_sum = 0;
    if (params_.draft_probs != nullptr) {
      const float* probs = params_.draft_probs + (begin_ + node) * params_.stride_draft_probs;
      draft_.resize(vocab);
      // What is no probability counts as none.
      std::transform(probs, probs + vocab, draft_.begin(),
                     [](float prob) { return prob > 0 ? double{prob} : 0.0; });
      draft_sum = std::reduce(draft_.begin(), draft_.end());
    }

    uint32_t draw = 0;
    for (int32_t child = first_child(node); child != -1 && target_sum > 0;
         child = next_sibling(child), ++draw) {
      const double coin = verify_coin(seed, position, draw);
      const int64_t token = params_.tokens[begin_ + child];
      const double target = target_[token] / target_sum;
      const double draft = draft_sum > 0 ? draft_[token] / draft_sum : 0.0;
      // Strictly below: a coin of 0 must not accept what has no probability.
      if (coin * (draft > 0 ? draft : 1.0) < target) return child;
      if (draft > 0) {
        for (int64_t x = 0; x < vocab; ++x) {
          target_[x] = std::max(target_[x] / target_sum - draft_[x] / draft_sum, 0.0);
        }
        // Summed anew: a difference of sums would be mostly rounding where little is left.
        draft_[token] = 0;
        draft_sum = std::reduce(draft_.begin(), draft_.end());
      } else {
        target_[token] = 0;
      }
      target_sum = std::reduce(target_.begin(), target_.end());
    }
    if (!(target_sum > 0)) {
      set_target(node);
      target_sum = std::reduce(target_.begin(), target_.end());
    }
    params_.next_token[tree_] = sample(verify_draw(seed, position) * target_sum);
    return -1;
  }

  // The law of the token after `node`, up to a factor, in target_.
  void set_target(int32_t node) {
    const int64_t vocab = params_.vocab;
    const T* logits = row(node);
    target_.resize(vocab);
    orders_.resize(vocab);
    for (int64_t token = 0; token < vocab; ++token) {
      orders_[token] = token_order(to_float(logits[token]), token, vocab);
    }
    const float maximum = logit_of_order(*std::ranges::max_element(orders_));
    const double temperature = params_.temperature[tree_];
    const auto weight = [&](uint64_t order) {
      const float logit = logit_of_order(order);
      // Also right where both are infinite.
      return logit == maximum ? 1.0 : std::exp((double{logit} - double{maximum}) / temperature);
    };
    for (int64_t token = 0; token < vocab; ++token) target_[token] = weight(orders_[token]);

    const int64_t top_k = params_.top_k[tree_];
    const double top_p = params_.top_p[tree_];
    const bool cut_k = top_k > 0 && top_k < vocab, cut_p = top_p < 1;
    if (!cut_k && !cut_p) return;
    if (cut_k) {
      std::ranges::nth_element(orders_, orders_.begin() + top_k - 1, std::greater{});
      orders_.resize(top_k);
    }
    uint64_t last = *std::ranges::min_element(orders_);
    if (cut_p) {
      // A heap gives the likeliest one after the other, and few of them are asked for.
      double total = 0, reached = 0;
      for (uint64_t order : orders_) total += weight(order);
      std::ranges::make_heap(orders_);
      while (reached < top_p * total && !orders_.empty()) {
        std::ranges::pop_heap(orders_);
        last = orders_.back();
        orders_.pop_back();
        reached += weight(last);
      }
    }
    for (int64_t token = 0; token < vocab; ++token) {
      if (token_order(to_float(logits[token]), token, vocab) < last) target_[token] = 0;
    }
  }

  // The first token whose cumulative weight is above the threshold; never one of weight 0.
  int64_t sample(double threshold) const {
    double reached = 0;
    int64_t chosen = 0;
    for (int64_t token = 0; token < params_.vocab && reached <= threshold; ++token) {
      if (target_[token] > 0) chosen = token;
      reached += target_[token];
    }
    return chosen;
  }

  const T* row(int32_t node) const {
    return static_cast<const T*>(params_.logits) + (begin_ + node) * params_.stride_logits;
  }
  int32_t first_child(int32_t node) const { return params_.first_child[begin_ + node]; }
  int32_t next_sibling(int32_t node) const { return params_.next_sibling[begin_ + node]; }

  const TreeVerifyParams& params_;
  int64_t tree_ = 0, begin_ = 0;
  std::vector<double> target_, draft_;
  std::vector<uint64_t> orders_;
};

std::tuple<Tensor, Tensor, Tensor> tree_verify_cpu(
    const Tensor& logits, const Tensor& tokens, const Tensor& first_child,
    const Tensor& next_sibling, const Tensor& cu_nodes, const Tensor& temperature,
    const Tensor& top_k, const Tensor& top_p, const Tensor& seed, const Tensor& position,
    const std::optional<Tensor>& draft_probs, int64_t max_nodes) {
  TreeVerifyParams params = check_tree_verify(
      as_view(logits, "logits"), as_view(tokens, "tokens"), as_view(first_child, "first_child"),
      as_view(next_sibling, "next_sibling"), as_view(cu_nodes, "cu_nodes"),
      as_view(temperature, "temperature"), as_view(top_k, "top_k"), as_view(top_p, "top_p"),
      as_view(seed, "seed"), as_view(position, "position"), as_view(draft_probs, "draft_probs"),
      max_nodes);
  check_values(params);

  Tensor accept_index = new_empty(logits, {params.num_trees, max_nodes}, DType::kInt32);
  Tensor num_accepted = new_empty(logits, {params.num_trees}, DType::kInt32);
  Tensor next_token = new_empty(logits, {params.num_trees}, DType::kInt64);
  params.accept_index = static_cast<int32_t*>(accept_index.mutable_data_ptr());
  params.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  params.next_token = static_cast<int64_t*>(next_token.mutable_data_ptr());

  // A tree reads a row at least; threads pay off from some ten thousand logits each.
  const int64_t grain = std::max<int64_t>((int64_t{1} << 14) / params.vocab, 1);
  dispatch_float(params.dtype, [&](auto element) {
    parallel_for(0, params.num_trees, grain, [&](int64_t begin, int64_t end) {
      TreeWalk<decltype(element)> walk(params);
      for (int64_t tree = begin; tree < end; ++tree) walk.run(tree);
    });
  });
  return {accept_index, num_accepted, next_token};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "tree_verify(Tensor logits, Tensor tokens, Tensor first_child, Tensor next_sibling, "
      "Tensor cu_nodes, Tensor temperature, Tensor top_k, Tensor top_p, Tensor seed, "
      "Tensor position, Tensor? draft_probs=None, *, SymInt max_nodes) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("tree_verify", TORCH_BOX(&tree_verify_cpu)); }

}  // namespace effllm
