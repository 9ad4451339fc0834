// Keys and values in blocks of positions, and the attention of a token to those of its sequence.
//
// A sequence has a table of its blocks: position p lies in block table[p / block size]. Several sequences may
// have the same block.
//
// Knows nothing of layers: who calls has turned queries and keys by their positions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "memory_and_threads.h"

namespace {

constexpr WeightsType kBFloat16Weights = kHasBFloat16Products ? kBFloat16Pairs : kBFloat16;

struct AttentionShape {
  int num_layers, num_heads, num_key_value_heads, head_size, num_blocks, block_size;
  float scale, cap;        // scores are kept below `cap`, 0 for none
  WeightsType stored;      // keys and values
  WeightsType multiplied;  // as what: pairs of bf16, or bf16 as fp32
};

class Attention {
 public:
  explicit Attention(const AttentionShape& shape) : shape_(shape), windows_(shape.num_layers) {
    pool_.reserve(head_bytes() * shape.num_key_value_heads * shape.num_layers * shape.num_blocks);
  }

  // A token of this layer sees itself and the `window` - 1 before it; all of them where it is 0.
  void set_window(int layer, int window) { windows_[layer] = window; }

  // Stores the keys and values (heads, D) of one token.
  void remember(int layer, const int32_t* table, int position, const float* key, const float* value) {
    for (int head = 0; head < shape_.num_key_value_heads; ++head) {
      uint8_t* keys = keys_of(layer, table, position, head);
      uint8_t* values = values_of(layer, table, position, head);
      if (shape_.stored == kFloat32) {
        remember<kFloat32>(key, value, position % kLanes, keys, values);
      } else {
        remember<kBFloat16>(key, value, position % kLanes, keys, values);
      }
      key += shape_.head_size, value += shape_.head_size;
    }
  }

  // What one head of a token sees: query (D) -> out (D).
  void look(int layer, const int32_t* table, int position, int head, const float* query, float* out) const {
    switch (shape_.multiplied) {
      case kFloat32: return look<kFloat32>(layer, table, position, head, query, out);
      case kBFloat16Pairs: return look<kBFloat16Weights>(layer, table, position, head, query, out);
      default: return look<kBFloat16>(layer, table, position, head, query, out);
    }
  }

 private:
  // The keys, or the values, of 16 positions of a head.
  size_t group_bytes() const { return kLanes * shape_.head_size * (shape_.stored == kFloat32 ? 4 : 2); }
  size_t head_bytes() const { return 2 * (shape_.block_size / kLanes) * group_bytes(); }

  // Of the 16 positions that this one is among.
  uint8_t* keys_of(int layer, const int32_t* table, int position, int head) const {
    const size_t block = table[position / shape_.block_size];
    const size_t number = (block * shape_.num_layers + layer) * shape_.num_key_value_heads + head;
    return pool_.get() + number * head_bytes() + position % shape_.block_size / kLanes * group_bytes();
  }
  uint8_t* values_of(int layer, const int32_t* table, int position, int head) const {
    return keys_of(layer, table, position, head) + head_bytes() / 2;
  }

  // Keys of 16 positions: [group of D][position][group]; values: [group of positions][D][group]. Neighbours
  // are written by other threads at the same time, so nothing but one's own numbers is touched.
  template <WeightsType Type>
  void remember(const float* key, const float* value, int lane, uint8_t* keys, uint8_t* values) const {
    const int size = shape_.head_size;
    if constexpr (Type == kFloat32) {
      float* place = reinterpret_cast<float*>(keys) + lane;
      for (int d = 0; d < size; ++d) place[d * kLanes] = key[d];
      std::copy(value, value + size, reinterpret_cast<float*>(values) + lane * size);
    } else {
      thread_local Buffer<uint16_t> buffer;
      uint16_t* halves = buffer.reserve(size);
      round_to_bfloat16(key, size, halves);
      int32_t* pairs = reinterpret_cast<int32_t*>(keys) + lane;
      for (int d = 0; d < size; d += 2) std::memcpy(pairs + d / 2 * kLanes, halves + d, 4);
      round_to_bfloat16(value, size, halves);
      uint16_t* place = reinterpret_cast<uint16_t*>(values) + lane / 2 * 2 * size + lane % 2;
      for (int d = 0; d < size; ++d) place[2 * d] = halves[d];
    }
  }

