// The passes over rows of logits. CMake compiles this file for several kinds of
// processor, with JAXSOFT_RUN the name of its one public function.
//
// Rows are cut into tiles, which fit in the cache: the logits are read and converted
// once, or where a row is longer than a tile once for each of the phases
//
//     maximum, the sums about it, what is written for every class.
//
// They are cut by their shape alone, and the sums of tiles are added in order: the same
// bits come out of any number of threads.

#include "rows.h"

#include <vector>

#include "cut.h"

namespace jaxsoft {
namespace {

// One pass over all rows, with sums in A.
template <class A, bool kTempered>
class Run : Cut<A, kTempered> {
 public:
  explicit Run(const Job& job) : Cut<A, kTempered>(job) {
    result_.data = job.classes_out;
    result_.number = job.classes_out_number;
    result_.class_stride = job.x.class_stride;
    result_.inner_stride = job.x.inner_stride;
    result_.groups = 1;
    result_.group_size[0] = shape_.outer;
    result_.group_stride[0] = shape_.classes * shape_.inner;
  }

  void all(Workers& workers) const {
    constexpr int64_t kFewGroups = 32;
    if (tiles_ > 1 && groups_ < kFewGroups) {
      all_in_phases(workers);
    } else {
      all_by_groups(workers);
    }
  }

 private:
  using Base = Cut<A, kTempered>;
  using Base::classes_per_tile_;
  using Base::groups_;
  using Base::job_;
  using Base::load_rows;
  using Base::long_rows_;
  using Base::put;
  using Base::rows_per_group_;
  using Base::shape_;
  using Base::sum_named;
  using Base::take_label_values;
  using Base::tile_of;
  using Base::tiles_;
  using Base::write_labels;
  using Base::write_summary;

  struct Memory {
    alignas(64) A z[kTileNumbers<A>];  // logits, then results
    alignas(64) A v[kTileNumbers<A>];  // values
  };

  // Every task has some groups of rows, and all phases of them.
  void all_by_groups(Workers& workers) const {
    int64_t numbers = std::max<int64_t>(1, rows_per_group_ * shape_.classes);
    int64_t per_task = std::max<int64_t>(1, kTaskNumbers / numbers);
    for_each(workers, divided_up(groups_, per_task), [&](int64_t task) {
      Memory memory;
      int64_t end = std::min(groups_, (task + 1) * per_task);
      for (int64_t group = task * per_task; group < end; ++group)
        tiles_ == 1 ? whole(group, memory) : in_parts(group, memory);
    });
  }

  // Of rows side by side, one alone would decide how the others are rounded.
  bool may_be_direct() const { return long_rows_ && !kTempered; }

  // A group whose rows are one tile, which stays in the cache.
  void whole(int64_t group, Memory& memory) const {
    Tile tile = tile_of(group, 0);
    Rows<A> rows;
    prepare(tile, rows);
    Pieces<A> pieces = open(tile, rows, memory);
    if (!job_.m) find_maximum(tile, pieces, rows);
    center(tile, rows, may_be_direct());
    if (rows.any_infinite) pieces = open(tile, rows, memory);
    add_up_all<true>(tile, pieces, memory, rows);
    Factors<A> factors;
    finish(tile, rows, factors);
    if (job_.classes_out) write(tile, pieces, rows, factors, memory);
  }

  void in_parts(int64_t group, Memory& memory) const {
    Rows<A> rows;
    prepare(tile_of(group, 0), rows);
    for (int64_t i = 0; i < tiles_ && !job_.m; ++i)
      maximum_of_part(tile_of(group, i), memory, rows);
    center(tile_of(group, 0), rows, may_be_direct());
    clear_sums(rows);
    for (int64_t i = 0; i < tiles_; ++i) {
      Rows<A> part = rows;
      sums_of_part(tile_of(group, i), memory, part);
      add_sums(part, rows);
    }
    Factors<A> factors;
    finish(tile_of(group, 0), rows, factors);
    for (int64_t i = 0; i < tiles_ && job_.classes_out; ++i)
      write_part(tile_of(group, i), rows, factors, memory);
  }

