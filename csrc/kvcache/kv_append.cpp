// kv_append: schema and CPU implementation.
#include "kvcache/kv_append.h"

#include <optional>

#include "common/math.h"
#include "common/torch.h"
#include "kvcache/kv_append_cpu.h"

namespace effllm {
namespace {

void kv_append_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& slot_mapping, const std::optional<Tensor>& k_scale,
                   const std::optional<Tensor>& v_scale) {
  const KvAppendParams params =
      check_kv_append(as_view(k, "k"), as_view(v, "v"), as_mutable_view(k_cache, "k_cache"),
                      as_mutable_view(v_cache, "v_cache"), as_view(slot_mapping, "slot_mapping"),
                      as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"));

  check_slots("kv_append", params);

  // Threads pay off from some ten thousand bytes each.
  const int64_t token_bytes = 2 * params.num_kv_heads * params.row_bytes;
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, token_bytes + 1);
  const RowWriter write_row = select_row_writer(params);
  parallel_for(0, params.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = params.slot_mapping[token];
      if (slot < 0) continue;
      for (const KvAppendRows* rows : {&params.k, &params.v}) {
        const char* source = rows->tokens + token * rows->stride_token_bytes;
        for (int64_t head = 0; head < params.num_kv_heads; ++head) {
          write_row(source + head * rows->stride_head_bytes, row_target(params, *rows, slot, head),
                    params);
        }
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "kv_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
      "Tensor(c!)? k_scale=None, Tensor(d!)? v_scale=None) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) { m.impl("kv_append", TORCH_BOX(&kv_append_cpu)); }

}  // namespace effllm
