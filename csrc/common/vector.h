// Vectors of any width, by the extension that GCC and Clang share: + - * < ?: work lane by lane.
//
// In an unnamed namespace, for headers that are compiled once per instruction set: an inline
// function compiled for AVX2 could else be the copy that the linker keeps for callers on processors
// without.
#pragma once

#include <cstdint>

namespace effllm {
namespace {

template <class T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
};

template <class T, int kWidth>
using Vector = typename VectorOf<T, 4 * kWidth>::type;
template <int kWidth>
using FloatVector = Vector<float, kWidth>;

template <class V, class T>
inline V load_vector(const T* from) {
  V vector;
  __builtin_memcpy(&vector, from, sizeof(V));
  return vector;
}

template <class V, class T>
inline void store_vector(V vector, T* to) {
  __builtin_memcpy(to, &vector, sizeof(V));
}

// For values that several multiplications use: compilers otherwise make the load an operand of
// each, and loads are what then bounds the loop.
template <class V, class T>
inline V load_once(const T* from) {
  typedef V Unaligned __attribute__((aligned(alignof(T)), may_alias));
  return *reinterpret_cast<const volatile Unaligned*>(from);
}

// The same value in every lane. Minus zero is nothing; plus zero would turn -0 into 0.
template <int kWidth>
inline FloatVector<kWidth> splat(float value) {
  return value - FloatVector<kWidth>{};
}

}  // namespace
}  // namespace effllm
