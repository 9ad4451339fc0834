// AVX2 with FMA: a vector is 8 numbers. AVX-VNNI is used where the compiler's flags name it.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

typedef float Vector __attribute__((vector_size(32)));
typedef int32_t IntVector __attribute__((vector_size(32)));

// 16 registers: 6 tokens by 1 panel of two vectors fill 12; two vectors become four where weights are unpacked.
constexpr int max_tokens_of_tile(int words_of_group) { return words_of_group == 1 ? 6 : 4; }
constexpr int panels_of_tile(int num_tokens, int words_of_group) {
  return num_tokens * words_of_group <= 2 ? 2 : 1;
}

// Of weights of 4 bits.
constexpr int kMaxCodeTokens = 4;
constexpr int code_panels_of_tile(int num_tokens) { return panels_of_tile(num_tokens, 1); }

inline Vector broadcast(float value) { return (Vector)_mm256_set1_ps(value); }
inline IntVector broadcast(int32_t value) { return (IntVector)_mm256_set1_epi32(value); }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}

// 8 bytes as numbers.
inline Vector from_bytes(const uint8_t* bytes) {
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
}
inline Vector from_integers(const int8_t* bytes) {
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
}
inline Vector from_integers(const int16_t* integers) {
  return (Vector)_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i*)integers)));
}

#ifdef __AVXVNNI__
constexpr int kInt8Offset = 128;  // unsigned bytes of weights by signed bytes of inputs
constexpr int kInt8Words = 1;
using Int8Weights = IntVector;
inline Int8Weights int8_weights(IntVector raw) { return raw; }

inline IntVector add_int8_products(IntVector sums, Int8Weights weights, const int32_t* words) {
  return (IntVector)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)weights, _mm256_set1_epi32(words[0]));
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
  __m256i even, odd;
};
inline Int8Weights int8_weights(IntVector raw) {
  return {_mm256_srai_epi16(_mm256_slli_epi16((__m256i)raw, 8), 8), _mm256_srai_epi16((__m256i)raw, 8)};
}

// The instruction for bytes saturates; products of 16 bits do not.
inline IntVector add_int8_products(IntVector sums, Int8Weights weights, const int32_t* words) {
  const __m256i even = _mm256_madd_epi16(weights.even, _mm256_set1_epi32(words[0]));
  const __m256i odd = _mm256_madd_epi16(weights.odd, _mm256_set1_epi32(words[1]));
  return sums + (IntVector)even + (IntVector)odd;
}

// Weights of 16 bits, two inputs of each output.
inline IntVector add_int16_products(IntVector sums, IntVector weights, const int32_t* words) {
  return sums + (IntVector)_mm256_madd_epi16((__m256i)weights, _mm256_set1_epi32(words[0]));
}

// Weights of 4 bits, as bytes from 0 to 15: sums of 16 products fit in 16 bits.
using CodeSums = IntVector;
inline CodeSums add_code_products(CodeSums sums, IntVector codes, const int32_t* word) {
  const auto products = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(word[0]));
  auto added = (IntVector)_mm256_add_epi16((__m256i)sums, products);
  // Else the compiler adds in another order, which takes more registers than there are.
  asm("" : "+x"(added));
  return added;
}
inline IntVector total_of(CodeSums sums) {
  return (IntVector)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
}
#endif

constexpr bool kHasBFloat16Products = false;

}  // namespace
