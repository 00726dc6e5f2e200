// How the rows of a call are cut into tiles, and what there is one number of per row.
#pragma once

#include <algorithm>
#include <type_traits>

#include "write.h"

namespace jaxsoft {
namespace {

// Rows of up to so many classes are taken kLanes at a time. Of 100 classes that takes
// half the time, of 128 two thirds; of 160 it makes no difference.
constexpr int64_t kShortRow = 128;
constexpr int64_t kTileBytes = 1 << 16;
// A task has about so many numbers, for what it costs to give it to a thread.
constexpr int64_t kTaskNumbers = 1 << 15;

template <class A>
constexpr int64_t kTileNumbers = kTileBytes / int64_t{sizeof(A)};

inline int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The rows of a job in groups, of one long row or of kLanes rows; and each group in
// tiles.
template <class A, bool kTempered>
class Cut {
 public:
  explicit Cut(const Job& job)
      : job_(job),
        shape_(job.shape),
        long_rows_(shape_.inner == 1 && shape_.classes > kShortRow),
        rows_per_group_(long_rows_ ? 1 : kLanes<A>),
        classes_per_tile_(long_rows_ ? kTileNumbers<A> : kTileNumbers<A> / kLanes<A>),
        groups_(divided_up(shape_.rows(), rows_per_group_)),
        tiles_(divided_up(shape_.classes, classes_per_tile_)) {}

 protected:
  Tile tile_of(int64_t group, int64_t i) const {
    Tile tile;
    tile.is_long_row = long_rows_;
    tile.first_row = group * rows_per_group_;
    tile.rows = static_cast<int>(
        std::min<int64_t>(rows_per_group_, shape_.rows() - tile.first_row));
    tile.first_class = i * classes_per_tile_;
    tile.classes = std::min(classes_per_tile_, shape_.classes - tile.first_class);
    tile.steps = long_rows_ ? divided_up(tile.classes, kLanes<A>) : tile.classes;
    return tile;
  }

  static bool has_class(const Tile& tile, int64_t label) {
    return label >= tile.first_class && label < tile.first_class + tile.classes;
  }

  // Where a tile has this class of a row.
  static int64_t index_of(const Tile& tile, int64_t label, int lane) {
    int64_t c = label - tile.first_class;
    return tile.is_long_row ? c : c * kLanes<A> + lane;
  }

  // f(lane, where the row begins in the array) for the rows of a tile.
  template <class F>
  void for_rows(const Array& array, const Tile& tile, F f) const {
    if (shape_.inner == 1 && array.groups <= 1) {
      int64_t stride = array.groups == 0 ? 0 : array.group_stride[0];
      for (int lane = 0; lane < tile.rows; ++lane)
        f(lane, (tile.first_row + lane) * stride);
      return;
    }
    for (int lane = 0; lane < tile.rows; ++lane)
      f(lane, offset_of(array, tile.first_row + lane, shape_));
  }

  // A number per row, by lane; lanes without a row get that of the last one.
  template <class T>
  void load_rows(const Array& array, const Tile& tile, T (&to)[kLanes<A>]) const {
    const T* numbers = static_cast<const T*>(array.data);
    bool is_one_piece =
        shape_.inner == 1 && array.groups == 1 && array.group_stride[0] == 1;
    if (is_one_piece && tile.rows == kLanes<A>) {
      std::copy_n(numbers + tile.first_row, kLanes<A>, to);
      return;
    }
    for_rows(array, tile, [&](int lane, int64_t at) { to[lane] = numbers[at]; });
    std::fill(to + tile.rows, to + kLanes<A>, to[tile.rows - 1]);
  }

  // A number for every row of a tile.
  template <class F>
  static void put(void* out, const Tile& tile, F number) {
    if (!out) return;
    A* first = static_cast<A*>(out) + tile.first_row;
    for (int lane = 0; lane < tile.rows; ++lane)
      first[lane] = static_cast<A>(number(lane));
  }

