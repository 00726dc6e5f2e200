// Rows that lie side by side, taken to one lane each and back: blocks of kWidth rows
// and kWidth classes are transposed in registers.
#pragma once

#include <algorithm>
#include <utility>

#include "vectors.h"

namespace jaxsoft {
namespace {

// The numbers of a and b, which count on behind those of a, at these indices.
template <class A, size_t... kIndex>
inline Vector<A> picked(Vector<A> a, Vector<A> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kIndex...);
#else
  using Integer = typename Traits<A>::Integer;
  return __builtin_shuffle(a, b, Mask<A>{static_cast<Integer>(kIndex)...});
#endif
}

// Of two rows of a block that are kApart from each other, the squares of kApart numbers
// off the diagonal change places.
template <class A, size_t kApart, size_t... k>
inline void exchange(Vector<A>& a, Vector<A>& b, std::index_sequence<k...>) {
  constexpr size_t kW = kWidth<A>;
  Vector<A> first = picked<A, (k & kApart ? kW + k - kApart : k)...>(a, b);
  b = picked<A, (k & kApart ? kW + k : k + kApart)...>(a, b);
  a = first;
}

template <class A, size_t kApart = kWidth<A> / 2>
inline void transpose(Vector<A> (&block)[kWidth<A>]) {
  for (size_t i = 0; i < kWidth<A>; ++i) {
    if (i & kApart) continue;
    exchange<A, kApart>(block[i], block[i + kApart],
                        std::make_index_sequence<kWidth<A>>());
  }
  if constexpr (kApart > 1) transpose<A, kApart / 2>(block);
}

// f(first row, first class) for blocks that cover kRows rows of at least kWidth
// classes. The last ones overlap those before them.
template <class A, int kRows, class F>
inline void for_each_block(int64_t classes, F f) {
  constexpr int kW = kWidth<A>;
  for (int row = 0; row < kRows; row += kW)
    for (int64_t c = 0; c < classes; c += kW) f(row, std::min(c, classes - kW));
}

// to[c * kRows + row] = from[row * stride + c] for c < classes, where the stride is at
// least kWidth.
template <class A, int kRows, class T>
inline void wide_rows_to_lanes(const T* from, int64_t stride, int64_t classes, A* to) {
  for_each_block<A, kRows>(classes, [=](int row, int64_t c) {
    Vector<A> block[kWidth<A>];
    for (int i = 0; i < kWidth<A>; ++i) {
      const T* numbers = from + (row + i) * stride + c;
      block[i] = load_numbers<A>(numbers);
      __builtin_prefetch(numbers + kRows * stride);  // of the tile that comes next
    }
    transpose<A>(block);
    for (int i = 0; i < kWidth<A>; ++i) store(to + (c + i) * kRows + row, block[i]);
  });
}

// The other way round.
template <class A, int kRows, class T>
inline void lanes_to_wide_rows(const A* from, int64_t stride, int64_t classes, T* to) {
  for_each_block<A, kRows>(classes, [=](int row, int64_t c) {
    Vector<A> block[kWidth<A>];
    for (int i = 0; i < kWidth<A>; ++i)
      block[i] = load<Vector<A>>(from + (c + i) * kRows + row);
    transpose<A>(block);
    for (int i = 0; i < kWidth<A>; ++i)
      store_numbers(to + (row + i) * stride + c, block[i]);
  });
}

// Of fewer classes a vector holds some of the next row too. Past the last row there is
// room in a copy; lanes of classes that are none are read and written for nothing.
template <class A, int kRows, class T>
inline void narrow_rows_to_lanes(const T* from, int64_t classes, A* to) {
  constexpr int kW = kWidth<A>;
  T copy[(kRows + 1) * kW] = {};
  std::copy(from, from + kRows * classes, copy);
  for (int row = 0; row < kRows; row += kW) {
    Vector<A> block[kW];
    for (int i = 0; i < kW; ++i) block[i] = load_numbers<A>(copy + (row + i) * classes);
    transpose<A>(block);
    for (int c = 0; c < classes; ++c) store(to + c * kRows + row, block[c]);
  }
}

template <class A, int kRows, class T>
inline void lanes_to_narrow_rows(const A* from, int64_t classes, T* to) {
  constexpr int kW = kWidth<A>;
  T copy[(kRows + 1) * kW];
  for (int row = 0; row < kRows; row += kW) {
    Vector<A> block[kW] = {};
    for (int c = 0; c < classes; ++c)
      block[c] = load<Vector<A>>(from + c * kRows + row);
    transpose<A>(block);
    for (int i = 0; i < kW; ++i) store_numbers(copy + (row + i) * classes, block[i]);
  }
  std::copy(copy, copy + kRows * classes, to);
}

// to[c * kRows + row] = from[row * classes + c].
template <class A, int kRows, class T>
void rows_to_lanes(const T* from, int64_t classes, A* to) {
  if (classes < kWidth<A>) return narrow_rows_to_lanes<A, kRows>(from, classes, to);
  wide_rows_to_lanes<A, kRows>(from, classes, classes, to);
}

template <class A, int kRows, class T>
void lanes_to_rows(const A* from, int64_t classes, T* to) {
  if (classes < kWidth<A>) return lanes_to_narrow_rows<A, kRows>(from, classes, to);
  lanes_to_wide_rows<A, kRows>(from, classes, classes, to);
}

}  // namespace
}  // namespace jaxsoft
