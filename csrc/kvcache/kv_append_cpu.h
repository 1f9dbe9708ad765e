// What the CPU implementations of ops that append to a cache share.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "common/dispatch.h"
#include "kvcache/kv_append.h"
#include "quant/kv_layout.h"

namespace effllm {

// Slots are data, which the checks of shapes do not see.
inline void check_slots(const char* op, const KvAppendParams& params) {
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    const int64_t slot = params.slot_mapping[token];
    if (slot >= -1 && slot < params.num_slots) continue;
    fail(op, "slot_mapping[" + std::to_string(token) + "] must be -1 or in [0, NP * P) = [0, " +
                 std::to_string(params.num_slots) + "), got " + std::to_string(slot));
  }
}

inline KvRowTarget row_target(const KvAppendParams& params, const KvAppendRows& rows, int64_t slot,
                              int64_t head) {
  return rows.target(slot / params.page_size, slot % params.page_size, head);
}

// Writes one row of a cache, and its word beside a quantised one.
using RowWriter = void (*)(const char* source, const KvRowTarget& target,
                           const KvAppendParams& params);

inline RowWriter select_row_writer(const KvAppendParams& params) {
  if (!params.quantizes()) {
    return [](const char* source, const KvRowTarget& target, const KvAppendParams& params) {
      std::memcpy(target.row, source, params.row_bytes);
    };
  }
  return dispatch_kv_codec(params.cache_dtype, [&](auto codec) {
    return dispatch_float(params.dtype, [](auto element) -> RowWriter {
      return [](const char* source, const KvRowTarget& target, const KvAppendParams& params) {
        *target.word =
            decltype(codec)::encode(reinterpret_cast<const decltype(element)*>(source),
                                    params.head_dim, reinterpret_cast<uint8_t*>(target.row));
      };
    });
  });
}

}  // namespace effllm
