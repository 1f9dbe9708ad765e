// kv_append: schema and CPU implementation.
#include "kvcache/kv_append.h"

#include <cstring>
#include <optional>
#include <string>

#include "common/math.h"
#include "common/torch.h"

namespace effllm {
namespace {

// Writes one row of a cache, and its word beside a quantised one.
using RowWriter = void (*)(const char* source, char* target, uint32_t* word,
                           const KvAppendParams& params);

RowWriter select_row_writer(const KvAppendParams& params) {
  if (!params.quantizes()) {
    return [](const char* source, char* target, uint32_t*, const KvAppendParams& params) {
      std::memcpy(target, source, params.row_bytes);
    };
  }
  return dispatch_kv_codec(params.cache_dtype, [&](auto codec) {
    return dispatch_float(params.dtype, [](auto element) -> RowWriter {
      return [](const char* source, char* target, uint32_t* word, const KvAppendParams& params) {
        *word = decltype(codec)::encode(reinterpret_cast<const decltype(element)*>(source),
                                        params.head_dim, reinterpret_cast<uint8_t*>(target));
      };
    });
  });
}

void write_token(const KvAppendParams& params, const KvAppendRows& rows, RowWriter write_row,
                 int64_t token, int64_t slot) {
  const int64_t page = slot / params.page_size, offset = slot % params.page_size;
  const char* source = rows.tokens + token * rows.stride_token_bytes;
  char* target = rows.cache + page * rows.stride_page_bytes + offset * rows.stride_slot_bytes;
  const KvScales& scales = rows.scales;
  for (int64_t head = 0; head < params.num_kv_heads; ++head) {
    uint32_t* word = scales.words == nullptr
                         ? nullptr
                         : scales.words + page * scales.stride_page + offset * scales.stride_slot +
                               head * scales.stride_head;
    write_row(source + head * rows.stride_head_bytes, target + head * rows.stride_cache_head_bytes,
              word, params);
  }
}

void kv_append_cpu(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
                   const Tensor& slot_mapping, const std::optional<Tensor>& k_scale,
                   const std::optional<Tensor>& v_scale) {
  const KvAppendParams params =
      check_kv_append(as_view(k, "k"), as_view(v, "v"), as_mutable_view(k_cache, "k_cache"),
                      as_mutable_view(v_cache, "v_cache"), as_view(slot_mapping, "slot_mapping"),
                      as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"));

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
  const RowWriter write_row = select_row_writer(params);
  parallel_for(0, params.num_tokens, grain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t slot = params.slot_mapping[token];
      if (slot < 0) continue;
      write_token(params, params.k, write_row, token, slot);
      write_token(params, params.v, write_row, token, slot);
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
