// Roofline: bytes. Every page is read once and written once; a few pages of all layers are so
// little that the launch is what they cost, which is why there is one for all of them.
#include <algorithm>
#include <vector>

#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "kvcache/block_copy.h"

namespace effllm {
namespace {

constexpr int kThreads = 256;
constexpr int kWordsInFlight = 4;  // per thread, so that a page is read in one round trip or two

struct BlockCopyArgs {
  // Caches of one layout: with them the arguments stay below the 4 KB that every driver takes.
  static constexpr int kMaxCaches = 400;

  const int64_t* src;
  const int64_t* dst;
  int64_t num_pages;
  PageLayout layout;
  char* caches[kMaxCaches];
};

// Block (c, l, part) moves a part of page src[c] of cache l.
template <class Word>
__global__ void __launch_bounds__(kThreads)
    block_copy_kernel(const __grid_constant__ BlockCopyArgs args) {
  const int64_t from = args.src[blockIdx.x], to = args.dst[blockIdx.x];
  if (from < 0 || to < 0 || from == to) return;
  if (from >= args.num_pages || to >= args.num_pages) return;
  const PageLayout& layout = args.layout;
  const char* source = args.caches[blockIdx.y] + from * layout.stride_page_bytes;
  char* target = args.caches[blockIdx.y] + to * layout.stride_page_bytes;
  const int64_t words_per_run = layout.run_bytes / sizeof(Word);
  const int64_t num_words = layout.num_runs * words_per_run;

  const auto offset_of = [&](int64_t word) -> int64_t {
    if (layout.num_dims == 0) return word * sizeof(Word);
    return layout.run_offset(word / words_per_run) + word % words_per_run * sizeof(Word);
  };
  constexpr int64_t kPart = kThreads * kWordsInFlight;
  for (int64_t part = blockIdx.z * kPart; part < num_words; part += gridDim.z * kPart) {
    Word words[kWordsInFlight];
    int64_t offsets[kWordsInFlight];
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      const int64_t word = part + i * kThreads + threadIdx.x;
      offsets[i] = word < num_words ? offset_of(word) : -1;
      if (offsets[i] >= 0) words[i] = *reinterpret_cast<const Word*>(source + offsets[i]);
    }
#pragma unroll
    for (int i = 0; i < kWordsInFlight; ++i) {
      if (offsets[i] >= 0) *reinterpret_cast<Word*>(target + offsets[i]) = words[i];
    }
  }
}

template <class Word>
void launch_block_copy(const BlockCopyArgs& args, int64_t num_copies, int64_t num_caches,
                       cudaStream_t stream) {
  constexpr int64_t kMaxGridZ = 65535;
  const int64_t num_words = args.layout.num_runs * args.layout.run_bytes / sizeof(Word);
  const int64_t parts =
      std::min(ceil_div<int64_t>(num_words, kThreads * kWordsInFlight), kMaxGridZ);
  const dim3 grid(num_copies, num_caches, parts);
  const Launch launch{"block_copy", grid, dim3(kThreads), 0, stream};
  launch(block_copy_kernel<Word>, args);
}

void block_copy_cuda(const std::vector<Tensor>& caches, const Tensor& src, const Tensor& dst) {
  const ViewList views = as_views(caches, "caches", as_mutable_view);
  const BlockCopyParams params = check_block_copy(views.views, element_bytes_of(caches),
                                                  as_view(src, "src"), as_view(dst, "dst"));
  if (params.num_copies == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(src.get_device_index());
  const cudaStream_t stream = current_cuda_stream(src);
  for (const auto& group : group_caches(params.caches, BlockCopyArgs::kMaxCaches)) {
    BlockCopyArgs args{params.src, params.dst, params.num_pages, group.layout, {}};
    std::ranges::copy(group.data, args.caches);
    const auto num_caches = static_cast<int64_t>(group.data.size());
    dispatch_word<uint4>(group.word_bytes, [&](auto word) {
      launch_block_copy<decltype(word)>(args, params.num_copies, num_caches, stream);
    });
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("block_copy", TORCH_BOX(&block_copy_cuda)); }

}  // namespace effllm
