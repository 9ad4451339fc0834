// The adapters of a decoder, and which tokens of a batch have which. Knows low_rank.h and nothing of layers.

#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "low_rank.h"

namespace {

struct Adapter {
  Adapter(size_t num_bytes, int num_linears) : pages(num_bytes), low_ranks(num_linears) {}
  HugePages pages;
  std::vector<LowRank> low_ranks;  // beside each linear layer of the decoder
};

// Tokens of one adapter, for one thread.
struct Share {
  const Adapter* adapter;
  int begin, end;  // places in a list of tokens
};

class Adapters {
 public:
  // bits: of the codes, 8 or 16.
  explicit Adapters(int bits) : bits_(bits) {}

  void add(int number, size_t num_bytes, int num_linears) {
    adapters_.insert_or_assign(number, std::make_unique<Adapter>(num_bytes, num_linears));
  }
  void remove(int number) { adapters_.erase(number); }

  void set(int number, const Linear& linear, const LowRankSource& source, bool is_pair) {
    Adapter& adapter = *adapters_.at(number);
    LowRank& packed = adapter.low_ranks[linear.place];
    if (bits_ == 8) {
      pack_low_rank<int8_t>(packed, adapter.pages, linear, source, is_pair);
    } else {
      pack_low_rank<int16_t>(packed, adapter.pages, linear, source, is_pair);
    }
  }

  // Says which adapter each token of the next calls has; 0 for none.
  void begin(int num_tokens, const int32_t* numbers) {
    tokens_.clear();
    shares_.clear();
    if (!numbers) return;
    std::vector<std::pair<int32_t, int>> order;
    for (int token = 0; token < num_tokens; ++token) {
      if (numbers[token]) order.emplace_back(numbers[token], token);
    }
    std::sort(order.begin(), order.end());
    for (const auto& [number, token] : order) {
      const int place = static_cast<int>(tokens_.size());
      const Adapter* adapter = adapters_.at(number).get();
      if (shares_.empty() || shares_.back().adapter != adapter || place - shares_.back().begin == kTokensOfShare) {
        shares_.push_back({adapter, place, place});
      }
      ++shares_.back().end;
      tokens_.push_back(token);
    }
  }

  // The biases of a linear layer for each token, with what its adapter adds; null where all have the layer's own.
  const float* const* biases(Pool& pool, const Linear& linear, const float* inputs, int num_tokens) {
    const auto is_beside = [&](const Share& share) { return share.adapter->low_ranks[linear.place].num_ranks > 0; };
    if (std::none_of(shares_.begin(), shares_.end(), is_beside)) return nullptr;
    const size_t width = static_cast<size_t>(linear.num_panels) * kLanes;
    float* sums = sums_.reserve(num_tokens * width);
    const float** biases = biases_.reserve(num_tokens);
    std::fill_n(biases, num_tokens, linear.bias.get());
    pool.run(static_cast<int>(shares_.size()), [&](int number) {
      const Share& share = shares_[number];
      const LowRank& matrices = share.adapter->low_ranks[linear.place];
      if (!matrices.num_ranks) return;
      const float* in[kTokensOfShare];
      float* out[kTokensOfShare];
      for (int place = share.begin; place < share.end; ++place) {
        const int token = tokens_[place];
        in[place - share.begin] = inputs + static_cast<size_t>(token) * linear.num_inputs;
        biases[token] = out[place - share.begin] = sums + token * width;
      }
      const int count = share.end - share.begin;
      if (bits_ == 8) {
        project<int8_t>(matrices, linear, count, in, out);
      } else {
        project<int16_t>(matrices, linear, count, in, out);
      }
    });
    return biases;
  }

 private:
  int bits_;
  std::map<int, std::unique_ptr<Adapter>> adapters_;
  std::vector<int> tokens_;  // those with adapters, by adapter
  std::vector<Share> shares_;
  Buffer<float> sums_;
  Buffer<const float*> biases_;
};

}  // namespace
