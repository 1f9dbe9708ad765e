// block_copy: copies whole pages inside caches, in place, as copy-on-write needs; all layers in one
// call.
//
//   caches    [NP, ...] each   any dtypes, any strides: K, V, and the scales of quantised caches
//   src, dst  [C] int64        page src[c] of every cache overwrites its page dst[c]
//
// An entry with a negative src or dst, or with src == dst, does nothing. All other dst must be
// distinct and must not be a src: pages are copied in no order, so the content of a page that
// breaks this is undefined. Pages are data: the CPU raises on one that breaks it, or is out of
// range, before it writes anything; the GPU, which cannot raise, skips entries out of range.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/view.h"
#include "kvcache/cache_groups.h"

namespace effllm {

// How the bytes of one page lie in memory: `num_runs` runs of neighbouring bytes, spread over up to
// kMaxDims dimensions. Dimensions that follow on each other in memory are one here, in whatever
// order the tensor names them: a dense page is a single run.
struct PageLayout {
  static constexpr int kMaxDims = 4;

  int64_t stride_page_bytes, run_bytes, num_runs;
  int num_dims;
  int64_t sizes[kMaxDims], strides_bytes[kMaxDims];  // the fastest first

  bool operator==(const PageLayout&) const = default;

  // Where run `run` begins within a page.
  constexpr int64_t run_offset(int64_t run) const {
    int64_t offset = 0;
    for (int dim = 0; dim < num_dims; ++dim) {
      offset += run % sizes[dim] * strides_bytes[dim];
      run /= sizes[dim];
    }
    return offset;
  }
};

struct BlockCopyCache {
  char* data;
  PageLayout layout;

  int word_bytes() const {
    int64_t all = static_cast<int64_t>(reinterpret_cast<uintptr_t>(data)) |
                  layout.stride_page_bytes | layout.run_bytes;
    for (int dim = 0; dim < layout.num_dims; ++dim) all |= layout.strides_bytes[dim];
    return widest_word_bytes(all);
  }
};

struct BlockCopyParams {
  int64_t num_copies, num_pages;
  const int64_t* src;
  const int64_t* dst;
  std::vector<BlockCopyCache> caches;  // those without bytes left out

  bool skips(int64_t from, int64_t to) const { return from < 0 || to < 0 || from == to; }
};

inline PageLayout page_layout(const View& cache, int64_t element_bytes) {
  std::vector<int> dims;
  for (int dim = 1; dim < cache.rank; ++dim) {
    if (cache.sizes[dim] != 1) dims.push_back(dim);
  }
  std::ranges::sort(dims, {}, [&](int dim) { return cache.strides[dim]; });

  PageLayout layout{};
  layout.stride_page_bytes = cache.strides[0] * element_bytes;
  layout.run_bytes = element_bytes;
  layout.num_runs = 1;
  for (int dim : dims) {
    const int64_t size = cache.sizes[dim], stride = cache.strides[dim] * element_bytes;
    const int last = layout.num_dims - 1;
    if (last < 0 && stride == layout.run_bytes) {
      layout.run_bytes *= size;
      continue;
    }
    layout.num_runs *= size;
    if (last >= 0 && stride == layout.sizes[last] * layout.strides_bytes[last]) {
      layout.sizes[last] *= size;
    } else {
      layout.sizes[layout.num_dims] = size;
      layout.strides_bytes[layout.num_dims++] = stride;
    }
  }
  return layout;
}

// `element_bytes`: of each cache, whatever its dtype.
inline BlockCopyParams check_block_copy(const std::vector<View>& caches,
                                        const std::vector<int64_t>& element_bytes, const View& src,
                                        const View& dst) {
  Check check("block_copy");
  Sym copies("C");
  check(src).dtype({DType::kInt64}).shape({copies}).last_stride_one();
  check(dst).dtype({DType::kInt64}).shape({copies}).last_stride_one();

  BlockCopyParams params{};
  params.num_copies = *copies;
  params.src = src.data_as<int64_t>();
  params.dst = dst.data_as<int64_t>();
  for (size_t idx = 0; idx < caches.size(); ++idx) {
    const View& cache = caches[idx];
    check(cache);
    check.that(cache.rank >= 1 && cache.rank <= PageLayout::kMaxDims + 1,
               std::string(cache.name) + " must have 1 to " +
                   std::to_string(PageLayout::kMaxDims + 1) + " dimensions, got " +
                   format_list(cache.sizes, cache.rank));
    if (idx == 0) params.num_pages = cache.sizes[0];
    check.that(cache.sizes[0] == params.num_pages,
               std::string(cache.name) +
                   " must be [NP, ...] with NP = " + std::to_string(params.num_pages) + ", got " +
                   format_list(cache.sizes, cache.rank));
    if (cache.numel() > 0) {
      params.caches.push_back({cache.data_as<char>(), page_layout(cache, element_bytes[idx])});
    }
  }
  return params;
}

}  // namespace effllm
