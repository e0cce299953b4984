// silu(gate) up on the CPU, forward and back in one pass over memory each; tokens are tasks.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "lanes.h"
#include "slices.h"

namespace crossladder {
namespace {

// Numbers that are worth another thread.
constexpr int64_t GRAIN = 16384;

// Gates in front and ups behind of each token, (tokens, 2 width).
struct Joint {
  int64_t tokens, width;
  const float* data;

  explicit Joint(const at::Tensor& x) : tokens(x.size(0)), width(x.size(1) / 2) {
    TORCH_CHECK(x.dim() == 2, "swiglu was given a tensor that is no matrix");
    data = read(x, "swiglu");
  }

  // Runs over vectors of channels: run(place of the gate, place of the output, count).
  template <typename Run>
  void for_each_place(const Run& run) const {
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(width, 1));
    at::parallel_for(0, tokens, grain, [&](int64_t first, int64_t end) {
      const FlushDenormals flush;
      for (int64_t t = first; t < end; ++t) {
        for_each_vector(width, [&](int64_t channel, int64_t count) {
          run(2 * t * width + channel, t * width + channel, count);
        });
      }
    });
  }
};

at::Tensor forward(const at::Tensor& joint) {
  const Joint in(joint);
  at::Tensor gated = at::empty({in.tokens, in.width}, joint.options());
  float* out = gated.mutable_data_ptr<float>();
  in.for_each_place([&](int64_t at, int64_t place, int64_t count) {
    const Lanes gate = load(in.data + at, count), up = load(in.data + at + in.width, count);
    store(out + place, gate * sigmoid(gate) * up, count);
  });
  return gated;
}

at::Tensor backward(const at::Tensor& d_gated, const at::Tensor& joint) {
  const Joint in(joint);
  at::Tensor d_joint = at::empty_like(joint);
  const float* gradient = read(d_gated, "swiglu");
  float* out = d_joint.mutable_data_ptr<float>();
  in.for_each_place([&](int64_t at, int64_t place, int64_t count) {
    const Lanes gate = load(in.data + at, count), up = load(in.data + at + in.width, count);
    const Lanes share = sigmoid(gate), open = gate * share, d = load(gradient + place, count);
    store(out + at, d * up * (share + open * (1.0f - share)), count);
    store(out + at + in.width, d * open, count);
  });
  return d_joint;
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("swiglu_forward", &forward);
  library.impl("swiglu_backward", &backward);
}

}  // namespace crossladder
