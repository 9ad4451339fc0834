// The layers of GPT-2 and Llama over the kernels: what is normalized, projected, attended to and added.
//
// `Decoder::forward` reads tokens behind those of their slots.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"
#include "kernels.h"
#include "memory_and_threads.h"

namespace {

constexpr int kPairsOfPiece = 4;

struct DecoderShape {
  int32_t num_layers, hidden_size, num_heads, num_key_value_heads, head_size, intermediate_size;
  int32_t vocab_size, max_length, num_slots, weights_type, num_threads;
  int32_t is_gated;         // silu(gate) * up, else GELU by tanh
  int32_t centers_in_norm;  // LayerNorm, else RMSNorm
  int32_t has_rotary;
  float norm_epsilon, attention_scale;
};

enum LinearName : int32_t { kAttentionIn = 0, kAttentionOut, kMlpIn, kMlpOut, kNumLinears };
enum NormName : int32_t { kAttentionNorm = 0, kMlpNorm, kNumNorms };

struct Norm {
  Buffer<float> weight, bias;
  bool has_bias = false;
};

struct Layer {
  Linear linears[kNumLinears];
  Norm norms[kNumNorms];
};

class Decoder {
 public:
  explicit Decoder(const DecoderShape& shape)
      : shape_(shape), type_(type_of(shape)), layers_(shape.num_layers), attention_(attention_of(shape)),
        pool_(shape.num_threads) {}

  DecoderShape shape_;
  WeightsType type_;
  HugePages pages_;  // of weights
  std::vector<Layer> layers_;
  Linear head_;
  Norm last_norm_;
  Buffer<uint8_t> token_embeddings_;     // (vocabulary, hidden), bf16 or fp32
  Buffer<float> position_embeddings_;    // (max_length, hidden), where the model has them
  bool has_positions_ = false;
  Buffer<float> cosines_, sines_;        // (max_length, head_size / 2)

  static WeightsType type_of(const DecoderShape& shape) {
    const auto type = static_cast<WeightsType>(shape.weights_type);
    return type == kBFloat16 ? kBFloat16Weights : type;
  }

  static AttentionShape attention_of(const DecoderShape& shape) {
    return {shape.num_layers, shape.num_heads, shape.num_key_value_heads, shape.head_size,
            shape.max_length, shape.num_slots, shape.attention_scale, type_of(shape)};
  }

  void copy_slot(int from, int to, int length) { attention_.copy_slot(from, to, length); }

  void forward(int num_tokens, const int32_t* ids, const int32_t* slots, const int32_t* positions,
               int num_rows, const int32_t* rows, float* logits) {
    const int hidden = shape_.hidden_size;
    ids_ = ids, slots_ = slots, positions_ = positions, num_tokens_ = num_tokens;
    hidden_.reserve(static_cast<size_t>(num_tokens) * hidden);
    each_token(num_tokens, [&](int token) { embed(token); });
    for (int layer = 0; layer < shape_.num_layers; ++layer) {
      attend(layer);
      apply(layers_[layer].linears[kAttentionOut], prepare(attended_.get(), attention_size(), num_tokens),
            num_tokens, hidden_.get(), hidden, Ending::kAdd);
      compute_mlp(layers_[layer]);
    }
    if (num_rows == 0) return;
    for (int row = 0; row < num_rows; ++row) {  // rows ascend, so nothing is overwritten before it is read
      std::memmove(hidden_.get() + static_cast<size_t>(row) * hidden,
                   hidden_.get() + static_cast<size_t>(rows[row]) * hidden, hidden * sizeof(float));
    }
    apply(head_, normalized(last_norm_, num_rows), num_rows, logits, shape_.vocab_size, Ending::kStore);
  }

