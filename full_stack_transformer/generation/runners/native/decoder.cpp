// The forward pass of a decoder on a processor with AVX-512, for batches of tokens of many requests.
//
//   ids, slots, positions (tokens) -> embeddings -> layers, each reading and writing its slots' keys and
//   values -> logits (rows, vocabulary) of the tokens that are asked for
//
// Every output is the sum over its inputs in their order, by one accumulator, and every token attends by
// itself. So the numbers of a token do not depend on which tokens are computed beside it, on how a prompt
// is cut into chunks, on its slot, or on the number of threads: bit for bit.
//
//   memory_and_threads.h   buffers, and threads that share the work
//   kernels_avx512.h       arithmetic of vectors, linear layers
//   model.h                layers, attention, cache of keys and values
//   this file              what Python calls

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "model.h"

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
void decoder_set_linear(Decoder* decoder, int layer, int name, const float* weights, const float* bias,
                        int num_outputs, int num_inputs) {
  Linear& linear = layer < 0 ? decoder->head_ : decoder->layers_[layer].linears[name];
  const bool is_pair = layer >= 0 && name == kMlpIn && decoder->shape_.is_gated;
  pack(linear, decoder->type_, weights, bias, num_outputs, num_inputs, is_pair ? 2 : 1);
}

// layer -1 is the last norm.
void decoder_set_norm(Decoder* decoder, int layer, int name, const float* weight, const float* bias) {
  Norm& norm = layer < 0 ? decoder->last_norm_ : decoder->layers_[layer].norms[name];
  set_norm(norm, weight, bias, decoder->shape_.hidden_size);
}

void decoder_set_embeddings(Decoder* decoder, const float* tokens, const float* positions) {
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
}

// Both (max_length, head_size / 2).
void decoder_set_rotary(Decoder* decoder, const float* cosines, const float* sines) {
  const size_t size = static_cast<size_t>(decoder->shape_.max_length) * decoder->shape_.head_size / 2;
  std::copy(cosines, cosines + size, decoder->cosines_.reserve(size));
  std::copy(sines, sines + size, decoder->sines_.reserve(size));
}

void decoder_forward(Decoder* decoder, int num_tokens, const int32_t* ids, const int32_t* slots,
                     const int32_t* positions, int num_rows, const int32_t* rows, float* logits) {
  decoder->forward(num_tokens, ids, slots, positions, num_rows, rows, logits);
}

void decoder_hidden_states(Decoder* decoder, float* out) { decoder->hidden_states(out); }

void decoder_copy_slot(Decoder* decoder, int from, int to, int length) {
  decoder->copy_slot(from, to, length);
}

}  // extern "C"
