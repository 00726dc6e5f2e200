// What a pass writes for every class, from the sums of its row.
#pragma once

#include "sums.h"

namespace jaxsoft {
namespace {

// The tail of a row, 0 if none of its logits is above -inf.
template <class A>
double tail_of(const Rows<A>& rows, int lane) {
  double tail = rows.sums[kTail][lane] + (rows.sums[kTies][lane] - 1);
  return tail == -1 ? 0 : tail;
}

template <class A>
bool is_empty(const Rows<A>& rows, int lane) {
  return rows.sums[kTies][lane] == 0 && rows.sums[kTail][lane] == 0;
}

// The values of a row about that of its maximum where the row is sure of it (no other
// class has half the probability), else about 0.
struct AboutValue {
  bool is_sure;
  double value;
  double deviation;  // sum of e (v - value)
  double others;     // sum of v, but for the class with this value
};

template <class A>
AboutValue about_value(const Rows<A>& rows, int lane) {
  auto sum = [&](int name) { return rows.sums[name][lane]; };
  if (!(tail_of(rows, lane) < 0.5))
    return {false, 0, sum(kWeighted) + sum(kTopValues), sum(kOthers) + sum(kTopValues)};
  double value = sum(kTopValues);
  double about = value == 0 ? 0 : value * sum(kTail);
  return {true, value, sum(kWeighted) - about, sum(kOthers)};
}

// log(1 + s) of s >= 0.
inline double log1p_for(double, double s) { return std::log1p(s); }

// For float, within 2^-30, and without a branch: a loop of it is one of vectors.
inline double log1p_for(float, double s) {
  constexpr int64_t kRootOfHalf = 0x3fe6a09e667f3bcd;
  constexpr int64_t kBitsOf2To52 = 0x4330000000000000;
  // 1 + s = mantissa 2^exponent, with a mantissa in [sqrt(1/2), sqrt(2)).
  bool is_finite = s - s == 0;
  int64_t bits = bits_of<int64_t>(1 + (is_finite ? s : 0));
  int64_t field = (bits - kRootOfHalf + (int64_t{1023} << 52)) >> 52;
  double mantissa = bits_of<double>(bits - ((field - 1023) << 52));
  double exponent = bits_of<double>(field | kBitsOf2To52) - (0x1p52 + 1023);
  double y = (mantissa - 1) / (mantissa + 1);
  double y2 = y * y;
  double series = 1.0 / 11;
  for (double inverse : {1.0 / 9, 1.0 / 7, 1.0 / 5, 1.0 / 3})
    series = series * y2 + inverse;
  double log = exponent * 0x1.62e42fefa39efp-1 + 2 * (y + y * y2 * series);
  double log_of_small = s - s * s * (0.5 - s * (1.0 / 3));
  return s < 1e-4 ? log_of_small : is_finite ? log : s;
}

// By lane, what the loops that write ask for.
template <class A>
struct Factors {
  static constexpr int kN = kLanes<A>;