  // Hidden states (tokens, hidden) of the last forward pass, after the last norm.
  void hidden_states(float* out) {
    normalized_.reserve(static_cast<size_t>(num_tokens_) * shape_.hidden_size);
    each_token(num_tokens_, [&](int token) { normalize(last_norm_, token); });
    std::memcpy(out, normalized_.get(), sizeof(float) * num_tokens_ * shape_.hidden_size);
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
    const size_t first = static_cast<size_t>(ids_[token]) * hidden;
    const float* position = position_embeddings_.get() + static_cast<size_t>(positions_[token]) * hidden;
    for (int k = 0; k < hidden; k += kLanes) {
      Floats values = type_ == kFloat32
                          ? load(reinterpret_cast<float*>(token_embeddings_.get()) + first + k)
                          : from_bfloat16(reinterpret_cast<uint16_t*>(token_embeddings_.get()) + first + k);
      if (has_positions_) values = values + load(position + k);
      store(out + k, values);
    }
  }

  // One token's hidden state -> normalized_.
  void normalize(const Norm& norm, int token) {
    const int hidden = shape_.hidden_size;
    const float* in = hidden_.get() + static_cast<size_t>(token) * hidden;
    float* out = normalized_.get() + static_cast<size_t>(token) * hidden;
    Floats mean = all(0), squares = all(0);
    if (shape_.centers_in_norm) {
      Floats sum = all(0);
      for (int k = 0; k < hidden; k += kLanes) sum = sum + load(in + k);
      mean = all(sum_of(sum) / hidden);
    }
    for (int k = 0; k < hidden; k += kLanes) {
      const Floats value = load(in + k) - mean;
      squares = multiply_add(value, value, squares);
    }
    const float variance = sum_of(squares) / hidden;
    const Floats factor = all(1 / std::sqrt(variance + shape_.norm_epsilon));
    for (int k = 0; k < hidden; k += kLanes) {
      const Floats bias = norm.has_bias ? load(norm.bias.get() + k) : all(0);
      store(out + k, multiply_add((load(in + k) - mean) * factor, load(norm.weight.get() + k), bias));
    }
  }

  // Hidden states, normalized, as the linear layers take them.
  Inputs normalized(const Norm& norm, int num_tokens) {
    normalized_.reserve(static_cast<size_t>(num_tokens) * shape_.hidden_size);
    return prepare(normalized_.get(), shape_.hidden_size, num_tokens, &norm);
  }

  // Values (T, K) as the linear layers take them; normalized before, where there is a norm.
  Inputs prepare(const float* values, int num_values, int num_tokens, const Norm* norm = nullptr) {
    if (type_ == kFloat32 || type_ == kBFloat16) {
      if (norm) each_token(num_tokens, [&](int token) { normalize(*norm, token); });
      return {reinterpret_cast<const int32_t*>(values), nullptr, nullptr};
    }
    const int num_words = num_values / values_of_group(type_) * words_of_group(type_);
    int32_t* words = words_.reserve(static_cast<size_t>(num_tokens) * num_words);
    float* scales = scales_.reserve(num_tokens);
    int32_t* sums = sums_.reserve(num_tokens);
    each_token(num_tokens, [&](int token) {
      if (norm) normalize(*norm, token);
      const float* in = values + static_cast<size_t>(token) * num_values;
      int32_t* out = words + static_cast<size_t>(token) * num_words;
      if (type_ == kInt8) {
        quantize(in, num_values, out, scales[token], sums[token]);
      } else if constexpr (kHasBFloat16Products) {
        round_to_bfloat16_pairs(in, num_values, out);
      }
    });
    return {words, scales, sums};
  }

  void apply(const Linear& linear, Inputs inputs, int num_tokens, float* outputs, int stride,
             Ending ending) {
    const Tile tile{&linear, inputs, outputs, stride, ending};
    // Pieces small enough to share evenly, large enough for the widest tile.
    const int num_pairs = linear.num_panels / 2;
    const int pairs_of_piece = std::max(1, std::min(kPairsOfPiece, num_pairs / (2 * shape_.num_threads)));
    const int num_pieces = (num_pairs + pairs_of_piece - 1) / pairs_of_piece;
    pool_.run(num_pieces, [&](int piece) {
      const int first = 2 * piece * pairs_of_piece;
      const int end = std::min(linear.num_panels, first + 2 * pairs_of_piece);
      switch (type_) {
        case kFloat32: return compute_panels<kFloat32>(tile, num_tokens, first, end);
        case kInt8: return compute_panels<kInt8>(tile, num_tokens, first, end);
        default: return compute_panels<kBFloat16Weights>(tile, num_tokens, first, end);
      }
    });
  }

