// The rotation of one head by its angles (Su et al. 2021, section 3.4.2).
#pragma once

#include <cstdint>

#include "lanes.h"

namespace crossladder {

// Rotates the channel pairs (p, p + width / 2) of one head; `back` applies the transpose, which
// maps gradients. The output may be the input.
inline void rotate_head(const float* x, const float* cos, const float* sin, int64_t width,
                        bool back, float* rotated) {
  const int64_t half = width / 2;
  for_each_vector(half, [&](int64_t p, int64_t count) {
    const int64_t q = p + half;
    const Lanes left = load(x + p, count), right = load(x + q, count);
    const Lanes to_left = back ? load(sin + q, count) : -load(sin + p, count);
    const Lanes to_right = back ? -load(sin + p, count) : load(sin + q, count);
    store(rotated + p, left * load(cos + p, count) + right * to_left, count);
    store(rotated + q, right * load(cos + q, count) + left * to_right, count);
  });
}

}  // namespace crossladder