  // Every task has one tile, of few long rows.
  void all_in_phases(Workers& workers) const {
    std::vector<Rows<A>> rows(groups_), parts(groups_ * tiles_);
    std::vector<Factors<A>> factors(groups_);
    for (int64_t g = 0; g < groups_; ++g) {
      prepare(tile_of(g, 0), rows[g]);
      clear_sums(rows[g]);
    }
    if (!job_.m) {
      for_each_tile(workers, [&](int64_t g, int64_t i, Memory& memory) {
        Rows<A>& part = parts[g * tiles_ + i] = rows[g];
        maximum_of_part(tile_of(g, i), memory, part);
      });
      for (int64_t i = 0; i < groups_ * tiles_; ++i)
        for (int lane = 0; lane < kLanes<A>; ++lane)
          rows[i / tiles_].top[lane] =
              std::max(rows[i / tiles_].top[lane], parts[i].top[lane]);
    }
    for (Rows<A>& row : rows) center(tile_of(0, 0), row, may_be_direct());
    for_each_tile(workers, [&](int64_t g, int64_t i, Memory& memory) {
      Rows<A>& part = parts[g * tiles_ + i] = rows[g];
      sums_of_part(tile_of(g, i), memory, part);
    });
    for (int64_t i = 0; i < groups_ * tiles_; ++i) add_sums(parts[i], rows[i / tiles_]);
    for (int64_t g = 0; g < groups_; ++g) finish(tile_of(g, 0), rows[g], factors[g]);
    if (!job_.classes_out) return;
    for_each_tile(workers, [&](int64_t g, int64_t i, Memory& memory) {
      write_part(tile_of(g, i), rows[g], factors[g], memory);
    });
  }

  template <class F>
  static void for_each(Workers& workers, int64_t tasks, F f) {
    auto call = [](void* f, int64_t task) { (*static_cast<F*>(f))(task); };
    workers.run(tasks, call, &f);
  }

  template <class F>
  void for_each_tile(Workers& workers, F f) const {
    for_each(workers, groups_ * tiles_, [&](int64_t task) {
      Memory memory;
      f(task / tiles_, task % tiles_, memory);
    });
  }

  // The temperatures and, where they are given, the maxima.
  void prepare(const Tile& tile, Rows<A>& rows) const {
    constexpr int kN = kLanes<A>;
    rows.any_infinite = false;
    if (job_.m) {
      load_rows(job_.m, tile, rows.top);
    } else {
      std::fill_n(rows.top, kN, -kInfinity<A>);
    }
    if constexpr (!kTempered) return;
    A tau[kN];
    load_rows(job_.temperature, tile, tau);
    for (int lane = 0; lane < kN; ++lane) set_temperature(rows, lane, tau[lane]);
  }

  static bool is_of_sums(const Array& array) {
    return array.number ==
           (sizeof(A) == sizeof(double) ? Number::kDouble : Number::kFloat);
  }

  // The logits of a tile, and a place for its results.
  Pieces<A> open(const Tile& tile, const Rows<A>& rows, Memory& memory) const {
    bool in_place = tile.is_long_row && !kTempered && !job_.where &&
                    is_of_sums(job_.x) && !rows.any_infinite;
    if (in_place) return open_in_place(tile, memory);
    load_logits(tile, rows, memory);
    if (rows.any_infinite) replace_infinite(tile, rows, memory.z);
    return {{{memory.z, memory.v, memory.z, tile.steps}}, 1};
  }

  Pieces<A> open_in_place(const Tile& tile, Memory& memory) const {
    int64_t first = tile.first_row * shape_.classes + tile.first_class;
    const A* x = static_cast<const A*>(job_.x.data) + first;
    A* out = job_.classes_out ? static_cast<A*>(job_.classes_out) + first : nullptr;
    int64_t whole = tile.classes / kLanes<A>, begin = whole * kLanes<A>;
    A *z = memory.z, *v = memory.v;
    std::copy(x + begin, x + tile.classes, z + begin);
    bool is_last = tile.first_row + 1 == shape_.outer;
    if (!is_last) __builtin_prefetch(x + begin + shape_.classes);
    pad(tile, z, -kInfinity<A>);
    Piece<A> last = {z + begin, v + begin, z + begin, 1};
    return {{{x, v, out, whole}, last}, begin < tile.classes ? 2 : 1};
  }

  void load_logits(const Tile& tile, const Rows<A>& rows, Memory& memory) const {
    A* z = memory.z;
    if (!tile.is_long_row) pad(tile, z, A{0});
    load_tile(job_.x, shape_, tile, z);
    if (kTempered) scale_all(tile, rows.sign, z);
    if (job_.where) mask_tile(job_.where, shape_, tile, z, -kInfinity<A>);
    if (tile.is_long_row) pad(tile, z, -kInfinity<A>);
  }

