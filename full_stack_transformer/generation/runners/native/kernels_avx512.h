// The arithmetic of AVX-512: bfloat16, exp and its like, and products of weights and inputs in tiles.
//
// T tokens, K inputs and N outputs of a linear layer, D head size. A *group* is the 32 bits of inputs that
// one lane of a dot-product instruction takes: 4 of int8, 2 of bf16, 1 of fp32. A *panel* is 16 outputs.
// Another instruction set is another file with the same functions. Knows nothing of models.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "memory_and_threads.h"

namespace {

constexpr int kLanes = 16;
constexpr int kMaxTokensOfTile = 12;

// ---------------------------------------------------------------- numbers

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void round_to_bfloat16(const float* values, int num_values, uint16_t* out) {
  for (int k = 0; k < num_values; k += kLanes) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), rounded);
  }
}

inline __m512 from_bfloat16(const uint16_t* values) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// exp of 16 numbers: 2^n times a polynomial of degree 6 for the rest, within 2 units in the last place.
inline __m512 exp16(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  }
  return _mm512_scalef_ps(sum, n);
}

inline __m512 sigmoid16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Hendrycks and Gimpel 2016, the approximation by tanh: x * sigmoid(2 y).
inline __m512 gelu16(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 y = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  return _mm512_mul_ps(x, sigmoid16(_mm512_mul_ps(y, _mm512_set1_ps(2 * 0.7978845608f))));
}

// ---------------------------------------------------------------- linear layers

enum WeightsType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

constexpr int values_of_group(WeightsType type) { return type == kInt8 ? 4 : type == kBFloat16 ? 2 : 1; }

// Adds the products of a panel's weights and one group of inputs to the panel's 16 sums.
template <WeightsType Type>
inline __m512i add_products(__m512i sums, __m512i weights, int32_t group) {
  const __m512i inputs = _mm512_set1_epi32(group);
  if constexpr (Type == kInt8) {
    return _mm512_dpbusd_epi32(sums, weights, inputs);
  } else if constexpr (Type == kBFloat16) {
    return _mm512_castps_si512(
        _mm512_dpbf16_ps(_mm512_castsi512_ps(sums), (__m512bh)weights, (__m512bh)inputs));
  } else {
    return _mm512_castps_si512(_mm512_fmadd_ps(
        _mm512_castsi512_ps(weights), _mm512_castsi512_ps(inputs), _mm512_castsi512_ps(sums)));
  }
}

// Weights (N, K) as panels: [N / 16][K / group][16 outputs][group]. int8 weights have one scale an output
// and are stored with 128 added, because the instruction multiplies unsigned with signed bytes.
struct Linear {
  int num_inputs = 0, num_outputs = 0, num_panels = 0, num_groups = 0;
  Buffer<uint8_t> panels;
  Buffer<float> scales, bias;  // (panels * 16)
  bool has_bias = false;
};

void pack(Linear& linear, WeightsType type, const float* weights, const float* bias, int num_outputs,
          int num_inputs, int row_order_stride) {
  // row_order_stride 2: outputs n and n + N / 2 share a pair of panels (gate and up of an MLP).
  const int per_group = values_of_group(type), num_groups = num_inputs / per_group;
  const int num_panels = (num_outputs + 2 * kLanes - 1) / (2 * kLanes) * 2;
  linear.num_inputs = num_inputs;
  linear.num_outputs = num_outputs;
  linear.num_panels = num_panels;
  linear.num_groups = num_groups;
  linear.has_bias = bias != nullptr;
  uint8_t* out = linear.panels.reserve(static_cast<size_t>(num_panels) * num_groups * 64);
  float* scales = linear.scales.reserve(num_panels * kLanes);
  float* biases = linear.bias.reserve(num_panels * kLanes);
  for (int panel = 0; panel < num_panels; ++panel) {
    for (int lane = 0; lane < kLanes; ++lane) {
      int row = panel * kLanes + lane;
      if (row_order_stride == 2) row = (panel / 2) * kLanes + lane + (panel % 2) * (num_outputs / 2);
      const bool exists = panel * kLanes + lane < num_outputs;
      const float* source = weights + static_cast<size_t>(row) * num_inputs;
      float largest = 0;
      for (int k = 0; exists && k < num_inputs; ++k) largest = std::max(largest, std::fabs(source[k]));
      const float scale = largest > 0 ? largest / 127 : 1;
      scales[panel * kLanes + lane] = type == kInt8 ? scale : 1;
      biases[panel * kLanes + lane] = bias && exists ? bias[row] : 0;
      for (int k = 0; k < num_inputs; ++k) {
        const float value = exists ? source[k] : 0;
        uint8_t* place = out + (static_cast<size_t>(panel) * num_groups + k / per_group) * 64 + lane * 4;
        if (type == kInt8) {
          place[k % 4] = static_cast<uint8_t>(128 + std::lrint(value / scale));
        } else if (type == kBFloat16) {
          const uint16_t half = to_bfloat16(value);
          std::memcpy(place + 2 * (k % 2), &half, 2);
        } else {
          std::memcpy(place, &value, 4);
        }
      }
    }
  }
}

// Inputs (T, K) of a linear layer as it takes them.
struct Inputs {
  const int32_t* groups = nullptr;  // (T, K / group)
  const float* scales = nullptr;    // (T), int8 only
  const int32_t* sums = nullptr;    // (T) of the quantized values, int8 only
};

// What happens to the 16 sums of a panel; a pair of panels is handed over together.
enum class Ending { kStore, kAdd, kGelu, kGated };

