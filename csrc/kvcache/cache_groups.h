// What ops that move bytes inside many caches share: caches that one launch can serve.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace effllm {

// The widest access that fits where all addresses and sizes are multiples of the bits of `all`.
constexpr int widest_word_bytes(int64_t all) { return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : 1; }

// Calls `body` with a word of so many bytes; Word16 is the type of 16.
template <class Word16, class Body>
void dispatch_word(int word_bytes, Body&& body) {
  switch (word_bytes) {
    case 16:
      return std::forward<Body>(body)(Word16{});
    case 4:
      return std::forward<Body>(body)(uint32_t{});
    default:
      return std::forward<Body>(body)(uint8_t{});
  }
}

template <class Cache>
struct CacheGroup {
  decltype(Cache::layout) layout;
  int word_bytes;
  std::vector<char*> data;
};

// Caches by layout and alignment, `max_caches` to a group at most.
template <class Cache>
std::vector<CacheGroup<Cache>> group_caches(std::vector<Cache> left, size_t max_caches) {
  std::vector<CacheGroup<Cache>> groups;
  while (!left.empty()) {
    CacheGroup<Cache> group{left[0].layout, left[0].word_bytes(), {}};
    std::erase_if(left, [&](const Cache& cache) {
      const bool alike = cache.layout == group.layout && cache.word_bytes() == group.word_bytes;
      if (!alike || group.data.size() == max_caches) return false;
      group.data.push_back(cache.data);
      return true;
    });
    groups.push_back(std::move(group));
  }
  return groups;
}

}  // namespace effllm