  // Values beside the logits. Masked classes have the value 0, and the values of a
  // tangent are those of d.
  void open_values(const Array& array, const Tile& tile, const Rows<A>& rows,
                   Memory& memory, Pieces<A>& pieces) const {
    bool is_changed = kTempered || job_.where || job_.pass == Pass::kToRows ||
                      array.class_stride != 1;
    A* v = memory.v;
    pieces.list[0].v = v;
    if (tile.is_long_row && is_of_sums(array) && !is_changed) {
      int64_t begin = tile.classes / kLanes<A> * kLanes<A>;
      const A* from = static_cast<const A*>(array.data) +
                      offset_of(array, tile.first_row, shape_) + tile.first_class;
      if (pieces.count == 2 || begin == tile.classes) {
        pieces.list[0].v = from;
        std::copy(from + begin, from + tile.classes, v + begin);
        return pad(tile, v, A{0});
      }
    }
    pad(tile, v, A{0});
    load_tile(array, shape_, tile, v);
    if (kTempered && job_.pass == Pass::kLogSoftmaxPush)
      scale_all(tile, rows.per_tau, v);
    if (kTempered && job_.pass == Pass::kToRows) scale_all(tile, rows.sign, v);
    bool is_masked = job_.where && job_.pass != Pass::kSummary;
    if (is_masked) mask_tile(job_.where, shape_, tile, v, A{0});
  }

  static void scale_all(const Tile& tile, const A* factor, A* numbers) {
    Pieces<A> pieces = {{{nullptr, nullptr, numbers, tile.steps}}, 1};
    write_all<A>(tile, pieces, [&](int lane) {
      Vector<A> here = load<Vector<A>>(factor + lane);
      return [=](const Piece<A>& piece, int64_t at) {
        return load<Vector<A>>(piece.out + at) * here;
      };
    });
  }

  void maximum_of_part(const Tile& tile, Memory& memory, Rows<A>& rows) const {
    find_maximum(tile, open(tile, rows, memory), rows);
  }

  void sums_of_part(const Tile& tile, Memory& memory, Rows<A>& rows) const {
    Pieces<A> pieces = open(tile, rows, memory);
    add_up_all<false>(tile, pieces, memory, rows);
  }

  void write_part(const Tile& tile, const Rows<A>& rows, const Factors<A>& factors,
                  Memory& memory) const {
    Pieces<A> pieces = open(tile, rows, memory);
    if (job_.values) open_values(job_.values, tile, rows, memory, pieces);
    if (job_.pass == Pass::kSoftmax) {
      with_exponential(rows, [&](auto of) {
        write_softmax_anew<A, typename decltype(of)::Type>(tile, pieces, rows, factors);
      });
      return close(tile, pieces, memory);
    }
    if (is_of_e()) {
      with_exponential(rows, [&](auto of) {
        write_exponentials<A, typename decltype(of)::Type>(tile, pieces, rows);
      });
    }
    write(tile, pieces, rows, factors, memory);
  }

  template <class T>
  struct Tag {
    using Type = T;
  };

  // f of the kind of exponential that the rows have.
  template <class F>
  static void with_exponential(const Rows<A>& rows, F f) {
    if constexpr (kTempered) {
      f(Tag<Tempered<A>>());
    } else if (rows.is_direct) {
      f(Tag<Direct<A>>());
    } else {
      f(Tag<Compensated<A>>());
    }
  }

  // Whether what is written is made of e. Then e stays in a tile that is whole.
  bool is_of_e() const {
    return job_.pass == Pass::kSoftmax || job_.pass == Pass::kSoftmaxPull ||
           job_.pass == Pass::kLogSoftmaxPull;
  }

  template <bool kWhole>
  void add_up_all(const Tile& tile, Pieces<A>& pieces, Memory& memory,
                  Rows<A>& rows) const {
    for (int i = 0; i < job_.coefficient_count; ++i) {
      open_values(job_.coefficients[i], tile, rows, memory, pieces);
      sum_coefficient(tile, pieces, i, rows);
    }
    if (job_.values) open_values(job_.values, tile, rows, memory, pieces);
    if (job_.labels && job_.pass == Pass::kToRows)
      take_label_values(tile, memory.v, rows);
    with_exponential(rows, [&](auto of) {
      add_up_exponentials<typename decltype(of)::Type, kWhole>(tile, pieces, rows);
    });
  }

