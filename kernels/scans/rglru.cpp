// The gates of an RG-LRU on the CPU (De et al. 2024, section 2.4), one pass over memory forward and
// one backward.
//
// Blocks of tokens are tasks; the gradient of the rates is summed over them in order, so that it
// does not depend on the number of threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"
#include "slices.h"

namespace crossladder {
namespace {

constexpr int64_t BLOCK = 64;
// The derivative of the square root diverges as the decay nears 1; this bounds it by 1000.
constexpr float LEAST_UNDER_ROOT = 1e-6f;

struct Gates {
  int64_t tokens, channels;
  const float *recurrence, *input, *rate, *candidate;
  const bool* begins;

  int64_t blocks() const { return ceil_div(tokens, BLOCK); }
};

const float* read(const at::Tensor& x) { return crossladder::read(x, "rglru"); }

Gates describe(const at::Tensor& recurrence, const at::Tensor& input, const at::Tensor& rate,
               const at::Tensor& begins, const std::optional<at::Tensor>& candidate) {
  TORCH_CHECK(begins.is_contiguous(), "rglru was given marks that are not contiguous");
  const int64_t channels = rate.numel();
  return {recurrence.numel() / channels, channels, read(recurrence), read(input), read(rate),
          candidate.has_value() ? read(*candidate) : nullptr, begins.const_data_ptr<bool>()};
}

// Run over the channels of the tokens of each block: run(block, place, channel, count, begins).
template <typename Run>
void for_each_place(const Gates& gates, const Run& run) {
  at::parallel_for(0, gates.blocks(), 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t block = first; block < end; ++block) {
      const int64_t last = std::min((block + 1) * BLOCK, gates.tokens);
      for (int64_t t = block * BLOCK; t < last; ++t) {
        for_each_vector(gates.channels, [&](int64_t channel, int64_t count) {
          run(block, t * gates.channels + channel, channel, count, gates.begins[t]);
        });
      }
    }
  });
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& recurrence, const at::Tensor& input,
                                           const at::Tensor& rate, const at::Tensor& begins,
                                           const std::optional<at::Tensor>& candidate) {
  const Gates gates = describe(recurrence, input, rate, begins, candidate);
  at::Tensor log_decay = at::empty_like(recurrence), write = at::empty_like(recurrence);
  float *logs = log_decay.mutable_data_ptr<float>(), *writes = write.mutable_data_ptr<float>();
  for_each_place(gates, [&](int64_t, int64_t at, int64_t channel, int64_t count, bool begin) {
    const Lanes speed = load(gates.rate + channel, count);
    const Lanes log = -speed * sigmoid(load(gates.recurrence + at, count));
    Lanes written = sigmoid(load(gates.input + at, count));
    // 1 - decay^2 by expm1: subtracting from 1 would lose the digits of a decay near 1.
    if (!begin) written *= root(-expm1(2.0f * log));
    if (gates.candidate != nullptr) written *= tanh(load(gates.candidate + at, count));
    store(logs + at, log, count);
    store(writes + at, written, count);
  });
  return {log_decay, write};
}

// Gradients of both maps, the rates and the candidate (empty where there is none).
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_log_decay, const at::Tensor& d_write, const at::Tensor& recurrence,
    const at::Tensor& input, const at::Tensor& rate, const at::Tensor& begins,
    const std::optional<at::Tensor>& candidate) {
  const Gates gates = describe(recurrence, input, rate, begins, candidate);
  at::Tensor d_recurrence = at::empty_like(recurrence), d_input = at::empty_like(input);
  at::Tensor d_candidate = candidate.has_value() ? at::empty_like(*candidate) : at::empty({0});
  at::Tensor d_rates = at::zeros({gates.blocks(), gates.channels});
  float *by_recurrence = d_recurrence.mutable_data_ptr<float>();
  float *by_input = d_input.mutable_data_ptr<float>(), *by_rate = d_rates.mutable_data_ptr<float>();
  float* by_candidate = d_candidate.mutable_data_ptr<float>();
  const float *d_log = read(d_log_decay), *d_written = read(d_write);
  for_each_place(gates, [&](int64_t block, int64_t at, int64_t channel, int64_t count, bool begin) {
    const Lanes speed = load(gates.rate + channel, count);
    const Lanes r = sigmoid(load(gates.recurrence + at, count));
    const Lanes i = sigmoid(load(gates.input + at, count));
    Lanes by_log = load(d_log + at, count), by_scaled = load(d_written + at, count);
    Lanes scale = Lanes{} + 1.0f;
    const Lanes forgotten = -expm1(-2.0f * speed * r);  // 1 - decay^2
    if (!begin) scale = root(forgotten);
    if (gates.candidate != nullptr) {
      const Lanes wanted = tanh(load(gates.candidate + at, count));
      store(by_candidate + at, by_scaled * i * scale * (1.0f - wanted * wanted), count);
      by_scaled *= wanted;
    }
    if (!begin) {
      const Lanes bounded = 4.0f * forgotten;
      const Lanes under = bounded < LEAST_UNDER_ROOT ? Lanes{} + LEAST_UNDER_ROOT : bounded;
      by_log -= by_scaled * i / root(under) * 2.0f * (1.0f - forgotten);
    }
    store(by_input + at, by_scaled * scale * i * (1.0f - i), count);
    store(by_recurrence + at, -speed * by_log * r * (1.0f - r), count);
    float* sum = by_rate + block * gates.channels + channel;
    store(sum, load(sum, count) - r * by_log, count);
  });
  return {d_recurrence, d_input, sum_slices(d_rates), d_candidate};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("rglru_forward", &forward);
  library.impl("rglru_backward", &backward);
}

}  // namespace crossladder
