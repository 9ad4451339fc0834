// The forward pass of a decoder on a processor with AVX-512, for batches of tokens of many requests.
//
//   ids, slots, positions (tokens) -> embeddings -> layers, each reading and writing its slots' keys and
//   values -> logits (rows, vocabulary) of the tokens that are asked for
//
// Every output is the sum over its inputs in their order, by one accumulator, and every token attends by
// itself. So the numbers of a token do not depend on which tokens are computed beside it, on how a prompt
// is cut into chunks, on its slot, or on the number of threads: bit for bit.
//
// T tokens, K inputs and N outputs of a linear layer, D head size. A *group* is the 32 bits of inputs that
// one lane of a dot-product instruction takes: 4 of int8, 2 of bf16, 1 of fp32. A *panel* is 16 outputs.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int kLanes = 16;
constexpr int kMaxTokensOfTile = 12;
constexpr int kPairsOfPiece = 4;

// ---------------------------------------------------------------- memory and threads

template <class Value>
class Buffer {  // 64-byte aligned, not initialized, grows on demand
 public:
  explicit Buffer(size_t size = 0) { reserve(size); }
  Value* reserve(size_t size) {
    if (size > size_) {
      size_ = size;
      const size_t bytes = (size * sizeof(Value) + 63) / 64 * 64;
      data_.reset(static_cast<Value*>(std::aligned_alloc(64, bytes)));
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }
  Value* get() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(void* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<Value, Free> data_;
  size_t size_ = 0;
};

// Threads that wait for the next piece of work by spinning for a while: a step has some eighty pieces of a
// few microseconds, and waking a sleeping thread takes fifty.
class Pool {
 public:
  explicit Pool(int num_threads) {
    for (int number = 1; number < num_threads; ++number) {
      threads_.emplace_back([this] { serve(); });
    }
  }

  ~Pool() {
    is_over_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    for (auto& thread : threads_) thread.join();
  }

  // Calls work(0) … work(count - 1), each once, on all threads.
  void run(int count, const std::function<void(int)>& work) {
    if (count == 1 || threads_.empty()) {
      for (int item = 0; item < count; ++item) work(item);
      return;
    }
    work_ = &work;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    is_open_.store(true);
    round_.fetch_add(1);
    round_.notify_all();
    take();
    // Only those that have come in are waited for: on a busy machine a thread may not run for milliseconds.
    is_open_.store(false);
    for (int spins = 0; num_inside_.load() > 0; ++spins) {
      if (spins < 2000) {
        _mm_pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  void take() {
    for (int item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*work_)(item);
  }

  void serve() {
    uint32_t seen = 0;
    while (true) {
      for (int spins = 0; round_.load(std::memory_order_acquire) == seen && spins < 20000; ++spins) {
        _mm_pause();
      }
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (is_over_) return;
      // Come in first, look second: whoever finds it open is waited for.
      num_inside_.fetch_add(1);
      if (is_open_.load()) take();
      num_inside_.fetch_sub(1);
    }
  }

  std::vector<std::thread> threads_;
  const std::function<void(int)>* work_ = nullptr;
  int count_ = 0;
  std::atomic<int> next_{0}, num_inside_{0};
  std::atomic<bool> is_open_{false};
  std::atomic<uint32_t> round_{0};
  std::atomic<bool> is_over_{false};
};

// ---------------------------------------------------------------- numbers

inline uint16_t to_bfloat16(float value) {  // to the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 64);  // NaN stays NaN
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline void round_to_bfloat16(const float* values, int num_values, uint16_t* out) {
  for (int k = 0; k < num_values; k += kLanes) {
    const auto rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(values + k));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + k), rounded);
  }
}

inline __m512 from_bfloat16(const uint16_t* values) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// exp of 16 numbers: 2^n times a polynomial of degree 6 for the rest, within 2 units in the last place.
inline __m512 exp16(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts
  rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  }
  return _mm512_scalef_ps(sum, n);
}

inline __m512 sigmoid16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

// Hendrycks and Gimpel 2016, the approximation by tanh: x * sigmoid(2 y).
inline __m512 gelu16(__m512 x) {
  const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(x, x), x);
  const __m512 y = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), x);
  return _mm512_mul_ps(x, sigmoid16(_mm512_mul_ps(y, _mm512_set1_ps(2 * 0.7978845608f))));
}

// ---------------------------------------------------------------- linear layers

enum WeightsType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2 };

constexpr int values_of_group(WeightsType type) { return type == kInt8 ? 4 : type == kBFloat16 ? 2 : 1; }

// Adds the products of a panel's weights and one group of inputs to the panel's 16 sums.
template <WeightsType Type>
inline __m512i add_products(__m512i sums, __m512i weights, int32_t group) {
  const __m512i inputs = _mm512_set1_epi32(group);
  if constexpr (Type == kInt8) {
    return _mm512_dpbusd_epi32(sums, weights, inputs);
  } else if constexpr (Type == kBFloat16) {
    return _mm512_castps_si512(
        _mm512_dpbf16_ps(_mm512_castsi512_ps(sums), (__m512bh)weights, (__m512bh)inputs));
  } else {
    return _mm512_castps_si512(_mm512_fmadd_ps(
        _mm512_castsi512_ps(weights), _mm512_castsi512_ps(inputs), _mm512_castsi512_ps(sums)));
  }
}

