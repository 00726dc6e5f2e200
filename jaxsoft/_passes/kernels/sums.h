// What a pass knows of the rows of a tile, and the loops that find it out.
//
// Letters as in the Python files beside this one: z the logits, m their maximum, t the
// size of the temperature tau, d = (z - m)/t, e = exp(d), the tail s = sum of e - 1, v
// values, q coefficients.
//
// Digits: e is within an ulp. A sum is made of blocks of 8 terms, which are added
// without a rounding error that counts, and is a double in the end.
#pragma once

#include <cmath>

#include "tiles.h"

namespace jaxsoft {
namespace {

// The sums of a row. "Others" are all classes but those at the maximum.
enum SumName {
  kTail,         // of e over the others
  kTies,         // of 1 over the classes at the maximum
  kWeighted,     // of e v over the others
  kOthers,       // of v over the others
  kTopValues,    // of v over the classes at the maximum
  kSizes,        // 0 if all v are
  kEd,           // of e d
  kAtLabel,      // v at the label
  kCoefficient,  // of q, and of q (z - m), for every coefficient
  kSumCount = kCoefficient + 2 * kMaxCoefficients,
};

// By lane. In a long row all lanes have the same maximum and temperature, and lane 0
// has the sums.
template <class A>
struct Rows {
  static constexpr int kN = kLanes<A>;

  alignas(64) A top[kN];  // max z
  alignas(64) A m[kN];    // the same, 0 if it is infinite
  bool any_infinite;      // some maximum is +inf

  // The temperature: its sign, 1/t in two parts of which the first has half the digits,
  // for differences that were multiplied by a scale; and whether tau is 0.
  alignas(64) A sign[kN];
  alignas(64) A scale[kN];
  alignas(64) A per_t_high[kN];
  alignas(64) A per_t_low[kN];
  alignas(64) A is_hard[kN];
  alignas(64) A per_tau[kN];  // 1/tau, 0 at tau = 0

  double sums[kSumCount][kN];
};

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

// The first half of the digits of 1/t, and the rest of it.
inline void invert(float t, float& high, float& low) {
  double inverse = 1.0 / double{t};
  high = upper_half<float, int32_t>(static_cast<float>(inverse));
  low = static_cast<float>(inverse - double{high});
}

inline void invert(double t, double& high, double& low) {
  double inverse = 1.0 / t;
  high = upper_half<double, int64_t>(inverse);
  low = (inverse - high) + std::fma(-inverse, t, 1.0) * inverse;
}

template <class A>
void set_temperature(Rows<A>& rows, int lane, A tau) {
  A t = std::abs(tau);
  bool is_hard = t < std::numeric_limits<A>::min();
  // Of a huge t the inverse would be subnormal, and flushed.
  A scale = t > A{0x1p100f} ? A{0x1p-32f} : A{1};
  rows.is_hard[lane] = is_hard;
  rows.sign[lane] = std::signbit(tau) && !is_hard ? A{-1} : A{1};
  rows.scale[lane] = scale;
  invert(is_hard ? A{1} : t * scale, rows.per_t_high[lane], rows.per_t_low[lane]);
  rows.per_tau[lane] = is_hard ? A{0} : rows.sign[lane] / t;
}

// d of a vector of lanes, as two numbers.
template <class A, bool kTempered>
class Shift {
 public:
  using V = Vector<A>;

  Shift(const Rows<A>& rows, int lane) : m_(load<V>(rows.m + lane)) {
    if constexpr (kTempered) {
      scale_ = load<V>(rows.scale + lane);
      high_ = load<V>(rows.per_t_high + lane);
      low_ = load<V>(rows.per_t_low + lane);
      is_hard_ = load<V>(rows.is_hard + lane) != A{0};
    }
  }

  V m() const { return m_; }

  TwoPart<A> operator()(V z) const {
    TwoPart<A> gap = difference<A>(z, m_);
    if constexpr (!kTempered) return gap;
    V minus_infinity = splat(-kInfinity<A>);
    V upper = upper_half<A, Mask<A>>(gap.high * scale_);
    V lower = gap.high * scale_ - upper;
    V product = upper * high_;  // exact
    V error =
        (upper * low_ + lower * high_) + (lower * low_ + gap.rest * scale_ * high_);
    V high = product + error;
    TwoPart<A> d = {high, (product - high) + error};
    d.high = gap.high == minus_infinity ? minus_infinity : d.high;
    V hard = gap.high < A{0} ? minus_infinity : gap.high;
    d.high = is_hard_ ? hard : d.high;
    d.rest = is_hard_ ? V{} : d.rest;
    return d;
  }

