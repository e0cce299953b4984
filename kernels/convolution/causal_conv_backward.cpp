// The gradients of the causal depthwise convolution on the CPU, with or without a SiLU after it.
//
// Tasks have a fixed size, so the gradients of weight and bias do not depend on the number of
// threads. The input of the SiLU is recomputed, tile by tile of channels, not kept.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "causal_conv.h"

namespace crossladder {
namespace {

// Channels of a tile, few enough for a task's tokens to stay in a core's cache.
constexpr int64_t TILE = 128;

// What a call writes. `sums` has a slice per task: the weight's gradient by age, then the bias's.
struct Gradients {
  at::Tensor values, initial, sums;

  explicit Gradients(const Convolution& conv, const at::TensorOptions& options)
      : values(at::empty({conv.batch, conv.length, conv.channels}, options)),
        initial(at::empty({conv.carries ? conv.batch : 0, conv.taps - 1, conv.channels}, options)),
        sums(at::zeros({conv.batch * conv.blocks(), conv.taps + 1, conv.channels}, options)) {}

  // Those of values, weight (oldest tap first), bias and initial inputs.
  std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> all(int64_t taps) const {
    const at::Tensor sum = sum_slices(sums);
    return {values, sum.slice(0, 0, taps).flip(0).t().contiguous(), sum[taps].clone(), initial};
  }
};

// The gradient of some channels of the outputs, and the bias if a SiLU follows the convolution.
struct OutputGradients {
  Part<const float> outputs;
  const float* bias;

  // The gradient with respect to the SiLU's input x.
  Lanes before_silu(Lanes given, Lanes x) const {
    const Lanes share = sigmoid(x);
    return given * (share + x * share * (1.0f - share));
  }
};

// The block of tokens whose gradients a task computes.
class Block {
 public:
  Block(const Convolution& conv, const Gradients& gradients, int64_t task)
      : conv_(conv),
        row_(task / conv.blocks()),
        begin_(task % conv.blocks() * CONV_BLOCK),
        end_(std::min(begin_ + CONV_BLOCK, conv.length)),
        past_(std::min(end_ + conv.taps - 1, conv.length)),
        d_values_(gradients.values.mutable_data_ptr<float>()),
        d_initial_(gradients.initial.mutable_data_ptr<float>()),
        sums_(gradients.sums.mutable_data_ptr<float>() + task * (conv.taps + 1) * conv.channels) {
    for (int64_t t = begin_; t < past_; ++t) reach_.push_back(conv.reach(row_, t));
  }

  void collect(const OutputGradients& d, std::vector<float>& scratch) const {
    const auto [first, past, data] = d.outputs;
    if (conv_.taps == 4 && in_full()) return collect_in_full<4>(d);
    if (conv_.taps == 7 && in_full()) return collect_in_full<7>(d);
    for (int64_t tile = first; tile < past; tile += TILE) {
      collect_tile(d, {tile, std::min(tile + TILE, past), nullptr}, scratch);
    }
  }

 private:
  // Whether no document begins or row ends near the block: then every tap applies everywhere.
  bool in_full() const {
    const auto sees_all = [&](int64_t reach) { return reach == conv_.taps; };
    return begin_ > 0 && past_ == end_ + conv_.taps - 1 &&
           std::all_of(reach_.begin(), reach_.end(), sees_all);
  }

  Lanes given(const OutputGradients& d, int64_t t, int64_t channel, int64_t count) const {
    return load(d.outputs.at(row_ * conv_.length + t, channel), count);
  }

  // One pass over the tokens for one vector of channels at a time, with all sums in registers.
  template <int64_t TAPS>
  void collect_in_full(const OutputGradients& d) const {
    for_each_vector(d.outputs.first, d.outputs.past, [&](int64_t channel, int64_t count) {
      // Indexed by age: the inputs that token t reads, and the gradients of the last TAPS outputs.
      Lanes taps[TAPS], seen[TAPS] = {}, owed[TAPS] = {}, sums[TAPS + 1] = {};
      for (int64_t age = 0; age < TAPS; ++age) taps[age] = conv_.tap(age, channel, count);
      const float* inputs = conv_.input(row_, begin_) + channel;
      for (int64_t age = 1; age < TAPS; ++age) {
        seen[age - 1] = load(inputs - age * conv_.channels, count);
      }
      const Lanes bias = d.bias == nullptr ? Lanes{} : load(d.bias + channel, count);
      for (int64_t t = begin_; t < past_; ++t, inputs += conv_.channels) {
#pragma GCC unroll 8
        for (int64_t age = TAPS - 1; age > 0; --age) {
          seen[age] = seen[age - 1];
          owed[age] = owed[age - 1];
        }
        seen[0] = load(inputs, count);
        owed[0] = given(d, t, channel, count);
        if (d.bias != nullptr) {
          Lanes x = bias;
#pragma GCC unroll 8
          for (int64_t age = 0; age < TAPS; ++age) x += taps[age] * seen[age];
          owed[0] = d.before_silu(owed[0], x);
        }
        if (t - begin_ >= TAPS - 1) {
          Lanes d_input{};
#pragma GCC unroll 8
          for (int64_t age = 0; age < TAPS; ++age) d_input += taps[age] * owed[TAPS - 1 - age];
          store(d_values_ + conv_.at(row_, t - TAPS + 1) + channel, d_input, count);
        }
        if (t >= end_) continue;
        sums[TAPS] += owed[0];
#pragma GCC unroll 8
        for (int64_t age = 0; age < TAPS; ++age) sums[age] += owed[0] * seen[age];
      }
      for (int64_t age = 0; age <= TAPS; ++age) {
        store(sums_ + age * conv_.channels + channel, sums[age], count);
      }
    });
  }

