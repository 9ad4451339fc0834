// Adapters: two small matrices beside a linear layer, other ones for other tokens of a batch.
//
//   outputs + up (down inputs),  of inputs as they are before they are rounded or rotated
//
// Hu et al. 2021 (LoRA). A step reads all matrices of every adapter that it has tokens of, which takes longer
// than their products: so they are kept as integers of 16 or 8 bits, with one scale for each rank. Integers are
// exact in fp32, in which all sums are taken. Knows nothing of models.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"

namespace {

constexpr int kRanksTogether = 4;  // their sums are under way at once
constexpr int kTokensTogether = kParts == 1 ? 4 : 1;
constexpr int kTokensOfShare = 8;
// Asked for ahead of what is multiplied: a share's matrices are over before the processor has noticed that they
// are read in order.
constexpr size_t kBytesAhead = 8192;

// 16 outputs, all of one part of a joined layer.
struct RankPanel {
  size_t place = 0;  // of their codes in `up`
  int first_rank = 0, num_ranks = 0;
};

// The matrices beside a linear layer. The ranks of the parts of a joined one stand one after another.
struct LowRank {
  int num_ranks = 0;  // a multiple of kRanksTogether; 0 where nothing stands beside the layer
  uint8_t* down = nullptr;  // [ranks / 4][inputs / 16][4 ranks][16 inputs]
  uint8_t* up = nullptr;    // [panels][ranks of the part][16 outputs]
  Buffer<float> scales;     // (ranks), of down and up together
  std::vector<RankPanel> panels;
};

// What 1 stands for, where the largest number is this; too little to be divided by counts as 0.
template <class Code>
inline float code_scale(float largest) {
  return largest > 1e-30f ? largest / std::numeric_limits<Code>::max() : 1;
}

template <class Code>
inline Code code_of(float value, float scale) {
  return static_cast<Code>(nearest_integer(value / scale));
}

// Sixteen codes as numbers.
template <class Code>
inline Floats from_codes(const Code* codes) {
  return each_part([&](int part) { return from_integers(codes + part * kWidth); });
}

// down (ranks, K) in fp32; up (N, most ranks of a part): of output n `ranks[n]`, from `first_ranks[n]` on.
struct LowRankSource {
  const float *down, *up;
  const int32_t *first_ranks, *ranks;
  int num_ranks, most_ranks;

  const float* up_row(int row) const { return up + static_cast<size_t>(row) * most_ranks; }
};

template <class Code>
void pack_down(LowRank& packed, HugePages& pages, int num_inputs, const LowRankSource& source) {
  const size_t group = static_cast<size_t>(kRanksTogether) * num_inputs;
  packed.down = pages.take(sizeof(Code) * packed.num_ranks / kRanksTogether * group);
  for (int rank = 0; rank < source.num_ranks; ++rank) {
    const float* in = source.down + static_cast<size_t>(rank) * num_inputs;
    float largest = 0;
    for (int k = 0; k < num_inputs; ++k) largest = std::max(largest, std::fabs(in[k]));
    const float scale = packed.scales.get()[rank] = code_scale<Code>(largest);
    Code* out = reinterpret_cast<Code*>(packed.down) + rank / kRanksTogether * group;
    for (int k = 0; k < num_inputs; ++k) {
      const int vector = k / kLanes * kRanksTogether + rank % kRanksTogether;
      out[vector * kLanes + k % kLanes] = code_of<Code>(in[k], scale);
    }
  }
}

template <class Code>
void pack_up(LowRank& packed, HugePages& pages, const Linear& linear, const LowRankSource& source, bool is_pair) {
  std::vector<float> scales(packed.num_ranks);  // first the largest numbers
  for (int row = 0; row < linear.num_outputs; ++row) {
    for (int rank = 0; rank < source.ranks[row]; ++rank) {
      float& largest = scales[source.first_ranks[row] + rank];
      largest = std::max(largest, std::fabs(source.up_row(row)[rank]));
    }
  }
  for (float& scale : scales) scale = code_scale<Code>(scale);
  size_t num_codes = 0;
  for (int panel = 0; panel < linear.num_panels; ++panel) {
    const int row = row_of(panel * kLanes, linear.num_outputs, is_pair);
    RankPanel& whole = packed.panels.emplace_back();
    if (row >= 0) whole = {num_codes, source.first_ranks[row], source.ranks[row]};
    num_codes += static_cast<size_t>(whole.num_ranks) * kLanes;
  }
  packed.up = pages.take(sizeof(Code) * num_codes);
  for (int number = 0; number < linear.num_panels * kLanes; ++number) {
    const int row = row_of(number, linear.num_outputs, is_pair);
    if (row < 0) continue;  // the pages hold zeros
    const RankPanel& panel = packed.panels[number / kLanes];
    Code* out = reinterpret_cast<Code*>(packed.up) + panel.place + number % kLanes;
    for (int rank = 0; rank < panel.num_ranks; ++rank) {
      out[rank * kLanes] = code_of<Code>(source.up_row(row)[rank], scales[panel.first_rank + rank]);
    }
  }
  for (int rank = 0; rank < packed.num_ranks; ++rank) packed.scales.get()[rank] *= scales[rank];
}

template <class Code>
void pack_low_rank(LowRank& packed, HugePages& pages, const Linear& linear, const LowRankSource& source,
                   bool is_pair) {
  packed.num_ranks = (source.num_ranks + kRanksTogether - 1) / kRanksTogether * kRanksTogether;
  std::fill_n(packed.scales.reserve(packed.num_ranks), packed.num_ranks, 0.0f);
  pack_down<Code>(packed, pages, linear.num_inputs, source);
  pack_up<Code>(packed, pages, linear, source, is_pair);
}

template <class Code>
inline void ask_ahead(const Code* codes, size_t num_vectors) {
  const auto* place = reinterpret_cast<const uint8_t*>(codes) + kBytesAhead;
  for (size_t byte = 0; byte < num_vectors * kLanes * sizeof(Code); byte += 64) __builtin_prefetch(place + byte, 0, 2);
}

// Of some tokens: inputs (K) of each -> numbers (ranks) of each.
template <class Code, int Tokens>
inline void project_down(const LowRank& matrices, int num_inputs, const float* const* inputs, float* out) {
  const Code* codes = reinterpret_cast<const Code*>(matrices.down);
  for (int first = 0; first < matrices.num_ranks; first += kRanksTogether) {
    Floats sums[Tokens][kRanksTogether];
#pragma GCC unroll 4
    for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 4
      for (int rank = 0; rank < kRanksTogether; ++rank) sums[token][rank] = all(0);
    }
    for (int k = 0; k < num_inputs; k += kLanes, codes += kRanksTogether * kLanes) {
      ask_ahead(codes, kRanksTogether);
      Floats weights[kRanksTogether];
#pragma GCC unroll 4
      for (int rank = 0; rank < kRanksTogether; ++rank) weights[rank] = from_codes(codes + rank * kLanes);
#pragma GCC unroll 4
      for (int token = 0; token < Tokens; ++token) {
        const Floats values = load(inputs[token] + k);
#pragma GCC unroll 4
        for (int rank = 0; rank < kRanksTogether; ++rank) {
          sums[token][rank] = multiply_add(weights[rank], values, sums[token][rank]);
        }
      }
    }
#pragma GCC unroll 4
    for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 4
      for (int rank = 0; rank < kRanksTogether; ++rank) {
        out[token * matrices.num_ranks + first + rank] = sum_of(sums[token][rank]) * matrices.scales.get()[first + rank];
      }
    }
  }
}

