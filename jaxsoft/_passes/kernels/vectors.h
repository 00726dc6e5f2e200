// Vectors of the processor's width, in the portable extension of GCC and Clang: what a
// loop over logits is made of. Everything has internal linkage, for the file is
// compiled for several kinds of processor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <limits>

namespace jaxsoft {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
constexpr bool kHasFma = true;
#else
constexpr bool kHasFma = false;
#endif

// Numbers in a vector.
template <class A>
constexpr int kWidth = kVectorBytes / int{sizeof(A)};

template <class A>
struct Traits;

template <>
struct Traits<float> {
  using Vector __attribute__((vector_size(kVectorBytes))) = float;
  using Integer = int32_t;
  using Mask __attribute__((vector_size(kVectorBytes))) = int32_t;
  using Flags __attribute__((vector_size(kVectorBytes / 4))) = uint8_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kToNearest = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kLog2OfE = 0x1.715476p+0f;
  // log 2 in two parts; the first has 15 bits, so that up to 2^8 times it is exact.
  static constexpr float kLog2High = 0x1.62e4p-1f;
  static constexpr float kLog2Low = 0x1.7f7d1cp-20f;
  static constexpr float kLeastExponent = -0x1.5d589ep+6f;  // exp of it is normal
  static constexpr float kMostExponent = 89.0f;             // exp of it is infinite
  // Up to this size of a maximum the logits near it are reduced exactly.
  static constexpr float kMostDirect = kHasFma ? 0x1p15f : 256.0f;
  // (exp(f) - 1 - f)/f^2 for |f| <= log(2)/2, within 0.2 * 2^-24 of exp(f).
  static constexpr float kSeries[] = {0x1.6d11fdp-10f, 0x1.120c62p-7f, 0x1.555518p-5f,
                                      0x1.5554dcp-3f, 0.5f};
  // The upper half of a mantissa: the product of two such halves is exact.
  static constexpr int32_t kUpperHalf = -0x1000;
};

template <>
struct Traits<double> {
  using Vector __attribute__((vector_size(kVectorBytes))) = double;
  using Integer = int64_t;
  using Mask __attribute__((vector_size(kVectorBytes))) = int64_t;
  using Flags __attribute__((vector_size(kVectorBytes / 8))) = uint8_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kToNearest = 0x1.8p+52;
  static constexpr double kLog2OfE = 0x1.71547652b82fep+0;
  static constexpr double kLog2High = 0x1.62e42fefa3p-1;
  static constexpr double kLog2Low = 0x1.3de6af278ece6p-42;
  static constexpr double kLeastExponent = -0x1.6232bdd7abcdp+9;
  static constexpr double kMostExponent = 710.0;
  static constexpr double kMostDirect = kHasFma ? 0x1p15 : 512.0;
  // Within 0.2 * 2^-53 of exp(f).
  static constexpr double kSeries[] = {0x1.af39789bfd689p-26, 0x1.28922d8c8d4fbp-22,
                                       0x1.71de0d573888bp-19, 0x1.a019b87f7a6e9p-16,
                                       0x1.a01a01a7da98dp-13, 0x1.6c16c178b0646p-10,
                                       0x1.1111111110996p-7,  0x1.5555555553d05p-5,
                                       0x1.5555555555556p-3,  0.5};
  static constexpr int64_t kUpperHalf = -0x8000000;
};

template <class A>
using Vector = typename Traits<A>::Vector;
template <class A>
using Mask = typename Traits<A>::Mask;

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <class V, class T>
inline V load(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
inline void store(T* to, V v) {
  std::memcpy(to, &v, sizeof v);
}

template <class A>
inline Vector<A> splat(A number) {
  return number - Vector<A>{};
}

// The larger of both; the second one where the first is NaN.
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

template <class V, class A>
inline V clamped(V v, A limit) {
  V most = limit - V{};
  V low = v < -most ? -most : v;
  return low > most ? most : low;
}

// A number as two: `high`, and `rest`, which is too small to change it.
template <class A>
struct TwoPart {
  Vector<A> high;
  Vector<A> rest;
};

template <class A>
inline TwoPart<A> difference(Vector<A> a, Vector<A> b) {
  Vector<A> high = a - b;
  Vector<A> minus_b = high - a;
  return {high, (a - (high - minus_b)) - (b + minus_b)};  // exact
}

// Of V one number or a vector, and B its bits.
template <class A, class B, class V>
inline V upper_half(V v) {
  B bits;
  std::memcpy(&bits, &v, sizeof v);
  bits &= Traits<A>::kUpperHalf;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}

// exp(f) 2^n for |f| <= log(2)/2, within 0.7 ulp, where the low bits of `shifted` are
// n, and `bias` is that of an exponent.
template <class A>
inline Vector<A> scaled_exponential(Vector<A> f, Vector<A> shifted, Mask<A> bias) {
  using T = Traits<A>;
  Vector<A> series = splat(T::kSeries[0]);
  for (size_t i = 1; i < std::size(T::kSeries); ++i)
    series = series * f + T::kSeries[i];
  Vector<A> mantissa = (series * (f * f) + f) + A{1};
  // What is above the low bits leaves the number.
  Mask<A> exponent = (load<Mask<A>>(&shifted) + bias) << T::kMantissaBits;
  return mantissa * load<Vector<A>>(&exponent);
}

// exp(high + rest), within 0.7 ulp for a rest of an ulp. 0 where the result would be
// subnormal: XLA has the processor flush such numbers.
template <class A>
inline Vector<A> exponential(TwoPart<A> d) {
  using T = Traits<A>;
  using V = Vector<A>;
  Mask<A> is_zero = d.high < T::kLeastExponent;
  V high = d.high > T::kMostExponent ? splat(T::kMostExponent) : d.high;
  V shifted = high * T::kLog2OfE + T::kToNearest;
  V n = shifted - T::kToNearest;
  V f = ((high - n * T::kLog2High) - n * T::kLog2Low) + d.rest;
  V e = scaled_exponential<A>(f, shifted, T::kBias - Mask<A>{});
  return is_zero ? V{} : e;
}

// A sum with the rounding errors of its additions.
template <class A>
struct Sum {
  Vector<A> total = {};
  Vector<A> rest = {};

  void add(Vector<A> term) {
    Vector<A> sum = total + term;
    Vector<A> added = sum - total;
    rest += (total - (sum - added)) + (term - added);
    total = sum;
  }

  void store_to(double* lanes) const {
    // Of an infinite sum there is no rounding error.
    Vector<A> error = rest - rest == A{0} ? rest : Vector<A>{};
    for (int i = 0; i < kWidth<A>; ++i) lanes[i] = double{total[i]} + double{error[i]};
  }
};

// bfloat16 and float16 as they lie in memory.
struct Bfloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

using Words __attribute__((vector_size(kVectorBytes))) = uint32_t;
using HalfWords __attribute__((vector_size(kVectorBytes / 2))) = uint16_t;

// The conversions, of one number or of a vector of them: W is uint32_t and F float, or
// both are vectors.
template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float as_number(uint32_t word) { return static_cast<float>(word); }
inline Vector<float> as_number(Words words) {
  return __builtin_convertvector(words, Vector<float>);
}

template <class F, class W>
inline F from_bfloat16(W bits) {
  return bits_of<F>(bits << 16);
}

template <class F, class W>
inline F from_half(W bits) {
  W magnitude = bits & 0x7fffu;
  W normal = (magnitude << 13) + (112u << 23);
  W special = (magnitude << 13) | 0x7f800000u;
  // By a product: the processor flushes subnormal floats.
  W subnormal = bits_of<W>(as_number(magnitude) * 0x1p-24f);
  W finite = magnitude < 0x0400u ? subnormal : normal;
  W result = magnitude < 0x7c00u ? finite : special;
  return bits_of<F>(result | ((bits & 0x8000u) << 16));
}

template <class W, class F>
inline W to_bfloat16(F v) {
  W bits = bits_of<W>(v);
  W rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : (bits >> 16) | 0x40u;
}

template <class W, class F>
inline W to_half(F v) {
  W bits = bits_of<W>(v);
  W magnitude = bits & 0x7fffffffu;
  F size = bits_of<F>(magnitude);
  W normal = (magnitude - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  W subnormal = bits_of<W>(size * 0x1p+24f + 0x1p+23f) & 0x7ffu;
  W finite = size < 0x1p-14f ? subnormal : normal;
  W infinite = (bits & 0u) + 0x7c00u;
  W number = size < 65520.0f ? finite : infinite;
  W result = v == v ? number : infinite + 0x200u;
  return result | ((bits >> 16) & 0x8000u);
}

inline Words widened(const void* from) {
  return __builtin_convertvector(load<HalfWords>(static_cast<const char*>(from)),
                                 Words);
}

inline void store_narrowed(void* to, Words bits) {
  store(static_cast<char*>(to), __builtin_convertvector(bits, HalfWords));
}

// A vector or one number of A, of numbers as they lie in memory.
template <class A>
inline Vector<A> load_numbers(const A* from) {
  return load<Vector<A>>(from);
}
template <class A>
inline Vector<A> load_numbers(const Bfloat16* from) {
  return from_bfloat16<Vector<A>>(widened(from));
}
template <class A>
inline Vector<A> load_numbers(const Half* from) {
  return from_half<Vector<A>>(widened(from));
}

template <class A>
inline A load_number(const A* from) {
  return *from;
}
template <class A>
inline A load_number(const Bfloat16* from) {
  return from_bfloat16<A>(uint32_t{from->bits});
}
template <class A>
inline A load_number(const Half* from) {
  return from_half<A>(uint32_t{from->bits});
}

template <class A>
inline void store_numbers(A* to, Vector<A> v) {
  store(to, v);
}
inline void store_numbers(Bfloat16* to, Vector<float> v) {
  store_narrowed(to, to_bfloat16<Words>(v));
}
inline void store_numbers(Half* to, Vector<float> v) {
  store_narrowed(to, to_half<Words>(v));
}

template <class A>
inline void store_number(A* to, A v) {
  *to = v;
}
inline void store_number(Bfloat16* to, float v) {
  to->bits = static_cast<uint16_t>(to_bfloat16<uint32_t>(v));
}
inline void store_number(Half* to, float v) {
  to->bits = static_cast<uint16_t>(to_half<uint32_t>(v));
}

}  // namespace
}  // namespace jaxsoft
