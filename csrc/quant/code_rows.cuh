// Rows that a block makes, quantises and never stores: from when they are made until they are codes
// they stay in registers. The arithmetic is code_rows.h's to the bit.
//
//   octet of a row    0  1 .. 15 | 16 .. 31 | ...  T-1 |  T  T+1 ...   8 columns each
//   thread of T       0  1 .. 15 | 16 .. 31 | ...  T-1 |  0  1   ...
//   slot              0  0 ..  0 |  0 ..  0 | ...   0  |  1  1   ...   of its registers
//   group             0  0 ..  0 |  1 ..  1 | ...
//
// A group of 128 columns is half a warp in one slot; what a whole row shares is found by shuffles
// and one word of shared memory per warp. Rows that are too long for registers, or not aligned,
// have no slots: their octets are made anew each time.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/vec.cuh"
#include "quant/code_rows.h"
#include "quant/code_scale.cuh"

namespace effllm {

inline constexpr int kMaxRowWarps = kMaxRowLanes / 32;
inline constexpr int kMostRowSlots = 8;  // of 16-bit elements: 32768 columns; of fp32 a quarter
inline constexpr int kPieceLanes = 128;  // of a block that takes a piece of a grouped row
inline constexpr int kPieceSlots = 2;
inline constexpr int kPieceColumns = kPieceLanes * kPieceSlots * kOctet;

// Two floats, rounded, in a word: ptx::pack_pair in intrinsics, which tests of the kernels emulate.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Eight neighbours of a row, in words: 16-bit elements of an array would take a register each.
template <class T>
struct Octet {
  static constexpr int kWords = kOctet * sizeof(T) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* row, int column, int k, bool wide) {
    if (wide) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(row + column + i * (kOctet / kWords));
        words[i] = four.x, words[i + 1] = four.y, words[i + 2] = four.z, words[i + 3] = four.w;
      }
      return;
    }
    float values[kOctet];
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const auto* element = reinterpret_cast<const device_t<T>*>(row) + column + i;
      values[i] = column + i < k ? device_to_float(*element) : 0.f;
    }
    set(values);
  }

  __device__ __forceinline__ void store(T* row, int column, int k, bool wide) const {
    if (wide) {
#pragma unroll
      for (int i = 0; i < kWords; i += 4) {
        *reinterpret_cast<uint4*>(row + column + i * (kOctet / kWords)) = {
            words[i], words[i + 1], words[i + 2], words[i + 3]};
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      auto* element = reinterpret_cast<device_t<T>*>(row) + column + i;
      if (column + i < k) *element = device_from_float<device_t<T>>(value(i));
    }
  }

  __device__ __forceinline__ float value(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return __uint_as_float(words[i]);
    } else {
      const uint32_t word = words[i / 2];
      constexpr DType kDType = std::is_same_v<T, bfloat16> ? DType::kBFloat16 : DType::kFloat16;
      return device_bits_to_float(i % 2 == 0 ? word & 0xffff : word >> 16, kDType);
    }
  }

  // Rounds.
  __device__ __forceinline__ void set(const float (&values)[kOctet]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < kOctet; ++i) words[i] = __float_as_uint(values[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = pack_pair<T>(values[2 * i], values[2 * i + 1]);
    }
  }

  __device__ __forceinline__ int32_t largest_bits() const {
    int32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kOctet; ++i) largest = max(largest, magnitude_bits(value(i)));
    return largest;
  }
};

// What `fold`, which is commutative, makes of the values of all threads, in every thread: halves of
// a warp, of those halves and so on, and then of the warps likewise. Threads are a power of two, 32
// at least. `of_warps` must be free for use.
template <class V, class Fold>
__device__ __forceinline__ V block_fold(V value, V (&of_warps)[kMaxRowWarps], const Fold& fold) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value = fold(value, __shfl_xor_sync(~0u, value, lanes));
  }
  const int num_warps = static_cast<int>(blockDim.x / 32);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[threadIdx.x % num_warps];
  for (int warps = num_warps / 2; warps > 0; warps /= 2) {
    value = fold(value, __shfl_xor_sync(~0u, value, warps));
  }
  return value;
}

