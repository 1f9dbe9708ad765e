// kv_compact's kernel on lanes that take turns; test_kv_compact.py compiles it, and calls it with
// tensors.
#include "kvcache/kv_compact.cuh"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensor_argument.h"

namespace {

constexpr unsigned kThreads = 64;

}  // namespace

// Caches, then the other tensors in the order of the schema.
extern "C" int kv_compact(const TensorArgument* tensors, int64_t num_caches) {
  std::vector<effllm::View> caches;
  std::vector<int64_t> element_bytes;
  for (int64_t idx = 0; idx < num_caches; ++idx) {
    caches.push_back(*tensors[idx].view());
    element_bytes.push_back(effllm::element_bytes(caches.back().dtype));
  }
  const auto view = [&](int64_t idx) { return *tensors[num_caches + idx].view(); };
  const effllm::KvCompactParams params =
      effllm::check_kv_compact(caches, element_bytes, view(0), view(1), view(2), view(3));
  for (const auto& group : effllm::group_caches(params.caches, effllm::KvCompactArgs::kMaxCaches)) {
    effllm::KvCompactArgs args{
        params.paths, group.layout, static_cast<int32_t>(group.data.size()), {}};
    std::ranges::copy(group.data, args.caches);
    effllm::dispatch_word<uint4>(group.word_bytes, [&](auto word) {
      for (int64_t block = 0; block < params.paths.num_trees * args.num_caches; ++block) {
        warp::block.x = static_cast<unsigned>(block);
        warp::run([&] { effllm::kv_compact_kernel<decltype(word)>(args); }, kThreads);
      }
    });
  }
  return 0;
}