 private:
  V m_ = {}, scale_ = {}, high_ = {}, low_ = {};
  Mask<A> is_hard_ = {};
};

// The terms of a block: sums, and how many classes are at the maximum.
template <class A, int kCount>
struct Terms {
  Vector<A> sum[kCount] = {};
  Mask<A> ties = {};
};

// The sum over the lanes, which are classes of one row, in lane 0.
inline void add_lanes(double* lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
}

// The named sums of all lanes, of what term(offset, terms) adds to `terms` for the
// vector of numbers at this offset in the tile; make_term(lane) gives it. Where
// kCountsTies, the number of ties as well.
template <class A, bool kCountsTies, int kCount, class MakeTerm>
void add_up(const Tile& tile, Rows<A>& rows, const int (&names)[kCount],
            MakeTerm make_term) {
  constexpr int kTermsPerBlock = 8;
  constexpr int kN = kLanes<A>, kW = kWidth<A>;
  for (int lane = 0; lane < kN; lane += kW) {
    auto term = make_term(lane);
    Sum<A> sums[kCount];
    Terms<A, kCount> block;
    for (int64_t step = 0; step < tile.steps; step += kTermsPerBlock) {
      int64_t end = std::min(step + kTermsPerBlock, tile.steps);
      for (Vector<A>& sum : block.sum) sum = Vector<A>{};
      for (int64_t k = step; k < end; ++k) term(k * kN + lane, block);
      for (int i = 0; i < kCount; ++i) sums[i].add(block.sum[i]);
    }
    for (int i = 0; i < kCount; ++i) sums[i].store_to(rows.sums[names[i]] + lane);
    if (kCountsTies)
      for (int i = 0; i < kW; ++i) rows.sums[kTies][lane + i] = double(block.ties[i]);
  }
  if (!tile.is_long_row) return;
  for (int name : names) add_lanes(rows.sums[name], kN);
  if (kCountsTies) add_lanes(rows.sums[kTies], kN);
}

template <class A>
void find_maximum(const Tile& tile, const A* z, Rows<A>& rows) {
  constexpr int kN = kLanes<A>, kW = kWidth<A>;
  using V = Vector<A>;
  V top[kN / kW];
  for (int i = 0; i < kN / kW; ++i) top[i] = load<V>(rows.top + i * kW);
  for (int64_t step = 0; step < tile.steps; ++step)
    for (int i = 0; i < kN / kW; ++i)
      top[i] = larger(load<V>(z + step * kN + i * kW), top[i]);
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

template <class A>
void center(Rows<A>& rows) {
  rows.any_infinite = false;
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    A top = rows.top[lane];
    rows.any_infinite |= top == kInfinity<A>;
    rows.m[lane] = std::isinf(top) ? A{0} : top;
  }
}

// The tail; e takes the place of the logits where it `stays`.
template <class A, bool kTempered, bool kStays>
void sum_tail(const Tile& tile, A* z, Rows<A>& rows) {
  using V = Vector<A>;
  add_up<A, true>(tile, rows, {kTail}, [&](int lane) {
    Shift<A, kTempered> shift(rows, lane);
    return [=](int64_t at, Terms<A, 1>& terms) {
      V here = load<V>(z + at);
      V e = exponential<A>(shift(here));
      auto is_top = here == shift.m();
      if (kStays) store(z + at, is_top ? splat(A{1}) : e);
      terms.sum[0] += is_top ? V{} : e;
      terms.ties -= is_top;
    };
  });
}

// The same, and what the passes with values ask for.
template <class A, bool kTempered, bool kStays>
void sum_tail_and_values(const Tile& tile, A* z, const A* v, Rows<A>& rows) {
  using V = Vector<A>;
  constexpr int kNames[] = {kTail, kWeighted, kOthers, kTopValues, kSizes};
  add_up<A, true>(tile, rows, kNames, [&](int lane) {
    Shift<A, kTempered> shift(rows, lane);
    return [=](int64_t at, Terms<A, 5>& terms) {
      V here = load<V>(z + at), value = load<V>(v + at);
      auto is_top = here == shift.m();
      V e = exponential<A>(shift(here));
      if (kStays) store(z + at, is_top ? splat(A{1}) : e);
      e = is_top ? V{} : e;
      terms.sum[0] += e;
      terms.sum[1] += value == A{0} ? V{} : e * value;
      terms.sum[2] += is_top ? V{} : value;
      terms.sum[3] += is_top ? value : V{};
      terms.sum[4] += value == A{0} ? V{} : splat(A{1});
      terms.ties -= is_top;
    };
  });
}

template <class A, bool kTempered>
void sum_e_d(const Tile& tile, const A* z, Rows<A>& rows) {
  using V = Vector<A>;
  add_up<A, false>(tile, rows, {kEd}, [&](int lane) {
    Shift<A, kTempered> shift(rows, lane);
    return [=](int64_t at, Terms<A, 1>& terms) {
      V here = load<V>(z + at);
      TwoPart<A> d = shift(here);
      V e = exponential<A>(d);
      terms.sum[0] += (here == shift.m()) | (e == A{0}) ? V{} : e * d.high;
    };
  });
}

// Sums of q, and of q (z - m), for the i-th coefficient.
template <class A>
void sum_coefficient(const Tile& tile, const A* z, const A* q, int i, Rows<A>& rows) {
  using V = Vector<A>;
  int first = kCoefficient + 2 * i;
  add_up<A, false>(tile, rows, {first, first + 1}, [&](int lane) {
    V m = load<V>(rows.m + lane);
    return [=](int64_t at, Terms<A, 2>& terms) {
      V gap = load<V>(z + at) - m, here = load<V>(q + at);
      auto is_nothing = (here == A{0}) & (gap == -kInfinity<A>);
      terms.sum[0] += here;
      terms.sum[1] += is_nothing ? V{} : here * gap;
    };
  });
}

// Sum of v e, which is 0 where v is, about a maximum that was given.
template <class A, bool kTempered>
void sum_weighted(const Tile& tile, const A* z, const A* v, Rows<A>& rows) {
  using V = Vector<A>;
  add_up<A, false>(tile, rows, {kWeighted}, [&](int lane) {
    Shift<A, kTempered> shift(rows, lane);
    return [=](int64_t at, Terms<A, 1>& terms) {
      V value = load<V>(v + at);
      V e = exponential<A>(shift(load<V>(z + at)));
      terms.sum[0] += value == A{0} ? V{} : value * e;
    };
  });
}

}  // namespace
}  // namespace jaxsoft