  void compute_mlp(Layer& layer) {
    const int size = shape_.intermediate_size, hidden = shape_.hidden_size;
    float* inner = inner_.reserve(static_cast<size_t>(num_tokens_) * size);
    apply(layer.linears[kMlpIn], normalized(layer.norms[kMlpNorm], num_tokens_), num_tokens_, inner, size,
          shape_.is_gated ? Ending::kGated : Ending::kGelu);
    apply(layer.linears[kMlpOut], prepare(inner, size, num_tokens_), num_tokens_, hidden_.get(), hidden,
          Ending::kAdd);
  }

  void attend(int layer) {
    const int size = shape_.head_size, num_heads = shape_.num_heads;
    const int num_all = num_heads + 2 * shape_.num_key_value_heads;
    float* projected = projected_.reserve(static_cast<size_t>(num_tokens_) * num_all * size);
    attended_.reserve(static_cast<size_t>(num_tokens_) * attention_size());
    apply(layers_[layer].linears[kAttentionIn], normalized(layers_[layer].norms[kAttentionNorm], num_tokens_),
          num_tokens_, projected, num_all * size, Ending::kStore);
    each_token(num_tokens_, [&](int token) { remember(layer, token); });
    // By heads first: neighbouring tokens of a prompt read the same keys.
    pool_.run(num_heads * num_tokens_, [&](int item) {
      const int head = item / num_tokens_, token = item % num_tokens_;
      attention_.look(layer, slots_[token], positions_[token], head,
                      projected + (static_cast<size_t>(token) * num_all + head) * size,
                      attended_.get() + static_cast<size_t>(token) * attention_size() + head * size);
    });
  }

  // Turns queries and keys by their position and stores keys and values in the slot.
  void remember(int layer, int token) {
    const int size = shape_.head_size, num_heads = shape_.num_heads;
    const int num_kv = shape_.num_key_value_heads, position = positions_[token];
    float* all = projected_.get() + static_cast<size_t>(token) * (num_heads + 2 * num_kv) * size;
    if (shape_.has_rotary) {
      for (int head = 0; head < num_heads + num_kv; ++head) rotate(all + head * size, position);
    }
    const float* key = all + num_heads * size;
    attention_.remember(layer, slots_[token], position, key, key + num_kv * size);
  }

  // Su et al. 2021 (RoFormer), with the two numbers of a pair half a head apart.
  void rotate(float* head, int position) const {
    const int half = shape_.head_size / 2;
    const float* cosines = cosines_.get() + static_cast<size_t>(position) * half;
    const float* sines = sines_.get() + static_cast<size_t>(position) * half;
    for (int d = 0; d < half; ++d) {
      const float first = head[d], second = head[d + half];
      head[d] = first * cosines[d] - second * sines[d];
      head[d + half] = second * cosines[d] + first * sines[d];
    }
  }

  Attention attention_;
  Pool pool_;
  int num_tokens_ = 0;
  const int32_t *ids_ = nullptr, *slots_ = nullptr, *positions_ = nullptr;
  Buffer<float> hidden_, normalized_, projected_, attended_, inner_, scales_;
  Buffer<int32_t> words_, sums_;
};

void set_norm(Norm& norm, const float* weight, const float* bias, int size) {
  std::copy(weight, weight + size, norm.weight.reserve(size));
  norm.has_bias = bias != nullptr;
  if (bias) std::copy(bias, bias + size, norm.bias.reserve(size));
}

}  // namespace
