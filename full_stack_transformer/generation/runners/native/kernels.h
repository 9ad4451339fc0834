// Linear layers: weights packed in panels, and their products with inputs in tiles of the registers.
//
// T tokens, K inputs and N outputs of a linear layer. A *group* is the 32 bits of weights that one lane takes at
// once: 4 of int8, 2 of bf16, 1 of fp32. A *panel* is 16 outputs. A *word* is 32 bits of inputs that all lanes
// share; a group takes one or two. Weights of 4 bits are in int4.h. Knows nothing of models.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "lanes.h"
#include "memory_and_threads.h"

namespace {

// Weights and what they are multiplied with. Pairs are bf16 on both sides, by an instruction of its own that
// rounds in its own way; otherwise bf16 is multiplied as fp32. int4 stands beside int8: a decoder has both.
// kInt16 is int8 unpacked once for many tokens.
enum WeightsType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kBFloat16Pairs = 3, kInt4 = 4, kInt16 = 5 };

constexpr int values_of_group(WeightsType type) {
  return type == kInt8 ? 4 : type == kFloat32 ? 1 : 2;
}
constexpr int words_of_group(WeightsType type) {
  return type == kInt8 ? kInt8Words : type == kBFloat16 ? 2 : 1;
}

struct BFloat16Weights {
  Vector even, odd;
};

// 32 bits of weights for each lane, ready to be multiplied.
template <WeightsType Type>
inline auto unpacked(IntVector raw) {
  if constexpr (Type == kInt8) {
    return int8_weights(raw);
  } else if constexpr (Type == kBFloat16) {
    return BFloat16Weights{(Vector)(raw << 16), (Vector)(raw & broadcast(int32_t{-65536}))};
  } else if constexpr (Type == kBFloat16Pairs || Type == kInt16) {
    return raw;
  } else {
    return (Vector)raw;
  }
}

template <WeightsType Type>
using Sums = std::conditional_t<Type == kInt8 || Type == kInt16, IntVector, Vector>;

inline float word_as_float(const int32_t* word) {
  float value;
  std::memcpy(&value, word, 4);
  return value;
}

// Adds the products of the lanes' weights and one group of inputs to the lanes' sums.
template <WeightsType Type, class Weights>
inline Sums<Type> add_products(Sums<Type> sums, Weights weights, const int32_t* words) {
  if constexpr (Type == kInt8) {
    return add_int8_products(sums, weights, words);
  } else if constexpr (Type == kBFloat16) {
    sums = multiply_add(weights.even, broadcast(word_as_float(words)), sums);
    return multiply_add(weights.odd, broadcast(word_as_float(words + 1)), sums);
  } else if constexpr (Type == kInt16) {
    return add_int16_products(sums, weights, words);
  } else if constexpr (Type == kBFloat16Pairs) {
    return add_bfloat16_products(sums, weights, words);
  } else {
    return multiply_add(weights, broadcast(word_as_float(words)), sums);
  }
}

// ---------------------------------------------------------------- weights

// Weights (N, K) as panels: [N / 16][K / group][16 outputs][group]. int8 weights have one scale an output and
// are stored with kInt8Offset added.
struct Linear {
  WeightsType type = kFloat32;
  int place = 0;  // which one of the decoder
  int num_outputs = 0, num_inputs = 0, num_panels = 0, num_groups = 0;
  uint8_t* panels = nullptr;
  uint8_t* group_scales = nullptr;  // int4 only, see int4.h
  Buffer<float> scales, bias;       // (panels * 16)
};

// What 127 stands for; too little to be divided by counts as 0.
inline float scale_of(float largest) { return largest > 1e-30f ? largest / 127 : 1; }

// Two words hold numbers 0 and 1, and 2 and 3: those of the even and of the odd bytes.
constexpr int kInt8Places[4] = {0, kInt8Words == 2 ? 2 : 1, kInt8Words == 2 ? 1 : 2, 3};

inline void pack_group(WeightsType type, const float* values, uint8_t* place) {
  if (type == kFloat32) {
    std::memcpy(place, values, 4);
  } else {
    const uint16_t pair[2] = {to_bfloat16(values[0]), to_bfloat16(values[1])};
    std::memcpy(place, pair, 4);
  }
}

