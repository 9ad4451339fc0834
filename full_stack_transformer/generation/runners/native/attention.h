// The attention of tokens to the keys and values of their sequences.
//
// Queries that see the same keys, those of the heads of a group and of neighbouring tokens
// of a sequence, are computed together, so that each number is loaded and unpacked once for several of them:
//
//   queries (rows) -> scores (rows, positions) -> weights (rows, positions) -> their sums of values (rows, D)
//
// Every query has sums of its own, in the order of its own positions, and never touches what stands behind its
// last one. Knows nothing of layers: who calls has turned queries and keys by their positions.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "attention_products.h"
#include "kernels.h"
#include "key_values.h"
#include "memory_and_threads.h"

namespace {

// Queries of a piece of work at most, unless a group has more heads; and positions of 16 that they take at once,
// which stay in the cache of the first level.
constexpr int kRowsOfPiece = 24, kGroupsOfChunk = 4;

// Tokens to read, and the sequences that they belong to.
struct Reading {
  int num_tokens = 0;
  const int32_t *ids = nullptr, *sequences = nullptr, *positions = nullptr;  // (tokens)
  const int32_t *table_starts = nullptr, *block_ids = nullptr;  // the tables of the sequences, one after another
  const int32_t* adapters = nullptr;  // (tokens), 0 for none; null where none has one

  const int32_t* table(int token) const { return block_ids + table_starts[sequences[token]]; }
};

class Attention {
 public:
  explicit Attention(const AttentionShape& shape) : shape_(shape), windows_(shape.num_layers), stored_(shape) {}

  // A token of this layer sees itself and the `window` - 1 before it; all of them where it is 0.
  void set_window(int layer, int window) { windows_[layer] = window; }

  // Says which tokens the next calls are about.
  void begin(const Reading& reading) {
    reading_ = reading;
    const int most = std::max(1, kRowsOfPiece / shape_.heads_of_group());
    runs_.clear();
    for (int first = 0, end; first < reading.num_tokens; first = end) {
      end = first + 1;
      while (end < reading.num_tokens && reading.sequences[end] == reading.sequences[first]) ++end;
      // Even shares, the longest texts first.
      for (int num_left = (end - first + most - 1) / most, last = end; num_left > 0; --num_left) {
        const int num_tokens = (last - first + num_left - 1) / num_left;
        runs_.push_back({last - num_tokens, num_tokens});
        last -= num_tokens;
      }
    }
  }

  // Stores the keys and values (heads, D) of one token.
  void remember(int layer, int token, const float* keys, const float* values) {
    stored_.remember(layer, reading_.table(token), reading_.positions[token], keys, values);
  }

  // What all tokens see: queries (T, stride), whose first numbers are those of (heads, D) -> out (T, heads, D).
  void attend(Pool& pool, int layer, const float* queries, size_t stride, float* out) const {
    const int num_runs = static_cast<int>(runs_.size()), group = shape_.heads_of_group();
    const int num_pieces = num_runs * shape_.num_key_value_heads;
    // By heads first: neighbouring tokens of a prompt see the same keys.
    pool.run(num_pieces, [&](int piece) {
      const int head = piece / num_runs;
      const Run& run = runs_[piece % num_runs];
      Rows rows{reading_.table(run.first_token), layer, head, run.first_token, run.num_tokens * group};
      switch (shape_.multiplied) {
        case kFloat32: return look<kFloat32>(rows, queries, stride, out);
        case kInt8: return look<kInt8>(rows, queries, stride, out);
        case kBFloat16Pairs: return look<kBFloat16Weights>(rows, queries, stride, out);
        default: return look<kBFloat16>(rows, queries, stride, out);
      }
    });
  }

 private:
  struct Run {  // neighbouring tokens of a sequence
    int first_token, num_tokens;
  };

  // The queries of a run that see the keys of one head: row r is of token r / heads of a group.
  struct Rows {
    const int32_t* table;
    int layer, head, first_token, num_rows;
    int origin = 0;                            // position of the first score
    size_t stride = 0;                         // of the rows of scores
    float *scores = nullptr, *sums = nullptr;  // (rows, stride), (rows, D)
    uint8_t** keys = nullptr;                  // of each 16 positions from the origin on, and of the last some more
  };

  int begin_of(const Rows& rows, int row) const {
    const int window = windows_[rows.layer];
    return window ? std::max(0, end_of(rows, row) - window) : 0;
  }
  int end_of(const Rows& rows, int row) const { return reading_.positions[token_of(rows, row)] + 1; }
  int token_of(const Rows& rows, int row) const { return rows.first_token + row / shape_.heads_of_group(); }

