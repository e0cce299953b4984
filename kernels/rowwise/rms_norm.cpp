// RMS norms on the CPU (Zhang and Sennrich 2019, equation 4): channels in vector lanes, blocks of
// rows as tasks.
//
// A group of channels is read twice, the second time from L1, so memory is read once. Intermediate
// results are kept in the output buffers. Blocks depend on the shape alone, and with them the order
// of the sums in the weight's gradient.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "lanes.h"
#include "rotary.h"
#include "slices.h"

namespace crossladder {
namespace {

constexpr int64_t MOST_BLOCKS = 64;
// A block has at least so many numbers, or starting a task costs more than its work.
constexpr int64_t LEAST_NUMBERS = 8192;

// A matrix with a row stride; `data` is null if there is no gate.
struct Rows {
  const float* data;
  int64_t stride;

  explicit Rows(const std::optional<at::Tensor>& x) : data(nullptr), stride(0) {
    if (!x.has_value()) return;
    TORCH_CHECK(x->dim() == 2 && (x->stride(1) == 1 || x->size(1) == 1),
                "rms_norm was given rows whose channels do not lie side by side");
    data = x->const_data_ptr<float>();
    stride = x->stride(0);
  }
  const float* at(int64_t row, int64_t channel) const {
    return data == nullptr ? nullptr : data + row * stride + channel;
  }
};

struct Blocks {
  int64_t rows, size;

  explicit Blocks(const at::Tensor& x)
      : rows(x.size(0)),
        size(std::max(ceil_div(x.size(0), MOST_BLOCKS), ceil_div(LEAST_NUMBERS, x.size(1)))) {}
  int64_t count() const { return ceil_div(rows, size); }

  // Call task(block, row) for all rows of all blocks.
  template <typename Task>
  void share_out(const Task& task) const {
    at::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      const FlushDenormals flush;
      for (int64_t block = first; block < last; ++block) {
        const int64_t end = std::min((block + 1) * size, rows);
        for (int64_t row = block * size; row < end; ++row) task(block, row);
      }
    });
  }
};

// The rotary angles applied after the norm: `heads` consecutive rows are a token, and token t has
// the angles of place t modulo `places`. Null for no rotation.
struct Angles {
  const float *cos = nullptr, *sin = nullptr;
  int64_t heads, places, width;

  Angles(const std::optional<at::Tensor>& cosines, const std::optional<at::Tensor>& sines,
         int64_t heads, int64_t groups, int64_t width)
      : heads(heads), places(1), width(width) {
    if (!cosines.has_value()) return;
    TORCH_CHECK(groups == 1 && cosines->sizes() == sines->sizes() && cosines->size(1) == width &&
                    width % 2 == 0,
                "rms_norm was given angles that do not fit its channels");
    cos = read(*cosines, "rms_norm");
    sin = read(*sines, "rms_norm");
    places = cosines->size(0);
  }
  void rotate(const float* x, int64_t row, bool back, float* rotated) const {
    const int64_t place = row / heads % places * width;
    rotate_head(x, cos + place, sin + place, width, back, rotated);
  }
};

// One group of one row; every pointer is at its first channel.
struct Group {
  const float* x;
  const float* gate;
  const float* weight;
  int64_t width;
};

// Writes the outputs and returns the scale, 1 / sqrt(mean of squares + eps).
float forward_group(const Group& group, float eps, float* outputs) {
  Lanes squares{};
  for_each_vector(group.width, [&](int64_t channel, int64_t count) {
    Lanes value = load(group.x + channel, count);
    if (group.gate != nullptr) {
      const Lanes gate = load(group.gate + channel, count);
      value *= gate * sigmoid(gate);
      store(outputs + channel, value, count);
    }
    squares += value * value;
  });
  const float scale = 1.0f / std::sqrt(total(squares) / group.width + eps);
  const float* values = group.gate == nullptr ? group.x : outputs;
  for_each_vector(group.width, [&](int64_t channel, int64_t count) {
    const Lanes weight = load(group.weight + channel, count);
    store(outputs + channel, load(values + channel, count) * scale * weight, count);
  });
  return scale;
}