// The row of the weights behind an output; none behind the last one. `is_pair`: outputs n and n + N / 2 share a
// pair of panels (gate and up of an MLP).
inline int row_of(int number, int num_outputs, bool is_pair) {
  if (number >= num_outputs) return -1;
  if (!is_pair) return number;
  return number / (2 * kLanes) * kLanes + number % kLanes + number / kLanes % 2 * (num_outputs / 2);
}

// Sizes, biases, and room for the scales of outputs; returns how many there are with those that fill a panel.
inline int prepare_linear(Linear& linear, WeightsType type, const float* bias, int num_outputs, int num_inputs,
                          bool is_pair) {
  linear.type = type;
  linear.num_outputs = num_outputs;
  linear.num_inputs = num_inputs;
  linear.num_panels = (num_outputs + 2 * kLanes - 1) / (2 * kLanes) * 2;
  const int num_all = linear.num_panels * kLanes;
  float* biases = linear.bias.reserve(num_all);
  float* scales = linear.scales.reserve(num_all);
  for (int number = 0; number < num_all; ++number) {
    const int row = row_of(number, num_outputs, is_pair);
    biases[number] = bias && row >= 0 ? bias[row] : 0;
    scales[number] = 1;
  }
  return num_all;
}

// Weights (N, K) of fp32 or bf16.
void pack(Linear& linear, HugePages& pages, WeightsType type, const float* weights, const float* bias,
          int num_outputs, int num_inputs, bool is_pair) {
  const int num_all = prepare_linear(linear, type, bias, num_outputs, num_inputs, is_pair);
  const int per_group = values_of_group(type), num_groups = num_inputs / per_group;
  linear.num_groups = num_groups;
  uint8_t* out = linear.panels = pages.take(static_cast<size_t>(linear.num_panels) * num_groups * 64);
  const Buffer<float> zeros(num_inputs);
  std::fill_n(zeros.get(), num_inputs, 0.0f);
  for (int number = 0; number < num_all; ++number) {
    const int row = row_of(number, num_outputs, is_pair), panel = number / kLanes, lane = number % kLanes;
    const float* source = row >= 0 ? weights + static_cast<size_t>(row) * num_inputs : zeros.get();
    for (int group = 0; group < num_groups; ++group) {
      pack_group(type, source + group * per_group,
                 out + (static_cast<size_t>(panel) * num_groups + group) * 64 + lane * 4);
    }
  }
}

// int8 weights (N, K), rotated and rounded, with one scale an output.
void pack_int8(Linear& linear, HugePages& pages, const int8_t* codes, const float* scales, const float* bias,
               int num_outputs, int num_inputs, bool is_pair) {
  const int num_all = prepare_linear(linear, kInt8, bias, num_outputs, num_inputs, is_pair);
  const int num_groups = num_inputs / 4;
  linear.num_groups = num_groups;
  uint8_t* out = linear.panels = pages.take(static_cast<size_t>(linear.num_panels) * num_groups * 64);
  for (int number = 0; number < num_all; ++number) {
    const int row = row_of(number, num_outputs, is_pair), panel = number / kLanes, lane = number % kLanes;
    if (row >= 0) linear.scales.get()[number] = scales[row];
    for (int k = 0; k < num_inputs; ++k) {
      const int code = row >= 0 ? codes[static_cast<size_t>(row) * num_inputs + k] : 0;
      out[(static_cast<size_t>(panel) * num_groups + k / 4) * 64 + lane * 4 + kInt8Places[k % 4]] =
          static_cast<uint8_t>(kInt8Offset + code);
    }
  }
}

// ---------------------------------------------------------------- inputs

// Inputs (T, K) of a linear layer as it takes them.
struct Inputs {
  const int32_t* words = nullptr;  // (T, K / group * words of a group)
  const float* scales = nullptr;   // (T) for int8, (T, K / 32) for int4
  const int32_t* sums = nullptr;   // (T) of the quantized values, int8 only
  const float* group_sums = nullptr;  // (T, K / 32), int4 only
  const float* plain = nullptr;       // (T, K) as they were
};

