// The layers of GPT-2 and Llama over the kernels: what is normalized, projected, attended to and added.
//
// Keys and values of every slot are kept here; `Decoder::forward` reads tokens behind those of their slots.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels_avx512.h"
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
      : shape_(shape), type_(static_cast<WeightsType>(shape.weights_type)), layers_(shape.num_layers),
        pool_(shape.num_threads) {
    num_blocks_ = (shape.max_length + kLanes - 1) / kLanes;
    head_values_ = static_cast<size_t>(num_blocks_) * kLanes * shape.head_size;
    const size_t num_values =
        head_values_ * shape.num_layers * shape.num_slots * shape.num_key_value_heads;
    keys_.reserve(num_values * cache_bytes());
    values_.reserve(num_values * cache_bytes());
  }

  DecoderShape shape_;
  WeightsType type_;
  std::vector<Layer> layers_;
  Linear head_;
  Norm last_norm_;
  Buffer<uint8_t> token_embeddings_;     // (vocabulary, hidden), bf16 or fp32
  Buffer<float> position_embeddings_;    // (max_length, hidden), where the model has them
  bool has_positions_ = false;
  Buffer<float> cosines_, sines_;        // (max_length, head_size / 2)

  size_t cache_bytes() const { return type_ == kFloat32 ? 4 : 2; }

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

  void copy_slot(int from, int to, int length) {
    const size_t positions = static_cast<size_t>((length + kLanes - 1) / kLanes) * kLanes;
    const size_t bytes = positions * shape_.head_size * cache_bytes();
    for (int layer = 0; layer < shape_.num_layers; ++layer) {
      for (int head = 0; head < shape_.num_key_value_heads; ++head) {
        for (auto* cache : {keys_.get(), values_.get()}) {
          std::memcpy(cache + offset(layer, to, head), cache + offset(layer, from, head), bytes);
        }
      }
    }
  }

 private:
  int attention_size() const { return shape_.num_heads * shape_.head_size; }

  size_t offset(int layer, int slot, int head) const {
    const size_t number =
        (static_cast<size_t>(layer) * shape_.num_slots + slot) * shape_.num_key_value_heads + head;
    return number * head_values_ * cache_bytes();
  }

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
      __m512 values = type_ == kFloat32
                          ? _mm512_loadu_ps(reinterpret_cast<float*>(token_embeddings_.get()) + first + k)
                          : from_bfloat16(reinterpret_cast<uint16_t*>(token_embeddings_.get()) + first + k);
      if (has_positions_) values = _mm512_add_ps(values, _mm512_loadu_ps(position + k));
      _mm512_storeu_ps(out + k, values);
    }
  }

  // One token's hidden state -> normalized_.
  void normalize(const Norm& norm, int token) {
    const int hidden = shape_.hidden_size;
    const float* in = hidden_.get() + static_cast<size_t>(token) * hidden;
    float* out = normalized_.get() + static_cast<size_t>(token) * hidden;
    __m512 mean = _mm512_setzero_ps();
    if (shape_.centers_in_norm) {
      __m512 sum = _mm512_setzero_ps();
      for (int k = 0; k < hidden; k += kLanes) sum = _mm512_add_ps(sum, _mm512_loadu_ps(in + k));
      mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / hidden);
    }
    __m512 squares = _mm512_setzero_ps();
    for (int k = 0; k < hidden; k += kLanes) {
      const __m512 value = _mm512_sub_ps(_mm512_loadu_ps(in + k), mean);
      squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / hidden;
    const __m512 factor = _mm512_set1_ps(1 / std::sqrt(variance + shape_.norm_epsilon));
    for (int k = 0; k < hidden; k += kLanes) {
      const __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(in + k), mean), factor);
      const __m512 bias = norm.has_bias ? _mm512_load_ps(norm.bias.get() + k) : _mm512_setzero_ps();
      _mm512_storeu_ps(out + k, _mm512_fmadd_ps(value, _mm512_load_ps(norm.weight.get() + k), bias));
    }
  }

  // Hidden states, normalized, as the linear layers take them.
  Inputs normalized(const Norm& norm, int num_tokens) {
    normalized_.reserve(static_cast<size_t>(num_tokens) * shape_.hidden_size);
    return prepare(normalized_.get(), shape_.hidden_size, num_tokens, &norm);
  }

  // Values (T, K) as the linear layers take them; normalized before, where there is a norm.
  Inputs prepare(const float* values, int num_values, int num_tokens, const Norm* norm = nullptr) {
    if (type_ == kFloat32) {
      if (norm) each_token(num_tokens, [&](int token) { normalize(*norm, token); });
      return {reinterpret_cast<const int32_t*>(values), nullptr, nullptr};
    }
    const int num_groups = num_values / values_of_group(type_);
    int32_t* groups = groups_.reserve(static_cast<size_t>(num_tokens) * num_groups);
    float* scales = scales_.reserve(num_tokens);
    int32_t* sums = sums_.reserve(num_tokens);
    each_token(num_tokens, [&](int token) {
      if (norm) normalize(*norm, token);
      const float* in = values + static_cast<size_t>(token) * num_values;
      int32_t* out = groups + static_cast<size_t>(token) * num_groups;
      if (type_ == kBFloat16) {
        round_to_bfloat16(in, num_values, reinterpret_cast<uint16_t*>(out));
      } else {
        quantize(in, num_values, reinterpret_cast<int8_t*>(out), scales[token], sums[token]);
      }
    });
    return {groups, scales, sums};
  }

  static void quantize(const float* in, int num_values, int8_t* out, float& scale, int32_t& sum) {
    __m512 largest = _mm512_setzero_ps();
    __mmask16 is_nan = 0;
    for (int k = 0; k < num_values; k += kLanes) {
      const __m512 values = _mm512_loadu_ps(in + k);
      is_nan |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
      largest = _mm512_max_ps(_mm512_abs_ps(values), largest);
    }
    const float limit = _mm512_reduce_max_ps(largest);
    scale = limit > 0 ? limit / 127 : 1;
    if (is_nan) scale = NAN;  // integers cannot carry it to the logits, the scale can
    const __m512 factor = _mm512_set1_ps(1 / scale);
    __m512i total = _mm512_setzero_si512();
    for (int k = 0; k < num_values; k += kLanes) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(in + k), factor));
      total = _mm512_add_epi32(total, rounded);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + k), _mm512_cvtsepi32_epi8(rounded));
    }
    sum = _mm512_reduce_add_epi32(total);
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
        case kInt8: return compute_panels<kInt8>(tile, num_tokens, first, end);
        case kBFloat16: return compute_panels<kBFloat16>(tile, num_tokens, first, end);
        case kFloat32: return compute_panels<kFloat32>(tile, num_tokens, first, end);
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
      if (type_ == kFloat32) {
        look<kFloat32>(layer, token, head);
      } else {
        look<kBFloat16>(layer, token, head);
      }
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
    for (int head = 0; head < num_kv; ++head) {
      const float* key = all + (num_heads + head) * size;
      const float* value = key + num_kv * size;
      uint8_t* keys = keys_.get() + offset(layer, slots_[token], head);
      uint8_t* values = values_.get() + offset(layer, slots_[token], head);
      if (type_ == kFloat32) {
        remember<kFloat32>(key, value, position, keys, values);
      } else {
        remember<kBFloat16>(key, value, position, keys, values);
      }
    }
  }

  // Keys: [16 positions][group of D][position][group]; values: [group of positions][D][group]. Neighbours
  // are written by other threads at the same time, so nothing but one's own numbers is touched.
  template <WeightsType Type>
  void remember(const float* key, const float* value, int position, uint8_t* keys, uint8_t* values) const {
    const int size = shape_.head_size;
    const size_t block = static_cast<size_t>(position / kLanes) * kLanes * size;
    if constexpr (Type == kFloat32) {
      float* place = reinterpret_cast<float*>(keys) + block + position % kLanes;
      for (int d = 0; d < size; ++d) place[d * kLanes] = key[d];
      std::copy(value, value + size, reinterpret_cast<float*>(values) + static_cast<size_t>(position) * size);
    } else {
      thread_local Buffer<uint16_t> buffer;
      uint16_t* halves = buffer.reserve(size);
      round_to_bfloat16(key, size, halves);
      int32_t* pairs = reinterpret_cast<int32_t*>(keys) + block / 2 + position % kLanes;
      for (int d = 0; d < size; d += 2) std::memcpy(pairs + d / 2 * kLanes, halves + d, 4);
      round_to_bfloat16(value, size, halves);
      uint16_t* place = reinterpret_cast<uint16_t*>(values) + static_cast<size_t>(position / 2) * 2 * size +
                        position % 2;
      for (int d = 0; d < size; ++d) place[2 * d] = halves[d];
    }
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

  template <WeightsType Type>
  void look(int layer, int token, int head) {
    const int size = shape_.head_size, num_heads = shape_.num_heads;
    const int num_kv = shape_.num_key_value_heads, length = positions_[token] + 1;
    const int kv_head = head / (num_heads / num_kv), num_blocks = (length + kLanes - 1) / kLanes;
    const float* query =
        projected_.get() + (static_cast<size_t>(token) * (num_heads + 2 * num_kv) + head) * size;
    thread_local Buffer<float> score_buffer;
    thread_local Buffer<int32_t> query_buffer;
    float* scores = score_buffer.reserve(static_cast<size_t>(num_blocks + 4) * kLanes);
    int32_t* groups = query_buffer.reserve(size);
    const int num_groups = size / values_of_group(Type);
    if constexpr (Type == kFloat32) {
      std::memcpy(groups, query, sizeof(float) * size);
    } else {
      round_to_bfloat16(query, size, reinterpret_cast<uint16_t*>(groups));
    }
    const uint8_t* keys = keys_.get() + offset(layer, slots_[token], kv_head);
    int block = 0;
    for (; block + 4 <= num_blocks; block += 4) score<Type, 4>(keys, groups, num_groups, block, scores);
    for (; block < num_blocks; ++block) score<Type, 1>(keys, groups, num_groups, block, scores);
    const __m512 inverse = soften(scores, length, num_blocks);
    // In place: a number is read before half as many bytes are written.
    if constexpr (Type == kBFloat16) {
      round_to_bfloat16(scores, num_blocks * kLanes, reinterpret_cast<uint16_t*>(scores));
    }
    const uint8_t* values = values_.get() + offset(layer, slots_[token], kv_head);
    float* out = attended_.get() + static_cast<size_t>(token) * attention_size() + head * size;
    for (int d = 0; d < size; d += 4 * kLanes) {
      switch (std::min(4, (size - d) / kLanes)) {
        case 4: mix<Type, 4>(values, scores, length, inverse, d, out + d); break;
        case 3: mix<Type, 3>(values, scores, length, inverse, d, out + d); break;
        case 2: mix<Type, 2>(values, scores, length, inverse, d, out + d); break;
        default: mix<Type, 1>(values, scores, length, inverse, d, out + d);
      }
    }
  }

  // Products of the query and 16 keys for each of `Blocks` blocks.
  template <WeightsType Type, int Blocks>
  void score(const uint8_t* keys, const int32_t* groups, int num_groups, int first, float* scores) const {
    __m512i sums[Blocks];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    for (int group = 0; group < num_groups; ++group) {
#pragma GCC unroll 4
      for (int block = 0; block < Blocks; ++block) {
        const auto* place = keys + (static_cast<size_t>(first + block) * num_groups + group) * 64;
        sums[block] = add_products<Type>(sums[block], _mm512_load_si512(place), groups[group]);
      }
    }
    const __m512 scale = _mm512_set1_ps(shape_.attention_scale);
    for (int block = 0; block < Blocks; ++block) {
      _mm512_storeu_ps(scores + (first + block) * kLanes,
                       _mm512_mul_ps(_mm512_castsi512_ps(sums[block]), scale));
    }
  }

  // Scores -> exponentials relative to the largest, 0 after `length`; returns 1 / their sum.
  static __m512 soften(float* scores, int length, int num_blocks) {
    const __m512 lowest = _mm512_set1_ps(-INFINITY);
    __m512 largest = lowest, sum = _mm512_setzero_ps();
    const auto mask = [&](int block) {
      const int left = length - block * kLanes;
      return left >= kLanes ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1 << left) - 1);
    };
    for (int block = 0; block < num_blocks; ++block) {
      const __m512 values = _mm512_mask_loadu_ps(lowest, mask(block), scores + block * kLanes);
      largest = _mm512_max_ps(largest, values);
    }
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    for (int block = 0; block < num_blocks; ++block) {
      const __m512 values = _mm512_loadu_ps(scores + block * kLanes);
      const __m512 weights = _mm512_maskz_mov_ps(mask(block), exp16(_mm512_sub_ps(values, top)));
      _mm512_storeu_ps(scores + block * kLanes, weights);
      sum = _mm512_add_ps(sum, weights);
    }
    return _mm512_set1_ps(1 / _mm512_reduce_add_ps(sum));
  }

  // Weighted mean of 16 * `Parts` numbers of the values; weights and values are of one type.
  template <WeightsType Type, int Parts>
  void mix(const uint8_t* values, const float* weights, int length, __m512 inverse, int d, float* out) const {
    constexpr int kPositions = values_of_group(Type);
    const size_t stride = static_cast<size_t>(shape_.head_size) * 4;  // bytes of a group of positions
    __m512i sums[Parts];
    for (auto& sum : sums) sum = _mm512_setzero_si512();
    const auto add = [&](int number, __m512i mask) {
      int32_t group;
      std::memcpy(&group, weights + number, 4);
#pragma GCC unroll 4
      for (int part = 0; part < Parts; ++part) {
        const __m512i value = _mm512_load_si512(values + number * stride + (d + part * kLanes) * 4);
        sums[part] = add_products<Type>(sums[part], _mm512_and_si512(value, mask), group);
      }
    };
    const __m512i everything = _mm512_set1_epi32(-1);
    for (int number = 0; number < length / kPositions; ++number) add(number, everything);
    // Behind the last position may stand anything, even what is no number and would survive a weight of 0.
    if (length % kPositions) add(length / kPositions, _mm512_set1_epi32(0xffff));
    for (int part = 0; part < Parts; ++part) {
      _mm512_storeu_ps(out + part * kLanes, _mm512_mul_ps(_mm512_castsi512_ps(sums[part]), inverse));
    }
  }

  Pool pool_;
  int num_blocks_ = 0, num_tokens_ = 0;
  size_t head_values_ = 0;  // numbers of one head of one slot of one layer
  const int32_t *ids_ = nullptr, *slots_ = nullptr, *positions_ = nullptr;
  ZeroPages keys_, values_;
  Buffer<float> hidden_, normalized_, projected_, attended_, inner_, scales_;
  Buffer<int32_t> groups_, sums_;
};

void set_norm(Norm& norm, const float* weight, const float* bias, int size) {
  std::copy(weight, weight + size, norm.weight.reserve(size));
  norm.has_bias = bias != nullptr;
  if (bias) std::copy(bias, bias + size, norm.bias.reserve(size));
}

}  // namespace
