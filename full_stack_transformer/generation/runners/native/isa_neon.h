// ARM's NEON with dot products of bytes: a vector is 4 numbers.

#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

typedef float Vector __attribute__((vector_size(16)));
typedef int32_t IntVector __attribute__((vector_size(16)));

// 32 registers: 6 tokens by 1 panel of four vectors fill 24; four vectors become eight where weights are unpacked.
constexpr int max_tokens_of_tile(int words_of_group) { return words_of_group == 1 ? 6 : 4; }
constexpr int panels_of_tile(int num_tokens, int words_of_group) {
  return num_tokens * words_of_group == 1 ? 4 : num_tokens * words_of_group <= 3 ? 2 : 1;
}

constexpr int kMaxCodeTokens = max_tokens_of_tile(1);
constexpr int code_panels_of_tile(int num_tokens) { return panels_of_tile(num_tokens, 1); }

inline Vector broadcast(float value) { return (Vector)vdupq_n_f32(value); }
inline IntVector broadcast(int32_t value) { return (IntVector)vdupq_n_s32(value); }

inline Vector multiply_add(Vector a, Vector b, Vector c) {
  return (Vector)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}

constexpr int kInt8Offset = 0;
constexpr int kInt8Words = 1;
using Int8Weights = IntVector;
inline Int8Weights int8_weights(IntVector raw) { return raw; }

inline IntVector add_int8_products(IntVector sums, Int8Weights weights, const int32_t* words) {
  const auto inputs = vreinterpretq_s8_s32(vdupq_n_s32(words[0]));
  return (IntVector)vdotq_s32((int32x4_t)sums, vreinterpretq_s8_s32((int32x4_t)weights), inputs);
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
