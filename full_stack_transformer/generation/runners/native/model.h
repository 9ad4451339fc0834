// The layers of a decoder over the kernels: what is normalized, projected, attended to and added.
//
// Families of models differ in numbers, in the norms that there are, and in what is added when; families.py
// says which family has what.
//
// `Decoder::forward` reads tokens behind those of their sequences.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "adapters.h"
#include "attention.h"
#include "int4.h"
#include "kernels.h"
#include "memory_and_threads.h"

namespace {

constexpr int kPairsOfPiece = 4;

struct DecoderShape {
  int32_t num_layers, hidden_size, num_heads, num_key_value_heads, head_size, intermediate_size;
  int32_t vocab_size, max_length, num_blocks, block_size, weights_type, kv_type, num_threads;
  int32_t activation;       // of MLPs
  int32_t is_gated;         // activation(gate) * up, else activation(inner)
  int32_t is_parallel;      // an MLP reads what its layer's attention has read, not what that has written
  int32_t centers_in_norm;  // LayerNorm, else RMSNorm
  int32_t adapter_bits;
  float norm_epsilon, attention_scale, embedding_scale, residual_scale, logit_scale;
  float attention_cap, logit_cap;  // 0 for none
};

enum LinearName : int32_t { kAttentionIn = 0, kAttentionOut, kMlpIn, kMlpOut, kNumLinears };
// Before attention and MLP, after them, and of queries and keys.
enum NormName : int32_t {
  kAttentionNorm = 0, kMlpNorm, kAttentionOutNorm, kMlpOutNorm, kQueryNorm, kKeyNorm, kNumNorms
};

struct Norm {
  int size = 0;  // numbers that are normalized together; 0 where there is no norm
  Buffer<float> weight, bias;
  bool has_bias = false;
};

// Cosines and sines (max_length, half) of the angles by which the first 2 * half numbers of a head are turned.
struct Rotary {
  int half = 0;
  Buffer<float> cosines, sines;
};

struct Layer {
  Linear linears[kNumLinears];
  Norm norms[kNumNorms];
  int rotary = -1;  // which one; -1 for none
};

class Decoder {
 public:
  explicit Decoder(const DecoderShape& shape)
      : shape_(shape), type_(type_of(shape)), layers_(shape.num_layers), adapters_(shape.adapter_bits),
        attention_(attention_of(shape)), pool_(shape.num_threads) {
    for (int layer = 0; layer < shape.num_layers; ++layer) {
      for (int name = 0; name < kNumLinears; ++name) layers_[layer].linears[name].place = layer * kNumLinears + name;
    }
    head_.place = num_linears() - 1;
  }

  DecoderShape shape_;
  WeightsType type_;
  HugePages pages_;  // of weights
  std::vector<Layer> layers_;
  Linear head_;
  Norm last_norm_;
  Buffer<uint8_t> token_embeddings_;     // (vocabulary, hidden), bf16 or fp32
  Buffer<float> position_embeddings_;    // (max_length, hidden), where the model has them
  bool has_positions_ = false;
  std::vector<Rotary> rotaries_;
  Adapters adapters_;

  int num_linears() const { return shape_.num_layers * kNumLinears + 1; }

  static WeightsType type_of(const DecoderShape& shape) {
    const auto type = static_cast<WeightsType>(shape.weights_type);
    return type == kBFloat16 ? kBFloat16Weights : type;
  }

  static AttentionShape attention_of(const DecoderShape& shape) {
    const auto stored = static_cast<WeightsType>(shape.kv_type);
    const bool are_pairs = stored == kBFloat16 && type_of(shape) == kBFloat16Pairs;
    return {shape.num_layers, shape.num_heads, shape.num_key_value_heads, shape.head_size,
            shape.num_blocks, shape.block_size, shape.attention_scale, shape.attention_cap, stored,
            are_pairs ? kBFloat16Pairs : stored};
  }

  void set_window(int layer, int window) { attention_.set_window(layer, window); }

