// Roofline: bytes. Every row is read once and written once; a step of decoding moves so little that
// the launch is what it costs.
#include <algorithm>
#include <optional>

#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"
#include "kvcache/kv_append.h"
#include "kvcache/kv_quantize.cuh"

namespace effllm {
namespace {

// One block moves one token: its threads run over the words of all heads, first of K, then of V.
template <class Word>
__global__ void kv_append_kernel(const __grid_constant__ KvAppendParams params) {
  const int64_t token = blockIdx.x;
  const int64_t slot = params.slot_mapping[token];
  if (slot < 0 || slot >= params.num_slots) return;
  const int64_t page = slot / params.page_size;
  const int64_t offset = slot % params.page_size;
  const uint32_t words_per_row = params.row_bytes / sizeof(Word);
  const uint32_t num_words = params.num_kv_heads * words_per_row;

  for (const KvAppendRows* rows : {&params.k, &params.v}) {
    const char* source = rows->tokens + token * rows->stride_token_bytes;
    char* target = rows->cache + page * rows->stride_page_bytes + offset * rows->stride_slot_bytes;
    for (uint32_t idx = threadIdx.x; idx < num_words; idx += blockDim.x) {
      const int64_t head = idx / words_per_row;
      const int64_t word = idx % words_per_row;
      reinterpret_cast<Word*>(target + head * rows->stride_cache_head_bytes)[word] =
          reinterpret_cast<const Word*>(source + head * rows->stride_head_bytes)[word];
    }
  }
}

template <class Word>
void launch_kv_append(const KvAppendParams& params, cudaStream_t stream) {
  constexpr int64_t kWarpSize = 32, kMaxThreads = 256;
  const int64_t num_words = params.num_kv_heads * params.row_bytes / sizeof(Word);
  const int64_t threads = std::clamp(round_up(num_words, kWarpSize), kWarpSize, kMaxThreads);
  const Launch launch{"kv_append", dim3(params.num_tokens), dim3(threads), 0, stream};
  launch(kv_append_kernel<Word>, params);
}

void kv_append_cuda(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                    const Tensor& slot_mapping, const std::optional<Tensor>& k_scale,
                    const std::optional<Tensor>& v_scale) {
  const KvAppendParams params =
      check_kv_append(as_view(k, "k"), as_view(v, "v"), as_mutable_view(k_cache, "k_cache"),
                      as_mutable_view(v_cache, "v_cache"), as_view(slot_mapping, "slot_mapping"),
                      as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"));
  if (params.num_tokens == 0 || params.num_kv_heads == 0 || params.row_bytes == 0) return;

  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const cudaStream_t stream = current_cuda_stream(k);
  if (params.quantizes()) {
    return dispatch_kv_codec(params.cache_dtype, [&](auto codec) {
      dispatch_float(params.dtype, [&](auto element) {
        launch_kv_quantize<decltype(element), decltype(codec)>(params, stream);
      });
    });
  }
  switch (params.word_bytes) {
    case 16:
      return launch_kv_append<uint4>(params, stream);
    case 4:
      return launch_kv_append<uint32_t>(params, stream);
    default:
      return launch_kv_append<uint16_t>(params, stream);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) { m.impl("kv_append", TORCH_BOX(&kv_append_cuda)); }

}  // namespace effllm
