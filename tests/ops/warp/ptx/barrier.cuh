// Barriers of a part of a block, in place of csrc/ptx/barrier.cuh.
#pragma once

#include <map>

#include "cuda_runtime.h"

namespace effllm::ptx {

struct NamedBarrier {
  int arrived = 0, rounds = 0;
};
inline std::map<int, NamedBarrier> named_barriers;

template <int kThreads>
void named_barrier_sync(int barrier) {
  NamedBarrier& state = named_barriers[barrier];
  const int round = state.rounds;
  if (++state.arrived == kThreads) {
    state.arrived = 0;
    ++state.rounds;
  }
  while (state.rounds == round) warp::next_lane();
}

}  // namespace effllm::ptx
