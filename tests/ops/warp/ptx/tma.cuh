// Copies that are done at once, in place of csrc/ptx/tma.cuh.
#pragma once

#include <cuda.h>

#include "ptx/mbarrier.cuh"

namespace effllm::ptx {

inline uint64_t l2_evict_first() { return 0; }
inline uint64_t l2_evict_normal() { return 0; }

inline void bulk_load(void* dst, const void* src, uint32_t bytes, uint64_t* barrier, uint64_t) {
  const auto both = reinterpret_cast<uintptr_t>(dst) | reinterpret_cast<uintptr_t>(src) | bytes;
  if (both % 16 != 0) {
    std::printf("a bulk copy is not aligned\n");
    std::exit(1);
  }
  std::memcpy(dst, src, bytes);
  mbarrier_complete(barrier, bytes);
}

// Where a byte of a box lies under the 128-byte swizzle.
inline char* swizzled(void* box, int row, int byte) {
  const uint32_t address = smem_address(box) + static_cast<uint32_t>(row * 128 + byte);
  return smem_pointer(address ^ (address >> 7 & 7) << 4);
}

// Calls copy(byte in shared memory, byte of the matrix or null) for all of a box.
template <class Copy>
void copy_box(const CUtensorMap& map, void* box, int x, int y, const Copy& copy) {
  for (int row = 0; row < map.box_rows; ++row) {
    for (int byte = 0; byte < 128; ++byte) {
      const int64_t column = int64_t{x} * map.element_bytes + byte;
      const bool inside = y + row < map.rows && column < map.row_bytes;
      copy(swizzled(box, row, byte),
           inside ? map.data + (y + row) * map.stride_bytes + column : nullptr);
    }
  }
}

inline void tma_load_2d(void* dst, const CUtensorMap* map, uint64_t* barrier, int x, int y) {
  copy_box(*map, dst, x, y, [](char* to, const char* from) { *to = from == nullptr ? 0 : *from; });
  mbarrier_complete(barrier, map->box_rows * 128);
}

inline void tma_store_2d(const CUtensorMap* map, const void* src, int x, int y) {
  copy_box(*map, const_cast<void*>(src), x, y, [](const char* from, char* to) {
    if (to != nullptr) *to = *from;
  });
}

inline void bulk_commit() {}
inline void bulk_wait_read() {}
inline void bulk_wait() {}
inline void fence_async_proxy() {}

}  // namespace effllm::ptx