  // z at the label, 0 if there is none.
  void put_logits(const Tile& tile, const Rows<A>& rows) const {
    if (!job_.logit_out) return;
    int32_t labels[kLanes<A>];
    load_rows(job_.labels, tile, labels);
    A* out = static_cast<A*>(job_.logit_out) + tile.first_row;
    auto is_class = [&](int lane) {
      return labels[lane] >= 0 && labels[lane] < shape_.classes;
    };
    with_type<A>(job_.x.number, const_cast<void*>(job_.x.data), [&](auto* x) {
      for_rows(job_.x, tile, [&](int lane, int64_t at) {
        int64_t label = at + labels[lane] * job_.x.class_stride;
        A z = is_class(lane) ? load_number<A>(x + label) : A{0};
        out[lane] = kTempered ? z * rows.sign[lane] : z;
      });
    });
    if (!job_.where) return;
    const uint8_t* included = static_cast<const uint8_t*>(job_.where.data);
    for_rows(job_.where, tile, [&](int lane, int64_t at) {
      int64_t label = at + labels[lane] * job_.where.class_stride;
      if (is_class(lane) && !included[label]) out[lane] = -kInfinity<A>;
    });
  }

  static auto sum_named(const Rows<A>& rows, int name) {
    return [&rows, name](int lane) { return rows.sums[name][lane]; };
  }

  void write_summary(const Tile& tile, const Rows<A>& rows) const {
    auto tail = [&](int lane) { return tail_of(rows, lane); };
    auto top = [&](int lane) {
      double s = tail(lane);
      return s == s ? double{rows.top[lane]} : s;
    };
    put(job_.m_out, tile, top);
    put(job_.s_out, tile, tail);
    put(job_.e_d_out, tile, sum_named(rows, kEd));
    for (int i = 0; i < job_.coefficient_count; ++i) {
      put(job_.total_out[i], tile, sum_named(rows, kCoefficient + 2 * i));
      put(job_.below_out[i], tile, sum_named(rows, kCoefficient + 2 * i + 1));
    }
    put_logits(tile, rows);
    auto about = [&](int lane) { return about_value(rows, lane); };
    put(job_.value_out, tile, [&](int lane) { return about(lane).value; });
    put(job_.deviation_out, tile, [&](int lane) { return about(lane).deviation; });
    put(job_.others_out, tile, [&](int lane) { return about(lane).others; });
  }

  // The value at the label, which leaves the tile.
  void take_label_values(const Tile& tile, A* v, Rows<A>& rows) const {
    int32_t labels[kLanes<A>];
    load_rows(job_.labels, tile, labels);
    for (int lane = 0; lane < tile.rows; ++lane) {
      int64_t label = labels[lane];
      rows.sums[kAtLabel][lane] = 0;
      if (!has_class(tile, label)) continue;
      A& value = v[index_of(tile, label, lane)];
      rows.sums[kAtLabel][lane] = double{value};
      value = 0;
    }
  }

  // Results at the labels; those that are not in the first piece are in `last`.
  void write_labels(const Tile& tile, const Pieces<A>& pieces, const Rows<A>& rows,
                    A limit, A* last) const {
    int32_t labels[kLanes<A>];
    A at_label[kLanes<A>];
    load_rows(job_.labels, tile, labels);
    load_rows(job_.at_label, tile, at_label);
    for (int lane = 0; lane < tile.rows; ++lane) {
      int64_t label = labels[lane];
      if (!has_class(tile, label)) continue;
      A dz = (kTempered ? rows.sign[lane] : A{1}) * at_label[lane];
      int64_t at = index_of(tile, label, lane);
      const Piece<A>& first = pieces.list[0];
      A* out = at < first.steps * kLanes<A> ? first.out : last;
      out[at] = dz < -limit ? -limit : dz > limit ? limit : dz;
    }
  }

  const Job& job_;
  const Shape shape_;
  const bool long_rows_;
  const int64_t rows_per_group_;
  const int64_t classes_per_tile_;
  const int64_t groups_;
  const int64_t tiles_;
};

}  // namespace
}  // namespace jaxsoft
