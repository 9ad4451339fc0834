// Sixteen numbers at a time, as one vector or several: what every instruction set computes alike, bit for bit.
//
// The compiler's flags choose the file with the instructions (isa_*.h). Everything above it rounds as IEEE 754
// says: products and sums are fused only by `multiply_add`, and sums over lanes are taken in one order.
// Knows nothing of layers.

#pragma once

#if defined(__AVX512F__)
#include "isa_avx512.h"
#elif defined(__AVX2__)
#include "isa_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "isa_neon.h"
#else
#include "isa_plain.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr int kLanes = 16;
constexpr int kWidth = sizeof(Vector) / 4;  // numbers of a vector
constexpr int kParts = kLanes / kWidth;     // vectors of 16 numbers

struct Floats {
  Vector parts[kParts];
};

struct Ints {
  IntVector parts[kParts];
};

template <class Work>
inline __attribute__((always_inline)) Floats each_part(const Work& work) {
  Floats results;
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) results.parts[part] = work(part);
  return results;
}

inline Vector load_vector(const void* values) {
  Vector loaded;
  std::memcpy(&loaded, values, sizeof loaded);
  return loaded;
}

inline IntVector load_int_vector(const void* values) {
  IntVector loaded;
  std::memcpy(&loaded, values, sizeof loaded);
  return loaded;
}

template <class AnyVector>
inline void store_vector(void* place, AnyVector vector) {
  std::memcpy(place, &vector, sizeof vector);
}

inline Floats load(const float* values) {
  return each_part([&](int part) { return load_vector(values + part * kWidth); });
}

inline void store(float* place, Floats values) {
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) store_vector(place + part * kWidth, values.parts[part]);
}

inline Floats all(float value) {
  return each_part([&](int) { return broadcast(value); });
}

inline Floats operator+(Floats a, Floats b) {
  return each_part([&](int part) { return a.parts[part] + b.parts[part]; });
}
inline Floats operator-(Floats a, Floats b) {
  return each_part([&](int part) { return a.parts[part] - b.parts[part]; });
}
inline Floats operator*(Floats a, Floats b) {
  return each_part([&](int part) { return a.parts[part] * b.parts[part]; });
}
inline Floats operator/(Floats a, Floats b) {
  return each_part([&](int part) { return a.parts[part] / b.parts[part]; });
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return each_part([&](int part) { return multiply_add(a.parts[part], b.parts[part], c.parts[part]); });
}

// The second where one is no number, on every processor.
inline Floats larger(Floats a, Floats b) {
  return each_part([&](int part) { return a.parts[part] > b.parts[part] ? a.parts[part] : b.parts[part]; });
}
inline Floats smaller(Floats a, Floats b) {
  return each_part([&](int part) { return a.parts[part] < b.parts[part] ? a.parts[part] : b.parts[part]; });
}

inline Floats magnitudes(Floats values) {
  return each_part(
      [&](int part) { return (Vector)((IntVector)values.parts[part] & broadcast(int32_t{0x7fffffff})); });
}

// Lanes `begin` … `end` - 1 of the values, and `rest` elsewhere.
inline Floats lanes_between(Floats values, int begin, int end, float rest) {
  alignas(64) float lanes[kLanes];
  store(lanes, values);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lane < begin || lane >= end) lanes[lane] = rest;
  }
  return load(lanes);
}

// Over the lanes: i with i + 8, then with i + 4, i + 2, i + 1.
template <class Join>
inline float over_lanes(Floats values, const Join& join) {
  alignas(64) float lanes[kLanes];
  store(lanes, values);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + half]);
  }
  return lanes[0];
}
inline float sum_of(Floats values) {
  return over_lanes(values, [](float a, float b) { return a + b; });
}
inline float largest_of(Floats values) {
  return over_lanes(values, [](float a, float b) { return a > b ? a : b; });
}

// exp of 16 numbers: 2^n times a polynomial of degree 6 for the rest, within 2 units in the last place.
// NaN stays NaN; above 88.3 it is exp(88.3), below -87.3 exp(-87.3). Inline, so that neighbours overlap.
inline __attribute__((always_inline)) Floats exp_of(Floats x) {
  x = smaller(all(88.3f), larger(all(-87.3f), x));
  // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the last bits.
  const Floats magic = all(12582912.0f);
  const Floats shifted = multiply_add(x, all(1.44269504f), magic);
  const Floats n = shifted - magic;
  Floats rest = multiply_add(n, all(-0.693359375f), x);  // ln 2 in two parts
  rest = multiply_add(n, all(2.12194440e-4f), rest);
  Floats sum = all(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = multiply_add(sum, rest, all(factor));
  }
  const Floats powers = each_part([&](int part) {
    return (Vector)(((IntVector)shifted.parts[part] << 23) + broadcast(int32_t{0x3f800000}));
  });
  return sum * powers;
}

