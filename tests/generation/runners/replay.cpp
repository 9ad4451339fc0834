// Repeats calls of the C++ decoder that were written to a file, and writes the logits to standard output.
//
// So another processor's decoder can be run where there is no Python for it: see test_instruction_sets.py.
// Numbers are 32 bits, little-endian; an array is its length and its numbers, and length -1 is a null pointer.

#include <cstdio>
#include <vector>

#include "decoder.cpp"

namespace {

class Tape {
 public:
  explicit Tape(const char* path) : file_(std::fopen(path, "rb")) {}
  ~Tape() { std::fclose(file_); }

  bool read(void* place, size_t bytes) { return std::fread(place, 1, bytes, file_) == bytes; }
  int32_t number() {
    int32_t value = 0;
    read(&value, 4);
    return value;
  }
  template <class Value>
  const Value* array() {  // valid until the next call of the decoder has been read
    const int32_t length = number();
    if (length < 0) return nullptr;
    arrays_.emplace_back(length);
    read(arrays_.back().data(), 4 * static_cast<size_t>(length));
    return reinterpret_cast<const Value*>(arrays_.back().data());
  }
  void forget() { arrays_.clear(); }

 private:
  std::FILE* file_;
  std::vector<std::vector<int32_t>> arrays_;
};

}  // namespace

int main(int, char** arguments) {
  Tape tape(arguments[1]);
  DecoderShape shape;
  if (!tape.read(&shape, sizeof shape)) return 1;
  Decoder* decoder = decoder_new(&shape);
  for (char name; tape.read(&name, 1); tape.forget()) {
    if (name == 'l') {
      const int layer = tape.number(), which = tape.number();
      const auto *weights = tape.array<float>(), *bias = tape.array<float>();
      const int num_outputs = tape.number(), num_inputs = tape.number();
      decoder_set_linear(decoder, layer, which, weights, bias, num_outputs, num_inputs);
    } else if (name == 'c') {
      const int layer = tape.number(), which = tape.number();
      const auto *codes = tape.array<uint8_t>(), *group_scales = tape.array<uint8_t>();
      const auto* zeros = tape.array<uint8_t>();
      const auto *scales = tape.array<float>(), *bias = tape.array<float>();
      const int num_outputs = tape.number(), num_inputs = tape.number();
      decoder_set_codes(decoder, layer, which, codes, group_scales, zeros, scales, bias, num_outputs,
                        num_inputs);
    } else if (name == 'n') {
      const int layer = tape.number(), which = tape.number();
      const auto *weight = tape.array<float>(), *bias = tape.array<float>();
      decoder_set_norm(decoder, layer, which, weight, bias, tape.number());
    } else if (name == 'y') {
      const int layer = tape.number(), window = tape.number();
      decoder_set_layer(decoder, layer, window, tape.number());
    } else if (name == 'e') {
      const auto *tokens = tape.array<float>(), *positions = tape.array<float>();
      decoder_set_embeddings(decoder, tokens, positions);
    } else if (name == 'r') {
      const auto *frequencies = tape.array<float>(), *scaling = tape.array<float>();
      decoder_add_rotary(decoder, frequencies, tape.number(), *scaling);
    } else if (name == 'a') {
      const int number = tape.number();
      decoder_add_adapter(decoder, number, tape.number());
    } else if (name == 'm') {
      const int number = tape.number(), layer = tape.number(), which = tape.number();
      const auto *down = tape.array<float>(), *up = tape.array<float>();
      const auto *first_ranks = tape.array<int32_t>(), *ranks = tape.array<int32_t>();
      const int num_ranks = tape.number(), most_ranks = tape.number();
      decoder_set_low_rank(decoder, number, layer, which, down, up, first_ranks, ranks, num_ranks, most_ranks);
    } else if (name == 'f') {
      const int num_tokens = tape.number();
      const auto *ids = tape.array<int32_t>(), *sequences = tape.array<int32_t>();
      const auto *positions = tape.array<int32_t>(), *starts = tape.array<int32_t>();
      const auto *block_ids = tape.array<int32_t>(), *adapters = tape.array<int32_t>();
      const int num_rows = tape.number();
      const auto* rows = tape.array<int32_t>();
      std::vector<float> logits(static_cast<size_t>(num_rows) * shape.vocab_size);
      decoder_forward(decoder, num_tokens, ids, sequences, positions, starts, block_ids, adapters, num_rows, rows,
                      logits.data());
      std::fwrite(logits.data(), 4, logits.size(), stdout);
    } else {
      return 2;
    }
  }
  decoder_delete(decoder);
}
