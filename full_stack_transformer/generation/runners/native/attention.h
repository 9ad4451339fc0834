// The keys and values of every slot, and the attention of a token to those of its slot.
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
  int num_layers, num_heads, num_key_value_heads, head_size, max_length, num_slots;
  float scale, cap;  // scores are kept below `cap`, 0 for none
  WeightsType type;  // of the model's weights
};

class Attention {
 public:
  explicit Attention(const AttentionShape& shape) : shape_(shape), windows_(shape.num_layers) {
    const int num_blocks = (shape.max_length + kLanes - 1) / kLanes;
    head_values_ = static_cast<size_t>(num_blocks) * kLanes * shape.head_size;
    const size_t num_values =
        head_values_ * shape.num_layers * shape.num_slots * shape.num_key_value_heads;
    keys_.reserve(num_values * cache_bytes());
    values_.reserve(num_values * cache_bytes());
  }

  // A token of this layer sees itself and the `window` - 1 before it; all of them where it is 0.
  void set_window(int layer, int window) { windows_[layer] = window; }

  // Stores the keys and values (heads, D) of one token.
  void remember(int layer, int slot, int position, const float* key, const float* value) {
    for (int head = 0; head < shape_.num_key_value_heads; ++head) {
      uint8_t* keys = keys_.get() + offset(layer, slot, head);
      uint8_t* values = values_.get() + offset(layer, slot, head);
      if (shape_.type == kFloat32) {
        remember<kFloat32>(key, value, position, keys, values);
      } else {
        remember<kBFloat16>(key, value, position, keys, values);
      }
      key += shape_.head_size, value += shape_.head_size;
    }
  }

  // What one head of a token sees: query (D) -> out (D).
  void look(int layer, int slot, int position, int head, const float* query, float* out) const {
    switch (shape_.type) {
      case kFloat32: return look<kFloat32>(layer, slot, position, head, query, out);
      case kBFloat16Pairs: return look<kBFloat16Weights>(layer, slot, position, head, query, out);
      default: return look<kBFloat16>(layer, slot, position, head, query, out);  // int8 weights, too
    }
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
  size_t cache_bytes() const { return shape_.type == kFloat32 ? 4 : 2; }

  size_t offset(int layer, int slot, int head) const {
    const size_t number =
        (static_cast<size_t>(layer) * shape_.num_slots + slot) * shape_.num_key_value_heads + head;
    return number * head_values_ * cache_bytes();
  }

  const uint8_t* block_of(const ZeroPages& cache, int layer, int slot, int head, int block) const {
    return cache.get() + offset(layer, slot, head) + block * kLanes * shape_.head_size * cache_bytes();
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

  template <WeightsType Type>
  void look(int layer, int slot, int position, int head, const float* query, float* out) const {
    // Positions are counted from the block that holds the first one to be seen.
    const int size = shape_.head_size, window = windows_[layer];
    const int first = window ? std::max(0, position + 1 - window) : 0, first_block = first / kLanes;
    const int num_skipped = first % kLanes, length = position + 1 - first_block * kLanes;
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
    const uint8_t* keys = block_of(keys_, layer, slot, kv_head, first_block);
    int block = 0;
    for (; block + 4 <= num_blocks; block += 4) score<Type, 4>(keys, words, block, scores);
    for (; block < num_blocks; ++block) score<Type, 1>(keys, words, block, scores);
    if (shape_.cap > 0) cap(scores, num_blocks);
    const float inverse = soften(scores, num_skipped, length, num_blocks);
    // In place: a number is read before half as many bytes are written.
    if constexpr (Type == kBFloat16Pairs) {
      round_to_bfloat16_pairs(scores, num_blocks * kLanes, reinterpret_cast<int32_t*>(scores));
    }
    const uint8_t* values = block_of(values_, layer, slot, kv_head, first_block);
    auto* weights = reinterpret_cast<const int32_t*>(scores);
    for (int d = 0; d < size; d += 4 * kLanes) {
      switch (std::min(4, (size - d) / kLanes)) {
        case 4: mix<Type, 4>(values, weights, length, inverse, d, out + d); break;
        case 3: mix<Type, 3>(values, weights, length, inverse, d, out + d); break;
        case 2: mix<Type, 2>(values, weights, length, inverse, d, out + d); break;
        default: mix<Type, 1>(values, weights, length, inverse, d, out + d);
      }
    }
  }

  // Products of the query and 16 keys for each of `Blocks` blocks.
  template <WeightsType Type, int Blocks>
  void score(const uint8_t* keys, const int32_t* words, int first, float* scores) const {
    const size_t block_bytes = static_cast<size_t>(shape_.head_size / values_of_group(Type)) * 64;
    keys += first * block_bytes;
    Vector sums[Blocks][kParts] = {};
    for (const auto* end = keys + block_bytes; keys < end; keys += 64, words += words_of_group(Type)) {
#pragma GCC unroll 4
      for (int block = 0; block < Blocks; ++block) {
        const auto* place = keys + block * block_bytes;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const auto loaded = unpacked<Type>(load_int_vector(place + part * sizeof(Vector)));
          sums[block][part] = add_products<Type>(sums[block][part], loaded, words);
        }
      }
    }
    put_scaled<Blocks>(sums, shape_.scale, scores + first * kLanes);
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
    // What a slot held before stands behind the last position.
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
  template <WeightsType Type, int Parts>
  void mix(const uint8_t* values, const int32_t* weights, int length, float inverse, int d, float* out) const {
    constexpr int kPositions = values_of_group(Type), kWords = words_of_group(Type);
    const size_t stride = static_cast<size_t>(shape_.head_size) * 4;  // bytes of a group of positions
    Vector sums[Parts][kParts] = {};
    values += d * 4;
    const auto add = [&](IntVector mask) __attribute__((always_inline)) {
#pragma GCC unroll 4
      for (int block = 0; block < Parts; ++block) {
        const auto* place = values + block * kLanes * 4;
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          const auto loaded = unpacked<Type>(load_int_vector(place + part * sizeof(Vector)) & mask);
          sums[block][part] = add_products<Type>(sums[block][part], loaded, weights);
        }
      }
    };
    const auto* end = values + length / kPositions * stride;
    for (; values < end; values += stride, weights += kWords) add(broadcast(int32_t{-1}));
    // Behind the last position may stand anything, even what is no number and would survive a weight of 0.
    if (length % kPositions) add(broadcast(int32_t{0xffff}));
    put_scaled<Parts>(sums, inverse, out);
  }

  AttentionShape shape_;
  std::vector<int> windows_;  // of layers
  size_t head_values_ = 0;  // numbers of one head of one slot of one layer
  ZeroPages keys_, values_;
};

}  // namespace
