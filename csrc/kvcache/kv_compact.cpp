// kv_compact: schema and CPU implementation.
#include "kvcache/kv_compact.h"

#include <cstring>
#include <string>
#include <vector>

#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

// Calls body(head, node, place) for every row that moves, in the order of its path.
template <class Body>
void each_move(const KvCompactPaths& paths, int64_t tree, const Body& body) {
  const int32_t* nodes = paths.accept_index + tree * paths.stride_accept_index;
  for (int64_t head = 0; head < paths.num_kv_heads; ++head) {
    for (int32_t place = 0; place < paths.num_accepted[tree]; ++place) {
      if (nodes[place] != place) body(head, nodes[place], place);
    }
  }
}

void check_paths(const KvCompactPaths& paths) {
  const auto entry = [](const char* name, int64_t first, int64_t second) {
    return std::string(name) + "[" + std::to_string(first) + ", " + std::to_string(second) + "]";
  };
  for (int64_t tree = 0; tree < paths.num_trees; ++tree) {
    const int64_t count = paths.num_accepted[tree];
    if (count < 0 || count > paths.max_nodes) {
      fail("kv_compact", "num_accepted[" + std::to_string(tree) + "] must be in [0, W] = [0, " +
                             std::to_string(paths.max_nodes) + "], got " + std::to_string(count));
    }
    const int32_t* nodes = paths.accept_index + tree * paths.stride_accept_index;
    for (int64_t idx = 0; idx < count; ++idx) {
      const int64_t least = idx == 0 ? 0 : int64_t{nodes[idx - 1]} + 1;
      if (nodes[idx] >= least) continue;
      fail("kv_compact", entry("accept_index", tree, idx) + " must be at least " +
                             std::to_string(least) + ", as numbers ascend, got " +
                             std::to_string(nodes[idx]));
    }
    each_move(paths, tree, [&](int64_t head, int32_t node, int32_t place) {
      for (const int32_t needed : {node, place}) {
        if (paths.row_offset({}, tree, head, needed) >= 0) continue;
        fail("kv_compact",
             "page_table and prefix_lens must give node " + std::to_string(needed) + " of tree " +
                 std::to_string(tree) + " a position in [0, MAXP * P) = [0, " +
                 std::to_string(paths.max_pages_per_seq * paths.page_size) +
                 ") and a page in [0, NP) = [0, " + std::to_string(paths.num_pages) +
                 "), got the position " +
                 std::to_string(int64_t{paths.prefix_lens[tree * paths.stride_prefix_lens_seq +
                                                          head * paths.stride_prefix_lens_head]} +
                                needed));
      }
    });
  }
}

void kv_compact_cpu(const std::vector<Tensor>& caches, const Tensor& page_table,
                    const Tensor& prefix_lens, const Tensor& accept_index,
                    const Tensor& num_accepted) {
  const ViewList views = as_views(caches, "caches", as_mutable_view);
  const KvCompactParams params =
      check_kv_compact(views.views, element_bytes_of(caches), as_view(page_table, "page_table"),
                       as_view(prefix_lens, "prefix_lens"), as_view(accept_index, "accept_index"),
                       as_view(num_accepted, "num_accepted"));
  if (params.caches.empty()) return;
  const KvCompactPaths& paths = params.paths;
  check_paths(paths);

  // One task per cache and tree; threads pay off from some ten thousand bytes each.
  const auto num_caches = static_cast<int64_t>(params.caches.size());
  const int64_t token_bytes = paths.num_kv_heads * params.caches[0].layout.row_bytes;
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, 4 * token_bytes);
  parallel_for(0, num_caches * paths.num_trees, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const KvCompactCache& cache = params.caches[task % num_caches];
      const int64_t tree = task / num_caches;
      each_move(paths, tree, [&](int64_t head, int32_t node, int32_t place) {
        std::memcpy(cache.data + paths.row_offset(cache.layout, tree, head, place),
                    cache.data + paths.row_offset(cache.layout, tree, head, node),
                    cache.layout.row_bytes);
      });
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "kv_compact(Tensor(a!)[] caches, Tensor page_table, Tensor prefix_lens, "
      "Tensor accept_index, Tensor num_accepted) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("kv_compact", TORCH_BOX(&kv_compact_cpu)); }

}  // namespace effllm
