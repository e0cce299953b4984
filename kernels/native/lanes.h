// Channels in vector registers: loads, stores, sums and the exponential that the kernels share.
//
// Plain compiler vector extensions (GCC and Clang, any architecture): `Lanes` is one AVX-512
// register, two of AVX2 or four of NEON, and the arithmetic operators are the usual ones.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace crossladder {

constexpr int64_t LANES = 16;

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t IntegerLanes __attribute__((vector_size(LANES * sizeof(int32_t))));

// The first `count` floats at `source`; the lanes beyond are zero, so they add nothing to any sum.
inline Lanes load(const float* source, int64_t count) {
#if defined(__AVX512F__)
  return std::bit_cast<Lanes>(_mm512_maskz_loadu_ps((1u << count) - 1, source));
#else
  Lanes lanes{};
  std::memcpy(&lanes, source, count * sizeof(float));
  return lanes;
#endif
}

inline void store(float* target, Lanes lanes, int64_t count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(target, (1u << count) - 1, std::bit_cast<__m512>(lanes));
#else
  std::memcpy(target, &lanes, count * sizeof(float));
#endif
}

// The sums of neighbouring lanes: those of `first`, then those of `second`.
inline Lanes sum_neighbours(Lanes first, Lanes second) {
#if defined(__clang__)
  return __builtin_shufflevector(first, second, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26,
                                 28, 30) +
         __builtin_shufflevector(first, second, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27,
                                 29, 31);
#else
  constexpr IntegerLanes EVEN = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  return __builtin_shuffle(first, second, EVEN) + __builtin_shuffle(first, second, EVEN + 1);
#endif
}

// Interleaves two vectors: zipped[0] gets their first halves, zipped[1] their second.
inline void zip(Lanes first, Lanes second, Lanes* zipped) {
#if defined(__clang__)
  zipped[0] = __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6,
                                      22, 7, 23);
  zipped[1] = __builtin_shufflevector(first, second, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29,
                                      14, 30, 15, 31);
#else
  constexpr IntegerLanes LOW = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
  zipped[0] = __builtin_shuffle(first, second, LOW);
  zipped[1] = __builtin_shuffle(first, second, LOW + 8);
#endif
}

// Lane i of the result is the sum over the lanes of rows[i * stride], i < 16, in a fixed order.
template <int64_t COUNT = LANES>
inline Lanes sums(const Lanes* rows, int64_t stride) {
  if constexpr (COUNT == 1) {
    return rows[0];
  } else {
    return sum_neighbours(sums<COUNT / 2>(rows, stride),
                          sums<COUNT / 2>(rows + COUNT / 2 * stride, stride));
  }
}

inline float total(Lanes x) {
  Lanes rows[LANES] = {x};
  return sums(rows, 1)[0];
}

constexpr IntegerLanes INDEX = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The first `count` lanes, and zeros.
inline Lanes first_lanes(Lanes x, int64_t count) {
  const IntegerLanes chosen = INDEX < static_cast<int32_t>(count);
  return std::bit_cast<Lanes>(std::bit_cast<IntegerLanes>(x) & chosen);
}

// Runs over the vectors of some floats from one place to another: run(place, count).
template <typename Run>
inline void for_each_vector(int64_t first, int64_t past, const Run& run) {
  int64_t i = first;
  for (; i + LANES <= past; i += LANES) run(i, LANES);
  if (i < past) run(i, past - i);
}

template <typename Run>
inline void for_each_vector(int64_t size, const Run& run) {
  for_each_vector(0, size, run);
}

// The products of two vectors, still to be summed over the lanes.
inline Lanes dot(const float* x, const float* y, int64_t size) {
  Lanes sum{};
  for_each_vector(size, [&](int64_t i, int64_t count) {
    sum += load(x + i, count) * load(y + i, count);
  });
  return sum;
}

// NaN stays NaN. The comparisons are what the instructions do, but GCC 12 does not find them.
inline Lanes clamp(Lanes x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 raised = _mm512_max_ps(_mm512_set1_ps(low), std::bit_cast<__m512>(x));
  return std::bit_cast<Lanes>(_mm512_min_ps(_mm512_set1_ps(high), raised));
#else
  x = x < low ? Lanes{} + low : x;
  return x > high ? Lanes{} + high : x;
#endif
}

inline Lanes larger(Lanes x, Lanes y) {
#if defined(__AVX512F__)
  return std::bit_cast<Lanes>(
      _mm512_max_ps(std::bit_cast<__m512>(x), std::bit_cast<__m512>(y)));
#else
  return x > y ? x : y;
#endif
}

// 2^x with a relative error below 2e-7, exactly 1 at 0.
//
// Adding 1.5 * 2^23 leaves round(x) in the low bits of the float. 2^(x - round(x)) is a minimax
// polynomial with the constant term held at 1; round(x) is added to its exponent bits. Below -126
// the result stays at the smallest normal number, above 128 it is infinite, and NaN stays NaN.
inline Lanes exp2(Lanes x) {
  constexpr float ROUNDER = 12582912.0f;
  x = clamp(x, -126.0f, 128.0f);
  const Lanes shifted = x + ROUNDER;
  const Lanes fraction = x - (shifted - ROUNDER);
  Lanes power = fraction * 0.00132647273f + 0.00967151299f;
  power = power * fraction + 0.0555073358f;
  power = power * fraction + 0.240222424f;
  power = power * fraction + 0.693147004f;
  power = power * fraction + 1.0f;
  const IntegerLanes exponent = std::bit_cast<IntegerLanes>(shifted) << 23;
  return std::bit_cast<Lanes>(std::bit_cast<IntegerLanes>(power) + exponent);
}

constexpr float LOG2_E = 1.44269504088896341f;

inline Lanes sigmoid(Lanes x) { return 1.0f / (1.0f + exp2(-LOG2_E * x)); }

// exp(x) - 1 for x <= 0 without cancellation near 0: by its Taylor series above -0.35, where the
// first omitted term is below 2e-8 of the result.
inline Lanes expm1(Lanes x) {
  const Lanes power = exp2(LOG2_E * x) - 1.0f;
  Lanes series = 1.0f + x * (1.0f / 7.0f);
  for (int term = 6; term > 1; --term) series = 1.0f + x * series * (1.0f / term);
  return x > -0.35f ? x * series : power;
}

inline Lanes tanh(Lanes x) {
  const Lanes size = x < 0.0f ? x : -x;
  const Lanes grown = expm1(2.0f * size);
  const Lanes result = grown / (2.0f + grown);
  return x < 0.0f ? result : -result;
}

inline Lanes root(Lanes x) {
#if defined(__AVX512F__)
  return std::bit_cast<Lanes>(_mm512_sqrt_ps(std::bit_cast<__m512>(x)));
#else
  for (int64_t i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Flushes denormal numbers to zero during its lifetime; arithmetic on a decayed state would be a
// hundred times slower. Every task sets it, as worker threads do not inherit the caller's setting.
class FlushDenormals {
 public:
#if defined(__SSE__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#else
  FlushDenormals() : saved_(0) {}
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
  unsigned saved_;
};

}  // namespace crossladder
