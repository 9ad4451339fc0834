// Keys and values in blocks of positions.
//
// A sequence has a table of its blocks: position p lies in block table[p / block size]. Several sequences may
// have the same block. A block is for all layers and heads, and takes memory when it is first written.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "memory_and_threads.h"

namespace {

constexpr WeightsType kBFloat16Weights = kHasBFloat16Products ? kBFloat16Pairs : kBFloat16;

struct AttentionShape {
  int num_layers, num_heads, num_key_value_heads, head_size, num_blocks, block_size;
  float scale, cap;        // scores are kept below `cap`, 0 for none
  WeightsType stored;      // keys and values
  WeightsType multiplied;  // as what: pairs of bf16, or bf16 as fp32

  int heads_of_group() const { return num_heads / num_key_value_heads; }
};

class KeyValues {
 public:
  // Where 16 positions of a head are.
  struct Place {
    uint8_t *keys, *values;
    float *key_scales, *value_scales;  // int8 only
  };

  explicit KeyValues(const AttentionShape& shape) : shape_(shape) {
    pool_.reserve(head_bytes() * shape.num_key_value_heads * shape.num_layers * shape.num_blocks);
  }

  // The 16 positions that this one is among.
  Place place(int layer, const int32_t* table, int position, int head) const {
    const size_t block = table[position / shape_.block_size], in_block = position % shape_.block_size / kLanes * kLanes;
    const size_t number = (block * shape_.num_layers + layer) * shape_.num_key_value_heads + head;
    uint8_t* keys = pool_.get() + number * head_bytes();
    uint8_t* values = keys + shape_.block_size * position_bytes();
    auto* scales = reinterpret_cast<float*>(values + shape_.block_size * position_bytes());
    return {keys + in_block * position_bytes(), values + in_block * position_bytes(), scales + in_block,
            scales + shape_.block_size + in_block};
  }

  // From keys to values of the same positions, in bytes.
  size_t values_offset() const { return shape_.block_size * position_bytes(); }

  // Stores the keys and values (heads, D) of one token.
  void remember(int layer, const int32_t* table, int position, const float* key, const float* value) {
    for (int head = 0; head < shape_.num_key_value_heads; ++head) {
      const Place place = this->place(layer, table, position, head);
      switch (shape_.stored) {
        case kFloat32: remember<kFloat32>(key, value, position % kLanes, place); break;
        case kInt8: remember<kInt8>(key, value, position % kLanes, place); break;
        default: remember<kBFloat16>(key, value, position % kLanes, place);
      }
      key += shape_.head_size, value += shape_.head_size;
    }
  }

 private:
  int value_bytes() const { return shape_.stored == kFloat32 ? 4 : shape_.stored == kInt8 ? 1 : 2; }
  size_t position_bytes() const { return static_cast<size_t>(shape_.head_size) * value_bytes(); }
  size_t head_bytes() const {  // of a block
    return 2 * shape_.block_size * (position_bytes() + (shape_.stored == kInt8 ? sizeof(float) : 0));
  }

  // Keys of 16 positions: [group of D][position][group]; values: [group of positions][D][group]. Neighbours
  // are written by other threads at the same time, so nothing but one's own numbers is touched.
  template <WeightsType Type>
  void remember(const float* key, const float* value, int lane, const Place& place) const {
    const int size = shape_.head_size;
    if constexpr (Type == kFloat32) {
      float* keys = reinterpret_cast<float*>(place.keys) + lane;
      for (int d = 0; d < size; ++d) keys[d * kLanes] = key[d];
      std::copy(value, value + size, reinterpret_cast<float*>(place.values) + lane * size);
    } else if constexpr (Type == kInt8) {
      thread_local Buffer<int8_t> buffer;
      int8_t* integers = buffer.reserve(size);
      quantize(key, size, integers, place.key_scales[lane]);
      uint8_t* keys = place.keys + lane * 4;
      for (int d = 0; d < size; ++d) {
        keys[d / 4 * 64 + kInt8Places[d % 4]] = static_cast<uint8_t>(kInt8Offset + integers[d]);
      }
      quantize(value, size, integers, place.value_scales[lane]);
      uint8_t* values = place.values + lane / 4 * 4 * size + lane % 4;
      for (int d = 0; d < size; ++d) values[4 * d] = static_cast<uint8_t>(integers[d]);
    } else {
      thread_local Buffer<uint16_t> buffer;
      uint16_t* halves = buffer.reserve(size);
      round_to_bfloat16(key, size, halves);
      int32_t* pairs = reinterpret_cast<int32_t*>(place.keys) + lane;
      for (int d = 0; d < size; d += 2) std::memcpy(pairs + d / 2 * kLanes, halves + d, 4);
      round_to_bfloat16(value, size, halves);
      uint16_t* values = reinterpret_cast<uint16_t*>(place.values) + lane / 2 * 2 * size + lane % 2;
      for (int d = 0; d < size; ++d) values[2 * d] = halves[d];
    }
  }

  AttentionShape shape_;
  // [block][layer][head][keys][values][scales of the keys][scales of the values]
  ZeroPages pool_;
};

}  // namespace
