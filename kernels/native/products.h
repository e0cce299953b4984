// Small matrix products inside a task, by the BLAS that torch links.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include <cstdint>

// Torch exports it where its BLAS is linked in; weak, so that a build without it still loads.
extern "C" __attribute__((weak)) void sgemm_(const char*, const char*, const int*, const int*,
                                             const int*, const float*, const float*, const int*,
                                             const float*, const int*, const float*, float*,
                                             const int*);

namespace crossladder {

// A row-major matrix of floats, or its transpose.
struct Matrix {
  const float* data;
  int64_t stride;
  bool is_transposed = false;

  Matrix transposed() const { return {data, stride, !is_transposed}; }
};

inline at::Tensor as_tensor(const Matrix& x, int64_t rows, int64_t columns) {
  if (x.is_transposed) return as_tensor(x.transposed(), columns, rows).t();
  return at::from_blob(const_cast<float*>(x.data), {rows, columns}, {x.stride, 1}, at::kFloat);
}

// out (rows, columns) = left (rows, inner) right (inner, columns) + kept * out, with kept 0 or 1.
inline void multiply(int64_t rows, int64_t columns, int64_t inner, const Matrix& left,
                     const Matrix& right, float kept, float* out, int64_t stride) {
  if (sgemm_ == nullptr) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    at::Tensor target = at::from_blob(out, {rows, columns}, {stride, 1}, at::kFloat);
    const at::Tensor a = as_tensor(left, rows, inner), b = as_tensor(right, inner, columns);
    target.addmm_(a, b, kept);
    return;
  }
  // BLAS is column-major: to it, row-major out = left right is out^T = right^T left^T.
  const int m = columns, n = rows, k = inner, c = stride;
  const int a = right.stride, b = left.stride;
  const float one = 1.0f;
  sgemm_(right.is_transposed ? "T" : "N", left.is_transposed ? "T" : "N", &m, &n, &k, &one,
         right.data, &a, left.data, &b, &kept, out, &c);
}

}  // namespace crossladder
