// What a query token of a tree sees of the query tokens of its sequence: of a draft's branches, the
// one that it ends.
//
//   token          0  1  2  3  4  5      of a sequence with `ahead` keys before them
//   token 5 sees   x  x     x     x      its path: bits 0, 1, 3 and 5 of `tokens`
//   depth in it    0  1     2     3      where it stands in the text: at position ahead + depth
//
// As if the path were all that follows these keys. What stands beside it is another continuation.
#pragma once

#include <bit>
#include <cstdint>

#ifdef __CUDACC__
#define EFFLLM_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define EFFLLM_HOST_DEVICE inline
#endif

namespace effllm {

inline constexpr int64_t kMaxTreeTokens = 64;  // the bits of a mask word

struct TreePath {
  uint64_t tokens;

  // Of query token `query`, below 64: it sees itself, and no token behind it, whatever its word
  // says.
  static EFFLLM_HOST_DEVICE TreePath of(int64_t word, int query) {
    const uint64_t own = uint64_t{1} << query;
    return {(static_cast<uint64_t>(word) & (own - 1)) | own};
  }

  EFFLLM_HOST_DEVICE bool has(int token) const { return tokens >> token & 1; }

  // How many tokens of the path come before `token`, up to 64.
  EFFLLM_HOST_DEVICE int depth_of(int token) const {
    return token < 64 ? popcount(tokens & ((uint64_t{1} << token) - 1)) : popcount(tokens);
  }

  // The token at a depth of the path, which is as long at least.
  EFFLLM_HOST_DEVICE int token_at(int depth) const {
#ifdef __CUDA_ARCH__
    return __ffsll(static_cast<long long>(from_depth(depth))) - 1;
#else
    return std::countr_zero(from_depth(depth));
#endif
  }

  // Of the query, its last token.
  EFFLLM_HOST_DEVICE int depth() const { return popcount(tokens) - 1; }

  // Where a key stands in the text that ends with the query, if that sees it; `ahead` keys come
  // before all tokens.
  EFFLLM_HOST_DEVICE int position_of(int key, int ahead) const {
    return key <= ahead ? key : ahead + depth_of(key - ahead);
  }

  // What the query sees of it: what its window reaches, and the first tokens of the sequence.
  EFFLLM_HOST_DEVICE TreePath visible(int64_t ahead, int64_t window, int64_t sink_tokens) const {
    const uint64_t in_head = sink_tokens > 0 ? tokens & ~from_depth(sink_tokens - ahead) : 0;
    return {from_depth(depth() + 1 - window) | in_head};
  }

 private:
  static EFFLLM_HOST_DEVICE int popcount(uint64_t bits) {
#ifdef __CUDA_ARCH__
    return __popcll(bits);
#else
    return std::popcount(bits);
#endif
  }

  // Its tokens from a depth on.
  EFFLLM_HOST_DEVICE uint64_t from_depth(int64_t depth) const {
    uint64_t rest = tokens;
#ifdef __CUDA_ARCH__
#pragma unroll 1
#endif
    for (; depth > 0 && rest != 0; --depth) rest &= rest - 1;
    return rest;
  }
};

}  // namespace effllm

#undef EFFLLM_HOST_DEVICE
