// Checked access to tensors, and partial sums added in a fixed order, whichever thread made them.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cstring>

namespace crossladder {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The data of a tensor; refuses one that is not contiguous float32.
inline const float* read(const at::Tensor& x, const char* kernel) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat, kernel,
              " was given a tensor that is not contiguous float32");
  return x.const_data_ptr<float>();
}

// Sum over the first dimension, slice after slice; of no slices it is zero.
inline at::Tensor sum_slices(const at::Tensor& slices) {
  if (slices.size(0) == 0) return at::zeros(slices.sizes().slice(1), slices.options());
  if (slices.size(0) == 1) return slices[0];
  at::Tensor total = at::empty_like(slices[0]);
  const int64_t size = total.numel(), count = slices.size(0);
  const float* source = slices.const_data_ptr<float>();
  float* target = total.mutable_data_ptr<float>();
  at::parallel_for(0, size, 16384, [&](int64_t first, int64_t end) {
    std::memcpy(target + first, source + first, (end - first) * sizeof(float));
    for (int64_t slice = 1; slice < count; ++slice) {
      const float* added = source + slice * size;
      for (int64_t i = first; i < end; ++i) target[i] += added[i];
    }
  });
  return total;
}

}  // namespace crossladder
