// The cluster of warp::run, in place of csrc/ptx/cluster.cuh.
#pragma once

#include "cuda_runtime.h"

namespace effllm::ptx {

inline uint32_t cluster_size() { return static_cast<uint32_t>(warp::lanes.size() / warp::dim.x); }
inline uint32_t cluster_rank() { return warp::current.x / warp::dim.x; }

inline void cluster_sync() {
  ++warp::lanes[warp::current.x].cluster_barriers;
  warp::wait(0, static_cast<unsigned>(warp::lanes.size()), &warp::Lane::cluster_barriers);
}

inline void cluster_sync_relaxed() { cluster_sync(); }

// In two halves: who has arrived may go on.
inline void cluster_arrive_relaxed() { ++warp::lanes[warp::current.x].cluster_barriers; }
inline void cluster_wait() {
  warp::wait(0, static_cast<unsigned>(warp::lanes.size()), &warp::Lane::cluster_barriers);
}

template <class T>
T* cluster_peer(T* own, uint32_t rank) {
  const auto ctas = static_cast<int64_t>(rank) - cluster_rank();
  return reinterpret_cast<T*>(reinterpret_cast<char*>(own) +
                              ctas * static_cast<int64_t>(warp::smem_bytes));
}

// A CTA alone has nobody to send to.
template <class T>
void store_async_cluster(void*, uint64_t*, uint32_t, const T&) {
  std::printf("a CTA alone sends to another\n");
  std::exit(1);
}

}  // namespace effllm::ptx