  template <WeightsType Type>
  void look(int layer, const int32_t* table, int position, int head, const float* query, float* out) const {
    // Positions are counted from the 16 that the first one to be seen is among.
    const int size = shape_.head_size, window = windows_[layer];
    const int first = window ? std::max(0, position + 1 - window) : 0, origin = first / kLanes * kLanes;
    const int num_skipped = first - origin, length = position + 1 - origin;
    const int kv_head = head / (shape_.num_heads / shape_.num_key_value_heads);
    const int num_blocks = (length + kLanes - 1) / kLanes;
    thread_local Buffer<float> score_buffer;
    thread_local Buffer<int32_t> query_buffer;
    float* scores = score_buffer.reserve(static_cast<size_t>(num_blocks + 4) * kLanes);
    auto* words = reinterpret_cast<const int32_t*>(query);
    if constexpr (Type == kBFloat16Pairs) {
      int32_t* pairs = query_buffer.reserve(size / 2);
      round_to_bfloat16_pairs(query, size, pairs);
      words = pairs;
    }
    const auto keys_at = [&](int block) { return keys_of(layer, table, origin + block * kLanes, kv_head); };
    int block = 0;
    for (; block < num_blocks; ++block) score<Type>(keys_at(block), words, scores + block * kLanes);
    if (shape_.cap > 0) cap(scores, num_blocks);
    const float inverse = soften(scores, num_skipped, length, num_blocks);
    // In place: a number is read before half as many bytes are written.
    if constexpr (Type == kBFloat16Pairs) {
      round_to_bfloat16_pairs(scores, num_blocks * kLanes, reinterpret_cast<int32_t*>(scores));
    }
    auto* weights = reinterpret_cast<const int32_t*>(scores);
    for (int d = 0; d < size; d += 4 * kLanes) {
      const auto values_at = [&](int place) { return values_of(layer, table, origin + place, kv_head) + d * 4; };
      switch (std::min(4, (size - d) / kLanes)) {
        case 4: mix<Type, 4>(values_at, weights, length, inverse, out + d); break;
        case 3: mix<Type, 3>(values_at, weights, length, inverse, out + d); break;
        case 2: mix<Type, 2>(values_at, weights, length, inverse, out + d); break;
        default: mix<Type, 1>(values_at, weights, length, inverse, out + d);
      }
    }
  }

  // Products of the query and 16 keys.
  template <WeightsType Type>
  void score(const uint8_t* keys, const int32_t* words, float* scores) const {
    Vector sums[1][kParts] = {};
    for (const auto* end = keys + group_bytes(); keys < end; keys += 64, words += words_of_group(Type)) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        const auto loaded = unpacked<Type>(load_int_vector(keys + part * sizeof(Vector)));
        sums[0][part] = add_products<Type>(sums[0][part], loaded, words);
      }
    }
    put_scaled<1>(sums, shape_.scale, scores);
  }

  template <int Count>
  static void put_scaled(const Vector (&sums)[Count][kParts], float scale, float* out) {
#pragma GCC unroll 4
    for (int number = 0; number < Count; ++number) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        store_vector(out + number * kLanes + part * kWidth, sums[number][part] * broadcast(scale));
      }
    }
  }

  // Gemma Team 2024 (Gemma 2), 2: cap * tanh(score / cap).
  void cap(float* scores, int num_blocks) const {
    for (int block = 0; block < num_blocks; ++block) {
      store(scores + block * kLanes, capped(load(scores + block * kLanes), shape_.cap));
    }
  }

  // Scores -> exponentials relative to the largest, 0 for those to be skipped and after `length`; returns 1 /
  // their sum.
  static float soften(float* scores, int num_skipped, int length, int num_blocks) {
    if (num_skipped) store(scores, last_lanes(load(scores), num_skipped, -INFINITY));
    // Anything may stand behind the last position.
    float* last = scores + (num_blocks - 1) * kLanes;
    const int num_last = length - (num_blocks - 1) * kLanes;
    store(last, first_lanes(load(last), num_last, -INFINITY));
    Floats largest = all(-INFINITY), sum = all(0);
    for (int block = 0; block < num_blocks; ++block) largest = larger(largest, load(scores + block * kLanes));
    const Floats top = all(largest_of(largest));
    for (int block = 0; block < num_blocks; ++block) {
      Floats weights = exp_of(load(scores + block * kLanes) - top);
      if (block == 0 && num_skipped) weights = last_lanes(weights, num_skipped, 0);
      if (block == num_blocks - 1) weights = first_lanes(weights, num_last, 0);
      store(scores + block * kLanes, weights);
      sum = sum + weights;
    }
    return 1 / sum_of(sum);
  }

  // Weighted mean of 16 * `Parts` numbers of the values.
  template <WeightsType Type, int Parts, class ValuesAt>
  void mix(const ValuesAt& values_at, const int32_t* weights, int length, float inverse, float* out) const {
    constexpr int kPositions = values_of_group(Type), kWords = words_of_group(Type);
    const size_t stride = static_cast<size_t>(shape_.head_size) * 4;  // bytes of a group of positions
    Vector sums[Parts][kParts] = {};
    const auto add = [&](const uint8_t* values, IntVector mask) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int block = 0; block < Parts; ++block) {
        const auto* place = values + block * kLanes * 4;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const auto loaded = unpacked<Type>(load_int_vector(place + part * sizeof(Vector)) & mask);
          sums[block][part] = add_products<Type>(sums[block][part], loaded, weights);
        }
      }
      weights += kWords;
    };
    for (int position = 0; position < length; position += kLanes) {
      const auto* values = values_at(position);
      const int num_left = std::min(kLanes, length - position);
      for (int group = 0; group < num_left / kPositions; ++group, values += stride) {
        add(values, broadcast(int32_t{-1}));
      }
      // Behind the last position may stand anything, even what is no number and would survive a weight of 0.
      if (num_left % kPositions) add(values, broadcast(int32_t{0xffff}));
    }
    put_scaled<Parts>(sums, inverse, out);
  }

  AttentionShape shape_;
  std::vector<int> windows_;  // of layers
  ZeroPages pool_;  // [block][layer][head of keys][keys of the block, values of the block]
};

}  // namespace
