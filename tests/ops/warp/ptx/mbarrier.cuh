// Barriers that count arrivals and bytes, in place of csrc/ptx/mbarrier.cuh.
#pragma once

#include <map>

#include "cuda_runtime.h"

namespace effllm::ptx {

// Of a variable in shared memory; addresses keep the alignment that pointers have to 64 KB.
inline uintptr_t smem_origin = 0;

inline uint32_t smem_address(const void* pointer) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (smem_origin == 0) smem_origin = (address & ~uintptr_t{0xffff}) - (uintptr_t{1} << 30);
  return static_cast<uint32_t>(address - smem_origin);
}
inline char* smem_pointer(uint32_t address) {
  return reinterpret_cast<char*>(smem_origin + address);
}

struct Barrier {
  uint32_t arrivals, pending;
  int64_t bytes;
  uint32_t phase;

  void complete_if_done() {
    if (pending > 0 || bytes != 0) return;
    pending = arrivals;
    phase ^= 1;
  }
};
inline std::map<uint64_t*, Barrier> barriers;

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
  barriers[barrier] = {arrivals, arrivals, 0, 0};
}
inline void fence_mbarrier_init() {}

inline void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
  Barrier& state = barriers.at(barrier);
  state.bytes += bytes;
  if (state.pending-- == 0) {
    std::printf("more arrivals than a barrier waits for\n");
    std::exit(1);
  }
  state.complete_if_done();
}
inline void mbarrier_arrive(uint64_t* barrier) { mbarrier_arrive_expect_bytes(barrier, 0); }

// What a copy has brought.
inline void mbarrier_complete(uint64_t* barrier, int64_t bytes) {
  Barrier& state = barriers.at(barrier);
  state.bytes -= bytes;
  state.complete_if_done();
}

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
  constexpr int kTurns = 10'000'000;
  for (int turn = 0; barriers.at(barrier).phase == parity; ++turn) {
    if (turn == kTurns) {
      std::printf("a barrier is never complete\n");
      std::exit(1);
    }
    warp::next_lane();
  }
}

}  // namespace effllm::ptx
