// What a draw needs of the scores of a vocabulary: their weights e^score, and the likeliest ones in order.
//
// Weights are in doubles, of the same bits on every processor: in eight sums, whatever its vectors hold. Scores are divided by the temperature before, and the largest is 0 then. Knows nothing of models.

#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "lanes.h"

namespace {

constexpr int kBlock = 256;  // scores whose weights are added up together
// Doubles of a vector of the processor, and the floats and integers of as many.
constexpr int kDoubles = sizeof(Vector) / 8, kSums = 8;
typedef double Doubles __attribute__((vector_size(sizeof(Vector))));
typedef int64_t LongInts __attribute__((vector_size(sizeof(Vector))));
typedef float HalfVector __attribute__((vector_size(sizeof(Vector) / 2)));

// e^x of x <= 0 within 2 units in the last place; 0 below -708.
inline Doubles exponentials(Doubles x) {
  const Doubles zero = {}, least = zero - 708, held = x > least ? x : least;
  // Adding 1.5 * 2^52 rounds to an integer and leaves it in the last bits.
  const Doubles shifted = held * 1.4426950408889634 + 6755399441055744.0;
  const Doubles n = shifted - 6755399441055744.0;
  // ln 2 in two parts, the first of 33 bits, as in fdlibm.
  const Doubles rest = (held - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Doubles sum = zero + 1.0 / 6227020800;  // Taylor's series from its end, 1 / 13!
#pragma GCC unroll 13
  for (const double factor : {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
                              1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5, 1.0, 1.0}) {
    sum = sum * rest + factor;
  }
  const LongInts bits = ((LongInts)shifted << 52) + (LongInts)(zero + 1.0);
  return x > least ? sum * (Doubles)bits : zero;
}

// Scores of one request, for as long as the next one is not begun.
class Scores {
 public:
  Scores(const float* scores, int count, float temperature) : count_(count) {
    const size_t num_all = static_cast<size_t>(count + kBlock - 1) / kBlock * kBlock;
    tempered_.assign(num_all, -INFINITY);
    std::copy_n(scores, count, tempered_.begin());
    Floats largest = all(-INFINITY);
    for (size_t k = 0; k < num_all; k += kBlock) largest = larger(largest_of_lanes(&tempered_[k]), largest);
    const Floats top = all(largest_of(largest)), divisor = all(temperature);
    for (size_t k = 0; k < num_all; k += kLanes) store(&tempered_[k], (load(&tempered_[k]) - top) / divisor);
  }

  // Sum of all weights; those of each block are kept.
  double weigh() {
    double total = 0;
    sums_.clear();
    for (size_t first = 0; first < tempered_.size(); first += kBlock) {
      double weights[kBlock];
      weigh_block(first, weights);
      Doubles lanes[kSums / kDoubles] = {}, some;
      for (int k = 0; k < kBlock; k += kDoubles) {
        std::memcpy(&some, weights + k, sizeof some);
        lanes[k % kSums / kDoubles] += some;
      }
      double sum = 0;
      for (int lane = 0; lane < kSums; ++lane) sum += lanes[lane / kDoubles][lane % kDoubles];
      sums_.push_back(sum);
      total += sum;
    }
    return total;
  }

  // The id up to which the weights of all ids, in their order, first exceed `uniform` of all of them.
  int draw(double uniform) {
    double left = uniform * weigh();
    const size_t block = find(sums_.data(), sums_.size(), left);
    double weights[kBlock];
    weigh_block(block * kBlock, weights);
    return static_cast<int>(block * kBlock + find(weights, kBlock, left));
  }

  // The `wanted` largest scores, falling, equal ones by their ids.
  void rank(int wanted, float* values, int32_t* ids) {
    // As many lanes of blocks have a score as large as the threshold; few others have more than one.
    std::vector<float> lanes(tempered_.size() / kLanes), sorted;
    for (size_t first = 0; first < tempered_.size(); first += kBlock) {
      store(&lanes[first / kLanes], largest_of_lanes(&tempered_[first]));
    }
    float threshold = -INFINITY;
    if (static_cast<size_t>(wanted) < lanes.size()) {
      sorted = lanes;
      std::nth_element(sorted.begin(), sorted.begin() + wanted - 1, sorted.end(), std::greater<float>());
      threshold = sorted[wanted - 1];
    }
    std::vector<uint64_t> found;  // falling scores, which are not positive, as rising integers; then the id
    for (size_t lane = 0; lane < lanes.size(); ++lane) {
      if (!(lanes[lane] >= threshold)) continue;
      const size_t start = lane / kLanes * kBlock + lane % kLanes;
      for (size_t id = start; id < start + kBlock && id < static_cast<size_t>(count_); id += kLanes) {
        if (!(tempered_[id] >= threshold)) continue;
        const uint32_t magnitude = std::bit_cast<uint32_t>(tempered_[id]) & 0x7fffffff;
        found.push_back(static_cast<uint64_t>(magnitude) << 32 | id);
      }
    }
    wanted = std::min<int>(wanted, found.size());  // fewer are numbers
    const auto end = found.begin() + wanted;
    if (end != found.end()) std::nth_element(found.begin(), end, found.end());
    std::sort(found.begin(), end);
    for (int place = 0; place < wanted; ++place) {
      ids[place] = static_cast<int32_t>(found[place]);
      values[place] = tempered_[ids[place]];
    }
  }

 private:
  static Floats largest_of_lanes(const float* values) {  // of a block
    Floats largest = load(values);
    for (int k = kLanes; k < kBlock; k += kLanes) largest = larger(load(values + k), largest);
    return largest;
  }

  void weigh_block(size_t first, double* weights) const {
    for (int k = 0; k < kBlock; k += kDoubles) {
      HalfVector values;
      std::memcpy(&values, &tempered_[first + k], sizeof values);
      const Doubles some = exponentials(__builtin_convertvector(values, Doubles));
      std::memcpy(weights + k, &some, sizeof some);
    }
  }

  // The first of the weights with which their sum exceeds the target, which becomes what is left for it.
  static size_t find(const double* weights, size_t count, double& target) {
    double sum = 0;
    size_t last = 0;
    for (size_t place = 0; place < count; ++place) {
      if (sum + weights[place] > target) {
        target = std::max(0.0, target - sum);
        return place;
      }
      sum += weights[place];
      if (weights[place] > 0) last = place;
    }
    target = std::max(0.0, target - (sum - weights[last]));  // rounding passed the end
    return last;
  }

  int count_;
  std::vector<float> tempered_;  // whole blocks, -inf behind the end
  std::vector<double> sums_;
};

}  // namespace
