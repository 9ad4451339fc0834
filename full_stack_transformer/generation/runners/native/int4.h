// Weights of 4 bits in groups of 32 inputs, and their products with inputs of 8 bits.
//
//   weight = scale of the output * scale of the group * (code - zero of the group / 16)
//
// Codes are 0 ... 15, scales of groups 1 ... 255, zeros 0 ... 255. So a group of an output takes 18 bytes, as much as
// with a scale alone in fp16, and represents what has a scale and a minimum (GGUF's Q4_1) almost exactly.
// Inputs have a scale for each token and group. The products of a group are summed as integers, and its numbers
// are exact in fp32 until they are multiplied with its scales; groups are added in their order. Knows nothing of models.

#pragma once

#include <cstdint>

#include "kernels.h"

namespace {

constexpr int kGroupInputs = 32;
constexpr int kChunks = kGroupInputs / 8;           // of 8 inputs: 64 bytes of a panel
constexpr int kGroupBytes = kChunks * 64;           // codes of a panel
constexpr int kGroupScaleBytes = 2 * kLanes;        // scales, then zeros
constexpr int kGroupWords = kGroupInputs / 4;

// Codes (N, K / 2), the even input in the low half of a byte; scales and zeros of groups (N, K / 32); scales of
// outputs (N). As panels: [N / 16][K / 32][4 chunks][16 outputs][4 bytes], a byte with inputs k and k + 4.
void pack_int4(Linear& linear, HugePages& pages, const uint8_t* codes, const uint8_t* group_scales,
               const uint8_t* zeros, const float* scales, const float* bias, int num_outputs, int num_inputs,
               bool is_pair) {
  const int num_all = prepare_linear(linear, kInt4, bias, num_outputs, num_inputs, is_pair);
  const int num_groups = num_inputs / kGroupInputs;
  linear.num_groups = num_groups;
  const size_t num_panel_groups = static_cast<size_t>(linear.num_panels) * num_groups;
  uint8_t* out = linear.panels = pages.take(num_panel_groups * kGroupBytes);
  uint8_t* out_scales = linear.group_scales = pages.take(num_panel_groups * kGroupScaleBytes);
  for (int number = 0; number < num_all; ++number) {
    const int row = row_of(number, num_outputs, is_pair), panel = number / kLanes, lane = number % kLanes;
    if (row < 0) continue;  // the pages hold zeros
    linear.scales.get()[number] = scales[row];
    for (int group = 0; group < num_groups; ++group) {
      const size_t source = static_cast<size_t>(row) * num_groups + group;
      const size_t target = static_cast<size_t>(panel) * num_groups + group;
      out_scales[target * kGroupScaleBytes + lane] = group_scales[source];
      out_scales[target * kGroupScaleBytes + kLanes + lane] = zeros[source];
      const uint8_t* pairs = codes + source * (kGroupInputs / 2);
      for (int chunk = 0; chunk < kChunks; ++chunk) {
        uint8_t* place = out + target * kGroupBytes + chunk * 64 + lane * 4;
        for (int k = 0; k < 4; ++k) {
          const int low = pairs[chunk * 4 + k / 2] >> (k % 2 * 4) & 15;
          const int high = pairs[chunk * 4 + 2 + k / 2] >> (k % 2 * 4) & 15;
          place[k] = static_cast<uint8_t>(low | high << 4);
        }
      }
    }
  }
}

// Numbers (K) as int8 with a scale for each group, and what the zeros of groups are multiplied with. With one
// scale for all, a few large inputs, which many models have, would leave little to the others: perplexity of
// SmolLM2 +3.5 %.
inline void quantize_groups(const float* in, int num_values, int32_t* words, float* scales, float* group_sums) {
  auto* bytes = reinterpret_cast<int8_t*>(words);
  for (int group = 0; group < num_values / kGroupInputs; ++group) {
    const int first = group * kGroupInputs;
    group_sums[group] = static_cast<float>(-quantize(in + first, kGroupInputs, bytes + first, scales[group])) / 16;
  }
}

template <int Tokens, int Panels>
inline void accumulate_codes(const Tile& tile, int first_token, int first_panel, Vector* results,
                             int results_stride) {
  const int num_groups = tile.linear->num_groups;
  const size_t panel_bytes = static_cast<size_t>(num_groups) * kGroupBytes;
  const size_t scales_bytes = static_cast<size_t>(num_groups) * kGroupScaleBytes;
  const size_t row = static_cast<size_t>(num_groups) * kGroupWords;
  const uint8_t* weights = tile.linear->panels + first_panel * panel_bytes;
  const uint8_t* scales = tile.linear->group_scales + first_panel * scales_bytes;
  const int32_t* words = tile.inputs.words + first_token * row;
  const float* group_sums = tile.inputs.group_sums + static_cast<size_t>(first_token) * num_groups;
  const float* input_scales = tile.inputs.scales + static_cast<size_t>(first_token) * num_groups;
  for (int token = 0; token < Tokens; ++token) {
    for (int part = 0; part < Panels * kParts; ++part) results[token * results_stride + part] = Vector{};
  }
  for (int group = 0; group < num_groups; ++group) {
    CodeSums sums[Tokens][Panels][kParts];
#pragma GCC unroll 12
    for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
      for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) sums[token][panel][part] = CodeSums{};
      }
    }
#pragma GCC unroll 4
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        IntVector codes[Panels][kParts];
#pragma GCC unroll 8
        for (int panel = 0; panel < Panels; ++panel) {
          const uint8_t* place = weights + panel * panel_bytes + chunk * 64;
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) {
            const IntVector raw = load_int_vector(place + part * sizeof(Vector));
            codes[panel][part] = (half ? raw >> 4 : raw) & broadcast(int32_t{0x0f0f0f0f});
          }
          // The next tile's, else memory rests while there are many tokens to multiply.
          if (half == 0) __builtin_prefetch(place + Panels * panel_bytes, 0, 2);
        }
#pragma GCC unroll 12
        for (int token = 0; token < Tokens; ++token) {
          const int32_t* word = words + token * row + chunk * 2 + half;
#pragma GCC unroll 8
          for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
            for (int part = 0; part < kParts; ++part) {
              sums[token][panel][part] =
                  add_code_products(sums[token][panel][part], codes[panel][part], word);
            }
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const uint8_t* place = scales + panel * scales_bytes + part * kWidth;
        const Vector scale = from_bytes(place), zero = from_bytes(place + kLanes);
#pragma GCC unroll 12
        for (int token = 0; token < Tokens; ++token) {
          const Vector sum = __builtin_convertvector(total_of(sums[token][panel][part]), Vector);
          Vector& result = results[token * results_stride + panel * kParts + part];
          const Vector centered = multiply_add(zero, broadcast(group_sums[token * num_groups]), sum);  // exact
          result = multiply_add(centered, scale * broadcast(input_scales[token * num_groups]), result);
        }
      }
    }
    weights += kGroupBytes, scales += kGroupScaleBytes, words += kGroupWords, ++group_sums, ++input_scales;
  }
}

}  // namespace
