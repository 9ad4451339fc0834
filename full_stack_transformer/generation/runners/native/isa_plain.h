// Any processor: C++ with the vector types of GCC and Clang, which need no vector instructions.

#pragma once

#include <bit>
#include <cstdint>

namespace {

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(16)));

constexpr int max_tokens_of_tile(int) { return 2; }
constexpr int panels_of_tile(int, int) { return 1; }

constexpr int kMaxCodeTokens = max_tokens_of_tile(1);
constexpr int code_panels_of_tile(int num_tokens) { return panels_of_tile(num_tokens, 1); }

inline Vector broadcast(float value) { return Vector{value, value, value, value}; }
inline IntVector broadcast(int32_t value) { return IntVector{value, value, value, value}; }

#ifdef __FP_FAST_FMAF
inline Vector multiply_add(Vector a, Vector b, Vector c) {
  for (int lane = 0; lane < 4; ++lane) a[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return a;
}
#else
// a * b + c, rounded once. The product is exact as a double; of the sum its last bit says whether something
// was lost ("round to odd", Boldo and Melquiond 2008), so that rounding again to a float is right.
inline float multiply_add(float a, float b, float c) {
  const double product = static_cast<double>(a) * b, sum = product + c, added = sum - product;
  const double lost = (product - (sum - added)) + (c - added);
  auto bits = std::bit_cast<int64_t>(sum);
  const int64_t outwards = (lost > 0) == (sum > 0) ? 1 : -1;
  if ((lost > 0 || lost < 0) && bits % 2 == 0) bits += outwards;
  return static_cast<float>(std::bit_cast<double>(bits));
}

constexpr int kLow = std::endian::native == std::endian::little ? 0 : 1;

// Rounding twice is wrong only where the double is in the middle of two floats, and for the smallest floats.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
  typedef double Doubles __attribute__((vector_size(32)));
  typedef int32_t Halves __attribute__((vector_size(32)));
  typedef int64_t Pair __attribute__((vector_size(16)));
  const Doubles products = __builtin_convertvector(a, Doubles) * __builtin_convertvector(b, Doubles);
  const Doubles sums = products + __builtin_convertvector(c, Doubles);
  Vector results = __builtin_convertvector(sums, Vector);
  const IntVector last_bits = __builtin_shufflevector((Halves)sums, (Halves)sums, kLow, kLow + 2, kLow + 4, kLow + 6);
  const auto are_middle = (last_bits & 0x1fffffff) == 0x10000000;
  const auto are_small = ((IntVector)results & 0x7f800000) == 0;
  const auto either = (Pair)(are_middle | are_small);
  if (__builtin_expect((either[0] | either[1]) != 0, 0)) {
    for (int lane = 0; lane < 4; ++lane) results[lane] = multiply_add(a[lane], b[lane], c[lane]);
  }
  return results;
}
#endif

constexpr int kInt8Offset = 0;
constexpr int kInt8Words = 1;
using Int8Weights = IntVector;
inline Int8Weights int8_weights(IntVector raw) { return raw; }

inline IntVector add_int8_products(IntVector sums, Int8Weights weights, const int32_t* words) {
  for (int shift = 0; shift < 32; shift += 8) {
    sums += (weights << (24 - shift) >> 24) * broadcast(words[0] << (24 - shift) >> 24);
  }
  return sums;
}

// Weights of 4 bits, as bytes from 0 to 15.
using CodeSums = IntVector;
inline CodeSums add_code_products(CodeSums sums, IntVector codes, const int32_t* word) {
  return add_int8_products(sums, codes, word);
}
inline IntVector total_of(CodeSums sums) { return sums; }

// 4 bytes as numbers.
inline Vector from_bytes(const uint8_t* bytes) {
  return Vector{static_cast<float>(bytes[0]), static_cast<float>(bytes[1]), static_cast<float>(bytes[2]),
                static_cast<float>(bytes[3])};
}
template <class Integer>
inline Vector from_integers(const Integer* integers) {
  return Vector{static_cast<float>(integers[0]), static_cast<float>(integers[1]), static_cast<float>(integers[2]),
                static_cast<float>(integers[3])};
}

constexpr bool kHasBFloat16Products = false;

}  // namespace
