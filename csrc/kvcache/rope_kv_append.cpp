// rope_kv_append: schema and CPU implementation.
#include "kvcache/rope_kv_append.h"

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/torch.h"
#include "kvcache/kv_append_cpu.h"

namespace effllm {
namespace {

void check_positions(const RopeKvAppendParams& params) {
  for (int64_t token = 0; token < params.append.num_tokens; ++token) {
    const int64_t position = params.positions[token];
    if (position >= 0 && position < params.max_position) continue;
    fail("rope_kv_append",
         "positions[" + std::to_string(token) + "] must be in [0, MAXPOS) = [0, " +
             std::to_string(params.max_position) + "), got " + std::to_string(position));
  }
}

template <class T>
void rotate(T& a, T& b, float cos, float sin) {
  // A statement each: compilers may fuse a product with the sum that it stands in.
  const float x = to_float(a), y = to_float(b);
  const float x_cos = x * cos, y_sin = y * sin;
  const float y_cos = y * cos, x_sin = x * sin;
  a = from_float<T>(x_cos - y_sin);
  b = from_float<T>(y_cos + x_sin);
}

template <class T>
void rotate_row(const RopeKvAppendParams& params, int64_t position, const char* row, T* out) {
  const float* cos = params.cos + position * params.stride_cos;
  const float* sin = params.sin + position * params.stride_sin;
  const int64_t half = params.half;
  std::memcpy(out, row, params.append.row_bytes);
  if (params.interleaved) {
    for (int64_t i = 0; i < half; ++i) rotate(out[2 * i], out[2 * i + 1], cos[i], sin[i]);
  } else {
    for (int64_t i = 0; i < half; ++i) rotate(out[i], out[half + i], cos[i], sin[i]);
  }
}

// `row` has room for D numbers.
template <class T>
void append_token(const RopeKvAppendParams& params, RowWriter write_row, int64_t token, T* row) {
  const KvAppendParams& append = params.append;
  const int64_t slot = append.slot_mapping[token];
  for (int64_t head = 0; head < append.num_kv_heads; ++head) {
    const auto source = [&](const KvAppendRows& rows) {
      return rows.tokens + token * rows.stride_token_bytes + head * rows.stride_head_bytes;
    };
    rotate_row(params, params.positions[token], source(append.k), row);
    write_row(reinterpret_cast<const char*>(row), row_target(append, append.k, slot, head), append);
    write_row(source(append.v), row_target(append, append.v, slot, head), append);
  }
}

Tensor rope_kv_append_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos,
                          const Tensor& sin, const Tensor& positions, const Tensor& k_cache,
                          const Tensor& v_cache, const Tensor& slot_mapping,
                          const std::optional<Tensor>& k_scale,
                          const std::optional<Tensor>& v_scale, bool interleaved) {
  RopeKvAppendParams params = check_rope_kv_append(
      as_view(q, "q"), as_view(k, "k"), as_view(v, "v"), as_view(cos, "cos"), as_view(sin, "sin"),
      as_view(positions, "positions"), as_mutable_view(k_cache, "k_cache"),
      as_mutable_view(v_cache, "v_cache"), as_view(slot_mapping, "slot_mapping"),
      as_mutable_view(k_scale, "k_scale"), as_mutable_view(v_scale, "v_scale"), interleaved);
  check_slots("rope_kv_append", params.append);
  check_positions(params);

  const KvAppendParams& append = params.append;
  Tensor out = new_empty(q, {append.num_tokens, params.num_heads, append.head_dim}, append.dtype);
  params.out = static_cast<char*>(out.mutable_data_ptr());
  // Threads pay off from some ten thousand bytes each.
  const int64_t rows = params.num_heads + 2 * append.num_kv_heads;
  const int64_t grain = ceil_div<int64_t>(int64_t{1} << 15, rows * append.row_bytes + 1);
  const RowWriter write_row = select_row_writer(append);
  dispatch_float(append.dtype, [&](auto element) {
    using T = decltype(element);
    parallel_for(0, append.num_tokens, grain, [&](int64_t begin, int64_t end) {
      std::vector<T> row(append.head_dim);
      for (int64_t token = begin; token < end; ++token) {
        for (int64_t head = 0; head < params.num_heads; ++head) {
          rotate_row(
              params, params.positions[token],
              params.q + token * params.stride_q_token_bytes + head * params.stride_q_head_bytes,
              reinterpret_cast<T*>(params.out) +
                  (token * params.num_heads + head) * append.head_dim);
        }
        if (append.slot_mapping[token] >= 0) append_token(params, write_row, token, row.data());
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NS, m) {
  m.def(
      "rope_kv_append(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor positions, "
      "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, Tensor(c!)? k_scale=None, "
      "Tensor(d!)? v_scale=None, *, bool interleaved=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NS, CPU, m) {
  m.impl("rope_kv_append", TORCH_BOX(&rope_kv_append_cpu));
}

}  // namespace effllm