// Weights (N, K) as panels: [N / 16][K / group][16 outputs][group]. int8 weights have one scale an output
// and are stored with 128 added, because the instruction multiplies unsigned with signed bytes.
struct Linear {
  int num_inputs = 0, num_outputs = 0, num_panels = 0, num_groups = 0;
  Buffer<uint8_t> panels;
  Buffer<float> scales, bias;  // (panels * 16)
  bool has_bias = false;
};

void pack(Linear& linear, WeightsType type, const float* weights, const float* bias, int num_outputs,
          int num_inputs, int row_order_stride) {
  // row_order_stride 2: outputs n and n + N / 2 share a pair of panels (gate and up of an MLP).
  const int per_group = values_of_group(type), num_groups = num_inputs / per_group;
  const int num_panels = (num_outputs + 2 * kLanes - 1) / (2 * kLanes) * 2;
  linear.num_inputs = num_inputs;
  linear.num_outputs = num_outputs;
  linear.num_panels = num_panels;
  linear.num_groups = num_groups;
  linear.has_bias = bias != nullptr;
  uint8_t* out = linear.panels.reserve(static_cast<size_t>(num_panels) * num_groups * 64);
  float* scales = linear.scales.reserve(num_panels * kLanes);
  float* biases = linear.bias.reserve(num_panels * kLanes);
  for (int panel = 0; panel < num_panels; ++panel) {
    for (int lane = 0; lane < kLanes; ++lane) {
      int row = panel * kLanes + lane;
      if (row_order_stride == 2) row = (panel / 2) * kLanes + lane + (panel % 2) * (num_outputs / 2);
      const bool exists = panel * kLanes + lane < num_outputs;
      const float* source = weights + static_cast<size_t>(row) * num_inputs;
      float largest = 0;
      for (int k = 0; exists && k < num_inputs; ++k) largest = std::max(largest, std::fabs(source[k]));
      const float scale = largest > 0 ? largest / 127 : 1;
      scales[panel * kLanes + lane] = type == kInt8 ? scale : 1;
      biases[panel * kLanes + lane] = bias && exists ? bias[row] : 0;
      for (int k = 0; k < num_inputs; ++k) {
        const float value = exists ? source[k] : 0;
        uint8_t* place = out + (static_cast<size_t>(panel) * num_groups + k / per_group) * 64 + lane * 4;
        if (type == kInt8) {
          place[k % 4] = static_cast<uint8_t>(128 + std::lrint(value / scale));
        } else if (type == kBFloat16) {
          const uint16_t half = to_bfloat16(value);
          std::memcpy(place + 2 * (k % 2), &half, 2);
        } else {
          std::memcpy(place, &value, 4);
        }
      }
    }
  }
}

// Inputs (T, K) of a linear layer as it takes them.
struct Inputs {
  const int32_t* groups = nullptr;  // (T, K / group)
  const float* scales = nullptr;    // (T), int8 only
  const int32_t* sums = nullptr;    // (T) of the quantized values, int8 only
};

// What happens to the 16 sums of a panel; a pair of panels is handed over together.
enum class Ending { kStore, kAdd, kGelu, kGated };

struct Tile {
  const Linear* linear;
  Inputs inputs;
  float* outputs;  // (T, stride)
  int stride;
  Ending ending;
};

template <WeightsType Type>
inline __m512 finish(const Tile& tile, __m512i sums, int token, int panel) {
  const __m512 bias = _mm512_load_ps(tile.linear->bias.get() + panel * kLanes);
  if constexpr (Type == kInt8) {
    // Takes back the 128 that was added to every weight.
    const __m512i plain = _mm512_sub_epi32(sums, _mm512_set1_epi32(128 * tile.inputs.sums[token]));
    const __m512 scales = _mm512_mul_ps(_mm512_load_ps(tile.linear->scales.get() + panel * kLanes),
                                        _mm512_set1_ps(tile.inputs.scales[token]));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(plain), scales, bias);
  } else {
    return _mm512_add_ps(_mm512_castsi512_ps(sums), bias);
  }
}

inline void put(const Tile& tile, __m512 values, int token, int panel) {
  const int left = tile.linear->num_outputs - panel * kLanes;
  if (left <= 0) return;
  const __mmask16 mask = left >= kLanes ? 0xffff : static_cast<__mmask16>((1 << left) - 1);
  float* place = tile.outputs + static_cast<size_t>(token) * tile.stride + panel * kLanes;
  if (tile.ending == Ending::kGelu) values = gelu16(values);
  if (tile.ending == Ending::kAdd) values = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, place), values);
  _mm512_mask_storeu_ps(place, mask, values);
}