  alignas(64) A per_total[kN];  // factor/(1 + s): p over e, as it is written
  alignas(64) A log_total[kN];  // log(1 + s)
  alignas(64) A inverse[kN];    // 1/(1 + s)
  alignas(64) A s[kN];
  alignas(64) A value[kN];
  alignas(64) A mean[kN];  // of v - value under p
  alignas(64) A others[kN];
  alignas(64) A is_sure[kN];  // 1 or 0
  alignas(64) A is_zero[kN];  // 1 where the row of results is 0, or 0
  alignas(64) A scale[kN];    // of the pass to_classes, times the factor
  A limit;                    // the largest number of the dtype of the results
};

template <class A>
void set_inverse(const Tile& tile, const Rows<A>& rows, Factors<A>& factors) {
  for (int lane = 0; lane < kLanes<A>; ++lane) {
    double inverse = 1 / (1 + tail_of(rows, lane));
    factors.inverse[lane] = static_cast<A>(inverse);
    factors.per_total[lane] = static_cast<A>(inverse * rows.factor[lane]);
  }
  spread<A>(tile, factors.inverse);
  spread<A>(tile, factors.per_total);
}

template <class A>
void set_log_total(const Tile& tile, const Rows<A>& rows, Factors<A>& factors) {
  int lanes = tile.is_long_row ? 1 : kLanes<A>;
  for (int lane = 0; lane < lanes; ++lane)
    factors.log_total[lane] = static_cast<A>(log1p_for(A{}, tail_of(rows, lane)));
  spread<A>(tile, factors.log_total);
}

// A row whose values are all 0 has the results 0, whatever its logits.
template <class A>
void set_about_values(const Tile& tile, const Rows<A>& rows, Factors<A>& factors) {
  set_inverse(tile, rows, factors);
  for (int lane = 0; lane < tile.rows; ++lane) {
    double s = tail_of(rows, lane);
    AboutValue about = about_value(rows, lane);
    factors.s[lane] = static_cast<A>(s);
    factors.value[lane] = static_cast<A>(about.value);
    factors.mean[lane] = static_cast<A>(about.deviation / (1 + s));
    factors.others[lane] = static_cast<A>(about.others);
    factors.is_sure[lane] = about.is_sure;
    factors.is_zero[lane] = is_empty(rows, lane) || rows.sums[kSizes][lane] == 0;
  }
  spread<A>(tile, factors.s);
  spread<A>(tile, factors.value);
  spread<A>(tile, factors.mean);
  spread<A>(tile, factors.others);
  spread<A>(tile, factors.is_sure);
  spread<A>(tile, factors.is_zero);
}

// write(piece, offset) for every vector of numbers; make_write(lane) gives it.
template <class A, class MakeWrite>
void write_all(const Tile& tile, const Pieces<A>& pieces, MakeWrite make_write) {
  const Sweeps<A> sweeps(tile);
  for (int lane = 0; lane < sweeps.lanes; lane += kWidth<A>) {
    auto write = make_write(lane);
    for (const Piece<A>& piece : pieces) {
      int64_t vectors = piece.steps * sweeps.per_step;
      for (int64_t k = 0; k < vectors; ++k) {
        int64_t at = k * sweeps.stride + lane;
        store(piece.out + at, write(piece, at));
      }
    }
  }
}

// e over the row's factor.
template <class A, class Exponential>
void write_exponentials(const Tile& tile, const Pieces<A>& pieces,
                        const Rows<A>& rows) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    Exponential exponential(rows, lane);
    V at_top = load<V>(rows.per_factor + lane);
    return [=](const Piece<A>& piece, int64_t at) {
      V z = load<V>(piece.z + at);
      return z == exponential.m() ? at_top : exponential.e(z);
    };
  });
}

// p = e/(1 + s).
template <class A, class Exponential>
void write_softmax_anew(const Tile& tile, const Pieces<A>& pieces, const Rows<A>& rows,
                        const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    Exponential exponential(rows, lane);
    V at_top = load<V>(rows.per_factor + lane);
    V per_total = load<V>(factors.per_total + lane);
    return [=](const Piece<A>& piece, int64_t at) {
      V z = load<V>(piece.z + at);
      return (z == exponential.m() ? at_top : exponential.e(z)) * per_total;
    };
  });
}

// The same, of e.
template <class A>
void write_softmax(const Tile& tile, const Pieces<A>& pieces,
                   const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    V per_total = load<V>(factors.per_total + lane);
    return [=](const Piece<A>& piece, int64_t at) {
      return load<V>(piece.out + at) * per_total;
    };
  });
}

// log p = d - log(1 + s)
template <class A, class Exponential>
void write_log_softmax(const Tile& tile, const Pieces<A>& pieces, const Rows<A>& rows,
                       const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    Exponential exponential(rows, lane);
    V log_total = load<V>(factors.log_total + lane);
    return [=](const Piece<A>& piece, int64_t at) {
      return exponential.d(load<V>(piece.z + at)) - log_total;
    };
  });
}