  void forward(const Reading& reading, int num_rows, const int32_t* rows, float* logits) {
    const int hidden = shape_.hidden_size, num_tokens = reading.num_tokens;
    reading_ = reading;
    attention_.begin(reading);
    adapters_.begin(num_tokens, reading.adapters);
    hidden_.reserve(static_cast<size_t>(num_tokens) * hidden);
    each_token(num_tokens, [&](int token) { embed(token); });
    for (int layer = 0; layer < shape_.num_layers; ++layer) {
      const Layer& weights = layers_[layer];
      attend(layer);
      if (shape_.is_parallel) compute_inner(weights);
      add(weights.linears[kAttentionOut], attended_.get(), weights.norms[kAttentionOutNorm]);
      if (!shape_.is_parallel) compute_inner(weights);
      add(weights.linears[kMlpOut], inner_.get(), weights.norms[kMlpOutNorm]);
    }
    if (num_rows == 0) return;
    for (int row = 0; row < num_rows; ++row) {  // rows ascend, so nothing is overwritten before it is read
      std::memmove(hidden_.get() + static_cast<size_t>(row) * hidden,
                   hidden_.get() + static_cast<size_t>(rows[row]) * hidden, hidden * sizeof(float));
    }
    if (reading.adapters) {
      std::vector<int32_t> of_rows(num_rows);
      for (int row = 0; row < num_rows; ++row) of_rows[row] = reading.adapters[rows[row]];
      adapters_.begin(num_rows, of_rows.data());
    }
    apply(head_, normalized(head_, last_norm_, num_rows), num_rows, logits, shape_.vocab_size,
          Ending::kScores);
  }

  // Hidden states (tokens, hidden) of the last forward pass, after the last norm.
  void hidden_states(float* out) {
    normalized_.reserve(static_cast<size_t>(reading_.num_tokens) * shape_.hidden_size);
    each_token(reading_.num_tokens, [&](int token) { normalize_hidden(last_norm_, token); });
    std::memcpy(out, normalized_.get(), sizeof(float) * reading_.num_tokens * shape_.hidden_size);
  }

 private:
  int attention_size() const { return shape_.num_heads * shape_.head_size; }

  // Few tokens are done sooner than another thread has noticed them.
  void each_token(int num_tokens, const std::function<void(int)>& work) {
    if (num_tokens < 4) {
      for (int token = 0; token < num_tokens; ++token) work(token);
    } else {
      pool_.run(num_tokens, work);
    }
  }

  void embed(int token) {
    const int hidden = shape_.hidden_size;
    float* out = hidden_.get() + static_cast<size_t>(token) * hidden;
    const size_t first = static_cast<size_t>(reading_.ids[token]) * hidden;
    const float* position = position_embeddings_.get() + static_cast<size_t>(reading_.positions[token]) * hidden;
    for (int k = 0; k < hidden; k += kLanes) {
      Floats values = type_ == kFloat32
                          ? load(reinterpret_cast<float*>(token_embeddings_.get()) + first + k)
                          : from_bfloat16(reinterpret_cast<uint16_t*>(token_embeddings_.get()) + first + k);
      values = values * all(shape_.embedding_scale);
      if (has_positions_) values = values + load(position + k);
      store(out + k, values);
    }
  }

  void normalize(const Norm& norm, const float* in, float* out) const {
    const int size = norm.size;
    Floats mean = all(0), squares = all(0);
    if (shape_.centers_in_norm) {
      Floats sum = all(0);
      for (int k = 0; k < size; k += kLanes) sum = sum + load(in + k);
      mean = all(sum_of(sum) / size);
    }
    for (int k = 0; k < size; k += kLanes) {
      const Floats value = load(in + k) - mean;
      squares = multiply_add(value, value, squares);
    }
    const float variance = sum_of(squares) / size;
    const Floats factor = all(1 / std::sqrt(variance + shape_.norm_epsilon));
    for (int k = 0; k < size; k += kLanes) {
      const Floats bias = norm.has_bias ? load(norm.bias.get() + k) : all(0);
      store(out + k, multiply_add((load(in + k) - mean) * factor, load(norm.weight.get() + k), bias));
    }
  }

  // One token's hidden state -> normalized_.
  void normalize_hidden(const Norm& norm, int token) {
    const size_t place = static_cast<size_t>(token) * shape_.hidden_size;
    normalize(norm, hidden_.get() + place, normalized_.get() + place);
  }