template <WeightsType Type, int Tokens, int Panels>
inline void compute_tile(const Tile& tile, int first_token, int first_panel) {
  const int num_groups = tile.linear->num_groups;
  const size_t panel_bytes = static_cast<size_t>(num_groups) * 64;
  const uint8_t* weights = tile.linear->panels.get() + first_panel * panel_bytes;
  const int32_t* groups = tile.inputs.groups + static_cast<size_t>(first_token) * num_groups;
  __m512i sums[Tokens][Panels];
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) sums[token][panel] = _mm512_setzero_si512();
  }
  for (int group = 0; group < num_groups; ++group) {
    __m512i loaded[Panels];
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) {
      const uint8_t* place = weights + panel * panel_bytes + group * 64;
      loaded[panel] = _mm512_load_si512(place);
      // The next tile's, else memory rests while there are many tokens to multiply.
      _mm_prefetch(reinterpret_cast<const char*>(place + Panels * panel_bytes), _MM_HINT_T1);
    }
#pragma GCC unroll 12
    for (int token = 0; token < Tokens; ++token) {
      const int32_t inputs = groups[static_cast<size_t>(token) * num_groups + group];
#pragma GCC unroll 8
      for (int panel = 0; panel < Panels; ++panel) {
        sums[token][panel] = add_products<Type>(sums[token][panel], loaded[panel], inputs);
      }
    }
  }
  // Every loop over `sums` is unrolled, else the compiler keeps them in memory instead of registers.
  __m512i results[Tokens][Panels];
#pragma GCC unroll 12
  for (int token = 0; token < Tokens; ++token) {
#pragma GCC unroll 8
    for (int panel = 0; panel < Panels; ++panel) results[token][panel] = sums[token][panel];
  }
  for (int token = 0; token < Tokens; ++token) {
    for (int panel = 0; panel < Panels; panel += 2) {
      const int at_token = first_token + token, at_panel = first_panel + panel;
      const __m512 first = finish<Type>(tile, results[token][panel], at_token, at_panel);
      const __m512 second = finish<Type>(tile, results[token][panel + 1], at_token, at_panel + 1);
      if (tile.ending == Ending::kGated) {
        const __m512 gated = _mm512_mul_ps(_mm512_mul_ps(first, sigmoid16(first)), second);
        _mm512_storeu_ps(tile.outputs + static_cast<size_t>(at_token) * tile.stride + at_panel / 2 * kLanes,
                         gated);
      } else {
        put(tile, first, at_token, at_panel);
        put(tile, second, at_token, at_panel + 1);
      }
    }
  }
}

// Few tokens: many panels at once, to have enough independent sums under way; many tokens: few panels.
constexpr int panels_of_tile(int num_tokens) { return num_tokens <= 2 ? 8 : num_tokens <= 5 ? 4 : 2; }

template <WeightsType Type, int Tokens>
void compute_tokens(const Tile& tile, int first_token, int first_panel, int end_panel) {
  constexpr int kPanels = panels_of_tile(Tokens);
  int panel = first_panel;
  for (; panel + kPanels <= end_panel; panel += kPanels) {
    compute_tile<Type, Tokens, kPanels>(tile, first_token, panel);
  }
  for (; panel < end_panel; panel += 2) compute_tile<Type, Tokens, 2>(tile, first_token, panel);
}

template <WeightsType Type, int Tokens = kMaxTokensOfTile>
void compute_rest(const Tile& tile, int num_tokens, int first_token, int first_panel, int end_panel) {
  if constexpr (Tokens > 0) {
    if (num_tokens == Tokens) {
      compute_tokens<Type, Tokens>(tile, first_token, first_panel, end_panel);
    } else {
      compute_rest<Type, Tokens - 1>(tile, num_tokens, first_token, first_panel, end_panel);
    }
  }
}

template <WeightsType Type>
void compute_panels(const Tile& tile, int num_tokens, int first_panel, int end_panel) {
  // Even shares: 13 tokens as 7 and 6, not as 12 and 1.
  const int num_tiles = (num_tokens + kMaxTokensOfTile - 1) / kMaxTokensOfTile;
  for (int number = 0; number < num_tiles; ++number) {
    const int first = num_tokens * number / num_tiles, end = num_tokens * (number + 1) / num_tiles;
    compute_rest<Type>(tile, end - first, first, first_panel, end_panel);
  }
}

// ---------------------------------------------------------------- the decoder

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
    std::memset(keys_.get(), 0, num_values * cache_bytes());
    std::memset(values_.get(), 0, num_values * cache_bytes());
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
  Buffer<uint8_t> keys_, values_;
  Buffer<float> hidden_, normalized_, projected_, attended_, inner_, scales_;
  Buffer<int32_t> groups_, sums_;
};

void set_norm(Norm& norm, const float* weight, const float* bias, int size) {
  std::copy(weight, weight + size, norm.weight.reserve(size));
  norm.has_bias = bias != nullptr;
  if (bias) std::copy(bias, bias + size, norm.bias.reserve(size));
}

}  // namespace

// ---------------------------------------------------------------- what Python calls

extern "C" {

int decoder_is_supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512bf16");
}

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
