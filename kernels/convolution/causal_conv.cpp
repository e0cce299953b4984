// Causal depthwise convolution on the CPU: channels in vector lanes, blocks of tokens as tasks.

#include "causal_conv.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

namespace crossladder {
namespace {

template <bool SILU>
void run(const Convolution& conv, const float* bias, const std::vector<Part<float>>& parts) {
  at::parallel_for(0, conv.batch * conv.blocks(), 1, [&](int64_t first, int64_t last) {
    const FlushDenormals flush;
    for (int64_t task = first; task < last; ++task) {
      const int64_t row = task / conv.blocks(), begin = task % conv.blocks() * CONV_BLOCK;
      for (int64_t t = begin; t < std::min(begin + CONV_BLOCK, conv.length); ++t) {
        const int64_t reach = conv.reach(row, t);
        for (const Part<float>& part : parts) {
          for_each_vector(part.first, part.past, [&](int64_t channel, int64_t count) {
            const Lanes total = conv.output(row, t, reach, bias, channel, count);
            store(part.at(row * conv.length + t, channel), SILU ? total * sigmoid(total) : total,
                  count);
          });
        }
      }
    }
  });
}

at::Tensor forward(const at::Tensor& values, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& initial,
                   const std::optional<at::Tensor>& documents) {
  const Convolution conv(values, weight, initial, documents);
  at::Tensor outputs = at::empty_like(values);
  run<false>(conv, read(bias, "causal_conv"),
             {{0, conv.channels, outputs.mutable_data_ptr<float>()}});
  return outputs;
}

std::vector<at::Tensor> silu_forward(const at::Tensor& values, const at::Tensor& weight,
                                     const at::Tensor& bias,
                                     const std::optional<at::Tensor>& initial,
                                     const std::optional<at::Tensor>& documents,
                                     at::IntArrayRef sizes) {
  const Convolution conv(values, weight, initial, documents);
  std::vector<at::Tensor> outputs;
  std::vector<Part<float>> parts;
  int64_t first = 0;
  for (const int64_t size : sizes) {
    outputs.push_back(at::empty({conv.batch, conv.length, size}, values.options()));
    parts.push_back({first, first + size, outputs.back().mutable_data_ptr<float>()});
    first += size;
  }
  TORCH_CHECK(first == conv.channels, "silu_conv was given parts that are not all channels");
  run<true>(conv, read(bias, "silu_conv"), parts);
  return outputs;
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("causal_conv_forward", &forward);
  library.impl("silu_conv_forward", &silu_forward);
}

}  // namespace crossladder