  // Hidden states, normalized where there is a norm, as the linear layer takes them.
  Inputs normalized(const Linear& linear, const Norm& norm, int num_tokens) {
    if (!norm.size) return prepare(linear, hidden_.get(), num_tokens);
    normalized_.reserve(static_cast<size_t>(num_tokens) * shape_.hidden_size);
    return prepare(linear, normalized_.get(), num_tokens, &norm);
  }

  // Values (T, K) as the linear layer takes them; normalized before, where there is a norm.
  Inputs prepare(const Linear& linear, const float* values, int num_tokens, const Norm* norm = nullptr) {
    const WeightsType type = linear.type;
    const int num_values = linear.num_inputs;
    if (type == kFloat32 || type == kBFloat16) {
      if (norm) each_token(num_tokens, [&](int token) { normalize_hidden(*norm, token); });
      return {reinterpret_cast<const int32_t*>(values), nullptr, nullptr, nullptr, values};
    }
    const int num_words = type == kInt4 ? num_values / 4 : num_values / values_of_group(type) * words_of_group(type);
    const int num_groups = num_values / kGroupInputs;
    int32_t* words = words_.reserve(static_cast<size_t>(num_tokens) * num_words);
    float* scales = scales_.reserve(static_cast<size_t>(num_tokens) * std::max(1, num_groups));
    int32_t* sums = sums_.reserve(num_tokens);
    float* group_sums = group_sums_.reserve(static_cast<size_t>(num_tokens) * num_groups);
    each_token(num_tokens, [&](int token) {
      if (norm) normalize_hidden(*norm, token);
      const float* in = values + static_cast<size_t>(token) * num_values;
      int32_t* out = words + static_cast<size_t>(token) * num_words;
      if (type == kInt8) {
        thread_local Buffer<float> buffer;
        float* rotated = buffer.reserve(num_values);
        const float factor = rotate_blocks(in, num_values, rotated);
        sums[token] = quantize(rotated, num_values, reinterpret_cast<Int8Input*>(out), scales[token]);
        scales[token] *= factor;
      } else if (type == kInt4) {
        const size_t first = static_cast<size_t>(token) * num_groups;
        quantize_groups(in, num_values, out, scales + first, group_sums + first);
      } else if constexpr (kHasBFloat16Products) {
        round_to_bfloat16_pairs(in, num_values, out);
      }
    });
    return {words, scales, sums, group_sums, values};
  }

  void apply(const Linear& linear, Inputs inputs, int num_tokens, float* outputs, int stride,
             Ending ending) {
    const float scale = ending == Ending::kScores ? shape_.logit_scale : shape_.residual_scale;
    const auto activation = static_cast<Activation>(shape_.activation);
    const Tile tile{&linear, linear.panels, linear.num_groups, 0, inputs, outputs, stride, ending, activation, scale,
                    shape_.logit_cap, adapters_.biases(pool_, linear, inputs.plain, num_tokens)};
    // Pieces large enough for the widest tile. With many tokens, which take long, all threads get the same.
    const int num_pairs = linear.num_panels / 2, num_threads = shape_.num_threads;
    const int size = std::max(1, std::min(kPairsOfPiece, num_pairs / (2 * num_threads)));
    const bool is_shared = num_tokens >= kManyTokens;
    int num_pieces = (num_pairs + size - 1) / size;
    if (is_shared) num_pieces = std::min(num_pairs, (num_pieces + num_threads - 1) / num_threads * num_threads);
    const auto begin = [&](int piece) {
      return 2 * (is_shared ? num_pairs * piece / num_pieces : std::min(num_pairs, size * piece));
    };
    pool_.run(num_pieces, [&](int piece) {
      const int first = begin(piece), end = begin(piece + 1);
      switch (linear.type) {
        case kFloat32: return compute_panels<kFloat32>(tile, num_tokens, first, end);
        case kInt4: return compute_panels<kInt4>(tile, num_tokens, first, end);
        case kInt8: return compute_panels<kInt8>(tile, num_tokens, first, end);
        default: return compute_panels<kBFloat16Weights>(tile, num_tokens, first, end);
      }
    });
  }