// dz_i = p_i ((v_i - value) - mean)/tau, of e.
template <class A, bool kTempered>
void write_softmax_pull(const Tile& tile, const Pieces<A>& pieces, const Rows<A>& rows,
                        const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    V per_total = load<V>(factors.per_total + lane);
    V value = load<V>(factors.value + lane), mean = load<V>(factors.mean + lane);
    V per_tau = kTempered ? load<V>(rows.per_tau + lane) : V{};
    auto is_zero = load<V>(factors.is_zero + lane) != A{0};
    A limit = factors.limit;
    return [=](const Piece<A>& piece, int64_t at) {
      V deviation = (load<V>(piece.v + at) - value) - mean;
      V dz = deviation * (load<V>(piece.out + at) * per_total);
      if (kTempered) dz *= per_tau;
      return (is_zero | (deviation == A{0})) ? V{} : clamped(dz, limit);
    };
  });
}

// dz_i = (v_i (s + (1 - e_i)) - e_i V_i)/((1 + s) tau), of e, where V_i is the sum of v
// over all classes but i.
template <class A, bool kTempered>
void write_log_softmax_pull(const Tile& tile, const Pieces<A>& pieces,
                            const Rows<A>& rows, const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    V inverse = load<V>(factors.inverse + lane), s = load<V>(factors.s + lane);
    V value = load<V>(factors.value + lane), others = load<V>(factors.others + lane);
    V factor = load<V>(rows.float_factor + lane);
    V at_top = load<V>(rows.per_factor + lane);
    V per_tau = kTempered ? load<V>(rows.per_tau + lane) : V{};
    auto is_zero = load<V>(factors.is_zero + lane) != A{0};
    auto is_sure = load<V>(factors.is_sure + lane) != A{0};
    A limit = factors.limit;
    return [=](const Piece<A>& piece, int64_t at) {
      V written = load<V>(piece.out + at), v = load<V>(piece.v + at);
      // In a sure row no other e comes near that of the maximum.
      auto is_top = is_sure & (written == at_top);
      V e = is_top ? splat(A{1}) : written * factor;
      V rest = is_top ? others : others + (value - v);
      V from_own = v == A{0} ? V{} : v * (s + (A{1} - e));
      V from_rest = e == A{0} ? V{} : rest * e;
      V dz = (from_own - from_rest) * inverse;
      if (kTempered) dz *= per_tau;
      return is_zero ? V{} : clamped(dz, limit);
    };
  });
}

// (v_i - value) - mean, where v = dd.
template <class A>
void write_log_softmax_push(const Tile& tile, const Pieces<A>& pieces,
                            const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    V value = load<V>(factors.value + lane), mean = load<V>(factors.mean + lane);
    auto is_zero = load<V>(factors.is_zero + lane) != A{0};
    A limit = factors.limit;
    return [=](const Piece<A>& piece, int64_t at) {
      V tangent = (load<V>(piece.v + at) - value) - mean;
      return is_zero ? V{} : clamped(tangent, limit);
    };
  });
}

// dz = scale e, about a maximum that was given.
template <class A, class Exponential>
void write_to_classes(const Tile& tile, const Pieces<A>& pieces, const Rows<A>& rows,
                      const Factors<A>& factors) {
  using V = Vector<A>;
  write_all<A>(tile, pieces, [&](int lane) {
    Exponential exponential(rows, lane);
    V scale = load<V>(factors.scale + lane);
    auto is_zero = scale == A{0};
    A limit = factors.limit;
    return [=](const Piece<A>& piece, int64_t at) {
      V dz = scale * exponential.e(load<V>(piece.z + at));
      return is_zero ? V{} : clamped(dz, limit);
    };
  });
}

}  // namespace
}  // namespace jaxsoft
