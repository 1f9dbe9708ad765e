// The CUDA op. Few rows per KV head go to the decode kernel (bytes-bound, keys split over CTAs),
// many to the prefill kernel (arithmetic-bound, rows split over CTAs).
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>

#include "attention/paged_attention.h"
#include "attention/paged_attention_quantized.cuh"
#include "attention/paged_kv.h"
#include "common/math.h"
#include "common/torch.h"
#include "cuda/launch.h"

namespace effllm {

EFFLLM_KV_LAUNCHES(extern, KvE4M3)
EFFLLM_KV_LAUNCHES(extern, KvInt8)
EFFLLM_KV_LAUNCHES(extern, KvInt4)

namespace {

constexpr const char* kOp = "paged_attention";
constexpr int64_t kAlignment = 16;    // bytes; all loads are of 16
constexpr int64_t kElementBytes = 2;  // of both dtypes that a GPU takes
// Up to here it pays to read the keys once per 8 rows, from L2 after the first time, and have
// splits: the prefill kernel has one CTA for all keys of these rows.
constexpr int64_t kMaxDecodeRows = 32;

int num_multiprocessors(const Tensor& q) {
  return device_attribute(cudaDevAttrMultiProcessorCount, q.get_device_index(), kOp);
}

template <class Config>
void decode(PagedAttentionArgs args, const Tensor& q, cudaStream_t stream) {
  const int device = q.get_device_index();
  const int num_sms = num_multiprocessors(q);
  args.early_start = device_attribute(cudaDevAttrComputeCapabilityMajor, device, kOp) >= 9;
  args.num_row_tiles =
      static_cast<int32_t>(ceil_div<int64_t>(args.group * args.max_seqlen_q, Config::kRows));
  // As many CTAs as run together, or as parts that are worth one.
  const int64_t resident =
      std::clamp<int64_t>(num_sms * Config::kCtasPerSm / args.num_row_tiles, 1, kMaxShares);
  const int64_t max_keys =
      std::min(args.max_pages_per_seq * args.page_size, args.window + args.max_seqlen_q);
  const int64_t parts_per_pair = std::clamp<int64_t>(
      ceil_div<int64_t>(max_keys, Config::kMinBlocks * Config::kBlockKeys), 1, resident);
  const int64_t parts = args.num_seqs * args.num_kv_heads * parts_per_pair;
  args.num_shares = static_cast<int32_t>(std::min(parts, resident));

  const int64_t ctas = int64_t{args.num_shares} * args.num_row_tiles;
  const int64_t rows = ctas * 2 * Config::kRows;
  // Freed on return: the allocator keeps the stream's order.
  const Tensor workspace = new_empty(q, {rows * (args.head_dim + 2) + ctas * 2}, DType::kFloat32);
  args.partial_out = static_cast<float*>(workspace.mutable_data_ptr());
  args.partial_softmax = args.partial_out + rows * args.head_dim;
  args.arrivals = reinterpret_cast<uint64_t*>(args.partial_softmax + rows * 2);
  launch_paged_decode<Config>(args, stream);
}

template <class Element, class Kv, int kHeadDim>
void launch(const PagedAttentionArgs& args, const Tensor& q, cudaStream_t stream) {
  if (args.group * args.max_seqlen_q > kMaxDecodeRows) {
    return launch_paged_prefill<PagedPrefillConfig<Element, kHeadDim, Kv>>(args, stream);
  }
  constexpr bool kQuantized = !std::is_same_v<Element, Kv>;
  // Shared memory is for four warps of D = 256.
  using DecodeConfig = PagedDecodeConfig<Element, kHeadDim, kHeadDim == 256 ? 4 : 8, Kv>;
  if constexpr (kQuantized) {
    if (args.head_dim % DecodeKv<DecodeConfig>::kKeyUnitDims != 0) {
      return decode<NarrowDecodeConfig<Element, Kv>>(args, q, stream);
    }
  } else if constexpr (kHeadDim == 128) {
    // Few pairs are split, and what CTAs leave behind must be merged at a price per CTA: one has
    // the multiprocessor. With many, the other of two loads while one goes to its next pair:
    // measured on an H100, up to 10 % quicker.
    if (args.num_seqs * args.num_kv_heads > num_multiprocessors(q)) {
      return decode<PagedDecodeConfig<Element, kHeadDim, 4>>(args, q, stream);
    }
  }
  decode<DecodeConfig>(args, q, stream);
}

template <class Element, class Kv>
void launch(const PagedAttentionArgs& args, const Tensor& q, cudaStream_t stream) {
  if (args.head_dim <= 64) {
    launch<Element, Kv, 64>(args, q, stream);
  } else if (args.head_dim <= 128) {
    launch<Element, Kv, 128>(args, q, stream);
  } else {
    launch<Element, Kv, 256>(args, q, stream);
  }
}

template <class Element>
void launch(const PagedAttentionArgs& args, const Tensor& q, cudaStream_t stream) {
  if (!is_quantized_kv(args.kv_dtype)) return launch<Element, Element>(args, q, stream);
  dispatch_kv_codec(args.kv_dtype,
                    [&](auto codec) { launch<Element, decltype(codec)>(args, q, stream); });
}

// What rows of a cache must be multiples of: all that their loads need, and rows of any D have.
int64_t cache_alignment(const View& cache) {
  const int64_t row_bytes = cache.size(-1);
  return is_quantized_kv(cache.dtype) ? std::min(kAlignment, row_bytes & -row_bytes) : kAlignment;
}

bool has_aligned_rows(const View& q) {
  return reinterpret_cast<uintptr_t>(q.data) % kAlignment == 0 &&
         q.stride(0) * kElementBytes % kAlignment == 0 &&
         q.stride(1) * kElementBytes % kAlignment == 0;
}

std::tuple<Tensor, Tensor> paged_attention_cuda(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table,
    const Tensor& seq_lens, const Tensor& cu_seqlens_q, const std::optional<Tensor>& k_scale,
    const std::optional<Tensor>& v_scale, int64_t max_seqlen_q, std::optional<double> scale,
    bool causal, std::optional<int64_t> window, double softcap) {
  const View q_view = as_view(q, "q");
  const View k_view = as_view(k_cache, "k_cache"), v_view = as_view(v_cache, "v_cache");
  PagedAttentionArgs args{check_paged_attention(
      q_view, k_view, v_view, as_view(page_table, "page_table"), as_view(seq_lens, "seq_lens"),
      as_view(cu_seqlens_q, "cu_seqlens_q"), as_view(k_scale, "k_scale"),
      as_view(v_scale, "v_scale"), max_seqlen_q, scale, causal, window, softcap)};
  // A copy of the cache would cost more than the op: its layout is the caller's to mend.
  const int64_t cache_element_bytes = is_quantized_kv(args.kv_dtype) ? 1 : kElementBytes;
  Match(kOp, k_view).aligned(cache_alignment(k_view), cache_element_bytes);
  Match(kOp, v_view).aligned(cache_alignment(v_view), cache_element_bytes);
  torch::stable::accelerator::DeviceGuard guard(q.get_device_index());

  Tensor out = new_empty(q, {args.num_tokens, args.num_q_heads, args.head_dim}, args.dtype);
  Tensor lse = new_empty(q, {args.num_tokens, args.num_q_heads}, DType::kFloat32);
  if (lse.numel() == 0) return {out, lse};
  if (args.num_seqs == 0 || args.max_seqlen_q == 0 || args.num_pages == 0) {  // no row sees a key
    torch::stable::zero_(out);
    torch::stable::fill_(lse, -INFINITY);
    return {out, lse};
  }

  Tensor aligned_q = q;
  if (!has_aligned_rows(q_view)) {
    aligned_q = torch::stable::clone(torch::stable::contiguous(q));
    const View view = as_view(aligned_q, "q");
    args.q = view.data, args.stride_q_token = view.stride(0), args.stride_q_head = view.stride(1);
  }
  args.out = out.mutable_data_ptr();
  args.lse = static_cast<float*>(lse.mutable_data_ptr());
  args.max_seqlen_q = std::min(args.max_seqlen_q, args.num_tokens);
  args.page_size_divisor = FastDivisor::of(args.page_size);
  args.group = static_cast<int32_t>(args.num_q_heads / args.num_kv_heads);
  args.group_divisor = FastDivisor::of(args.group);

  const cudaStream_t stream = current_cuda_stream(q);
  if (args.dtype == DType::kFloat16) {
    launch<float16>(args, aligned_q, stream);
  } else {
    launch<bfloat16>(args, aligned_q, stream);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CUDA, m) {
  m.impl("paged_attention", TORCH_BOX(&paged_attention_cuda));
}

}  // namespace effllm
