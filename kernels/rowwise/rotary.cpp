// Rotary embeddings on the CPU: pairs of channels turned by an angle, in one pass over memory.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "rotary.h"
#include "slices.h"

namespace crossladder {
namespace {

// Numbers that are worth another thread.
constexpr int64_t GRAIN = 16384;

// x: (tokens, heads, width); angles: (places, width), of which tokens take one after the other and
// begin again. `back` turns gradients, by the transpose.
at::Tensor turn(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin, bool back) {
  const int64_t tokens = x.size(0), heads = x.size(1), width = x.size(2);
  const int64_t places = cos.size(0);
  TORCH_CHECK(cos.sizes() == sin.sizes() && cos.size(1) == width && width % 2 == 0,
              "rotary_turn was given angles that do not fit its channels");
  const float *source = read(x, "rotary_turn"), *cosines = read(cos, "rotary_turn");
  const float* sines = read(sin, "rotary_turn");
  at::Tensor turned = at::empty_like(x);
  float* target = turned.mutable_data_ptr<float>();
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
  return turned;
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) { library.impl("rotary_turn", &turn); }

}  // namespace crossladder
