// Products of several queries, or rows of weights, with keys or values, in tiles of the registers.
//
// A panel is 16 positions of keys, or 16 numbers of values. Knows nothing of blocks and of positions.

#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace {

// 32 bits of keys or values for each lane, and how they are multiplied with words of queries or weights.
template <WeightsType Type>
struct Products {
  static constexpr int kWords = words_of_group(Type);
  using Sum = Sums<Type>;
  static auto load(IntVector raw) { return unpacked<Type>(raw); }
  template <class Loaded>
  static Sum add(Sum sum, Loaded loaded, const int32_t* words) {
    return add_products<Type>(sum, loaded, words);
  }
};

// Values of int8 at four positions, whose scales are in the weights.
struct Int8Values {
  static constexpr int kWords = 4;
  using Sum = Vector;
  struct Loaded {
    Vector at[4];
  };
  static Loaded load(IntVector raw) {
    const auto floats = [](IntVector integers) { return __builtin_convertvector(integers, Vector); };
    return {{floats(raw << 24 >> 24), floats(raw << 16 >> 24), floats(raw << 8 >> 24), floats(raw >> 24)}};
  }
  static Sum add(Sum sum, const Loaded& loaded, const int32_t* words) {
#pragma GCC unroll 4
    for (int number = 0; number < 4; ++number) {
      sum = multiply_add(loaded.at[number], broadcast(word_as_float(words + number)), sum);
    }
    return sum;
  }
};

template <WeightsType Type>
using ValueProducts = std::conditional_t<Type == kInt8, Int8Values, Products<Type>>;

// Rows and panels of 16 whose sums the registers hold together.
constexpr int max_rows_of_tile(int num_words) { return max_tokens_of_tile(std::min(num_words, 2)); }
constexpr int panels_of_rows(int num_rows, int num_words) {
  const int most = max_rows_of_tile(num_words);
  const int num_tiles = most * panels_of_tile(most, std::min(num_words, 2)) / num_rows;
  return static_cast<int>(std::bit_floor(static_cast<unsigned>(std::min(num_tiles, 4))));
}

// Calls work(number of rows, first row) for tiles of rows, the number as a constant.
template <int Rows, class Work>
inline void each_tile(int first, int num_rows, const Work& work) {
  for (; first + Rows <= num_rows; first += Rows) work(std::integral_constant<int, Rows>{}, first);
  if constexpr (Rows > 1) each_tile<(Rows > 6 ? 6 : Rows > 4 ? 4 : Rows - 1)>(first, num_rows, work);
}

template <class Some, int Rows, int Panels>
struct TileSums {
  typename Some::Sum at[Rows][Panels][kParts];
};

// Adds the products of panels, of which there is a group each `step` bytes, and of rows of words. What will be
// needed soon is fetched from `ahead`: blocks are anywhere in memory, so the processor cannot guess it.
template <class Some, int Rows, int Panels>
inline __attribute__((always_inline)) void add_groups(TileSums<Some, Rows, Panels>& sums,
                                                      const uint8_t* const (&panels)[Panels],
                                                      const uint8_t* const (&ahead)[Panels], size_t step,
                                                      int num_groups, const int32_t* words, size_t row) {
  for (int group = 0; group < num_groups; ++group, words += Some::kWords) {
    decltype(Some::load(IntVector{})) loaded[Panels][kParts];
#pragma GCC unroll 4
    for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        loaded[panel][part] = Some::load(load_int_vector(panels[panel] + group * step + part * sizeof(Vector)));
      }
      __builtin_prefetch(ahead[panel] + group * step);
    }
#pragma GCC unroll 12
    for (int number = 0; number < Rows; ++number) {
#pragma GCC unroll 4
      for (int panel = 0; panel < Panels; ++panel) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part) {
          auto& sum = sums.at[number][panel][part];
          sum = Some::add(sum, loaded[panel][part], words + number * row);
        }
      }
    }
  }
}

}  // namespace
