// Roofline: bytes. M * K values of 2 bytes are read and written once. A row is gathered out of
// shared memory, where neighbours that lie far apart cost a bank conflict; out of global memory
// they would cost a sector of 32 bytes each. Rows that do not fit are gathered there nonetheless.
//
//   CTA (token, slice)   stages a whole row, of which it writes one slice: few tokens would leave
//                        most multiprocessors idle
#include <algorithm>

#include "common/math.h"
#include "cuda/launch.h"
#include "gemm/gather_columns.h"

namespace effllm {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxStagedBytes = 96 * 1024;

struct GatherArgs {
  GatherColumns params;
  int slice_cols;  // a multiple of kWidth
  bool is_staged;
};

// kWidth elements at once: 8, or 1 where rows do not start at multiples of 16 bytes.
template <int kWidth>
__global__ void __launch_bounds__(kThreads)
    gather_columns_kernel(const __grid_constant__ GatherArgs args) {
  struct alignas(2 * kWidth) Chunk {
    uint16_t values[kWidth];
  };
  extern __shared__ __align__(16) uint16_t staged[];
  const GatherColumns& params = args.params;
  const auto k = static_cast<int>(params.k);
  const int64_t start = int64_t{blockIdx.x} * k;
  const uint16_t* row = static_cast<const uint16_t*>(params.x) + start;
  uint16_t* out = static_cast<uint16_t*>(params.out) + start;
  if (args.is_staged) {
    for (int col = threadIdx.x * kWidth; col < k; col += kThreads * kWidth) {
      *reinterpret_cast<Chunk*>(staged + col) = *reinterpret_cast<const Chunk*>(row + col);
    }
    __syncthreads();
    row = staged;
  }
  const int begin = static_cast<int>(blockIdx.y) * args.slice_cols;
  const int end = min(begin + args.slice_cols, k);
  for (int col = begin + threadIdx.x * kWidth; col < end; col += kThreads * kWidth) {
    int from[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; ++i) from[i] = params.perm[col + i];
    Chunk chunk;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) chunk.values[i] = row[min(max(from[i], 0), k - 1)];
    *reinterpret_cast<Chunk*>(out + col) = chunk;
  }
}

}  // namespace

void launch_gather_columns(const char* op, const GatherColumns& params, cudaStream_t stream) {
  if (params.k == 0) return;
  constexpr int64_t kEnoughCtas = 264;  // two for each multiprocessor of an H100
  constexpr int kWidth = 8;
  const bool is_wide =
      params.k % kWidth == 0 && reinterpret_cast<uintptr_t>(params.x) % (2 * kWidth) == 0;
  const int64_t turns = ceil_div<int64_t>(params.k, kThreads * (is_wide ? kWidth : 1));
  const int64_t slices = std::clamp<int64_t>(kEnoughCtas / params.m, 1, turns);
  const int64_t staged_bytes = params.k * 2;
  const GatherArgs args{
      params, static_cast<int>(round_up<int64_t>(ceil_div<int64_t>(params.k, slices), kWidth)),
      staged_bytes <= kMaxStagedBytes};
  const Launch launch{op, dim3(static_cast<unsigned>(params.m), static_cast<unsigned>(slices)),
                      dim3(kThreads), args.is_staged ? static_cast<size_t>(staged_bytes) : 0,
                      stream};
  launch(is_wide ? gather_columns_kernel<kWidth> : gather_columns_kernel<1>, args);
}

}  // namespace effllm
