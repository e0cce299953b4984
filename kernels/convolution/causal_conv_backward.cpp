// The gradients of the causal depthwise convolution on the CPU, and of a silu behind it.
//
// Tasks have a fixed size: the gradients of weight and bias do not depend on the number of threads.
// What the silu was given is computed anew, for a tile of channels and all tokens that a task needs.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <tuple>

#include "causal_conv.h"

namespace crossladder {
namespace {

// Channels of a tile, which with the tokens of a task fill a part of the nearest cache.
constexpr int64_t TILE = 128;

// What a call writes; each task has sums of its own by age, and then of the bias.
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

// Gradients of some channels of the outputs, and the bias if a silu stands behind them.
struct Behind {
  Part<const float> outputs;
  const float* bias;

  // The gradient of what the silu was given, x.
  Lanes before_silu(Lanes given, Lanes x) const {
    const Lanes share = sigmoid(x);
    return given * (share + x * share * (1.0f - share));
  }
};

// The block of tokens that a task collects for.
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

  void collect(const Behind& behind, std::vector<float>& scratch) const {
    const auto [first, past, data] = behind.outputs;
    if (conv_.taps == 4 && in_full()) return collect_in_full<4>(behind);
    if (conv_.taps == 7 && in_full()) return collect_in_full<7>(behind);
    for (int64_t tile = first; tile < past; tile += TILE) {
      collect_tile(behind, {tile, std::min(tile + TILE, past), nullptr}, scratch);
    }
  }

 private:
  // Whether all tokens see as many ages as there are taps, and are seen by as many.
  bool in_full() const {
    const auto sees_all = [&](int64_t reach) { return reach == conv_.taps; };
    return begin_ > 0 && past_ == end_ + conv_.taps - 1 &&
           std::all_of(reach_.begin(), reach_.end(), sees_all);
  }

  Lanes given(const Behind& behind, int64_t t, int64_t channel, int64_t count) const {
    return load(behind.outputs.at(row_ * conv_.length + t, channel), count);
  }

  // One walk over the tokens, by a few channels at a time whose sums stay in registers.
  template <int64_t TAPS>
  void collect_in_full(const Behind& behind) const {
    for_each_vector(behind.outputs.first, behind.outputs.past, [&](int64_t channel, int64_t count) {
      // By age: inputs that token t sees, and gradients of the outputs up to its own.
      Lanes taps[TAPS], seen[TAPS] = {}, owed[TAPS] = {}, sums[TAPS + 1] = {};
      for (int64_t age = 0; age < TAPS; ++age) taps[age] = conv_.tap(age, channel, count);
      const float* inputs = conv_.input(row_, begin_) + channel;
      for (int64_t age = 1; age < TAPS; ++age) {
        seen[age - 1] = load(inputs - age * conv_.channels, count);
      }
      const Lanes bias = behind.bias == nullptr ? Lanes{} : load(behind.bias + channel, count);
      for (int64_t t = begin_; t < past_; ++t, inputs += conv_.channels) {
#pragma GCC unroll 8
        for (int64_t age = TAPS - 1; age > 0; --age) {
          seen[age] = seen[age - 1];
          owed[age] = owed[age - 1];
        }
        seen[0] = load(inputs, count);
        owed[0] = given(behind, t, channel, count);
        if (behind.bias != nullptr) {
          Lanes x = bias;
#pragma GCC unroll 8
          for (int64_t age = 0; age < TAPS; ++age) x += taps[age] * seen[age];
          owed[0] = behind.before_silu(owed[0], x);
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

  // Gradients of what stands before a silu are laid down first, since tokens need several.
  void collect_tile(const Behind& behind, const Part<const float>& tile,
                    std::vector<float>& scratch) const {
    scratch.resize(reach_.size() * TILE);
    for (int64_t t = begin_; t < past_; ++t) {
      for_each_vector(tile.first, tile.past, [&](int64_t channel, int64_t count) {
        Lanes d = given(behind, t, channel, count);
        if (behind.bias != nullptr) {
          const int64_t reach = reach_[t - begin_];
          d = behind.before_silu(d, conv_.output(row_, t, reach, behind.bias, channel, count));
        }
        store(&scratch[(t - begin_) * TILE + channel - tile.first], d, count);
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

  // The outputs that see an input lie at the ages after it.
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
  // Behind the last token that sees one of the block.
  int64_t past_;
  float *d_values_, *d_initial_, *sums_;
  // How many ages each of these tokens sees.
  std::vector<int64_t> reach_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> run(
    const Convolution& conv, const std::vector<Behind>& parts, const at::TensorOptions& options) {
  const Gradients gradients(conv, options);
  at::parallel_for(0, conv.batch * conv.blocks(), 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    std::vector<float> scratch;
    for (int64_t task = first; task < last; ++task) {
      const Block block(conv, gradients, task);
      for (const Behind& part : parts) block.collect(part, scratch);
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
  std::vector<Behind> parts;
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