  template <WeightsType Type>
  void look(Rows& rows, const float* queries, size_t stride, float* out) const {
    thread_local Buffer<float> score_buffer, sum_buffer, inverse_buffer;
    thread_local Buffer<uint8_t*> key_buffer;
    const int size = shape_.head_size, group = shape_.heads_of_group(), last = rows.num_rows - 1;
    rows.origin = begin_of(rows, 0) / kLanes * kLanes;
    const int num_groups = (end_of(rows, last) - rows.origin + kLanes - 1) / kLanes;
    rows.stride = static_cast<size_t>(num_groups) * kLanes;
    rows.scores = score_buffer.reserve(rows.num_rows * rows.stride);
    rows.sums = sum_buffer.reserve(static_cast<size_t>(rows.num_rows) * size);
    rows.keys = key_buffer.reserve(num_groups + kGroupsOfChunk);
    for (int number = 0; number < num_groups + kGroupsOfChunk; ++number) {
      const int position = rows.origin + std::min(number, num_groups - 1) * kLanes;
      rows.keys[number] = stored_.place(rows.layer, rows.table, position, rows.head).keys;
    }
    std::fill_n(rows.sums, rows.num_rows * size, 0.0f);
    const auto query_of = [&](int row) {
      return queries + token_of(rows, row) * stride + (rows.head * group + row % group) * size;
    };
    score<Type>(rows, query_of);
    float* inverses = inverse_buffer.reserve(rows.num_rows);
    for (int row = 0; row < rows.num_rows; ++row) inverses[row] = soften<Type>(rows, row);
    mix<Type>(rows);
    for (int row = 0; row < rows.num_rows; ++row) {
      const int head = rows.head * group + row % group;
      float* place = out + (static_cast<size_t>(token_of(rows, row)) * shape_.num_heads + head) * size;
      for (int d = 0; d < size; d += kLanes) {
        store(place + d, load(rows.sums + row * size + d) * all(inverses[row]));
      }
    }
  }

  // Products of all queries and keys, times the scale.
  template <WeightsType Type, class QueryOf>
  void score(const Rows& rows, const QueryOf& query_of) const {
    constexpr int kWords = words_of_group(Type);
    thread_local Buffer<int32_t> word_buffer, query_sum_buffer;
    thread_local Buffer<float> factor_buffer;
    const int size = shape_.head_size, num_groups = size / values_of_group(Type), num_words = num_groups * kWords;
    int32_t* words = word_buffer.reserve(static_cast<size_t>(rows.num_rows) * num_words);
    int32_t* query_sums = query_sum_buffer.reserve(rows.num_rows);
    float* factors = factor_buffer.reserve(rows.num_rows);
    for (int row = 0; row < rows.num_rows; ++row) {
      const float* query = query_of(row);
      int32_t* place = words + row * num_words;
      factors[row] = shape_.scale;
      if constexpr (Type == kInt8) {
        float scale;
        query_sums[row] = quantize(query, size, reinterpret_cast<Int8Input*>(place), scale);
        factors[row] = scale * shape_.scale;
      } else if constexpr (Type == kBFloat16Pairs) {
        round_to_bfloat16_pairs(query, size, place);
      } else {
        std::memcpy(place, query, size * sizeof(float));
      }
    }
    const int num_all = static_cast<int>(rows.stride) / kLanes;
    for (int chunk = 0; chunk < num_all; chunk += kGroupsOfChunk) {
      const int num_here = std::min(kGroupsOfChunk, num_all - chunk);
      each_tile<max_rows_of_tile(kWords)>(0, rows.num_rows, [&](auto num_rows, int row) {
        constexpr int kRows = decltype(num_rows)::value, kPanels = panels_of_rows(kRows, kWords);
        if (end_of(rows, row + kRows - 1) <= rows.origin + chunk * kLanes) return;
        const auto tile = [&](auto num_panels, int first) __attribute__((always_inline)) {
          score_tile<Type, kRows, decltype(num_panels)::value>(rows, row, chunk + first, num_groups, words, num_words,
                                                               factors, query_sums);
        };
        int first = 0;
        for (; first + kPanels <= num_here; first += kPanels) tile(std::integral_constant<int, kPanels>{}, first);
        for (; first < num_here; ++first) tile(std::integral_constant<int, 1>{}, first);
      });
    }
  }

