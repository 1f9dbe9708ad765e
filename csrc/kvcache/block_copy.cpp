// block_copy: schema and CPU implementation.
#include "kvcache/block_copy.h"

#include <cstring>
#include <string>
#include <vector>

#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

void copy_page(const BlockCopyCache& cache, int64_t from, int64_t to) {
  const PageLayout& layout = cache.layout;
  const char* source = cache.data + from * layout.stride_page_bytes;
  char* target = cache.data + to * layout.stride_page_bytes;
  for (int64_t run = 0; run < layout.num_runs; ++run) {
    const int64_t offset = layout.run_offset(run);
    std::memcpy(target + offset, source + offset, layout.run_bytes);
  }
}

// Raises on a page out of range, written twice, or both read and written.
void check_pages(const BlockCopyParams& params) {
  enum Role : uint8_t { kNone, kRead, kWritten };
  std::vector<Role> roles(params.num_pages, kNone);
  const auto entry = [](const char* name, int64_t idx) {
    return std::string(name) + "[" + std::to_string(idx) + "]";
  };
  const auto check_range = [&](const char* name, const int64_t* pages, int64_t idx) {
    if (pages[idx] < params.num_pages) return;
    fail("block_copy", entry(name, idx) + " must be negative or in [0, NP) = [0, " +
                           std::to_string(params.num_pages) + "), got " +
                           std::to_string(pages[idx]));
  };
  for (int64_t idx = 0; idx < params.num_copies; ++idx) {
    check_range("src", params.src, idx);
    check_range("dst", params.dst, idx);
    if (!params.skips(params.src[idx], params.dst[idx])) roles[params.src[idx]] = kRead;
  }
  for (int64_t idx = 0; idx < params.num_copies; ++idx) {
    if (params.skips(params.src[idx], params.dst[idx])) continue;
    Role& role = roles[params.dst[idx]];
    if (role != kNone) {
      fail("block_copy", entry("dst", idx) + " must be a page that no other entry " +
                             (role == kRead ? "reads" : "writes") + ", got " +
                             std::to_string(params.dst[idx]));
    }
    role = kWritten;
  }
}

void block_copy_cpu(const std::vector<Tensor>& caches, const Tensor& src, const Tensor& dst) {
  const ViewList views = as_views(caches, "caches", as_mutable_view);
  const BlockCopyParams params = check_block_copy(views.views, element_bytes_of(caches),
                                                  as_view(src, "src"), as_view(dst, "dst"));
  if (params.caches.empty()) return;
  check_pages(params);

  // One task per cache and copy; threads pay off from some ten thousand bytes each.
  const auto num_caches = static_cast<int64_t>(params.caches.size());
  const PageLayout& first = params.caches[0].layout;
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, 2 * first.num_runs * first.run_bytes);
  parallel_for(0, num_caches * params.num_copies, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t from = params.src[task / num_caches], to = params.dst[task / num_caches];
      if (!params.skips(from, to)) copy_page(params.caches[task % num_caches], from, to);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def("block_copy(Tensor(a!)[] caches, Tensor src, Tensor dst) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("block_copy", TORCH_BOX(&block_copy_cpu)); }

}  // namespace effllm
