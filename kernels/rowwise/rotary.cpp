// Rotary embeddings on the CPU (Su et al. 2021, section 3.4.2), in one pass over memory.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "rotary.h"
#include "slices.h"

namespace crossladder {
namespace {

// Numbers per thread, at least.
constexpr int64_t GRAIN = 16384;

// x: (tokens, heads, width); cos, sin: (places, width), token t at place t modulo `places`. `back`
// applies the transpose, which maps gradients.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  const int64_t tokens = x.size(0), heads = x.size(1), width = x.size(2);
  const int64_t places = cos.size(0);
  TORCH_CHECK(cos.sizes() == sin.sizes() && cos.size(1) == width && width % 2 == 0,
              "rotary_embedding was given angles that do not fit its channels");
  const float *source = read(x, "rotary_embedding"), *cosines = read(cos, "rotary_embedding");
  const float* sines = read(sin, "rotary_embedding");
  at::Tensor rotated = at::empty_like(x);
  float* target = rotated.mutable_data_ptr<float>();
  const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(heads * width, 1));
  at::parallel_for(0, tokens, grain, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t t = first; t < end; ++t) {
      const float *c = cosines + t % places * width, *s = sines + t % places * width;
      for (int64_t at = t * heads * width; at < (t + 1) * heads * width; at += width) {
        rotate_head(source + at, c, s, width, back, target + at);
      }
    }
  });
  return rotated;
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) { library.impl("rotary_embedding", &rotate); }

}  // namespace crossladder