  template <WeightsType Type, int kRows, int kPanels>
  void score_tile(const Rows& rows, int first_row, int first, int num_groups, const int32_t* words, int num_words,
                  const float* factors, const int32_t* query_sums) const {
    const uint8_t *panels[kPanels], *ahead[kPanels];
    for (int panel = 0; panel < kPanels; ++panel) {
      panels[panel] = rows.keys[first + panel];
      ahead[panel] = rows.keys[first + panel + kGroupsOfChunk];
    }
    TileSums<Products<Type>, kRows, kPanels> sums{};
    add_groups<Products<Type>, kRows, kPanels>(sums, panels, ahead, 64, num_groups, words + first_row * num_words,
                                               num_words);
#pragma GCC unroll 12
    for (int number = 0; number < kRows; ++number) {
      const int row = first_row + number;
      const Floats factor = all(factors[row]);
#pragma GCC unroll 4
      for (int panel = 0; panel < kPanels; ++panel) {
        const auto& sum = sums.at[number][panel];
        float* place = rows.scores + row * rows.stride + (first + panel) * kLanes;
        if constexpr (Type == kInt8) {
          const IntVector added = broadcast(kInt8Offset * query_sums[row]);
          const Floats plain = each_part([&](int part) { return __builtin_convertvector(sum[part] - added, Vector); });
          store(place, plain * factor * load(place_of(rows, first + panel).key_scales));
        } else {
          store(place, each_part([&](int part) { return sum[part]; }) * factor);
        }
      }
    }
  }

  // Scores of a row -> exponentials relative to the largest, as the values take them, 0 outside of what the query
  // sees; returns 1 / their sum.
  template <WeightsType Type>
  float soften(const Rows& rows, int row) const {
    const int begin = begin_of(rows, row), end = end_of(rows, row), first = begin / kLanes * kLanes;
    float* scores = rows.scores + row * rows.stride + (first - rows.origin);
    const int num_groups = (end - first + kLanes - 1) / kLanes;
    // Anything may stand before the first position and behind the last one.
    const auto seen = [&](int group, Floats values, float rest) {
      const bool is_inside = first + group * kLanes >= begin && first + (group + 1) * kLanes <= end;
      return is_inside ? values : lanes_between(values, begin - first - group * kLanes, end - first - group * kLanes, rest);
    };
    Floats largest = all(-INFINITY), sum = all(0);
    for (int group = 0; group < num_groups; ++group) {
      Floats values = load(scores + group * kLanes);
      if (shape_.cap > 0) values = capped(values, shape_.cap);  // Gemma Team 2024 (Gemma 2), 2
      values = seen(group, values, -INFINITY);
      store(scores + group * kLanes, values);
      largest = larger(largest, values);
    }
    const Floats top = all(largest_of(largest));
    for (int group = 0; group < num_groups; ++group) {
      Floats weights = seen(group, exp_of(load(scores + group * kLanes) - top), 0);
      sum = sum + weights;
      if constexpr (Type == kInt8) {
        const float* scales = place_of(rows, (first - rows.origin) / kLanes + group).value_scales;
        weights = seen(group, weights * load(scales), 0);
      }
      store(scores + group * kLanes, weights);
    }
    // In place: a number is read before half as many bytes are written.
    if constexpr (Type == kBFloat16Pairs) {
      round_to_bfloat16_pairs(scores, num_groups * kLanes,
                              reinterpret_cast<int32_t*>(rows.scores + row * rows.stride) + (first - rows.origin) / 2);
    }
    return 1 / sum_of(sum);
  }

  // Adds the values, times their weights, to the sums.
  template <WeightsType Type>
  void mix(const Rows& rows) const {
    using Some = ValueProducts<Type>;
    constexpr int kPositions = values_of_group(Type);
    const int end = rows.origin + static_cast<int>(rows.stride);
    for (int chunk = rows.origin; chunk < end; chunk += kGroupsOfChunk * kLanes) {
      const int chunk_end = std::min(end, chunk + kGroupsOfChunk * kLanes);
      each_tile<max_rows_of_tile(Some::kWords)>(0, rows.num_rows, [&](auto num_rows, int row) {
        constexpr int kRows = decltype(num_rows)::value;
        // What all of them see, in whole groups; the rest one by one.
        const int from = (begin_of(rows, row + kRows - 1) + kPositions - 1) / kPositions * kPositions;
        const int to = std::min(end_of(rows, row) / kPositions * kPositions, chunk_end);
        const int shared = std::max(from, chunk), shared_end = std::max(shared, to);
        for (int one = row; one < row + kRows; ++one) {
          mix_few<Type>(rows, one, std::max(chunk, begin_of(rows, one)),
                        std::min({shared, chunk_end, end_of(rows, one)}));
        }
        if (shared < to) mix_rows<Type, kRows>(rows, row, shared, to);
        for (int one = row; one < row + kRows; ++one) {
          mix_few<Type>(rows, one, std::max(shared_end, begin_of(rows, one)),
                        std::min(chunk_end, end_of(rows, one)));
        }
      });
    }
  }

