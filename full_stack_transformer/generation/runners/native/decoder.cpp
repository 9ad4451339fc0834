// The forward pass of a decoder, for batches of tokens of many requests.
//
//   ids, sequences, positions (tokens) -> embeddings -> layers, each reading and writing keys and values in
//   the blocks of the sequences -> logits (rows, vocabulary) of the tokens that are asked for
//
// Every output is the sum over its inputs in their order, by one accumulator, and every token attends by
// itself. So the numbers of a token do not depend on which tokens are computed beside it, on how a prompt
// is cut into chunks, on its blocks and their size, or on the number of threads: bit for bit. With weights of
// fp32, int8 and int4 nor do they depend on the processor. bf16 is computed by its own instructions where
// there are any.
//
//   memory_and_threads.h   buffers, and threads that share the work
//   isa_*.h                vectors and their products, by instruction set
//   lanes.h                arithmetic of 16 numbers, the same bits everywhere
//   kernels.h              linear layers
//   int4.h                 weights of 4 bits
//   key_values.h           keys and values in blocks
//   attention_products.h   queries, keys and values, multiplied in tiles
//   attention.h            who sees what
//   low_rank.h             small matrices beside linear layers
//   adapters.h             which tokens have which of them
//   model.h                layers
//   sampler.h              what a draw needs of the scores that come out
//   this file              what Python calls

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>

#include "model.h"
#include "sampler.h"

