// AVX-512: a vector is 16 numbers. VNNI and BF16 are used where the compiler's flags name them.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

typedef float Vector __attribute__((vector_size(64)));
typedef int32_t IntVector __attribute__((vector_size(64)));

// 32 registers: 12 tokens by 2 panels fill 24. One token needs more panels, to have enough sums under way.
constexpr int max_tokens_of_tile(int) { return 12; }
constexpr int panels_of_tile(int num_tokens, int) { return num_tokens == 1 ? 4 : 2; }

// Of weights of 4 bits.
constexpr int kMaxCodeTokens = 8;
constexpr int code_panels_of_tile(int num_tokens) { return panels_of_tile(num_tokens, 1); }

inline Vector broadcast(float value) { return (Vector)_mm512_set1_ps(value); }
inline IntVector broadcast(int32_t value) { return (IntVector)_mm512_set1_epi32(value); }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

// 16 bytes as numbers.
inline Vector from_bytes(const uint8_t* bytes) {
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
}
inline Vector from_integers(const int8_t* bytes) {
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
}
inline Vector from_integers(const int16_t* integers) {
  return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256((const __m256i*)integers)));
}

#ifdef __AVX512VNNI__
constexpr int kInt8Offset = 128;  // unsigned bytes of weights by signed bytes of inputs
constexpr int kInt8Words = 1;
using Int8Weights = IntVector;
inline Int8Weights int8_weights(IntVector raw) { return raw; }

inline IntVector add_int8_products(IntVector sums, Int8Weights weights, const int32_t* words) {
  return (IntVector)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(words[0]));
}

// Weights of 4 bits, as bytes from 0 to 15.
using CodeSums = IntVector;
inline CodeSums add_code_products(CodeSums sums, IntVector codes, const int32_t* word) {
  return add_int8_products(sums, codes, word);
}
inline IntVector total_of(CodeSums sums) { return sums; }
#else
constexpr int kInt8Offset = 0;
constexpr int kInt8Words = 2;  // inputs of 16 bits: those for the even and those for the odd bytes of weights
struct Int8Weights {
  __m512i even, odd;
};
inline Int8Weights int8_weights(IntVector raw) {
  return {_mm512_srai_epi16(_mm512_slli_epi16((__m512i)raw, 8), 8), _mm512_srai_epi16((__m512i)raw, 8)};
}

// The instruction for bytes saturates; products of 16 bits do not.
inline IntVector add_int8_products(IntVector sums, Int8Weights weights, const int32_t* words) {
  const __m512i even = _mm512_madd_epi16(weights.even, _mm512_set1_epi32(words[0]));
  const __m512i odd = _mm512_madd_epi16(weights.odd, _mm512_set1_epi32(words[1]));
  return sums + (IntVector)even + (IntVector)odd;
}

// Weights of 16 bits, two inputs of each output.
inline IntVector add_int16_products(IntVector sums, IntVector weights, const int32_t* words) {
  return sums + (IntVector)_mm512_madd_epi16((__m512i)weights, _mm512_set1_epi32(words[0]));
}

// Weights of 4 bits, as bytes from 0 to 15: sums of 16 products fit in 16 bits.
using CodeSums = IntVector;
inline CodeSums add_code_products(CodeSums sums, IntVector codes, const int32_t* word) {
  const auto products = _mm512_maddubs_epi16((__m512i)codes, _mm512_set1_epi32(word[0]));
  auto added = (IntVector)_mm512_add_epi16((__m512i)sums, products);
  // Else the compiler adds in another order, which takes more registers than there are.
  asm("" : "+v"(added));
  return added;
}
inline IntVector total_of(CodeSums sums) {
  return (IntVector)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
}
#endif

#ifdef __AVX512BF16__
constexpr bool kHasBFloat16Products = true;
inline Vector add_bfloat16_products(Vector sums, IntVector weights, const int32_t* words) {
  const auto inputs = (__m512bh)_mm512_set1_epi32(words[0]);
  return (Vector)_mm512_dpbf16_ps((__m512)sums, (__m512bh)weights, inputs);
}

// Its instruction takes the smallest numbers, below 2^-126, for 0; their products would not matter.
inline void round_to_bfloat16_pairs(const float* values, int num_values, int32_t* out) {
  for (int k = 0; k < num_values; k += 16) {
    _mm256_storeu_si256((__m256i*)(out + k / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + k)));
  }
}
#else
constexpr bool kHasBFloat16Products = false;
#endif

}  // namespace