  // Values of the 16 positions that this one is among.
  const uint8_t* values_of(const Rows& rows, int position) const {
    return rows.keys[(position - rows.origin) / kLanes] + stored_.values_offset();
  }

  KeyValues::Place place_of(const Rows& rows, int group) const {
    return stored_.place(rows.layer, rows.table, rows.origin + group * kLanes, rows.head);
  }

  template <WeightsType Type>
  const int32_t* weights_of(const Rows& rows, int row, int position) const {
    const int group = (position - rows.origin) / values_of_group(Type);
    return reinterpret_cast<const int32_t*>(rows.scores + row * rows.stride) + group * ValueProducts<Type>::kWords;
  }

  // Whole groups of positions, which all queries of a tile see.
  template <WeightsType Type, int kRows>
  void mix_rows(const Rows& rows, int row, int begin, int end) const {
    using Some = ValueProducts<Type>;
    constexpr int kPanels = panels_of_rows(kRows, Some::kWords), kPositions = values_of_group(Type);
    const int size = shape_.head_size;
    const size_t step = static_cast<size_t>(size) * 4;
    const auto tile = [&](auto num_panels, int d) __attribute__((always_inline)) {
      constexpr int kCount = decltype(num_panels)::value;
      TileSums<Some, kRows, kCount> sums;
      float* place = rows.sums + row * size + d;
#pragma GCC unroll 12
      for (int one = 0; one < kRows; ++one) {
#pragma GCC unroll 4
        for (int panel = 0; panel < kCount; ++panel) {
          const Floats loaded = load(place + one * size + panel * kLanes);
#pragma GCC unroll 4
          for (int part = 0; part < kParts; ++part) sums.at[one][panel][part] = loaded.parts[part];
        }
      }
      for (int position = begin, next; position < end; position = next) {
        next = std::min(end, position / kLanes * kLanes + kLanes);
        const size_t offset = position % kLanes / kPositions * step + d * 4;
        const uint8_t* values = values_of(rows, position) + offset;
        const uint8_t* later = values_of(rows, position + kGroupsOfChunk * kLanes) + offset;
        const uint8_t *panels[kCount], *ahead[kCount];
        for (int panel = 0; panel < kCount; ++panel) {
          panels[panel] = values + panel * 64, ahead[panel] = later + panel * 64;
        }
        add_groups<Some, kRows, kCount>(sums, panels, ahead, step, (next - position) / kPositions,
                                        weights_of<Type>(rows, row, position), rows.stride);
      }
#pragma GCC unroll 12
      for (int one = 0; one < kRows; ++one) {
#pragma GCC unroll 4
        for (int panel = 0; panel < kCount; ++panel) {
          store(place + one * size + panel * kLanes, each_part([&](int part) { return sums.at[one][panel][part]; }));
        }
      }
    };
    int d = 0;
    for (; d + kPanels * kLanes <= size; d += kPanels * kLanes) tile(std::integral_constant<int, kPanels>{}, d);
    for (; d < size; d += kLanes) tile(std::integral_constant<int, 1>{}, d);
  }

  // Some positions that not all queries of a tile see.
  template <WeightsType Type>
  void mix_few(const Rows& rows, int row, int position, int end) const {
    using Some = ValueProducts<Type>;
    constexpr int kPositions = values_of_group(Type);
    const int size = shape_.head_size;
    float* sums = rows.sums + row * size;
    while (position < end) {
      const int group = position / kPositions * kPositions, next = std::min(end, group + kPositions);
      const uint8_t* values = values_of(rows, group) + group % kLanes / kPositions * static_cast<size_t>(size) * 4;
      // Outside may stand anything, even what is no number and would survive a weight of 0.
      constexpr int kBits = 32 / kPositions;
      uint32_t mask = ~0u << (position - group) * kBits;
      if (next - group < kPositions) mask &= (1u << (next - group) * kBits) - 1;
      const IntVector masks = broadcast(static_cast<int32_t>(mask));
      const int32_t* weights = weights_of<Type>(rows, row, group);
      for (int d = 0; d < size; d += kWidth) {
        const auto loaded = Some::load(load_int_vector(values + d * 4) & masks);
        store_vector(sums + d, Some::add(load_vector(sums + d), loaded, weights));
      }
      position = next;
    }
  }

  AttentionShape shape_;
  std::vector<int> windows_;  // of layers
  KeyValues stored_;
  Reading reading_;
  std::vector<Run> runs_;
};

}  // namespace
