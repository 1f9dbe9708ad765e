// merge_states: one attention result out of results over disjoint sets of keys.
//
//   outs  [T, HQ, D] each    softmax-weighted means of values; any strides with stride(-1) == 1
//   lses  [T, HQ] fp32 each  natural logarithm of each row's sum of exponentials; any strides
//   out   [T, HQ, D]         what attention over all the keys gives, in the dtype of outs
//   lse   [T, HQ] fp32       and its lse
//
//   out = sum_i w_i outs_i / sum_i w_i,  lse = max + ln sum_i w_i,
//   with w_i = e^(lses_i - max), max = max_i lses_i
//
// An lse of -inf says that the state has no keys: its row of out is not looked at and may be
// anything. A row without keys in any state is 0 with lse -inf. An lse that is NaN or +inf makes
// its row NaN. All arithmetic is fp32, sums run in the order of the list: equal inputs give equal
// bits.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/view.h"

namespace effllm {

struct AttentionState {
  const char* out;
  int64_t stride_out_token_bytes, stride_out_head_bytes;
  const float* lse;
  int64_t stride_lse_token, stride_lse_head;
};

struct MergeStatesParams {
  // As many as fit a kernel's arguments (4 KB) with room to spare.
  static constexpr int kMaxStates = 32;

  int64_t num_tokens;
  uint32_t num_heads, head_dim;
  int num_states;
  DType dtype;  // of outs and out
  AttentionState states[kMaxStates];
  bool wide;  // 16-byte accesses fit every row of outs

  void* out;   // [T, HQ, D], contiguous
  float* lse;  // [T, HQ], contiguous
};

// Everything but `out` and `lse`, which the op allocates afterwards.
inline MergeStatesParams check_merge_states(const std::vector<View>& outs,
                                            const std::vector<View>& lses) {
  constexpr auto kMaxStates = static_cast<size_t>(MergeStatesParams::kMaxStates);
  Check check("merge_states");
  check.that(!outs.empty() && outs.size() <= kMaxStates,
             "outs must hold 1 to " + std::to_string(kMaxStates) + " tensors, got " +
                 std::to_string(outs.size()));
  check.that(lses.size() == outs.size(), "lses must hold as many tensors as outs, " +
                                             std::to_string(outs.size()) + ", got " +
                                             std::to_string(lses.size()));
  Sym tokens("T"), q_heads("HQ"), dim("D");
  check(outs[0]).dtype({DType::kFloat16, DType::kBFloat16, DType::kFloat32});

  MergeStatesParams params{};
  params.num_states = static_cast<int>(outs.size());
  params.dtype = outs[0].dtype;
  const int64_t bytes = element_bytes(params.dtype);
  int64_t all_bytes = 0;  // a multiple of 16 if all its terms are
  for (int idx = 0; idx < params.num_states; ++idx) {
    const View &out = outs[idx], &lse = lses[idx];
    check(out).dtype({params.dtype}).shape({tokens, q_heads, dim}).last_stride_one();
    check(lse).dtype({DType::kFloat32}).shape({tokens, q_heads});
    params.states[idx] = {out.data_as<char>(),  out.stride(0) * bytes, out.stride(1) * bytes,
                          lse.data_as<float>(), lse.stride(0),         lse.stride(1)};
    const AttentionState& state = params.states[idx];
    all_bytes |= static_cast<int64_t>(reinterpret_cast<uintptr_t>(state.out)) |
                 state.stride_out_token_bytes | state.stride_out_head_bytes;
  }
  check.that(*dim > 0, "outs must have a head dim of at least 1, got 0");
  check.that(
      *q_heads * *dim <= INT32_MAX,
      "outs must have fewer than 2^31 elements per token, got " + std::to_string(*q_heads * *dim));
  params.num_tokens = *tokens;
  params.num_heads = static_cast<uint32_t>(*q_heads);
  params.head_dim = static_cast<uint32_t>(*dim);
  params.wide = (all_bytes | (*dim * bytes)) % 16 == 0;
  return params;
}

}  // namespace effllm
