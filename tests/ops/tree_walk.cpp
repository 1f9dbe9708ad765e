// tree_verify's kernel on a cluster of a few warps whose lanes take turns; test_tree_walk.py
// compiles it, and calls it with tensors.
#include "spec/tree_walk.cuh"

#include <cstdint>
#include <memory>
#include <vector>

#include "common/dispatch.h"
#include "tensor_argument.h"

namespace {

constexpr int kThreads = 2 * effllm::kWarpSize;

// As it lies in a CTA's shared memory.
struct Storage {
  effllm::WalkStorage<kThreads> walk;
  effllm::Rejected rejected[effllm::TreeVerifyParams::kMaxNodes];
};

}  // namespace

// Tensors in the order of the schema. `warp_turns`: see warp::run.
extern "C" void tree_verify_walks(const TensorArgument* tensors, int64_t max_nodes, int num_ctas,
                                  int warp_turns, int32_t* accept_index, int32_t* num_accepted,
                                  int64_t* next_token) {
  const auto view = [&](int idx) { return tensors[idx].view(); };
  effllm::TreeVerifyParams params =
      effllm::check_tree_verify(*view(0), *view(1), *view(2), *view(3), *view(4), *view(5),
                                *view(6), *view(7), *view(8), *view(9), view(10), max_nodes);
  params.accept_index = accept_index;
  params.num_accepted = num_accepted;
  params.next_token = next_token;
  std::vector<Storage> storage(num_ctas);
  warp::smem_bytes = sizeof(Storage);
  effllm::dispatch_float(params.dtype, [&](auto element) {
    using Element = effllm::device_t<decltype(element)>;
    for (int64_t tree = 0; tree < params.num_trees; ++tree) {
      const auto walk = [&] {
        Storage& own = storage[effllm::ptx::cluster_rank()];
        effllm::TreeWalk<Element, kThreads>(params, tree, own.walk, own.rejected).run();
      };
      warp::run(walk, kThreads, static_cast<unsigned>(num_ctas), static_cast<unsigned>(warp_turns));
    }
  });
}
