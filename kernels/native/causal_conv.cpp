// Causal depthwise convolution on the CPU, channels in vector lanes, blocks of tokens as tasks.
//
// A tap is known by its age: the number of tokens between the input it reads and the output. Which
// ages a token sees ends at its document's first token, so a masked input is never read. Blocks
// have a fixed size: the gradients of weight and bias do not depend on the number of threads.

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

// The tensors of one call; `kernel` holds the weight as (age, channel).
struct Convolution {
  int64_t batch, length, channels, taps;
  const float* values;
  const float* initial;
  const int32_t* documents;
  std::vector<float> kernel;

  int64_t blocks() const { return ceil_div(length, BLOCK); }
  // Inputs before the first token have negative positions, down to 1 - taps.
  int64_t carried_at(int64_t row, int64_t position) const {
    return (row * (taps - 1) + position + taps - 1) * channels;
  }
  int64_t at(int64_t row, int64_t position) const { return (row * length + position) * channels; }
  const float* input(int64_t row, int64_t position) const {
    return position < 0 ? initial + carried_at(row, position) : values + at(row, position);
  }
  // How many ages token t of a row sees: its own document's inputs, within the taps.
  int64_t reach(int64_t row, int64_t t) const {
    const int32_t* ids = documents == nullptr ? nullptr : documents + row * length;
    int64_t age = 1;
    while (age < std::min(taps, t + 1) && (ids == nullptr || ids[t - age] == ids[t])) ++age;
    const bool continues = initial != nullptr && (ids == nullptr || ids[t] == 0);
    return age == t + 1 && continues ? taps : age;
  }
};

void forward_block(const Convolution& conv, int64_t row, int64_t begin, int64_t end,
                   const float* bias, float* outputs) {
  for (int64_t t = begin; t < end; ++t) {
    const int64_t reach = conv.reach(row, t);
    float* output = outputs + conv.at(row, t);
    for (int64_t channel = 0; channel < conv.channels; channel += LANES) {
      const int64_t count = std::min(LANES, conv.channels - channel);
      Lanes total = load(bias + channel, count);
      for (int64_t age = 0; age < reach; ++age) {
        total += load(&conv.kernel[age * conv.channels + channel], count) *
                 load(conv.input(row, t - age) + channel, count);
      }
      store(output + channel, total, count);
    }
  }
}

// What the backward pass is given and writes; each block has its own kernel (ages, then the bias).
struct Gradients {
  const float* outputs;
  float* values;
  float* initial;
  float* kernel;
};

// The gradient of the input at one position: the outputs that see it lie at the ages after it.
void backward_input(const Convolution& conv, const Gradients& gradients, int64_t row,
                    int64_t position) {
  float* d_input = position < 0 ? gradients.initial + conv.carried_at(row, position)
                                : gradients.values + conv.at(row, position);
  int64_t first = std::max<int64_t>(0, -position), last = first;
  while (last < conv.taps && position + last < conv.length &&
         conv.reach(row, position + last) > last) {
    ++last;
  }
  for (int64_t channel = 0; channel < conv.channels; channel += LANES) {
    const int64_t count = std::min(LANES, conv.channels - channel);
    Lanes total{};
    for (int64_t age = first; age < last; ++age) {
      total += load(&conv.kernel[age * conv.channels + channel], count) *
               load(gradients.outputs + conv.at(row, position + age) + channel, count);
    }
    store(d_input + channel, total, count);
  }
}

void backward_kernel(const Convolution& conv, const Gradients& gradients, int64_t row, int64_t t,
                     float* d_kernel) {
  const int64_t reach = conv.reach(row, t);
  for (int64_t channel = 0; channel < conv.channels; channel += LANES) {
    const int64_t count = std::min(LANES, conv.channels - channel);
    const Lanes d_output = load(gradients.outputs + conv.at(row, t) + channel, count);
    for (int64_t age = 0; age < reach; ++age) {
      float* tap = d_kernel + age * conv.channels + channel;
      const Lanes input = load(conv.input(row, t - age) + channel, count);
      store(tap, load(tap, count) + d_output * input, count);
    }
    float* d_bias = d_kernel + conv.taps * conv.channels + channel;
    store(d_bias, load(d_bias, count) + d_output, count);
  }
}