struct Tile {
  const Linear* linear;
  Inputs inputs;
  float* outputs;  // (T, stride)
  int stride;
  Ending ending;
};

template <WeightsType Type>
inline __m512 finish(const Tile& tile, __m512i sums, int token, int panel) {
  const __m512 bias = _mm512_load_ps(tile.linear->bias.get() + panel * kLanes);
  if constexpr (Type == kInt8) {
    // Takes back the 128 that was added to every weight.
    const __m512i plain = _mm512_sub_epi32(sums, _mm512_set1_epi32(128 * tile.inputs.sums[token]));
    const __m512 scales = _mm512_mul_ps(_mm512_load_ps(tile.linear->scales.get() + panel * kLanes),
                                        _mm512_set1_ps(tile.inputs.scales[token]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(plain), scales, bias);
  } else {
    return _mm512_add_ps(_mm512_castsi512_ps(sums), bias);
  }
}

inline void put(const Tile& tile, __m512 values, int token, int panel) {
  const int left = tile.linear->num_outputs - panel * kLanes;
  if (left <= 0) return;
  const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
  float* place = tile.outputs + static_cast<size_t>(token) * tile.stride + panel * kLanes;
  if (tile.ending == Ending::kGelu) values = gelu16(values);
  if (tile.ending == Ending::kAdd) values = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, place), values);
  _mm512_mask_storeu_ps(place, mask, values);
}

template <WeightsType Type, int Tokens, int Panels>
inline void compute_tile(const Tile& tile, int first_token, int first_panel) {
  const int num_groups = tile.linear->num_groups;
  const size_t panel_bytes = static_cast<size_t>(num_groups) * 64;
  const uint8_t* weights = tile.linear->panels.get() + first_panel * panel_bytes;
  const int32_t* groups = tile.inputs.groups + static_cast<size_t>(first_token) * num_groups;
  __m512i sums[Tokens][Panels];
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) sums[token][panel] = _mm512_setzero_si512();
  }
  for (int group = 0; group < num_groups; ++group) {
    __m512i loaded[Panels];
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) {
      const uint8_t* place = weights + panel * panel_bytes + group * 64;
      loaded[panel] = _mm512_load_si512(place);
      // The next tile's, else memory rests while there are many tokens to multiply.
      _mm_prefetch(reinterpret_cast<const char*>(place + Panels * panel_bytes), _MM_HINT_T1);
    }
#pragma GCC unroll 12
    for (int token = 0; token < Tokens; ++token) {
      const int32_t inputs = groups[static_cast<size_t>(token) * num_groups + group];
#pragma GCC unroll 8
      for (int panel = 0; panel < Panels; ++panel) {
        sums[token][panel] = add_products<Type>(sums[token][panel], loaded[panel], inputs);
      }
    }
  }
  // Every loop over `sums` is unrolled, else the compiler keeps them in memory instead of registers.
  __m512i results[Tokens][Panels];
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) results[token][panel] = sums[token][panel];
  }
  for (int token = 0; token < Tokens; ++token) {
    for (int panel = 0; panel < Panels; panel += 2) {
      const int at_token = first_token + token, at_panel = first_panel + panel;
      const __m512 first = finish<Type>(tile, results[token][panel], at_token, at_panel);
      const __m512 second = finish<Type>(tile, results[token][panel + 1], at_token, at_panel + 1);
      if (tile.ending == Ending::kGated) {
        const __m512 gated = _mm512_mul_ps(_mm512_mul_ps(first, sigmoid16(first)), second);
        _mm512_storeu_ps(tile.outputs + static_cast<size_t>(at_token) * tile.stride + at_panel / 2 * kLanes,
                         gated);
      } else {
        put(tile, first, at_token, at_panel);
        put(tile, second, at_token, at_panel + 1);
      }
    }
  }
}

// Few tokens: many panels at once, to have enough independent sums under way; many tokens: few panels.
constexpr int panels_of_tile(int num_tokens) { return num_tokens <= 2 ? 8 : num_tokens <= 5 ? 4 : 2; }

template <WeightsType Type, int Tokens>
void compute_tokens(const Tile& tile, int first_token, int first_panel, int end_panel) {
  constexpr int kPanels = panels_of_tile(Tokens);
  int panel = first_panel;
  for (; panel + kPanels <= end_panel; panel += kPanels) {
    compute_tile<Type, Tokens, kPanels>(tile, first_token, panel);
  }
  for (; panel < end_panel; panel += 2) compute_tile<Type, Tokens, 2>(tile, first_token, panel);
}

template <WeightsType Type, int Tokens = kMaxTokensOfTile>
void compute_rest(const Tile& tile, int num_tokens, int first_token, int first_panel, int end_panel) {
  if constexpr (Tokens > 0) {
    if (num_tokens == Tokens) {
      compute_tokens<Type, Tokens>(tile, first_token, first_panel, end_panel);
    } else {
      compute_rest<Type, Tokens - 1>(tile, num_tokens, first_token, first_panel, end_panel);
    }
  }
}

template <WeightsType Type>
void compute_panels(const Tile& tile, int num_tokens, int first_panel, int end_panel) {
  // Even shares: 13 tokens as 7 and 6, not as 12 and 1.
  const int num_tiles = (num_tokens + kMaxTokensOfTile - 1) / kMaxTokensOfTile;
  for (int number = 0; number < num_tiles; ++number) {
    const int first = num_tokens * number / num_tiles, end = num_tokens * (number + 1) / num_tiles;
    compute_rest<Type>(tile, end - first, first, first_panel, end_panel);
  }
}

}  // namespace
