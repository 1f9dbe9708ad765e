// The kernels of quantised caches. Those of one dtype are compiled in a file of their own,
// paged_attention_<dtype>.cu: EFFLLM_KV_LAUNCHES declares its launches here and defines them there.
#pragma once

#include "attention/paged_attention_sm80.cuh"
#include "attention/paged_decode_sm80.cuh"

namespace effllm {

// Rows whose bytes no wider load divides, of any D.
template <class Element, class Kv>
using NarrowDecodeConfig = PagedDecodeConfig<Element, 256, 4, Kv, true>;

#define EFFLLM_KV_LAUNCH(prefix, name, ...) \
  prefix template void name<__VA_ARGS__>(const PagedAttentionArgs&, cudaStream_t);

#define EFFLLM_KV_LAUNCHES_OF(prefix, Element, Kv)                                     \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_decode, PagedDecodeConfig<Element, 64, 8, Kv>)   \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_decode, PagedDecodeConfig<Element, 128, 8, Kv>)  \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_decode, PagedDecodeConfig<Element, 256, 4, Kv>)  \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_decode, NarrowDecodeConfig<Element, Kv>)       \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_prefill, PagedPrefillConfig<Element, 64, Kv>)  \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_prefill, PagedPrefillConfig<Element, 128, Kv>) \
  EFFLLM_KV_LAUNCH(prefix, launch_paged_prefill, PagedPrefillConfig<Element, 256, Kv>)

#define EFFLLM_KV_LAUNCHES(prefix, Kv)       \
  EFFLLM_KV_LAUNCHES_OF(prefix, float16, Kv) \
  EFFLLM_KV_LAUNCHES_OF(prefix, bfloat16, Kv)

}  // namespace effllm