// Writes the gradients of x and gate, and adds to the weight's.
void backward_group(const Group& group, const float* d_outputs, float scale, float* d_x,
                    float* d_gate, float* d_weight) {
  Lanes products{};
  for_each_vector(group.width, [&](int64_t channel, int64_t count) {
    Lanes normed = load(group.x + channel, count) * scale;
    if (group.gate != nullptr) {
      const Lanes gate = load(group.gate + channel, count), share = sigmoid(gate);
      normed *= gate * share;
      store(d_gate + channel, share, count);
    }
    const Lanes product = load(d_outputs + channel, count) * normed;
    products += product * load(group.weight + channel, count);
    store(d_weight + channel, load(d_weight + channel, count) + product, count);
  });
  const float along = total(products) / group.width;
  for_each_vector(group.width, [&](int64_t channel, int64_t count) {
    const Lanes x = load(group.x + channel, count);
    const Lanes d_normed = load(d_outputs + channel, count) * load(group.weight + channel, count);
    if (group.gate == nullptr) {
      store(d_x + channel, (d_normed - x * scale * along) * scale, count);
      return;
    }
    const Lanes gate = load(group.gate + channel, count), share = load(d_gate + channel, count);
    const Lanes open = gate * share;
    const Lanes d_gated = (d_normed - x * open * scale * along) * scale;
    store(d_x + channel, d_gated * open, count);
    store(d_gate + channel, d_gated * x * (share + open * (1.0f - share)), count);
  });
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x,
                                           const std::optional<at::Tensor>& gate,
                                           const at::Tensor& weight, int64_t groups, double eps,
                                           const std::optional<at::Tensor>& cos,
                                           const std::optional<at::Tensor>& sin, int64_t heads) {
  const int64_t channels = x.size(1), width = channels / groups;
  const Rows inputs(x), gates(gate);
  const Angles angles(cos, sin, heads, groups, width);
  const float* weights = weight.const_data_ptr<float>();
  at::Tensor outputs = at::empty({x.size(0), channels}, x.options());
  at::Tensor scale = at::empty({x.size(0), groups}, x.options());
  float* y = outputs.mutable_data_ptr<float>();
  float* scales = scale.mutable_data_ptr<float>();
  Blocks(x).share_out([&](int64_t, int64_t row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width;
      const Group each{inputs.at(row, first), gates.at(row, first), weights + first, width};
      scales[row * groups + group] = forward_group(each, eps, y + row * channels + first);
    }
    float* normed = y + row * channels;
    if (angles.cos != nullptr) angles.rotate(normed, row, false, normed);
  });
  return {outputs, scale};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& d_outputs,
                                                        const at::Tensor& x,
                                                        const std::optional<at::Tensor>& gate,
                                                        const at::Tensor& weight,
                                                        const at::Tensor& scale,
                                                        const std::optional<at::Tensor>& cos,
                                                        const std::optional<at::Tensor>& sin,
                                                        int64_t heads) {
  const int64_t channels = x.size(1), groups = scale.size(1), width = channels / groups;
  const Rows inputs(x), gates(gate), d_y(d_outputs);
  const Angles angles(cos, sin, heads, groups, width);
  const Blocks blocks(x);
  at::Tensor d_x = at::empty({x.size(0), channels}, x.options());
  at::Tensor d_gate = at::empty({gate.has_value() ? x.size(0) : 0, channels}, x.options());
  at::Tensor d_weights = at::zeros({blocks.count(), channels}, x.options());
  const float* weights = weight.const_data_ptr<float>();
  const float* scales = scale.const_data_ptr<float>();
  float* d_inputs = d_x.mutable_data_ptr<float>();
  float* d_gates = d_gate.mutable_data_ptr<float>();
  float* sums = d_weights.mutable_data_ptr<float>();
  blocks.share_out([&](int64_t block, int64_t row) {
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t first = group * width, place = row * channels + first;
      const Group each{inputs.at(row, first), gates.at(row, first), weights + first, width};
      const float* gradient = d_y.at(row, first);
      if (angles.cos != nullptr) {
        // In place: each number is read before it is overwritten.
        angles.rotate(gradient, row, true, d_inputs + place);
        gradient = d_inputs + place;
      }
      backward_group(each, gradient, scales[row * groups + group], d_inputs + place,
                     d_gates + place, sums + block * channels + first);
    }
  });
  return {d_x, d_gate, blocks.count() == 0 ? at::zeros_like(weight) : sum_slices(d_weights)};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("rms_norm_forward", &forward);
  library.impl("rms_norm_backward", &backward);
}

}  // namespace crossladder
