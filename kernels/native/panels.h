// Small matrix products inside a task: out += left right, a panel of `out` in registers at a time.
//
// Vector operands are copied to a contiguous workspace first, with rows padded to whole vectors:
// rows of a tensor whose stride is a power of two would compete for a few cache sets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>

#include "lanes.h"

namespace crossladder {

// Floats of a register, and a panel's rows and registers per row: as many as the register file
// holds. Not in `Lanes`: where that is wider than a register, compilers spill arrays of it.
#if defined(__AVX512F__)
constexpr int64_t REGISTER = 16, PANEL_ROWS = 6, PANEL_REGISTERS = 4;
#elif defined(__AVX__)
constexpr int64_t REGISTER = 8, PANEL_ROWS = 6, PANEL_REGISTERS = 2;
#elif defined(__aarch64__)
constexpr int64_t REGISTER = 4, PANEL_ROWS = 6, PANEL_REGISTERS = 4;
#else
constexpr int64_t REGISTER = 4, PANEL_ROWS = 6, PANEL_REGISTERS = 2;
#endif

typedef float Register __attribute__((vector_size(REGISTER * sizeof(float))));

inline Register load_register(const float* source) {
  Register found;
  std::memcpy(&found, source, sizeof(found));
  return found;
}

inline int64_t whole_vectors(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

// Uninitialised floats, aligned to vectors.
class Workspace {
 public:
  explicit Workspace(int64_t size)
      : lanes_(std::make_unique_for_overwrite<Lanes[]>(whole_vectors(size) / LANES)) {}
  float* data() { return reinterpret_cast<float*>(lanes_.get()); }

 private:
  std::unique_ptr<Lanes[]> lanes_;
};

struct Range {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
  bool empty() const { return end <= begin; }
  Range within(const Range& other) const {
    return {std::max(begin, other.begin), std::min(end, other.end)};
  }
};

// The left operand, read one number at a time: element (r, i) is data[r * row + i * step].
struct Scalars {
  const float* data;
  int64_t row, step;
};

// The right operand, read in vectors: row i begins at data[i * row].
struct Rows {
  const float* data;
  int64_t row;
};

// What some rows of a product need: the inner range to sum over, and the columns, in whole vectors.
struct Extent {
  Range inner, columns;
};

template <int64_t ROWS, int64_t REGISTERS>
void panel(const Scalars& left, const Rows& right, const Range& inner, bool kept, float* out,
           int64_t stride) {
  Register sums[ROWS][REGISTERS];
  const auto for_each = [&](const auto& run) {
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < REGISTERS; ++v) run(sums[r][v], out + r * stride + v * REGISTER);
    }
  };
  for_each([&](Register& sum, const float* at) { sum = kept ? load_register(at) : Register{}; });
  const float *a = left.data + inner.begin * left.step, *b = right.data + inner.begin * right.row;
  for (int64_t i = inner.begin; i < inner.end; ++i, a += left.step, b += right.row) {
    Register taken[REGISTERS];
#pragma GCC unroll 8
    for (int64_t v = 0; v < REGISTERS; ++v) taken[v] = load_register(b + v * REGISTER);
#pragma GCC unroll 8
    for (int64_t r = 0; r < ROWS; ++r) {
      const float x = a[r * left.row];
#pragma GCC unroll 8
      for (int64_t v = 0; v < REGISTERS; ++v) sums[r][v] += x * taken[v];
    }
  }
  for_each([&](const Register& sum, float* at) { std::memcpy(at, &sum, sizeof(sum)); });
}

template <int64_t ROWS>
void panels(const Scalars& left, const Rows& right, const Extent& extent, bool kept, float* out,
            int64_t stride) {
  constexpr int64_t WIDE = PANEL_REGISTERS * REGISTER;
  int64_t c = extent.columns.begin;
  for (; c + WIDE <= extent.columns.end; c += WIDE) {
    panel<ROWS, PANEL_REGISTERS>(left, {right.data + c, right.row}, extent.inner, kept, out + c,
                                 stride);
  }
  for (; c < extent.columns.end; c += REGISTER) {
    panel<ROWS, 1>(left, {right.data + c, right.row}, extent.inner, kept, out + c, stride);
  }
}

// out = left right, or out += left right if `kept`; `extent(rows)` says what each panel needs.
template <typename Choice>
void product(int64_t rows, const Scalars& left, const Rows& right, bool kept, float* out,
             int64_t stride, const Choice& extent) {
  static_assert(PANEL_ROWS == 6);
  for (int64_t r = 0; r < rows; r += PANEL_ROWS) {
    const Range some{r, std::min(r + PANEL_ROWS, rows)};
    const Scalars from{left.data + r * left.row, left.row, left.step};
    float* to = out + r * stride;
    switch (some.size()) {
      case 1: panels<1>(from, right, extent(some), kept, to, stride); break;
      case 2: panels<2>(from, right, extent(some), kept, to, stride); break;
      case 3: panels<3>(from, right, extent(some), kept, to, stride); break;
      case 4: panels<4>(from, right, extent(some), kept, to, stride); break;
      case 5: panels<5>(from, right, extent(some), kept, to, stride); break;
      default: panels<6>(from, right, extent(some), kept, to, stride);
    }
  }
}

// Copies rows of `size` numbers from a stride of `stride` to one of `padded`, and pads with zeros.
inline void gather(const float* source, int64_t stride, int64_t rows, int64_t size, float* target,
                   int64_t padded) {
  for (int64_t r = 0; r < rows; ++r) {
    for_each_vector(size, [&](int64_t i, int64_t count) {
      store(target + r * padded + i, load(source + r * stride + i, count), LANES);
    });
  }
}

// Transposes a 16 x 16 block: four rounds that interleave vectors i and i + 8.
inline void transpose(Lanes* rows) {
  Lanes other[LANES];
#pragma GCC unroll 4
  for (int64_t round = 0; round < 4; ++round) {
    const Lanes* from = round % 2 == 0 ? rows : other;
    Lanes* to = round % 2 == 0 ? other : rows;
#pragma GCC unroll 8
    for (int64_t i = 0; i < LANES / 2; ++i) zip(from[i], from[i + LANES / 2], to + 2 * i);
  }
}

// target (columns, rows) is the transpose of `source`, whose rows and columns are padded.
inline void transpose(const float* source, int64_t rows, int64_t columns, int64_t stride,
                      float* target, int64_t target_stride) {
  for (int64_t r = 0; r < rows; r += LANES) {
    for (int64_t c = 0; c < columns; c += LANES) {
      Lanes taken[LANES];
      for (int64_t i = 0; i < LANES; ++i) taken[i] = load(source + (r + i) * stride + c, LANES);
      transpose(taken);
      for (int64_t i = 0; i < LANES; ++i) {
        store(target + (c + i) * target_stride + r, taken[i], LANES);
      }
    }
  }
}

}  // namespace crossladder
