// Roofline: bytes, of the rows on the accepted path. This kernel is bound by latency instead: one
// CTA walks a tree, and passes several times over each row that it comes by, which L2 then holds.
// Nothing depends on timing: equal inputs give equal tokens.
#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "spec/tree_verify.h"
#include "spec/tree_walk.cuh"

namespace effllm {
namespace {

constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;

template <class Element>
__global__ void __launch_bounds__(kThreads, 1)
    tree_verify_kernel(const __grid_constant__ TreeVerifyParams params) {
  __shared__ WalkScratch<kWarps> scratch;
  extern __shared__ Rejected rejected[];
  walk_tree<Element>(params, blockIdx.x, scratch, rejected);
}

std::tuple<Tensor, Tensor, Tensor> tree_verify_cuda(
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

  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor accept_index = new_empty(logits, {params.num_trees, max_nodes}, DType::kInt32);
  Tensor num_accepted = new_empty(logits, {params.num_trees}, DType::kInt32);
  Tensor next_token = new_empty(logits, {params.num_trees}, DType::kInt64);
  params.accept_index = static_cast<int32_t*>(accept_index.mutable_data_ptr());
  params.num_accepted = static_cast<int32_t*>(num_accepted.mutable_data_ptr());
  params.next_token = static_cast<int64_t*>(next_token.mutable_data_ptr());
  if (params.num_trees == 0) return {accept_index, num_accepted, next_token};

  const Launch launch{"tree_verify", dim3(static_cast<unsigned>(params.num_trees)), dim3(kThreads),
                      static_cast<size_t>(max_nodes) * sizeof(Rejected),
                      current_cuda_stream(logits)};
  dispatch_float(params.dtype, [&](auto element) {
    launch(tree_verify_kernel<device_t<decltype(element)>>, params);
  });
  return {accept_index, num_accepted, next_token};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("tree_verify", TORCH_BOX(&tree_verify_cuda));
}

}  // namespace effllm