namespace {

// False where memory is short.
bool succeeds(const std::function<void()>& work) {
  try {
    work();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

Decoder* decoder_new(const DecoderShape* shape) {
  try {
    return new Decoder(*shape);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

void decoder_delete(Decoder* decoder) { delete decoder; }

// layer -1 is the head.
bool decoder_set_linear(Decoder* decoder, int layer, int name, const float* weights, const float* bias,
                        int num_outputs, int num_inputs) {
  Linear& linear = layer < 0 ? decoder->head_ : decoder->layers_[layer].linears[name];
  const bool is_pair = layer >= 0 && name == kMlpIn && decoder->shape_.is_gated;
  return succeeds([&] {
    pack(linear, decoder->pages_, decoder->type_, weights, bias, num_outputs, num_inputs, is_pair);
  });
}

// Weights that have been rounded before: int8 (N, K), or with scales of groups int4 as int4.h says. Layer -1 is
// the head.
bool decoder_set_codes(Decoder* decoder, int layer, int name, const uint8_t* codes, const uint8_t* group_scales,
                       const uint8_t* zeros, const float* scales, const float* bias, int num_outputs,
                       int num_inputs) {
  Linear& linear = layer < 0 ? decoder->head_ : decoder->layers_[layer].linears[name];
  const bool is_pair = layer >= 0 && name == kMlpIn && decoder->shape_.is_gated;
  return succeeds([&] {
    if (group_scales) {
      pack_int4(linear, decoder->pages_, codes, group_scales, zeros, scales, bias, num_outputs, num_inputs, is_pair);
    } else {
      pack_int8(linear, decoder->pages_, reinterpret_cast<const int8_t*>(codes), scales, bias, num_outputs,
                num_inputs, is_pair);
    }
  });
}

// layer -1 is the last norm. `size`: how many numbers are normalized together.
void decoder_set_norm(Decoder* decoder, int layer, int name, const float* weight, const float* bias, int size) {
  Norm& norm = layer < 0 ? decoder->last_norm_ : decoder->layers_[layer].norms[name];
  set_norm(norm, weight, bias, size);
}

// window: tokens that one sees, 0 for all. rotary: which one of decoder_add_rotary turns queries and keys, -1
// for none.
void decoder_set_layer(Decoder* decoder, int layer, int window, int rotary) {
  decoder->set_window(layer, window);
  decoder->layers_[layer].rotary = rotary;
}

bool decoder_set_embeddings(Decoder* decoder, const float* tokens, const float* positions) {
  return succeeds([&] {
    const DecoderShape& shape = decoder->shape_;
    const size_t num_values = static_cast<size_t>(shape.vocab_size) * shape.hidden_size;
    if (decoder->type_ == kFloat32) {
      std::memcpy(decoder->token_embeddings_.reserve(num_values * 4), tokens, num_values * 4);
    } else {
      auto* halves = reinterpret_cast<uint16_t*>(decoder->token_embeddings_.reserve(num_values * 2));
      for (size_t number = 0; number < num_values; ++number) halves[number] = to_bfloat16(tokens[number]);
    }
    decoder->has_positions_ = positions != nullptr;
    if (positions) {
      const size_t num_position_values = static_cast<size_t>(shape.max_length) * shape.hidden_size;
      std::copy(positions, positions + num_position_values,
                decoder->position_embeddings_.reserve(num_position_values));
    }
  });
}

// Frequencies (half) in radians per position; cosines and sines are multiplied by `scaling`.
void decoder_add_rotary(Decoder* decoder, const float* frequencies, int half, float scaling) {
  Rotary& rotary = decoder->rotaries_.emplace_back();
  rotary.half = half;
  const size_t size = static_cast<size_t>(decoder->shape_.max_length) * half;
  float* cosines = rotary.cosines.reserve(size);
  float* sines = rotary.sines.reserve(size);
  for (size_t number = 0; number < size; ++number) {
    const float angle = static_cast<float>(number / half) * frequencies[number % half];
    cosines[number] = cosine(angle, 0) * scaling;
    sines[number] = cosine(angle, -1) * scaling;
  }
}

// Before its matrices are set.
bool decoder_add_adapter(Decoder* decoder, int number, int64_t num_bytes) {
  return succeeds([&] { decoder->adapters_.add(number, num_bytes, decoder->num_linears()); });
}

void decoder_remove_adapter(Decoder* decoder, int number) { decoder->adapters_.remove(number); }

// The matrices beside a linear layer, as LowRankSource says; layer -1 is the head.
bool decoder_set_low_rank(Decoder* decoder, int number, int layer, int name, const float* down, const float* up,
                          const int32_t* first_ranks, const int32_t* ranks, int num_ranks, int most_ranks) {
  const Linear& linear = layer < 0 ? decoder->head_ : decoder->layers_[layer].linears[name];
  const bool is_pair = layer >= 0 && name == kMlpIn && decoder->shape_.is_gated;
  const LowRankSource source{down, up, first_ranks, ranks, num_ranks, most_ranks};
  return succeeds([&] { decoder->adapters_.set(number, linear, source, is_pair); });
}

// adapters: of each token, 0 for none; null where no token has one.
bool decoder_forward(Decoder* decoder, int num_tokens, const int32_t* ids, const int32_t* sequences,
                     const int32_t* positions, const int32_t* table_starts, const int32_t* block_ids,
                     const int32_t* adapters, int num_rows, const int32_t* rows, float* logits) {
  const Reading reading{num_tokens, ids, sequences, positions, table_starts, block_ids, adapters};
  return succeeds([&] { decoder->forward(reading, num_rows, rows, logits); });
}

bool decoder_hidden_states(Decoder* decoder, float* out) {
  return succeeds([&] { decoder->hidden_states(out); });
}

// The `wanted` likeliest of the scores, divided by the temperature and less the largest, and the sum of all
// weights.
void sampler_rank(const float* scores, int count, float temperature, int wanted, float* values, int32_t* ids,
                  double* total) {
  Scores one(scores, count, temperature);
  *total = one.weigh();
  one.rank(wanted, values, ids);
}

// An id, each as probable as its weight.
int sampler_draw(const float* scores, int count, float temperature, double uniform) {
  return Scores(scores, count, temperature).draw(uniform);
}

}  // extern "C"
#pragma GCC visibility pop