  // Adds what a linear layer makes, normalized where there is a norm, to the hidden states.
  void add(const Linear& linear, const float* values, const Norm& norm) {
    const int hidden = shape_.hidden_size, num_tokens = reading_.num_tokens;
    const Inputs inputs = prepare(linear, values, num_tokens);
    if (!norm.size) return apply(linear, inputs, num_tokens, hidden_.get(), hidden, Ending::kAdd);
    float* added = added_.reserve(static_cast<size_t>(num_tokens) * hidden);
    apply(linear, inputs, num_tokens, added, hidden, Ending::kStore);
    each_token(num_tokens, [&](int token) {
      const size_t place = static_cast<size_t>(token) * hidden;
      normalize(norm, added + place, added + place);
      for (int k = 0; k < hidden; k += kLanes) {
        const Floats values = load(added + place + k) * all(shape_.residual_scale);
        store(hidden_.get() + place + k, load(hidden_.get() + place + k) + values);
      }
    });
  }

  // The first half of an MLP.
  void compute_inner(const Layer& layer) {
    const int size = shape_.intermediate_size, num_tokens = reading_.num_tokens;
    float* inner = inner_.reserve(static_cast<size_t>(num_tokens) * size);
    const Linear& linear = layer.linears[kMlpIn];
    apply(linear, normalized(linear, layer.norms[kMlpNorm], num_tokens), num_tokens, inner, size,
          shape_.is_gated ? Ending::kGated : Ending::kActivated);
  }

  void attend(int layer) {
    const int size = shape_.head_size, num_heads = shape_.num_heads;
    const int num_all = num_heads + 2 * shape_.num_key_value_heads;
    float* projected = projected_.reserve(static_cast<size_t>(reading_.num_tokens) * num_all * size);
    attended_.reserve(static_cast<size_t>(reading_.num_tokens) * attention_size());
    const Linear& linear = layers_[layer].linears[kAttentionIn];
    apply(linear, normalized(linear, layers_[layer].norms[kAttentionNorm], reading_.num_tokens),
          reading_.num_tokens, projected, num_all * size, Ending::kStore);
    each_token(reading_.num_tokens, [&](int token) { remember(layer, token); });
    attention_.attend(pool_, layer, projected, num_all * size, attended_.get());
  }

  // Normalizes queries and keys, turns them by their position, and stores keys and values.
  void remember(int layer, int token) {
    const int size = shape_.head_size, num_heads = shape_.num_heads;
    const int num_kv = shape_.num_key_value_heads, position = reading_.positions[token];
    float* all = projected_.get() + static_cast<size_t>(token) * (num_heads + 2 * num_kv) * size;
    float* key = all + num_heads * size;
    const Layer& weights = layers_[layer];
    normalize_each(weights.norms[kQueryNorm], all, num_heads * size);
    normalize_each(weights.norms[kKeyNorm], key, num_kv * size);
    if (weights.rotary >= 0) {
      const Rotary& rotary = rotaries_[weights.rotary];
      for (int head = 0; head < num_heads + num_kv; ++head) rotate(rotary, all + head * size, position);
    }
    attention_.remember(layer, token, key, key + num_kv * size);
  }

  // In place: each head by itself or all of them together, as the norm is wide.
  void normalize_each(const Norm& norm, float* values, int num_values) const {
    if (!norm.size) return;
    for (int first = 0; first < num_values; first += norm.size) {
      normalize(norm, values + first, values + first);
    }
  }

  // Su et al. 2021 (RoFormer), with the two numbers of a pair half of what is turned apart.
  static void rotate(const Rotary& rotary, float* head, int position) {
    const int half = rotary.half;
    const float* cosines = rotary.cosines.get() + static_cast<size_t>(position) * half;
    const float* sines = rotary.sines.get() + static_cast<size_t>(position) * half;
    for (int d = 0; d < half; ++d) {
      const float first = head[d], second = head[d + half];
      head[d] = first * cosines[d] - second * sines[d];
      head[d + half] = second * cosines[d] + first * sines[d];
    }
  }

  Attention attention_;
  Pool pool_;
  Reading reading_;
  Buffer<float> hidden_, normalized_, projected_, attended_, inner_, added_, scales_, group_sums_;
  Buffer<int32_t> words_, sums_;
};

void set_norm(Norm& norm, const float* weight, const float* bias, int size) {
  norm.size = size;
  std::copy(weight, weight + size, norm.weight.reserve(size));
  norm.has_bias = bias != nullptr;
  if (bias) std::copy(bias, bias + size, norm.bias.reserve(size));
}

}  // namespace
