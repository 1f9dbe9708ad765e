// kv_compact on CUDA; kv_compact.cuh has the kernel.
#include <algorithm>
#include <vector>

#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "kvcache/kv_compact.cuh"

namespace effllm {
namespace {

void kv_compact_cuda(const std::vector<Tensor>& caches, const Tensor& page_table,
                     const Tensor& prefix_lens, const Tensor& accept_index,
                     const Tensor& num_accepted) {
  const ViewList views = as_views(caches, "caches", as_mutable_view);
  const KvCompactParams params =
      check_kv_compact(views.views, element_bytes_of(caches), as_view(page_table, "page_table"),
                       as_view(prefix_lens, "prefix_lens"), as_view(accept_index, "accept_index"),
                       as_view(num_accepted, "num_accepted"));
  if (params.caches.empty() || params.paths.num_trees == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(page_table.get_device_index());
  for (const auto& group : group_caches(params.caches, KvCompactArgs::kMaxCaches)) {
    KvCompactArgs args{params.paths, group.layout, static_cast<int32_t>(group.data.size()), {}};
    std::ranges::copy(group.data, args.caches);
    constexpr int64_t kWarpSize = 32, kMaxThreads = 256;
    const int64_t num_words = params.paths.num_kv_heads * group.layout.row_bytes / group.word_bytes;
    const int64_t threads = std::min(round_up(num_words, kWarpSize), kMaxThreads);
    const dim3 grid(static_cast<unsigned>(params.paths.num_trees * args.num_caches));
    const Launch launch{"kv_compact", grid, dim3(static_cast<unsigned>(threads)), 0,
                        current_cuda_stream(page_table)};
    dispatch_word<uint4>(group.word_bytes,
                         [&](auto word) { launch(kv_compact_kernel<decltype(word)>, args); });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("kv_compact", TORCH_BOX(&kv_compact_cuda)); }

}  // namespace effllm
