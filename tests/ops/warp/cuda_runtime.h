// A warp on the CPU, or a block of several, for headers that are made of CUDA's keywords and warp
// functions: lanes take turns, each running until it waits for what others have to say. In place of
// CUDA's header.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __device__
#define __forceinline__ inline
#define __global__
#define __noinline__
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(...)
#define __shared__ thread_local  // of the one thread that all lanes share

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(16) longlong2 {
  long long x, y;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) int4 {
  int x, y, z, w;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct Index {
  unsigned x;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

using cudaStream_t = void*;

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace warp {

inline constexpr int kLanes = 32;

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool done;
  unsigned exchanges;  // so far; two rounds of words are never mixed up
  unsigned barriers;
  unsigned cluster_barriers;
};

using Words = std::array<uint64_t, kLanes>;

inline std::vector<Lane> lanes(kLanes);
inline std::vector<std::array<Words, 2>> words(1);  // of each warp
inline ucontext_t caller;
inline std::function<void()> work;
inline Index current, block, dim{kLanes}, grid{1};
inline size_t smem_bytes;  // from where a CTA of a cluster has something to where the next one has it

inline unsigned turns_of_warp;  // of the current run

inline unsigned lane_after(unsigned lane) {
  static uint32_t random = 1;
  if (turns_of_warp == 0) return (lane + 1) % lanes.size();
  const auto draw = [] { return (random = random * 1664525u + 1013904223u) >> 8; };
  // Of one number for both, some lanes would never be drawn.
  if ((draw() >> 8) % turns_of_warp == 0 || lanes[lane].done) return draw() % lanes.size();
  return lane / kLanes * kLanes + (lane + 1) % kLanes;
}

inline void next_lane() {
  const unsigned from = current.x;
  const auto is_done = [](const Lane& lane) { return lane.done; };
  if (lanes[from].done && std::all_of(lanes.begin(), lanes.end(), is_done)) {
    swapcontext(&lanes[from].context, &caller);
  }
  do {
    current.x = lane_after(current.x);
  } while (lanes[current.x].done);
  if (current.x != from) swapcontext(&lanes[from].context, &lanes[current.x].context);
}

// Others run until each lane of first .. first + count - 1 has been there `rounds` times.
inline void wait(unsigned first, unsigned count, unsigned Lane::* rounds) {
  const auto begin = lanes.begin() + first, end = begin + count;
  const unsigned needed = lanes[current.x].*rounds;
  const auto is_missing = [&](const Lane& other) { return other.*rounds < needed; };
  while (std::any_of(begin, end, is_missing)) {
    if (std::any_of(begin, end, [&](const Lane& l) { return l.done && is_missing(l); })) {
      std::printf("a lane waits for one that has returned\n");
      std::exit(1);
    }
    next_lane();
  }
}

// Shows a word to all lanes of the warp, and returns those of all once they have shown theirs.
inline const Words& exchange(uint64_t word) {
  Lane& lane = lanes[current.x];
  auto& round = words[current.x / kLanes][lane.exchanges % 2];
  round[current.x % kLanes] = word;
  ++lane.exchanges;
  wait(current.x / kLanes * kLanes, kLanes, &Lane::exchanges);
  return round;
}

// The value of another lane of the warp.
template <class T>
T exchange_with(T value, int lane) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  word = exchange(word)[lane % kLanes];
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

inline void run_lane() {
  work();
  lanes[current.x].done = true;
  next_lane();
}

// Runs `body` once in every lane of a block, or of each block of a cluster. With `warp_turns`, lanes
// take turns within their warp, and one turn in so many goes to any lane: warps that run ahead as
// far as they may find out where a barrier is missing.
inline void run(const std::function<void()>& body, unsigned num_lanes = kLanes,
                unsigned num_ctas = 1, unsigned warp_turns = 0) {
  work = body;
  turns_of_warp = warp_turns;
  dim.x = num_lanes;
  lanes.resize(num_lanes * num_ctas);
  words.resize(lanes.size() / kLanes);
  for (Lane& lane : lanes) {
    lane.done = false, lane.exchanges = 0, lane.barriers = 0, lane.cluster_barriers = 0;
    getcontext(&lane.context);
    lane.context.uc_stack.ss_sp = lane.stack.data();
    lane.context.uc_stack.ss_size = lane.stack.size();
    makecontext(&lane.context, run_lane, 0);
  }
  current.x = 0;
  swapcontext(&caller, &lanes[0].context);
}

}  // namespace warp

#define threadIdx (Index{warp::current.x % warp::dim.x})
#define blockIdx (warp::block)
#define blockDim (warp::dim)
#define gridDim (warp::grid)

inline void __syncwarp() { warp::exchange(0); }

inline void __syncthreads() {
  ++warp::lanes[warp::current.x].barriers;
  warp::wait(warp::current.x / warp::dim.x * warp::dim.x, warp::dim.x, &warp::Lane::barriers);
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return warp::exchange_with(value, lane);
}

template <class T>
T __shfl_up_sync(unsigned, T value, int lanes) {
  const int lane = static_cast<int>(threadIdx.x % warp::kLanes);
  return warp::exchange_with(value, lane < lanes ? lane : lane - lanes);
}

inline unsigned atomicAdd(unsigned* word, unsigned value) {
  const unsigned before = *word;
  *word += value;
  return before;
}

template <class T>
T __ldcg(const T* src) {
  return *src;
}

template <class T>
T __ldcs(const T* src) {
  return *src;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return warp::exchange_with(value, static_cast<int>(threadIdx.x) ^ mask);
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const auto& votes = warp::exchange(vote);
  unsigned ballot = 0;
  for (int lane = 0; lane < warp::kLanes; ++lane) ballot |= unsigned(votes[lane]) << lane;
  return ballot;
}

inline unsigned __reduce_add_sync(unsigned, unsigned value) {
  unsigned sum = 0;
  for (const uint64_t word : warp::exchange(value)) sum += unsigned(word);
  return sum;
}

inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }

inline int __reduce_max_sync(unsigned, int value) {
  int largest = value;
  for (const uint64_t word : warp::exchange(value)) largest = std::max(largest, int(word));
  return largest;
}

inline int __reduce_min_sync(unsigned, int value) {
  int smallest = value;
  for (const uint64_t word : warp::exchange(value)) smallest = std::min(smallest, int(word));
  return smallest;
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const auto& values = warp::exchange(value);
  return unsigned(*std::max_element(values.begin(), values.end()));
}

inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  unsigned smallest = value;
  for (const uint64_t word : warp::exchange(value)) smallest = std::min(smallest, unsigned(word));
  return smallest;
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) {
  return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int2float_rn(int value) { return static_cast<float>(value); }
// Saturates; NaN is 0.
inline int __float2int_rn(float value) {
  if (std::isnan(value)) return 0;
  if (std::fabs(value) >= 0x1p31f) return value > 0 ? INT32_MAX : INT32_MIN;
  return static_cast<int>(std::nearbyint(value));
}
inline unsigned long long __float2ull_rn(float value) {
  return static_cast<unsigned long long>(std::nearbyint(value));
}
inline unsigned long long __double2ull_rn(double value) {
  return static_cast<unsigned long long>(std::nearbyint(value));
}
// Functions, so that no product is fused with the sum that takes it.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __frcp_rn(float x) { return 1 / x; }
// As far off as it may be there.
inline float __fdividef(float a, float b) { return std::nextafter(a / b, 0.f); }


inline int2 make_int2(int32_t x, int32_t y) { return {x, y}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

using std::max;
using std::min;