// In each pair of lanes `Half` apart the sum and the difference.
template <int Half>
inline Vector sums_and_differences(Vector values) {
  Vector other{}, sign{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) sign[lane] = lane & Half ? -1.0f : 1.0f;
#if defined(__clang__)
  for (int lane = 0; lane < kWidth; ++lane) other[lane] = values[lane ^ Half];
#else
  IntVector places{};
#pragma GCC unroll 16
  for (int lane = 0; lane < kWidth; ++lane) places[lane] = lane ^ Half;
  other = __builtin_shuffle(values, places);
#endif
  return values * sign + other;
}

// Numbers (K) of each block times a Hadamard matrix, and what makes it a rotation. A few numbers that are much
// larger than the others, which many models have, are spread over their block, so that one scale serves all;
// weights are rotated likewise (codes.py), and products stay what they were. Ashkboos et al. 2024 (QuaRot).
inline float rotate_blocks(const float* in, int num_values, float* out) {
  const int block = num_values & -num_values;  // the largest power of 2 that divides
  for (int k = 0; k < num_values; k += kWidth) {
    Vector values = load_vector(in + k);
    values = sums_and_differences<1>(values);
    values = sums_and_differences<2>(values);
    if constexpr (kWidth > 4) values = sums_and_differences<4>(values);
    if constexpr (kWidth > 8) values = sums_and_differences<8>(values);
    store_vector(out + k, values);
  }
  for (int half = kWidth; half < block; half *= 2) {
    for (int first = 0; first < num_values; first += 2 * half) {
      for (int k = first; k < first + half; k += kWidth) {
        const Vector a = load_vector(out + k), b = load_vector(out + k + half);
        store_vector(out + k, a + b);
        store_vector(out + k + half, a - b);
      }
    }
  }
  return 1 / std::sqrt(static_cast<float>(block));
}

using Int8Input = std::conditional_t<kInt8Words == 1, int8_t, int16_t>;

// Numbers (K) as integers from -127 to 127 with one scale; returns the sum of the integers.
template <class Integer>
inline int32_t quantize(const float* in, int num_values, Integer* out, float& scale) {
  Floats largest = all(0), zeros = all(0);
  for (int k = 0; k < num_values; k += kLanes) {
    const Floats values = load(in + k);
    largest = larger(magnitudes(values), largest);
    zeros = multiply_add(values, all(0), zeros);  // NaN from what is no finite number
  }
  scale = scale_of(largest_of(largest));
  const float factor = 1 / scale;
  const float zero = sum_of(zeros);
  if (zero != 0) scale = zero;  // integers cannot carry NaN to the logits, the scale can
  int32_t total = 0;
  for (int k = 0; k < num_values; ++k) {
    const int32_t rounded = nearest_integer(in[k] * factor);
    out[k] = static_cast<Integer>(rounded);
    total += rounded;
  }
  return total;
}

// ---------------------------------------------------------------- products

// What happens to the 16 sums of a panel; a pair of panels is handed over together. kGated: the first one,
// activated, times the second one.
enum class Ending { kStore, kAdd, kActivated, kGated, kScores };
enum class Activation : int32_t { kSilu = 0, kGelu, kGeluByTanh };

// Inline, so that neighbours are computed at the same time; gelu_of is rare and large.
inline __attribute__((always_inline)) Floats activated(Activation activation, Floats values) {
  switch (activation) {
    case Activation::kSilu: return silu_of(values);
    case Activation::kGelu: return gelu_of(values);
    default: return gelu_by_tanh_of(values);
  }
}

struct Tile {
  const Linear* linear;
  const uint8_t* panels;  // from `first_panel` on
  int num_groups, first_panel;
  Inputs inputs;
  float* outputs;  // (T, stride)
  int stride;
  Ending ending;
  Activation activation;
  float scale, cap;  // of what is added and of scores; of scores, 0 for none
  const float* const* biases;  // (T), of tokens with adapters; null where all have the layer's
};