// The part of a row that a block takes.
struct RowPiece {
  int64_t row;
  int first, end;  // columns

  __device__ __forceinline__ int column(int slot) const {
    return first + (slot * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * kOctet;
  }
};

// That of this block; a row past the last if there is none.
__device__ __forceinline__ RowPiece piece_of_block(int k, int64_t num_pieces) {
  const auto pieces = static_cast<unsigned>(num_pieces);
  const int first = static_cast<int>(blockIdx.x % pieces) * kPieceColumns;
  return {blockIdx.x / pieces, first, pieces == 1 ? k : min(k, first + kPieceColumns)};
}

// Fills the slots of this thread with make(load(column), column).
template <int kSlots, class T, class Load, class Make>
__device__ __forceinline__ void make_octets(const RowPiece& piece, Octet<T> (&octets)[kSlots],
                                            const Load& load, const Make& make) {
  using Loaded = std::invoke_result_t<Load, int>;
  constexpr int kAhead = 2;  // slots whose loads are under way at the same time
#pragma unroll
  for (int slot = 0; slot < kSlots; slot += kAhead) {
    Loaded loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = piece.column(slot + i);
      if (column < piece.end) loaded[i] = load(column);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int column = piece.column(slot + i);
      if (column < piece.end) octets[slot + i] = make(loaded[i], column);
    }
  }
}

// Calls body(slot, column) in all threads for all slots: kSlots of them, or if that is 0 as many as
// the piece has. Where a thread has no more octets the column is past the end.
template <int kSlots, class Body>
__device__ __forceinline__ void for_each_slot(const RowPiece& piece, const Body& body) {
  if constexpr (kSlots > 0) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) body(slot, piece.column(slot));
  } else {
    const int step = static_cast<int>(blockDim.x) * kOctet;
    const int num_slots = (piece.end - piece.first + step - 1) / step;
    for (int slot = 0; slot < num_slots; ++slot) body(slot, piece.column(slot));
  }
}

template <class T, class Scale>
__device__ __forceinline__ void store_octet(const Octet<T>& y, const Scale& by, uint8_t* codes,
                                            int column, int k, bool wide) {
  float values[kOctet];
#pragma unroll
  for (int i = 0; i < kOctet; ++i) values[i] = y.value(i);
  if (wide) {
    store_codes<kOctet>(values, by, codes + column);
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      if (column + i < k) codes[column + i] = static_cast<uint8_t>(code_of(values[i], by));
    }
  }
}

// The scale of a row that is not grouped.
template <class Scale, int kSlots, class Read>
__device__ __forceinline__ float scale_of_row(const CodeRows& rows, const RowPiece& piece,
                                              int32_t (&of_warps)[kMaxRowWarps], const Read& read) {
  if (rows.given_scale != nullptr) {
    return device_load_float(rows.given_scale, rows.given_scale_dtype, 0);
  }
  int32_t largest = 0;
  for_each_slot<kSlots>(piece, [&](int slot, int column) {
    if (column < piece.end) largest = max(largest, read(slot, column).largest_bits());
  });
  largest = block_fold(largest, of_warps, [](int32_t a, int32_t b) { return max(a, b); });
  const float scale = scale_of_largest<Scale>(largest);
  if (threadIdx.x == 0) rows.scales[piece.row] = scale;
  return scale;
}

