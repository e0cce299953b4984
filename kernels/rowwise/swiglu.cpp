// silu(gate) * up on the CPU (Shazeer 2020, equation 6), one pass over memory forward and one
// backward; tokens are tasks.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "lanes.h"
#include "slices.h"

namespace crossladder {
namespace {

// Numbers per thread, at least.
constexpr int64_t GRAIN = 16384;

// Gates and ups, (tokens, width) each; a single tensor holds gates, then ups, in each row.
struct Gates {
  int64_t tokens, width, stride;
  const float *gates, *ups;

  Gates(const at::Tensor& first, const std::optional<at::Tensor>& second)
      : tokens(first.size(0)), stride(first.size(1)) {
    TORCH_CHECK(first.dim() == 2, "swiglu was given a tensor that is no matrix");
    width = second.has_value() ? stride : stride / 2;
    gates = read(first, "swiglu");
    ups = second.has_value() ? read(*second, "swiglu") : gates + width;
  }

  // Runs over vectors of channels: run(place of gate and up, place of the output, count).
  template <typename Run>
  void for_each_place(const Run& run) const {
    const int64_t grain = std::max<int64_t>(1, GRAIN / std::max<int64_t>(width, 1));
    at::parallel_for(0, tokens, grain, [&](int64_t first, int64_t end) {
      const FlushDenormals flush;
      for (int64_t t = first; t < end; ++t) {
        for_each_vector(width, [&](int64_t channel, int64_t count) {
          run(t * stride + channel, t * width + channel, count);
        });
      }
    });
  }
};

at::Tensor forward(const at::Tensor& gates, const std::optional<at::Tensor>& ups) {
  const Gates in(gates, ups);
  at::Tensor gated = at::empty({in.tokens, in.width}, gates.options());
  float* out = gated.mutable_data_ptr<float>();
  in.for_each_place([&](int64_t at, int64_t place, int64_t count) {
    const Lanes gate = load(in.gates + at, count), up = load(in.ups + at, count);
    store(out + place, gate * sigmoid(gate) * up, count);
  });
  return gated;
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& d_gated, const at::Tensor& gates,
                                            const std::optional<at::Tensor>& ups) {
  const Gates in(gates, ups);
  at::Tensor d_gates = at::empty_like(gates);
  at::Tensor d_ups = ups.has_value() ? at::empty_like(*ups) : at::empty({0}, gates.options());
  const float* gradient = read(d_gated, "swiglu");
  float* to_gates = d_gates.mutable_data_ptr<float>();
  float* to_ups = ups.has_value() ? d_ups.mutable_data_ptr<float>() : to_gates + in.width;
  in.for_each_place([&](int64_t at, int64_t place, int64_t count) {
    const Lanes gate = load(in.gates + at, count), up = load(in.ups + at, count);
    const Lanes share = sigmoid(gate), open = gate * share, d = load(gradient + place, count);
    store(to_gates + at, d * up * (share + open * (1.0f - share)), count);
    store(to_ups + at, d * open, count);
  });
  return {d_gates, d_ups};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("swiglu_forward", &forward);
  library.impl("swiglu_backward", &backward);
}

}  // namespace crossladder
