// The loops that find out what a pass asks for of the rows of a tile.
//
// Digits: e is within an ulp. A sum is made of blocks of 8 terms, which are added
// without a rounding error that counts, and is a double in the end.
#pragma once

#include <initializer_list>

#include "exponentials.h"

namespace jaxsoft {
namespace {

template <class A>
void clear_sums(Rows<A>& rows) {
  for (auto& sum : rows.sums) std::fill(std::begin(sum), std::end(sum), 0.0);
}

template <class A>
void add_sums(const Rows<A>& part, Rows<A>& rows) {
  for (int name = 0; name < kSumCount; ++name)
    for (int lane = 0; lane < kLanes<A>; ++lane)
      rows.sums[name][lane] += part.sums[name][lane];
}

// The numbers of a tile: `z` and `v` are read and `out` is written, at the same
// offsets. They lie in the caller's arrays where these are of A, and for the last
// numbers of a long row, fewer than there are lanes, in a buffer.
template <class A>
struct Piece {
  const A* z;
  const A* v;
  A* out;
  int64_t steps;
};

template <class A>
struct Pieces {
  Piece<A> list[2];
  int count;

  const Piece<A>* begin() const { return list; }
  const Piece<A>* end() const { return list + count; }
};

// The terms of a block: sums, how many classes are at the maximum, and whether some
// value is not 0.
template <class A, int kCount>
struct Terms {
  Vector<A> sum[kCount] = {};
  Mask<A> ties = {};
  Mask<A> sizes = {};
};

// What is stored of the terms besides their sums.
enum class Besides { kNothing, kTies, kTiesAndSizes };

// The sum over these lanes, which are classes of one row, in lane 0.
inline void add_lanes(double* lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
}

constexpr int kTermsPerBlock = 8;

// How the vectors of a tile follow one another. Those of a long row are all alike, and
// are taken in one sweep; otherwise there is a sweep for every kWidth lanes.
template <class A>
struct Sweeps {
  explicit Sweeps(const Tile& tile)
      : lanes(tile.is_long_row ? kWidth<A> : kLanes<A>),
        stride(tile.is_long_row ? kWidth<A> : kLanes<A>),
        per_step(kLanes<A> / stride) {}