// Codes (code_scale.cuh) and scales of a piece, whose octets read(slot, column) gives; whole rows
// if something is shared by a row. `of_warps` must be free for use.
template <class Scale, int kSlots, class Read>
__device__ __forceinline__ void quantize_piece(const CodeRows& rows, const RowPiece& piece,
                                               int32_t (&of_warps)[kMaxRowWarps],
                                               const Read& read) {
  const int k = static_cast<int>(rows.k);
  const bool wide = kSlots > 0 || k % kOctet == 0;
  uint8_t* codes = rows.codes + piece.row * rows.k;
  const bool grouped = rows.is_grouped();
  float scale = grouped ? 1.f : scale_of_row<Scale, kSlots>(rows, piece, of_warps, read);
  Scale by = Scale::of(scale);
  for_each_slot<kSlots>(piece, [&](int slot, int column) {
    const bool valid = column < piece.end;
    if (grouped) {
      int32_t largest = valid ? read(slot, column).largest_bits() : 0;
#pragma unroll
      for (int lanes = kFp8GroupSize / kOctet / 2; lanes > 0; lanes /= 2) {
        largest = max(largest, __shfl_xor_sync(~0u, largest, lanes));
      }
      scale = scale_of_largest<Scale>(largest);
      by = Scale::of(scale);
      if (valid && column % kFp8GroupSize == 0) {
        rows.scales[column / kFp8GroupSize * rows.stride_scales_group + piece.row] = scale;
      }
    }
    if (valid) store_octet(read(slot, column), by, codes, column, k, wide);
  });
}

// The given scale is a result, too, also of no rows.
__device__ __forceinline__ void store_given_scale(const CodeRows& rows) {
  if (rows.given_scale != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
    *rows.scales = device_load_float(rows.given_scale, rows.given_scale_dtype, 0);
  }
}

// Blocks of 512 threads that an SM shall hold: of two, one computes while the other loads.
template <int kSlots>
inline constexpr int kRowBlocksPerSm = kSlots <= 4 ? 2 : 1;

// Blocks, their threads, and the octets that each thread keeps: 0 of rows that are too long or not
// aligned.
struct RowsLaunch {
  int64_t blocks;
  int threads, slots;
  int64_t pieces;  // of a row, each of kPieceColumns; or 1
};

// `in_pieces`: nothing is shared by a whole row. `wide`: all of StridedRows are.
inline RowsLaunch rows_launch(const CodeRows& rows, bool in_pieces, bool wide) {
  // A given scale of no rows is written by a block that has none.
  const int64_t least = rows.given_scale != nullptr ? 1 : 0;
  if (in_pieces) {
    const int64_t pieces = std::max<int64_t>(ceil_div<int64_t>(rows.k, kPieceColumns), 1);
    const int threads = pieces == 1 ? row_lanes(rows.k) : kPieceLanes;
    return {std::max(rows.m * pieces, least), threads, wide ? kPieceSlots : 0, pieces};
  }
  const int threads = row_lanes(rows.k);
  const int64_t needed = ceil_div<int64_t>(rows.k, threads * kOctet);
  const int most = rows.dtype == DType::kFloat32 ? kMostRowSlots / 4 : kMostRowSlots;
  int slots = 2;
  while (slots < needed && slots <= most) slots *= 2;
  return {std::max(rows.m, least), threads, wide && slots <= most ? slots : 0, 1};
}

// Calls `body` with the slots of a launch as a compile-time constant.
template <class T, class Body>
void dispatch_slots(int slots, const Body& body) {
  if (slots == 2) return body(std::integral_constant<int, 2>{});
  if constexpr (sizeof(T) == 2) {
    if (slots == 4) return body(std::integral_constant<int, 4>{});
    if (slots == 8) return body(std::integral_constant<int, 8>{});
  }
  body(std::integral_constant<int, 0>{});
}

inline void check_rows_launch(const char* op, const CodeRows& rows, const RowsLaunch& launch) {
  if (launch.blocks > INT32_MAX || rows.k > INT32_MAX / 2) {
    fail(op,
         "on a GPU there must be fewer than 2^31 rows, or pieces of 2048 columns, and fewer "
         "than 2^30 columns, got M = " +
             std::to_string(rows.m) + " and K = " + std::to_string(rows.k));
  }
}

}  // namespace effllm
