// Applies the decoder's functions to the fp32 numbers of standard input, whose count is a multiple of 16:
// gelu, gelu by tanh, silu, tanh. Writes the results of each, one after the other.

#include <cstdio>
#include <vector>

#include "lanes.h"

int main() {
  std::vector<float> values;
  for (float value; std::fread(&value, 4, 1, stdin) == 1;) values.push_back(value);
  for (Floats (*function)(Floats) : {gelu_of, gelu_by_tanh_of, silu_of, tanh_of}) {
    std::vector<float> results(values.size());
    for (size_t k = 0; k < values.size(); k += kLanes) store(&results[k], function(load(&values[k])));
    std::fwrite(results.data(), 4, results.size(), stdout);
  }
}
