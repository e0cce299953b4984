// What the forward and the backward pass of the causal depthwise convolution share.
//
// A tap is indexed by its age: how many tokens before the output its input lies. At each token the
// ages end with its document's first token, so inputs of other documents are never read.
#pragma once

#include <ATen/Functions.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "lanes.h"
#include "slices.h"

namespace crossladder {

// Tokens of a task.
constexpr int64_t CONV_BLOCK = 64;

// The tensors of one call; `kernel` holds the weight as (age, channel).
struct Convolution {
  int64_t batch, length, channels, taps;
  const float* values;
  // Whether `initial` was given; with one tap it is given but empty.
  bool carries;
  const float* initial;
  const int32_t* documents;
  std::vector<float> kernel;

  Convolution(const at::Tensor& given, const at::Tensor& weight,
              const std::optional<at::Tensor>& carried, const std::optional<at::Tensor>& ids)
      : batch(given.size(0)),
        length(given.size(1)),
        channels(given.size(2)),
        taps(weight.size(1)),
        values(read(given, "causal_conv")),
        carries(carried.has_value()),
        initial(carries ? read(*carried, "causal_conv") : nullptr),
        documents(ids.has_value() ? ids->const_data_ptr<int32_t>() : nullptr),
        kernel(weight.numel()) {
    const float* by_channel = read(weight, "causal_conv");
    for (int64_t age = 0; age < taps; ++age) {
      for (int64_t channel = 0; channel < channels; ++channel) {
        kernel[age * channels + channel] = by_channel[(channel + 1) * taps - 1 - age];
      }
    }
  }

  int64_t blocks() const { return ceil_div(length, CONV_BLOCK); }
  // Inputs before the first token have negative positions, down to 1 - taps.
  int64_t carried_at(int64_t row, int64_t position) const {
    return (row * (taps - 1) + position + taps - 1) * channels;
  }
  int64_t at(int64_t row, int64_t position) const { return (row * length + position) * channels; }
  const float* input(int64_t row, int64_t position) const {
    return position < 0 ? initial + carried_at(row, position) : values + at(row, position);
  }
  Lanes tap(int64_t age, int64_t channel, int64_t count) const {
    return load(&kernel[age * channels + channel], count);
  }
  // How many taps apply at token t: those whose inputs belong to its document.
  int64_t reach(int64_t row, int64_t t) const {
    const int32_t* ids = documents == nullptr ? nullptr : documents + row * length;
    int64_t age = 1;
    while (age < std::min(taps, t + 1) && (ids == nullptr || ids[t - age] == ids[t])) ++age;
    const bool continues = carries && (ids == nullptr || ids[t] == 0);
    return age == t + 1 && continues ? taps : age;
  }
  // The output of token t at some channels, summed over the first `reach` ages.
  Lanes output(int64_t row, int64_t t, int64_t reach, const float* bias, int64_t channel,
               int64_t count) const {
    Lanes total = load(bias + channel, count);
    for (int64_t age = 0; age < reach; ++age) {
      total += tap(age, channel, count) * load(input(row, t - age) + channel, count);
    }
    return total;
  }
};

// A slice of the channels, stored as a contiguous tensor of its own.
template <typename Number>
struct Part {
  int64_t first, past;
  Number* data;

  Number* at(int64_t token, int64_t channel) const {
    return data + token * (past - first) + channel - first;
  }
};

}  // namespace crossladder
