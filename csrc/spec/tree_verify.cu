// Roofline: bytes, of the rows on the accepted path, which are read one after the other: a row that
// a tree comes by is spread over a cluster of CTAs, and stays in L2 for what passes follow the
// first. Nothing depends on timing or the number of CTAs: equal inputs give equal tokens.
#include <array>
#include <optional>
#include <tuple>

#include "common/dispatch.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "cuda/per_device.h"
#include "spec/tree_verify.h"
#include "spec/tree_walk.cuh"

namespace effllm {
namespace {

constexpr int kThreads = 512;

template <class Element>
__global__ void __launch_bounds__(kThreads)
    tree_verify_kernel(const __grid_constant__ TreeVerifyParams params) {
  using Storage = WalkStorage<kThreads>;
  extern __shared__ __align__(16) char smem[];
  auto* storage = reinterpret_cast<Storage*>(smem);
  auto* rejected = reinterpret_cast<Rejected*>(smem + sizeof(Storage));
  const int64_t tree = blockIdx.x / ptx::cluster_size();
  TreeWalk<Element, kThreads>(params, tree, *storage, rejected).run();
}

constexpr int smem_bytes(int64_t max_nodes) {
  return static_cast<int>(sizeof(WalkStorage<kThreads>) + max_nodes * sizeof(Rejected));
}

// CTAs to a tree: as many as find room beside those of all other trees, if each gets tokens enough
// to be worth meeting the others for.
template <class Element>
int cluster_ctas(const TreeVerifyParams& params, int device) {
  constexpr int64_t kMinTokens = 4096;
  constexpr const char* kOp = "tree_verify";
  if (device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) < 9) return 1;
  static PerDevice<std::array<int, 3>> known;  // trees at the same time, by 2, 4 and 8 CTAs each
  const std::array<int, 3> resident = known.get(device, [] {
    std::array<int, 3> trees;
    for (int i = 0; i < 3; ++i) {
      trees[i] = max_resident_clusters(kOp, tree_verify_kernel<Element>, kThreads,
                                       smem_bytes(TreeVerifyParams::kMaxNodes), 2 << i);
    }
    return trees;
  });
  int ctas = 1;
  for (const int trees : resident) {
    if (params.num_trees > trees || params.vocab < kMinTokens * 2 * ctas) break;
    ctas *= 2;
  }
  return ctas;
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

  dispatch_float(params.dtype, [&](auto element) {
    using Element = device_t<decltype(element)>;
    const int ctas = cluster_ctas<Element>(params, logits.get_device_index());
    const dim3 grid(static_cast<unsigned>(params.num_trees * ctas));
    const Launch launch{"tree_verify",
                        grid,
                        dim3(kThreads),
                        static_cast<size_t>(smem_bytes(max_nodes)),
                        current_cuda_stream(logits),
                        ctas};
    launch(tree_verify_kernel<Element>, params);
  });
  return {accept_index, num_accepted, next_token};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("tree_verify", TORCH_BOX(&tree_verify_cuda));
}

}  // namespace effllm