Convolution describe(const at::Tensor& values, const at::Tensor& weight,
                     const std::optional<at::Tensor>& initial,
                     const std::optional<at::Tensor>& documents) {
  TORCH_CHECK(values.is_contiguous() && weight.is_contiguous(),
              "causal_conv was given a tensor that is not contiguous");
  Convolution conv{values.size(0),
                   values.size(1),
                   values.size(2),
                   weight.size(1),
                   values.const_data_ptr<float>(),
                   initial.has_value() ? initial->const_data_ptr<float>() : nullptr,
                   documents.has_value() ? documents->const_data_ptr<int32_t>() : nullptr,
                   std::vector<float>(weight.numel())};
  const float* taps = weight.const_data_ptr<float>();
  for (int64_t age = 0; age < conv.taps; ++age) {
    for (int64_t channel = 0; channel < conv.channels; ++channel) {
      conv.kernel[age * conv.channels + channel] = taps[(channel + 1) * conv.taps - 1 - age];
    }
  }
  return conv;
}

// The gradient of `weight` from the sums by age, oldest tap first.
at::Tensor by_tap(const at::Tensor& sums, int64_t taps) {
  return sums.slice(0, 0, taps).flip(0).t().contiguous();
}

at::Tensor forward(const at::Tensor& values, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& initial,
                   const std::optional<at::Tensor>& documents) {
  const Convolution conv = describe(values, weight, initial, documents);
  at::Tensor outputs = at::empty_like(values);
  const float* offset = bias.const_data_ptr<float>();
  float* y = outputs.mutable_data_ptr<float>();
  at::parallel_for(0, conv.batch * conv.blocks(), 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    for (int64_t task = first; task < last; ++task) {
      const int64_t begin = task % conv.blocks() * BLOCK;
      const int64_t end = std::min(begin + BLOCK, conv.length);
      forward_block(conv, task / conv.blocks(), begin, end, offset, y);
    }
  });
  return outputs;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_outputs, const at::Tensor& values, const at::Tensor& weight,
    const std::optional<at::Tensor>& initial, const std::optional<at::Tensor>& documents) {
  const Convolution conv = describe(values, weight, initial, documents);
  const int64_t tasks = conv.batch * conv.blocks();
  at::Tensor d_values = at::empty_like(values);
  at::Tensor d_initial = at::empty(
      {initial.has_value() ? conv.batch : 0, conv.taps - 1, conv.channels}, values.options());
  at::Tensor d_kernels = at::zeros({tasks, conv.taps + 1, conv.channels}, values.options());
  const Gradients gradients{d_outputs.const_data_ptr<float>(), d_values.mutable_data_ptr<float>(),
                            d_initial.mutable_data_ptr<float>(),
                            d_kernels.mutable_data_ptr<float>()};
  at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / conv.blocks(), begin = task % conv.blocks() * BLOCK;
      const int64_t end = std::min(begin + BLOCK, conv.length);
      float* d_kernel = gradients.kernel + task * (conv.taps + 1) * conv.channels;
      if (begin == 0 && conv.initial != nullptr) {
        for (int64_t t = 1 - conv.taps; t < 0; ++t) backward_input(conv, gradients, row, t);
      }
      for (int64_t t = begin; t < end; ++t) {
        backward_input(conv, gradients, row, t);
        backward_kernel(conv, gradients, row, t, d_kernel);
      }
    }
  });
  const at::Tensor d_kernel = sum_slices(d_kernels);
  return {d_values, by_tap(d_kernel, conv.taps), d_kernel[conv.taps].clone(), d_initial};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("causal_conv_forward", &forward);
  library.impl("causal_conv_backward", &backward);
}

}  // namespace crossladder
