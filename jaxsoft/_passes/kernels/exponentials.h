// What a pass knows of the rows of a tile, and the exponentials of their logits.
//
// Letters as in the Python files beside this one: z the logits, m their maximum, t the
// size of the temperature tau, d = (z - m)/t, e = exp(d), the tail s = sum of e - 1, v
// values, q coefficients.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

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
  kSizes,        // 0 if all v are, or some other number
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
  bool is_direct;         // the exponentials are those of `Direct`

  // What the exponentials of a row are to be multiplied by.
  double factor[kN];
  alignas(64) A float_factor[kN];
  alignas(64) A per_factor[kN];
  // With k the exponent of a power of 2 below exp(m): the bias of an exponent, less k.
  alignas(64) typename Traits<A>::Integer bias[kN];

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

// By its bits: where subnormal numbers are flushed to 0, none of them is below it. -0.0
// is not.
template <class A>
bool is_negative(A tau) {
  std::conditional_t<sizeof(A) == 8, int64_t, int32_t> bits;
  std::memcpy(&bits, &tau, sizeof tau);
  return bits < 0 && bits != std::numeric_limits<decltype(bits)>::min();
}

template <class A>
void set_temperature(Rows<A>& rows, int lane, A tau) {
  A t = std::abs(tau);
  bool is_hard = t < std::numeric_limits<A>::min();
  // Of a huge t the inverse would be subnormal, and flushed.
  A scale = t > A{0x1p100f} ? A{0x1p-32f} : A{1};
  rows.is_hard[lane] = is_hard;
  rows.sign[lane] = is_negative(tau) ? A{-1} : A{1};
  rows.scale[lane] = scale;
  invert(is_hard ? A{1} : t * scale, rows.per_t_high[lane], rows.per_t_low[lane]);
  rows.per_tau[lane] = is_hard ? A{0} : rows.sign[lane] / t;
}

// Three ways to e for a vector of lanes. They have
//
//     m()     the maximum;   d(z)    (z - m)/t;   e(z)    exp(d), over the row's
//     factor.

// Without a temperature, for maxima that are not huge. With k log 2 just below m,
//
//     exp(z - m) = exp(z - k log 2) factor        factor = exp(k log 2 - m)
//
// and z itself is reduced: no difference is rounded.
template <class A>
class Direct {
 public:
  using V = Vector<A>;
  using T = Traits<A>;

  Direct(const Rows<A>& rows, int lane)
      : m_(load<V>(rows.m + lane)),
        least_(m_ + T::kLeastExponent),
        most_(m_ + (T::kMostExponent - A{1})),
        bias_(load<Mask<A>>(rows.bias + lane)) {}

  V m() const { return m_; }
  V d(V z) const { return z - m_; }

  V e(V z) const {
    auto is_zero = z < least_;
    V bounded = z > most_ ? most_ : z;
    V shifted = bounded * T::kLog2OfE + T::kToNearest;
    V n = shifted - T::kToNearest;
    V f = (bounded - n * T::kLog2High) - n * T::kLog2Low;
    V e = scaled_exponential<A>(f, shifted, bias_);
    return is_zero ? V{} : e;
  }

 private:
  V m_, least_, most_;
  Mask<A> bias_;
};

// Without a temperature: the rounding of z - m goes into the exponential.
template <class A>
class Compensated {
 public:
  using V = Vector<A>;

  Compensated(const Rows<A>& rows, int lane) : m_(load<V>(rows.m + lane)) {}

  V m() const { return m_; }
  V d(V z) const { return z - m_; }
  V e(V z) const { return exponential<A>(difference<A>(z, m_)); }

 private:
  V m_;
};

// With a temperature. The quotient is a number and a rest too.
template <class A>
class Tempered {
 public:
  using V = Vector<A>;

  Tempered(const Rows<A>& rows, int lane)
      : m_(load<V>(rows.m + lane)),
        scale_(load<V>(rows.scale + lane)),
        high_(load<V>(rows.per_t_high + lane)),
        low_(load<V>(rows.per_t_low + lane)),
        is_hard_(load<V>(rows.is_hard + lane) != A{0}) {}

  V m() const { return m_; }
  V d(V z) const { return quotient(z).high; }
  V e(V z) const { return exponential<A>(quotient(z)); }

 private:
  TwoPart<A> quotient(V z) const {
    TwoPart<A> gap = difference<A>(z, m_);
    V minus_infinity = splat(-kInfinity<A>);
    V scaled = gap.high * scale_;
    V upper = upper_half<A, Mask<A>>(scaled), lower = scaled - upper;
    V product = upper * high_;  // exact
    V error =
        (upper * low_ + lower * high_) + (lower * low_ + gap.rest * scale_ * high_);
    V sum = product + error;
    V hard = gap.high < A{0} ? minus_infinity : gap.high;
    V soft = gap.high == minus_infinity ? minus_infinity : sum;
    return {is_hard_ ? hard : soft, is_hard_ ? V{} : (product - sum) + error};
  }

  V m_, scale_, high_, low_;
  Mask<A> is_hard_;
};

}  // namespace
}  // namespace jaxsoft
