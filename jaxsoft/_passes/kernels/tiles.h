// Tiles: blocks of classes of one row or of kLanes rows, [step][lane], in the dtype of
// sums.
//
// In a long row the lanes are classes that lie side by side; otherwise they are rows.
// The loops over a tile are the same for both.
#pragma once

#include <algorithm>

#include "rows.h"
#include "transpose.h"
#include "vectors.h"

namespace jaxsoft {
namespace {

template <class A>
constexpr int kLanes = 64 / int{sizeof(A)};

struct Tile {
  bool is_long_row;
  int64_t first_row;
  int rows;
  int64_t first_class;
  int64_t classes;
  int64_t steps;
};

struct Position {
  int64_t outer;
  int64_t inner;
};

inline Position position_of(int64_t row, const Shape& shape) {
  if (shape.inner == 1) return {row, 0};
  return {row / shape.inner, row % shape.inner};
}

inline int64_t offset_of(const Array& array, int64_t row, const Shape& shape) {
  Position at = position_of(row, shape);
  return array.offset(at.outer, at.inner);
}

inline bool is_same_for_all_rows(const Array& array) {
  bool same = array.inner_stride == 0;
  for (int g = 0; g < array.groups; ++g) same &= array.group_stride[g] == 0;
  return same;
}

// A number of any of the types; a mask is bytes.
struct Flag {
  uint8_t byte;
};

// Where the numbers of an array go in a tile. on_vector(from, to) is called for kWidth
// numbers that are neighbours in both, on_number for a single one. T may be const.
template <class A, class T, class OnVector, class OnNumber>
void walk_long_row(const Array& array, int64_t at, const Tile& tile, T* data, A* to,
                   OnVector on_vector, OnNumber on_number) {
  constexpr int kW = kWidth<A>;
  T* from = data + at + tile.first_class * array.class_stride;
  int64_t c = 0;
  if (array.class_stride == 0) {
    std::remove_const_t<T> copies[kW];
    std::fill_n(copies, kW, *from);
    for (; c + kW <= tile.classes; c += kW) on_vector(copies, to + c);
    for (; c < tile.classes; ++c) on_number(from, to + c);
    return;
  }
  for (; c + kW <= tile.classes; c += kW) on_vector(from + c, to + c);
  for (; c < tile.classes; ++c) on_number(from + c, to + c);
}

template <class A, class T, class OnVector, class OnNumber>
void walk_rows(const Array& array, const Shape& shape, const Tile& tile, T* data, A* to,
               OnVector on_vector, OnNumber on_number) {
  constexpr int kN = kLanes<A>, kW = kWidth<A>;
  int64_t stride = array.class_stride;
  T* first = data + offset_of(array, tile.first_row, shape) + tile.first_class * stride;
  if (is_same_for_all_rows(array)) {
    std::remove_const_t<T> copies[kW];
    for (int64_t c = 0; c < tile.classes; ++c) {
      std::fill_n(copies, kW, first[c * stride]);
      for (int lane = 0; lane < kN; lane += kW) on_vector(copies, to + c * kN + lane);
    }
    return;
  }
  bool in_one_run = shape.inner > 1 && array.inner_stride == 1 && tile.rows == kN &&
                    tile.first_row % shape.inner + kN <= shape.inner;
  if (in_one_run) {
    for (int64_t c = 0; c < tile.classes; ++c)
      for (int lane = 0; lane < kN; lane += kW)
        on_vector(first + c * stride + lane, to + c * kN + lane);
    return;
  }
  bool is_even = shape.inner == 1 && array.groups == 1;
  for (int lane = 0; lane < tile.rows; ++lane) {
    T* from = is_even ? first + lane * array.group_stride[0]
                      : data + offset_of(array, tile.first_row + lane, shape) +
                            tile.first_class * stride;
    for (int64_t c = 0; c < tile.classes; ++c)
      on_number(from + c * stride, to + c * kN + lane);
  }
}

template <class A, class T, class OnVector, class OnNumber>
void walk(const Array& array, const Shape& shape, const Tile& tile, T* data, A* to,
          OnVector on_vector, OnNumber on_number) {
  if (tile.is_long_row) {
    int64_t at = offset_of(array, tile.first_row, shape);
    walk_long_row(array, at, tile, data, to, on_vector, on_number);
  } else {
    walk_rows(array, shape, tile, data, to, on_vector, on_number);
  }
}

// f of the array's data, with their type.
template <class A, class F>
void with_type(Number number, void* data, F f) {
  if constexpr (sizeof(A) == sizeof(double)) {
    f(static_cast<double*>(data));
  } else if (number == Number::kBfloat16) {
    f(static_cast<Bfloat16*>(data));
  } else if (number == Number::kHalf) {
    f(static_cast<Half*>(data));
  } else {
    f(static_cast<float*>(data));
  }
}

// The part of a tile that no class or row stands for gets `padding`.
template <class A>
void pad(const Tile& tile, A* numbers, A padding) {
  constexpr int kN = kLanes<A>;
  if (tile.is_long_row) {
    std::fill(numbers + tile.classes, numbers + tile.steps * kN, padding);
  } else if (tile.rows < kN) {
    std::fill_n(numbers, tile.steps * kN, padding);
  }
}

// Whether the tile is whole rows, one behind the other and one for every lane.
template <class A>
bool is_one_piece(const Array& array, const Shape& shape, const Tile& tile) {
  return !tile.is_long_row && tile.rows == kLanes<A> && tile.classes == shape.classes &&
         array.class_stride == 1 && array.groups == 1 &&
         array.group_stride[0] == shape.classes;
}

template <class A>
void load_tile(const Array& array, const Shape& shape, const Tile& tile, A* to) {
  with_type<A>(array.number, const_cast<void*>(array.data), [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    if (is_one_piece<A>(array, shape, tile)) {
      const T* from = data + tile.first_row * shape.classes;
      return rows_to_lanes<A, kLanes<A>>(from, tile.classes, to);
    }
    walk(
        array, shape, tile, static_cast<const T*>(data), to,
        [](const T* from, A* lane) { store(lane, load_numbers<A>(from)); },
        [](const T* from, A* lane) { *lane = load_number<A>(from); });
  });
}

template <class A>
void store_tile(const A* from, const Shape& shape, const Tile& tile,
                const Array& array) {
  with_type<A>(array.number, const_cast<void*>(array.data), [&](auto* data) {
    using T = std::remove_pointer_t<decltype(data)>;
    if (is_one_piece<A>(array, shape, tile)) {
      T* to = data + tile.first_row * shape.classes;
      return lanes_to_rows<A, kLanes<A>>(from, tile.classes, to);
    }
    walk(
        array, shape, tile, data, from,
        [](T* to, const A* lane) { store_numbers(to, load<Vector<A>>(lane)); },
        [](T* to, const A* lane) { store_number(to, *lane); });
  });
}

// `masked` in place of the numbers of masked classes.
template <class A>
void mask_tile(const Array& where, const Shape& shape, const Tile& tile, A* numbers,
               A masked) {
  using Flags = typename Traits<A>::Flags;
  walk(
      where, shape, tile, static_cast<const uint8_t*>(where.data), numbers,
      [masked](const uint8_t* flags, A* lane) {
        Mask<A> included = __builtin_convertvector(load<Flags>(flags), Mask<A>) != 0;
        store(lane, included ? load<Vector<A>>(lane) : splat(masked));
      },
      [masked](const uint8_t* flag, A* lane) { *lane = *flag ? *lane : masked; });
}

}  // namespace
}  // namespace jaxsoft