// Numbers (ranks) of each token -> biases of a layer and what is added to them (panels * 16).
template <class Code, int Tokens>
inline void project_up(const LowRank& matrices, const float* biases, const float* numbers, float* const* outputs) {
  const Code* codes = reinterpret_cast<const Code*>(matrices.up);
  int place = 0;
  for (const RankPanel& panel : matrices.panels) {
    Floats sums[Tokens];
#pragma GCC unroll 4
    for (int token = 0; token < Tokens; ++token) sums[token] = load(biases + place);
    const Code* weights = codes + panel.place;
    ask_ahead(weights, panel.num_ranks);
    const float* factors = numbers + panel.first_rank;
    for (int rank = 0; rank < panel.num_ranks; ++rank, weights += kLanes) {
      const Floats values = from_codes(weights);
#pragma GCC unroll 4
      for (int token = 0; token < Tokens; ++token) {
        sums[token] = multiply_add(values, all(factors[token * matrices.num_ranks + rank]), sums[token]);
      }
    }
#pragma GCC unroll 4
    for (int token = 0; token < Tokens; ++token) store(outputs[token] + place, sums[token]);
    place += kLanes;
  }
}

template <class Code, int Tokens = kTokensTogether>
void project_some(const LowRank& matrices, const Linear& linear, int num_tokens, const float* const* inputs,
                  float* const* outputs) {
  thread_local Buffer<float> buffer;
  float* numbers = buffer.reserve(static_cast<size_t>(kTokensTogether) * matrices.num_ranks);
  if constexpr (Tokens > 0) {
    if (num_tokens == Tokens) {
      project_down<Code, Tokens>(matrices, linear.num_inputs, inputs, numbers);
      project_up<Code, Tokens>(matrices, linear.bias.get(), numbers, outputs);
    } else {
      project_some<Code, Tokens - 1>(matrices, linear, num_tokens, inputs, outputs);
    }
  }
}

// For tokens of one adapter: inputs (K) of each -> biases and what is added to them (panels * 16) of each.
template <class Code>
void project(const LowRank& matrices, const Linear& linear, int num_tokens, const float* const* inputs,
             float* const* outputs) {
  for (int first = 0; first < num_tokens; first += kTokensTogether) {
    project_some<Code>(matrices, linear, std::min(kTokensTogether, num_tokens - first), inputs + first, outputs + first);
  }
}

}  // namespace