  int lanes;
  int stride;
  int per_step;  // vectors of a sweep in a step
};

// The results of a block are fetched into the cache while its terms are added.
template <class A>
inline void expect_writes(const A* results, const Sweeps<A>& sweeps) {
  for (int i = 0; i < kTermsPerBlock * sweeps.stride; i += 64 / int{sizeof(A)})
    __builtin_prefetch(results + i, 1);
}

// The named sums of all lanes, of what term(piece, offset, terms) adds to `terms` for
// the vector of numbers at this offset; make_term(lane) gives it.
template <class A, Besides kBesides, int kCount, class MakeTerm>
void add_up(const Tile& tile, const Pieces<A>& pieces, Rows<A>& rows,
            const int (&names)[kCount], MakeTerm make_term) {
  constexpr int kN = kLanes<A>, kW = kWidth<A>;
  const Sweeps<A> sweeps(tile);
  for (int lane = 0; lane < sweeps.lanes; lane += kW) {
    auto term = make_term(lane);
    Sum<A> sums[kCount];
    Terms<A, kCount> block;
    for (const Piece<A>& piece : pieces) {
      int64_t vectors = piece.steps * sweeps.per_step;
      for (int64_t begin = 0; begin < vectors; begin += kTermsPerBlock) {
        int64_t end = std::min(begin + kTermsPerBlock, vectors);
        if (piece.out) expect_writes(piece.out + begin * sweeps.stride, sweeps);
        for (Vector<A>& sum : block.sum) sum = Vector<A>{};
        for (int64_t k = begin; k < end; ++k)
          term(piece, k * sweeps.stride + lane, block);
        for (int i = 0; i < kCount; ++i) sums[i].add(block.sum[i]);
      }
    }
    for (int i = 0; i < kCount; ++i) sums[i].store_to(rows.sums[names[i]] + lane);
    auto store_counts = [&](Mask<A> counts, int name) {
      for (int i = 0; i < kW; ++i) rows.sums[name][lane + i] = double(counts[i]);
    };
    if (kBesides != Besides::kNothing) store_counts(block.ties, kTies);
    if (kBesides == Besides::kTiesAndSizes) store_counts(block.sizes, kSizes);
  }
  if (!tile.is_long_row) return;
  auto to_lane_0 = [&](double* sums) {
    add_lanes(sums, kW);
    std::fill(sums + 1, sums + kN, 0.0);
  };
  for (int name : names) to_lane_0(rows.sums[name]);
  if (kBesides != Besides::kNothing) to_lane_0(rows.sums[kTies]);
  if (kBesides == Besides::kTiesAndSizes) to_lane_0(rows.sums[kSizes]);
}

// The sums that were made of exponentials, in full.
template <class A>
void multiply_sums(Rows<A>& rows, std::initializer_list<int> names) {
  if (!rows.is_direct) return;
  for (int name : names)
    for (int lane = 0; lane < kLanes<A>; ++lane)
      rows.sums[name][lane] *= rows.factor[lane];
}

template <class A>
void find_maximum(const Tile& tile, const Pieces<A>& pieces, Rows<A>& rows) {
  constexpr int kN = kLanes<A>, kW = kWidth<A>;
  using V = Vector<A>;
  V top[kN / kW];
  for (int i = 0; i < kN / kW; ++i) top[i] = load<V>(rows.top + i * kW);
  for (const Piece<A>& piece : pieces)
    for (int64_t step = 0; step < piece.steps; ++step)
      for (int i = 0; i < kN / kW; ++i)
        top[i] = larger(load<V>(piece.z + step * kN + i * kW), top[i]);
  for (int i = 0; i < kN / kW; ++i) store(rows.top + i * kW, top[i]);
  if (!tile.is_long_row) return;
  A most = *std::max_element(rows.top, rows.top + kN);
  std::fill_n(rows.top, kN, most);
}

// Where a maximum is +inf, the logits there become 0 and all others -inf, NaN stays,
// and the maximum counts as 0: then no difference is infinity minus infinity.
template <class A>
void replace_infinite(const Tile& tile, const Rows<A>& rows, A* z) {
  for (int64_t i = 0; i < tile.steps * kLanes<A>; ++i) {
    if (rows.top[i % kLanes<A>] != kInfinity<A> || std::isnan(z[i])) continue;
    z[i] = z[i] == kInfinity<A> ? A{0} : -kInfinity<A>;
  }
}

// exp(-x) for 0 <= x < 1.
inline double exp_of_minus(double, double x) { return std::exp(-x); }

// For float, within 2^-34, and without a branch: a loop of it is one of vectors.
inline double exp_of_minus(float, double x) {
  double y = x * -0.25, series = 1;
  for (double inverse : {1. / 8, 1. / 7, 1. / 6, 1. / 5, 1. / 4, 1. / 3, 1. / 2, 1.})
    series = 1 + y * inverse * series;
  series *= series;
  return series * series;
}

// From the maxima of the first lanes to what `Direct` asks for. False if one of them is
// too large for it.
template <class A>
bool set_factors(Rows<A>& rows, int lanes) {
  using T = Traits<A>;
  bool all_small = true;
  for (int lane = 0; lane < lanes; ++lane)
    all_small &= std::abs(rows.m[lane]) < T::kMostDirect;
  if (!all_small) return false;
  for (int lane = 0; lane < lanes; ++lane) {
    double m = rows.m[lane];
    double k = std::floor(m * Traits<double>::kLog2OfE);
    double above = (m - k * Traits<double>::kLog2High) - k * Traits<double>::kLog2Low;
    rows.factor[lane] = exp_of_minus(A{}, above);
    rows.float_factor[lane] = static_cast<A>(rows.factor[lane]);
    rows.per_factor[lane] = static_cast<A>(1 / rows.factor[lane]);
    rows.bias[lane] =
        T::kBias - static_cast<typename T::Integer>(static_cast<int32_t>(k));
  }
  return true;
}

template <class A, class T>
void spread(const Tile& tile, T (&lanes)[kLanes<A>]) {
  if (tile.is_long_row) std::fill_n(lanes + 1, kLanes<A> - 1, lanes[0]);
}

template <class A>
void center(const Tile& tile, Rows<A>& rows, bool may_be_direct) {
  rows.any_infinite = false;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    A top = rows.top[lane];
    rows.any_infinite |= top == kInfinity<A>;
    rows.m[lane] = std::isinf(top) ? A{0} : top;
  }
  rows.is_direct = may_be_direct && set_factors(rows, tile.is_long_row ? 1 : kLanes<A>);
  if (!rows.is_direct) {
    std::fill_n(rows.factor, kLanes<A>, 1.0);
    std::fill_n(rows.float_factor, kLanes<A>, A{1});
    std::fill_n(rows.per_factor, kLanes<A>, A{1});
    return;
  }
  spread<A>(tile, rows.factor);
  spread<A>(tile, rows.float_factor);
  spread<A>(tile, rows.per_factor);
  spread<A>(tile, rows.bias);
}

// The tail. Where it `stays`, e over the row's factor is written.
template <class A, class Exponential, bool kStays>
void sum_tail(const Tile& tile, const Pieces<A>& pieces, Rows<A>& rows) {
  using V = Vector<A>;
  add_up<A, Besides::kTies>(tile, pieces, rows, {kTail}, [&](int lane) {
    Exponential exponential(rows, lane);
    V at_top = load<V>(rows.per_factor + lane);
    return [=](const Piece<A>& piece, int64_t at, Terms<A, 1>& terms) {
      V z = load<V>(piece.z + at), e = exponential.e(z);
      auto is_top = z == exponential.m();
      if (kStays) store(piece.out + at, is_top ? at_top : e);
      terms.sum[0] += is_top ? V{} : e;
      terms.ties -= is_top;
    };
  });
  multiply_sums(rows, {kTail});
}

// The same, and the sums of values that a pass asks for: where kWeights those of e v,
// and where kOthersToo those of v.
template <class A, class Exponential, bool kStays, bool kWeights, bool kOthersToo>
void sum_tail_and_values(const Tile& tile, const Pieces<A>& pieces, Rows<A>& rows) {
  using V = Vector<A>;
  constexpr int kCount = 2 + kWeights + kOthersToo;
  int names[kCount] = {kTail, kTopValues};
  if (kWeights) names[2] = kWeighted;
  if (kOthersToo) names[kCount - 1] = kOthers;
  add_up<A, Besides::kTiesAndSizes>(tile, pieces, rows, names, [&](int lane) {
    Exponential exponential(rows, lane);
    V at_top = load<V>(rows.per_factor + lane);
    return [=](const Piece<A>& piece, int64_t at, Terms<A, kCount>& terms) {
      V z = load<V>(piece.z + at), v = load<V>(piece.v + at), e = exponential.e(z);
      auto is_top = z == exponential.m();
      if (kStays) store(piece.out + at, is_top ? at_top : e);
      e = is_top ? V{} : e;
      terms.sum[0] += e;
      terms.sum[1] += is_top ? v : V{};
      if (kWeights) terms.sum[2] += v == A{0} ? V{} : e * v;
      if (kOthersToo) terms.sum[kCount - 1] += is_top ? V{} : v;
      terms.ties -= is_top;
      terms.sizes |= v != A{0};
    };
  });
  multiply_sums(rows, {kTail});
  if (kWeights) multiply_sums(rows, {kWeighted});
}

template <class A, class Exponential>
void sum_e_d(const Tile& tile, const Pieces<A>& pieces, Rows<A>& rows) {
  using V = Vector<A>;
  add_up<A, Besides::kNothing>(tile, pieces, rows, {kEd}, [&](int lane) {
    Exponential exponential(rows, lane);
    return [=](const Piece<A>& piece, int64_t at, Terms<A, 1>& terms) {
      V z = load<V>(piece.z + at), e = exponential.e(z);
      auto is_nothing = (z == exponential.m()) | (e == A{0});
      terms.sum[0] += is_nothing ? V{} : e * exponential.d(z);
    };
  });
  multiply_sums(rows, {kEd});
}

// Sums of q, and of q (z - m), for the i-th coefficient, which is v.
template <class A>
void sum_coefficient(const Tile& tile, const Pieces<A>& pieces, int i, Rows<A>& rows) {
  using V = Vector<A>;
  int first = kCoefficient + 2 * i;
  add_up<A, Besides::kNothing>(tile, pieces, rows, {first, first + 1}, [&](int lane) {
    V m = load<V>(rows.m + lane);
    return [=](const Piece<A>& piece, int64_t at, Terms<A, 2>& terms) {
      V gap = load<V>(piece.z + at) - m, q = load<V>(piece.v + at);
      auto is_nothing = (q == A{0}) & (gap == -kInfinity<A>);
      terms.sum[0] += q;
      terms.sum[1] += is_nothing ? V{} : q * gap;
    };
  });
}

// Sum of v e, which is 0 where v is, about a maximum that was given.
template <class A, class Exponential>
void sum_weighted(const Tile& tile, const Pieces<A>& pieces, Rows<A>& rows) {
  using V = Vector<A>;
  add_up<A, Besides::kNothing>(tile, pieces, rows, {kWeighted}, [&](int lane) {
    Exponential exponential(rows, lane);
    return [=](const Piece<A>& piece, int64_t at, Terms<A, 1>& terms) {
      V v = load<V>(piece.v + at), e = exponential.e(load<V>(piece.z + at));
      terms.sum[0] += v == A{0} ? V{} : v * e;
    };
  });
  multiply_sums(rows, {kWeighted});
}

}  // namespace
}  // namespace jaxsoft