inline Floats sigmoid_of(Floats x) {
  const Floats one = all(1.0f);
  return one / (one + exp_of(all(0.0f) - x));
}

inline Floats silu_of(Floats x) { return x * sigmoid_of(x); }

// Hendrycks and Gimpel 2016: x times the share of a normal distribution below x. With erf by Abramowitz and
// Stegun 1964, 7.1.26, for what is left above |x|: 1.5e-7 off, with rounding 4e-7.
__attribute__((noinline)) Floats gelu_of(Floats x) {
  const Floats size = magnitudes(x), one = all(1.0f);
  const Floats t = one / multiply_add(size, all(0.3275911f * 0.70710678f), one);
  Floats sum = all(1.061405429f);
  for (const float factor : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f}) {
    sum = multiply_add(sum, t, all(factor));
  }
  const Floats above = sum * t * exp_of(x * x * all(-0.5f)) * all(0.5f);
  return larger(x, all(0.0f)) - size * above;
}

// Their approximation by tanh: x * sigmoid(2 y).
inline Floats gelu_by_tanh_of(Floats x) {
  const Floats y = multiply_add(x * x * x, all(0.044715f), x);
  return x * sigmoid_of(y * all(2 * 0.7978845608f));
}

// tanh of 16 numbers: below 0.625 by a polynomial of Cephes (Moshier 1992), whose terms keep the last digits.
inline Floats tanh_of(Floats x) {
  const Floats square = x * x, one = all(1.0f), two = all(2.0f);
  Floats sum = all(-5.70498872745e-3f);
  for (const float factor : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
    sum = multiply_add(sum, square, all(factor));
  }
  const Floats small = multiply_add(sum * square, x, x), large = one - two / (exp_of(x * two) + one);
  return each_part([&](int part) {
    const IntVector is_small = magnitudes(x).parts[part] < broadcast(0.625f);
    return is_small ? small.parts[part] : large.parts[part];
  });
}

// Between -cap and cap.
__attribute__((noinline)) Floats capped(Floats values, float cap) { return tanh_of(values * all(1 / cap)) * all(cap); }

// cos(angle + quarters * pi / 2) of 0 <= angle < 2^20, in doubles: libraries round in their own ways.
inline float cosine(double angle, int quarters) {
  const double turns = std::floor(angle * 0.63661977236758134 + 0.5);
  // pi / 2 in two parts, the first of 33 bits, as in fdlibm.
  const double rest = (angle - turns * 1.57079632673412561417) - turns * 6.07710050650619224932e-11;
  quarters = (static_cast<int>(turns) + quarters) & 3;
  const bool is_sine = quarters % 2 != 0;
  const double square = rest * rest;
  // Taylor's series to the 18th or 17th power, from its end.
  double sum = 1;
  for (int power = is_sine ? 17 : 18; power > 1; power -= 2) sum = 1 - sum * square / (power * (power - 1));
  const double value = is_sine ? rest * sum : sum;
  return static_cast<float>(quarters == 1 || quarters == 2 ? -value : value);
}

// To the nearest integer, ties to even, of |value| < 2^22; anything for others.
inline int32_t nearest_integer(float value) {
  const float shifted = value + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  return bits - 0x4b400000;
}

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 64 : rounded);  // NaN stays NaN
}

inline void round_to_bfloat16(const float* values, int num_values, uint16_t* out) {
  for (int k = 0; k < num_values; ++k) out[k] = to_bfloat16(values[k]);
}

#ifndef __AVX512BF16__  // else an instruction does it
inline void round_to_bfloat16_pairs(const float* values, int num_values, int32_t* out) {
  round_to_bfloat16(values, num_values, reinterpret_cast<uint16_t*>(out));
}
#endif

inline Floats from_bfloat16(const uint16_t* values) {
  alignas(64) uint32_t bits[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) bits[lane] = static_cast<uint32_t>(values[lane]) << 16;
  return load(reinterpret_cast<const float*>(bits));
}

}  // namespace