  // The general case. The SiLU's input gradients go to `scratch` first: each is read TAPS times.
  void collect_tile(const OutputGradients& d, const Part<const float>& tile,
                    std::vector<float>& scratch) const {
    scratch.resize(reach_.size() * TILE);
    for (int64_t t = begin_; t < past_; ++t) {
      for_each_vector(tile.first, tile.past, [&](int64_t channel, int64_t count) {
        Lanes gradient = given(d, t, channel, count);
        if (d.bias != nullptr) {
          const int64_t reach = reach_[t - begin_];
          gradient = d.before_silu(gradient, conv_.output(row_, t, reach, d.bias, channel, count));
        }
        store(&scratch[(t - begin_) * TILE + channel - tile.first], gradient, count);
      });
    }
    const auto owed = [&](int64_t t, int64_t channel, int64_t count) {
      return load(&scratch[(t - begin_) * TILE + channel - tile.first], count);
    };
    if (begin_ == 0 && conv_.carries) {
      for (int64_t t = 1 - conv_.taps; t < 0; ++t) {
        to_input(owed, t, d_initial_ + conv_.carried_at(row_, t), tile);
      }
    }
    for (int64_t t = begin_; t < end_; ++t) {
      to_input(owed, t, d_values_ + conv_.at(row_, t), tile);
      to_sums(owed, t, tile);
    }
  }

  // An input at `position` is read by the outputs at position + age.
  template <typename Owed>
  void to_input(const Owed& owed, int64_t position, float* d_input,
                const Part<const float>& tile) const {
    const int64_t youngest = std::max<int64_t>(0, -position);
    int64_t last = youngest;
    while (last < conv_.taps && position + last < conv_.length &&
           reach_[position + last - begin_] > last) {
      ++last;
    }
    for_each_vector(tile.first, tile.past, [&](int64_t channel, int64_t count) {
      Lanes total{};
      for (int64_t age = youngest; age < last; ++age) {
        total += conv_.tap(age, channel, count) * owed(position + age, channel, count);
      }
      store(d_input + channel, total, count);
    });
  }

  template <typename Owed>
  void to_sums(const Owed& owed, int64_t t, const Part<const float>& tile) const {
    const int64_t reach = reach_[t - begin_];
    const auto add = [&](int64_t age, int64_t channel, int64_t count, Lanes added) {
      float* sum = sums_ + age * conv_.channels + channel;
      store(sum, load(sum, count) + added, count);
    };
    for_each_vector(tile.first, tile.past, [&](int64_t channel, int64_t count) {
      const Lanes d_output = owed(t, channel, count);
      for (int64_t age = 0; age < reach; ++age) {
        const float* input = conv_.input(row_, t - age) + channel;
        add(age, channel, count, d_output * load(input, count));
      }
      add(conv_.taps, channel, count, d_output);
    });
  }

  const Convolution& conv_;
  int64_t row_, begin_, end_;
  // End of the outputs that read an input of the block.
  int64_t past_;
  float *d_values_, *d_initial_, *sums_;
  // Taps that apply at each token from `begin_` to `past_`; fewer near a document's beginning.
  std::vector<int64_t> reach_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run(
    const Convolution& conv, const std::vector<OutputGradients>& parts,
    const at::TensorOptions& options) {
  const Gradients gradients(conv, options);
  at::parallel_for(0, conv.batch * conv.blocks(), 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    std::vector<float> scratch;
    for (int64_t task = first; task < last; ++task) {
      const Block block(conv, gradients, task);
      for (const OutputGradients& part : parts) block.collect(part, scratch);
    }
  });
  return gradients.all(conv.taps);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_outputs, const at::Tensor& values, const at::Tensor& weight,
    const std::optional<at::Tensor>& initial, const std::optional<at::Tensor>& documents) {
  const Convolution conv(values, weight, initial, documents);
  const float* given = read(d_outputs, "causal_conv");
  return run(conv, {{{0, conv.channels, given}, nullptr}}, values.options());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> silu_backward(
    at::TensorList d_outputs, const at::Tensor& values, const at::Tensor& weight,
    const at::Tensor& bias, const std::optional<at::Tensor>& initial,
    const std::optional<at::Tensor>& documents) {
  const Convolution conv(values, weight, initial, documents);
  std::vector<OutputGradients> parts;
  int64_t first = 0;
  for (const at::Tensor& given : d_outputs) {
    const int64_t past = first + given.size(2);
    parts.push_back({{first, past, read(given, "silu_conv")}, read(bias, "silu_conv")});
    first = past;
  }
  TORCH_CHECK(first == conv.channels, "silu_conv was given parts that are not all channels");
  return run(conv, parts, values.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("causal_conv_backward", &backward);
  library.impl("silu_conv_backward", &silu_backward);
}

}  // namespace crossladder