template <WeightsType Type>
inline Floats finish(const Tile& tile, const Sums<Type>* sums, int token, int panel) {
  const float* biases = tile.biases ? tile.biases[token] : tile.linear->bias.get();
  const Floats bias = load(biases + panel * kLanes);
  const Floats output_scales = load(tile.linear->scales.get() + panel * kLanes);
  if constexpr (Type == kInt8 || Type == kInt16) {
    // Takes back what was added to every weight.
    const IntVector added = broadcast(kInt8Offset * tile.inputs.sums[token]);
    const Floats plain = each_part(
        [&](int part) { return __builtin_convertvector(sums[part] - added, Vector); });
    return multiply_add(plain, output_scales * all(tile.inputs.scales[token]), bias);
  } else if constexpr (Type == kInt4) {
    return multiply_add(each_part([&](int part) { return sums[part]; }), output_scales, bias);
  } else {
    return each_part([&](int part) { return sums[part]; }) + bias;
  }
}

inline void put(const Tile& tile, Floats values, int token, int panel) {
  const int left = tile.linear->num_outputs - panel * kLanes;
  if (left <= 0) return;
  float* place = tile.outputs + static_cast<size_t>(token) * tile.stride + panel * kLanes;
  if (tile.ending == Ending::kActivated) values = activated(tile.activation, values);
  if (tile.ending == Ending::kAdd || tile.ending == Ending::kScores) values = values * all(tile.scale);
  if (tile.ending == Ending::kScores && tile.cap > 0) values = capped(values, tile.cap);
  if (left >= kLanes) {
    if (tile.ending == Ending::kAdd) values = load(place) + values;
    store(place, values);
  } else {
    alignas(64) float lanes[kLanes];
    store(lanes, values);
    for (int lane = 0; lane < left; ++lane) {
      place[lane] = tile.ending == Ending::kAdd ? place[lane] + lanes[lane] : lanes[lane];
    }
  }
}

// Sums (Tokens, panels of `results`, 16) of some panels, which are computed together in registers.
template <WeightsType Type, int Tokens, int Panels>
inline void accumulate(const Tile& tile, int first_token, int first_panel, Sums<Type>* results,
                       int results_stride) {
  constexpr int kWords = words_of_group(Type);
  const int num_groups = tile.num_groups;
  const size_t panel_bytes = static_cast<size_t>(num_groups) * 64, row = static_cast<size_t>(num_groups) * kWords;
  const uint8_t* weights = tile.panels + (first_panel - tile.first_panel) * panel_bytes;
  const int32_t* words = tile.inputs.words + first_token * row;
  using Weights = decltype(unpacked<Type>(IntVector{}));
  // Every loop over `sums` is unrolled, else the compiler keeps them in memory instead of registers.
  Sums<Type> sums[Tokens][Panels][kParts];
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) sums[token][panel][part] = Sums<Type>{};
    }
  }
  const uint8_t* end = weights + panel_bytes;
  for (; weights < end; weights += 64, words += kWords) {
    Weights loaded[Panels][kParts];
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) {
      const uint8_t* place = weights + panel * panel_bytes;
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        loaded[panel][part] = unpacked<Type>(load_int_vector(place + part * sizeof(Vector)));
      }
      // The next tile's, else memory rests while there are many tokens to multiply. With one it never rests.
      if constexpr (Tokens > 1 || Panels < 4) __builtin_prefetch(place + Panels * panel_bytes, 0, 2);
    }
#pragma GCC unroll 12
    for (int token = 0; token < Tokens; ++token) {
      const int32_t* inputs = words + token * row;
#pragma GCC unroll 8
      for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          sums[token][panel][part] = add_products<Type>(sums[token][panel][part], loaded[panel][part], inputs);
        }
      }
    }
  }
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        results[token * results_stride + panel * kParts + part] = sums[token][panel][part];
      }
    }
  }
}

// The same for weights of 4 bits, in int4.h.
template <int Tokens, int Panels>
inline void accumulate_codes(const Tile& tile, int first_token, int first_panel, Vector* results,
                             int results_stride);

template <WeightsType Type>
constexpr int most_tokens() {
  return Type == kInt4 ? kMaxCodeTokens : max_tokens_of_tile(words_of_group(Type));
}
template <WeightsType Type>
constexpr int panels_together(int num_tokens) {
  return Type == kInt4 ? code_panels_of_tile(num_tokens) : panels_of_tile(num_tokens, words_of_group(Type));
}

