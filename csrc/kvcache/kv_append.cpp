// kv_append: schema and CPU implementation.
#include "kvcache/kv_append.h"

#include <cstring>
#include <string>

#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

void copy_token(const KvAppendParams& params, const KvAppendRows& rows, int64_t token,
                int64_t slot) {
  const char* source = rows.tokens + token * rows.stride_token_bytes;
  char* target = rows.cache + slot / params.page_size * rows.stride_page_bytes +
                 slot % params.page_size * rows.stride_slot_bytes;
  for (int64_t head = 0; head < params.num_kv_heads; ++head) {
    std::memcpy(target + head * rows.stride_cache_head_bytes,
                source + head * rows.stride_head_bytes, params.row_bytes);
  }
}

void kv_append_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& slot_mapping) {
  const KvAppendParams params =
      check_kv_append(as_view(k, "k"), as_view(v, "v"), as_mutable_view(k_cache, "k_cache"),
                      as_mutable_view(v_cache, "v_cache"), as_view(slot_mapping, "slot_mapping"));

  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    if (slot >= -1 && slot < params.num_slots) continue;
    fail("kv_append", "slot_mapping[" + std::to_string(token) +
                          "] must be -1 or in [0, NP * P) = [0, " +
                          std::to_string(params.num_slots) + "), got " + std::to_string(slot));
  }

  // Threads pay off from some ten thousand bytes each.
  const int64_t token_bytes = 2 * params.num_kv_heads * params.row_bytes;
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, token_bytes + 1);
  parallel_for(0, params.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = params.slot_mapping[token];
      if (slot < 0) continue;
      copy_token(params, params.k, token, slot);
      copy_token(params, params.v, token, slot);
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "kv_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping) "
      "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("kv_append", TORCH_BOX(&kv_append_cpu)); }

}  // namespace effllm
