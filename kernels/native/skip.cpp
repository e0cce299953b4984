// The gradients of outputs + D values on the CPU, in one pass over memory.
//
// Blocks of tokens have a fixed size: D's do not depend on the number of threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "lanes.h"
#include "slices.h"

namespace crossladder {
namespace {

constexpr int64_t BLOCK = 64;

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& d_outputs, const at::Tensor& values,
                                            const at::Tensor& D) {
  TORCH_CHECK(values.dim() == 2 && D.dim() == 1 && D.size(0) == values.size(1),
              "skip was given values that are not (tokens, channels), or a D of another width");
  const int64_t tokens = values.size(0), channels = values.size(1);
  const int64_t blocks = ceil_div(tokens, BLOCK);
  at::Tensor d_values = at::empty_like(values);
  at::Tensor sums = at::zeros({std::max<int64_t>(blocks, 1), channels}, values.options());
  const float *given = read(d_outputs, "skip"), *x = read(values, "skip"), *rate = read(D, "skip");
  float *to_values = d_values.mutable_data_ptr<float>(), *to_sums = sums.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t block = first; block < end; ++block) {
      float* sum = to_sums + block * channels;
      for (int64_t t = block * BLOCK; t < std::min((block + 1) * BLOCK, tokens); ++t) {
        for_each_vector(channels, [&](int64_t channel, int64_t count) {
          const int64_t at = t * channels + channel;
          const Lanes d = load(given + at, count);
          store(to_values + at, d * load(rate + channel, count), count);
          store(sum + channel, load(sum + channel, count) + d * load(x + at, count), count);
        });
      }
    }
  });
  return {d_values, sum_slices(sums)};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) { library.impl("skip_backward", &backward); }

}  // namespace crossladder
