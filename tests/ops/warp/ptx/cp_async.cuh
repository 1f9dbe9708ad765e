// Copies that arrive when they are waited for, in place of csrc/ptx/cp_async.cuh.
#pragma once

#include <cstring>
#include <deque>
#include <map>
#include <vector>

#include "cuda_runtime.h"

namespace effllm::ptx {

struct Copy {
  void* dst;
  const void* src;
};

// Groups of each lane, the last one still open.
inline std::map<unsigned, std::deque<std::vector<Copy>>> cp_async_groups;

inline std::deque<std::vector<Copy>>& own_groups() {
  auto& groups = cp_async_groups[warp::current.x];
  if (groups.empty()) groups.emplace_back();
  return groups;
}

inline void cp_async_16(void* dst, const void* src, bool valid) {
  if (reinterpret_cast<uintptr_t>(dst) % 16 != 0 || reinterpret_cast<uintptr_t>(src) % 16 != 0) {
    std::printf("a copy of 16 bytes from or to an address that is no multiple of 16\n");
    std::exit(1);
  }
  std::memset(dst, 0xff, 16);
  own_groups().back().push_back({dst, valid ? src : nullptr});
}
inline void cp_async_16(void* dst, const void* src) { cp_async_16(dst, src, true); }

inline void cp_async_commit() { own_groups().emplace_back(); }

template <int kPending>
void cp_async_wait() {
  auto& groups = own_groups();
  while (groups.size() > kPending + 1) {
    for (const Copy& copy : groups.front()) {
      if (copy.src == nullptr) {
        std::memset(copy.dst, 0, 16);
      } else {
        std::memcpy(copy.dst, copy.src, 16);
      }
    }
    groups.pop_front();
  }
}

}  // namespace effllm::ptx