// `Panels` panels, at least one pair.
template <WeightsType Type, int Tokens, int Panels>
inline void compute_tile(const Tile& tile, int first_token, int first_panel) {
  constexpr int kTogether = std::min(Panels, panels_together<Type>(Tokens));
  Sums<Type> results[Tokens][Panels][kParts];
  for (int panel = 0; panel < Panels; panel += kTogether) {
    if constexpr (Type == kInt4) {
      accumulate_codes<Tokens, kTogether>(tile, first_token, first_panel + panel, results[0][panel],
                                          Panels * kParts);
    } else {
      accumulate<Type, Tokens, kTogether>(tile, first_token, first_panel + panel, results[0][panel],
                                          Panels * kParts);
    }
  }
  for (int token = 0; token < Tokens; ++token) {
    for (int panel = 0; panel < Panels; panel += 2) {
      const int at_token = first_token + token, at_panel = first_panel + panel;
      const Floats first = finish<Type>(tile, results[token][panel], at_token, at_panel);
      const Floats second = finish<Type>(tile, results[token][panel + 1], at_token, at_panel + 1);
      if (tile.ending == Ending::kGated) {
        store(tile.outputs + static_cast<size_t>(at_token) * tile.stride + at_panel / 2 * kLanes,
              activated(tile.activation, first) * second);
      } else {
        put(tile, first, at_token, at_panel);
        put(tile, second, at_token, at_panel + 1);
      }
    }
  }
}

template <WeightsType Type, int Tokens>
void compute_tokens(const Tile& tile, int first_token, int first_panel, int end_panel) {
  constexpr int kPanels = std::max(2, panels_together<Type>(Tokens));
  int panel = first_panel;
  for (; panel + kPanels <= end_panel; panel += kPanels) {
    compute_tile<Type, Tokens, kPanels>(tile, first_token, panel);
  }
  for (; panel < end_panel; panel += 2) compute_tile<Type, Tokens, 2>(tile, first_token, panel);
}

template <WeightsType Type, int Tokens = most_tokens<Type>()>
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
void compute_tiles(const Tile& tile, int num_tokens, int first_panel, int end_panel) {
  // Even shares: 13 tokens as 7 and 6, not as 12 and 1.
  constexpr int kMaxTokens = most_tokens<Type>();
  const int num_tiles = (num_tokens + kMaxTokens - 1) / kMaxTokens;
  for (int number = 0; number < num_tiles; ++number) {
    const int first = num_tokens * number / num_tiles, end = num_tokens * (number + 1) / num_tiles;
    compute_rest<Type>(tile, end - first, first, first_panel, end_panel);
  }
}

// A pair of panels of int8 as [panel][K / 2][16 outputs][2] of 16 bits. Where bytes are multiplied as that, unpacking
// them for every few tokens takes a fifth of the time.
template <class Weights = Int8Weights>
inline const uint8_t* unpack_pair(const Linear& linear, int first_panel) {
  thread_local Buffer<IntVector> buffer;
  const size_t num_vectors = static_cast<size_t>(2) * linear.num_groups * kParts;
  IntVector* place = buffer.reserve(2 * num_vectors);
  const uint8_t* source = linear.panels + static_cast<size_t>(first_panel) * linear.num_groups * 64;
  for (size_t number = 0; number < num_vectors; ++number) {
    const Weights weights = int8_weights(load_int_vector(source + number * sizeof(IntVector)));
    const size_t group = number / kParts, part = number % kParts;
    store_vector(place + 2 * group * kParts + part, weights.even);
    store_vector(place + (2 * group + 1) * kParts + part, weights.odd);
  }
  return reinterpret_cast<const uint8_t*>(place);
}

constexpr int kManyTokens = 64;

template <WeightsType Type>
void compute_panels(const Tile& tile, int num_tokens, int first_panel, int end_panel) {
  if constexpr (Type == kInt8 && kInt8Words == 2) {
    if (num_tokens >= kManyTokens) {
      for (int panel = first_panel; panel < end_panel; panel += 2) {
        Tile unpacked = tile;
        unpacked.panels = unpack_pair(*tile.linear, panel);
        unpacked.first_panel = panel;
        unpacked.num_groups = 2 * tile.num_groups;
        compute_tiles<kInt16>(unpacked, num_tokens, panel, panel + 2);
      }
      return;
    }
  }
  compute_tiles<Type>(tile, num_tokens, first_panel, end_panel);
}

}  // namespace