  template <class Exponential, bool kWhole>
  void add_up_exponentials(const Tile& tile, const Pieces<A>& pieces,
                           Rows<A>& rows) const {
    bool stays = kWhole && is_of_e();
    if (job_.with_e_d) sum_e_d<A, Exponential>(tile, pieces, rows);
    if (job_.pass == Pass::kToClasses) return;
    if (job_.pass == Pass::kToRows) {
      sum_weighted<A, Exponential>(tile, pieces, rows);
    } else if (job_.pass == Pass::kSoftmaxPull) {
      sum_tail_and_values<A, Exponential, kWhole, true, false>(tile, pieces, rows);
    } else if (job_.pass == Pass::kLogSoftmaxPull) {
      sum_tail_and_values<A, Exponential, kWhole, false, true>(tile, pieces, rows);
    } else if (job_.pass == Pass::kLogSoftmaxPush) {
      sum_tail_and_values<A, Exponential, false, true, false>(tile, pieces, rows);
    } else if (job_.values) {
      sum_tail_and_values<A, Exponential, false, true, true>(tile, pieces, rows);
    } else if (stays) {
      sum_tail<A, Exponential, true>(tile, pieces, rows);
    } else {
      sum_tail<A, Exponential, false>(tile, pieces, rows);
    }
  }

  void finish(const Tile& tile, const Rows<A>& rows, Factors<A>& factors) const {
    factors.limit = largest();
    switch (job_.pass) {
      case Pass::kSoftmax:
        return set_inverse(tile, rows, factors);
      case Pass::kLogSoftmax:
        return set_log_total(tile, rows, factors);
      case Pass::kSoftmaxPull:
      case Pass::kLogSoftmaxPull:
      case Pass::kLogSoftmaxPush:
        return set_about_values(tile, rows, factors);
      case Pass::kToClasses:
        load_rows(job_.scale, tile, factors.scale);
        for (int lane = 0; lane < kLanes<A>; ++lane) {
          A sign = kTempered ? rows.sign[lane] : A{1};
          double scale = factors.scale[lane];
          factors.scale[lane] = sign * static_cast<A>(scale * rows.factor[lane]);
        }
        return;
      case Pass::kToRows:
        put(job_.to_rows_out, tile, sum_named(rows, kWeighted));
        return put(job_.at_label_out, tile, sum_named(rows, kAtLabel));
      case Pass::kSummary:
        return write_summary(tile, rows);
    }
  }

  void write(const Tile& tile, const Pieces<A>& pieces, const Rows<A>& rows,
             const Factors<A>& factors, Memory& memory) const {
    switch (job_.pass) {
      case Pass::kSoftmax:
        write_softmax(tile, pieces, factors);
        break;
      case Pass::kLogSoftmax:
        with_exponential(rows, [&](auto of) {
          write_log_softmax<A, typename decltype(of)::Type>(tile, pieces, rows,
                                                            factors);
        });
        break;
      case Pass::kSoftmaxPull:
        write_softmax_pull<A, kTempered>(tile, pieces, rows, factors);
        break;
      case Pass::kLogSoftmaxPull:
        write_log_softmax_pull<A, kTempered>(tile, pieces, rows, factors);
        break;
      case Pass::kLogSoftmaxPush:
        write_log_softmax_push(tile, pieces, factors);
        break;
      case Pass::kToClasses:
        with_exponential(rows, [&](auto of) {
          write_to_classes<A, typename decltype(of)::Type>(tile, pieces, rows, factors);
        });
        if (job_.labels) write_labels(tile, pieces, rows, factors.limit, memory.z);
        break;
      default:
        break;
    }
    close(tile, pieces, memory);
  }

  // The results that are not in place.
  void close(const Tile& tile, const Pieces<A>& pieces, Memory& memory) const {
    if (pieces.list[0].out != memory.z) {
      int64_t begin = pieces.list[0].steps * kLanes<A>;
      std::copy(memory.z + begin, memory.z + tile.classes, pieces.list[0].out + begin);
      return;
    }
    bool is_derivative = job_.pass != Pass::kSoftmax && job_.pass != Pass::kLogSoftmax;
    if (is_derivative && job_.where)
      mask_tile(job_.where, shape_, tile, memory.z, A{0});
    store_tile(memory.z, shape_, tile, result_);
  }

  // The largest number of the dtype of the results.
  A largest() const {
    if (job_.classes_out_number == Number::kHalf) return A{65504};
    if (job_.classes_out_number == Number::kBfloat16) return A(0x1.fep127);
    return std::numeric_limits<A>::max();
  }

  Array result_;
};

template <class A>
void run_in(const Job& job, Workers& workers) {
  if (job.temperature) {
    Run<A, true>(job).all(workers);
  } else {
    Run<A, false>(job).all(workers);
  }
}

}  // namespace

void JAXSOFT_RUN(const Job& job, Workers& workers) {
  if (job.in_double) {
    run_in<double>(job, workers);
  } else {
    run_in<float>(job, workers);
  }
}

}  // namespace jaxsoft
