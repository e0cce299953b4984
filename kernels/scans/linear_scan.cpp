// Linear scan on the CPU: h = exp(log_decay) h + value for each channel (Martin and Cundy 2018).
//
// Channels lie in vector lanes, so nothing is summed across lanes and the result does not depend on
// the number of threads. The backward pass reads the states from the outputs and recomputes decays.
// Memory bandwidth bounds the speed: wider tiles of channels gained less than a tenth.

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

// The tensors of one call that both passes read, as the pointers and sizes that the loops need.
struct Scan {
  int64_t batch, length, channels;
  const float* log_decay;
  const float* initial;
  const int32_t* documents;

  int64_t groups() const { return ceil_div(channels, LANES); }
  bool starts_document(int64_t row, int64_t t) const {
    if (documents == nullptr) return false;
    const int32_t* id = documents + row * length + t;
    return id[0] != (t == 0 ? 0 : id[-1]);
  }
};

// One vector of channels of one batch row.
struct Group {
  const Scan& scan;
  int64_t row, channel, count;

  int64_t at(int64_t t) const { return (row * scan.length + t) * scan.channels + channel; }
  int64_t state_at() const { return row * scan.channels + channel; }
  Lanes decay(int64_t t) const { return exp2(LOG2_E * load(scan.log_decay + at(t), count)); }
  Lanes initial() const {
    return scan.initial == nullptr ? Lanes{} : load(scan.initial + state_at(), count);
  }

  void forward(const float* values, float* outputs) const {
    Lanes state = initial();
    for (int64_t t = 0; t < scan.length; ++t) {
      if (scan.starts_document(row, t)) state = Lanes{};
      state = decay(t) * state + load(values + at(t), count);
      store(outputs + at(t), state, count);
    }
  }

  // The adjoint recurrence: g[t] = d_outputs[t] + decay[t + 1] g[t + 1].
  void backward(const float* d_outputs, const float* outputs, float* d_log_decay, float* d_values,
                float* d_initial) const {
    Lanes carried{};
    for (int64_t t = scan.length - 1; t >= 0; --t) {
      const Lanes adjoint = load(d_outputs + at(t), count) + carried;
      store(d_values + at(t), adjoint, count);
      Lanes d_log{};
      if (scan.starts_document(row, t)) {
        carried = Lanes{};
      } else {
        carried = decay(t) * adjoint;
        d_log = carried * (t == 0 ? initial() : load(outputs + at(t - 1), count));
      }
      store(d_log_decay + at(t), d_log, count);
    }
    if (d_initial != nullptr) store(d_initial + state_at(), carried, count);
  }
};

template <typename Run>
void for_each_group(const Scan& scan, const Run& run) {
  const int64_t groups = scan.groups();
  at::parallel_for(0, scan.batch * groups, 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t task = first; task < end; ++task) {
      const int64_t channel = task % groups * LANES;
      run(Group{scan, task / groups, channel, std::min(LANES, scan.channels - channel)});
    }
  });
}

Scan describe(const at::Tensor& log_decay, const at::Tensor& other,
              const std::optional<at::Tensor>& initial,
              const std::optional<at::Tensor>& documents) {
  for (const at::Tensor* tensor : {&log_decay, &other}) {
    TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == at::kFloat,
                "linear_scan was given a tensor that is not contiguous float32");
  }
  return {log_decay.size(0), log_decay.size(1), log_decay.size(2),
          log_decay.const_data_ptr<float>(),
          initial.has_value() ? initial->const_data_ptr<float>() : nullptr,
          documents.has_value() ? documents->const_data_ptr<int32_t>() : nullptr};
}

at::Tensor forward(const at::Tensor& log_decay, const at::Tensor& values,
                   const std::optional<at::Tensor>& initial,
                   const std::optional<at::Tensor>& documents) {
  const Scan scan = describe(log_decay, values, initial, documents);
  at::Tensor outputs = at::empty_like(values);
  const float* x = values.const_data_ptr<float>();
  float* y = outputs.mutable_data_ptr<float>();
  for_each_group(scan, [&](const Group& group) { group.forward(x, y); });
  return outputs;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_outputs, const at::Tensor& log_decay, const at::Tensor& outputs,
    const std::optional<at::Tensor>& initial, const std::optional<at::Tensor>& documents) {
  const Scan scan = describe(log_decay, d_outputs, initial, documents);
  at::Tensor d_log_decay = at::empty_like(log_decay);
  at::Tensor d_values = at::empty_like(log_decay);
  at::Tensor d_initial =
      at::empty({initial.has_value() ? scan.batch : 0, scan.channels}, log_decay.options());
  const float* dy = d_outputs.const_data_ptr<float>();
  const float* y = outputs.const_data_ptr<float>();
  float* d_log = d_log_decay.mutable_data_ptr<float>();
  float* dx = d_values.mutable_data_ptr<float>();
  float* d_start = initial.has_value() ? d_initial.mutable_data_ptr<float>() : nullptr;
  for_each_group(scan, [&](const Group& group) { group.backward(dy, y, d_log, dx, d_start); });
  return {d_log_decay, d_values, d_initial};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("linear_scan_forward", &forward);
  library.impl("linear_scan_backward", &backward);
}

}  // namespace crossladder
