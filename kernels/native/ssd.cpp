// What SSD by chunks does between its products of matrices on the CPU, in one pass over memory each.
//
// A matrix of decays between the tokens of a chunk is as large as the product that it masks, so
// every pass over it that torch would make counts. Here it exists one row at a time. Each chunk
// belongs to one thread, and heads are summed in order: results do not depend on the threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "lanes.h"
#include "slices.h"

namespace crossladder {
namespace {

constexpr float LOG2_E = 1.44269504088896341f;
// Smaller decays count for nothing, but the denormal numbers that they lead to are slow.
constexpr float FLOOR = -60.0f;
// Numbers that are worth another thread.
constexpr int64_t GRAIN = 16384;

constexpr IntegerLanes INDEX = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline float total(Lanes x) {
  Lanes rows[LANES] = {x};
  return sums(rows, 1)[0];
}

// The first `count` lanes, and zeros.
inline Lanes first_lanes(Lanes x, int64_t count) {
  const IntegerLanes chosen = INDEX < static_cast<int32_t>(count);
  return std::bit_cast<Lanes>(std::bit_cast<IntegerLanes>(x) & chosen);
}

const float* read(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat,
              "ssd was given a tensor that is not contiguous float32");
  return x.const_data_ptr<float>();
}

float* write(at::Tensor& x) {
  read(x);
  return x.mutable_data_ptr<float>();
}

// The chunks of a piece: (chunks, heads, length) by token, pairs (chunks, 1, length, length).
struct Chunks {
  int64_t chunks, heads, length;
  const float *log_decay, *rounding, *dt, *pairs;

  Chunks(const at::Tensor& log, const at::Tensor& rest, const at::Tensor& steps,
         const at::Tensor& products)
      : chunks(log.size(0) * log.size(1)), heads(log.size(2)), length(log.size(3)),
        log_decay(read(log)), rounding(read(rest)), dt(read(steps)), pairs(read(products)) {}

  int64_t square() const { return length * length; }
  int64_t grain() const { return std::max<int64_t>(1, GRAIN / (heads * square())); }

  // Decays from tokens `j` on to token i, at most 1, of one head of one chunk.
  Lanes decay(int64_t matrix, int64_t i, int64_t j, int64_t count) const {
    const float *log = log_decay + matrix * length, *rest = rounding + matrix * length;
    const Lanes exponent =
        (log[i] - load(log + j, count)) + (rest[i] - load(rest + j, count));
    return exp2(LOG2_E * clamp(exponent, FLOOR, 0.0f));
  }
};

// For each row i of a matrix of `length`, the vectors that hold its entries j <= i.
template <typename Run>
inline void for_each_vector(int64_t i, int64_t length, const Run& run) {
  for (int64_t j = 0; j <= i; j += LANES) run(j, std::min(LANES, length - j));
}

inline void clear_rest(float* row, int64_t i, int64_t length) {
  const int64_t end = std::min(length, (i / LANES + 1) * LANES);
  std::fill(row + end, row + length, 0.0f);
}

// The matrix from values to outputs inside each chunk: decay, product of C and B, step size.
void matrix(const at::Tensor& log, const at::Tensor& rest, const at::Tensor& steps,
            const at::Tensor& products, at::Tensor& out) {
  const Chunks x(log, rest, steps, products);
  float* target = write(out);
  at::parallel_for(0, x.chunks, x.grain(), [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t m = first * x.heads; m < end * x.heads; ++m) {
      const float *pairs = x.pairs + m / x.heads * x.square(), *dt = x.dt + m * x.length;
      for (int64_t i = 0; i < x.length; ++i) {
        float* row = target + m * x.square() + i * x.length;
        for_each_vector(i, x.length, [&](int64_t j, int64_t count) {
          const Lanes product = load(pairs + i * x.length + j, count) * load(dt + j, count);
          store(row + j, x.decay(m, i, j, count) * product, count);
        });
        clear_rest(row, i, x.length);
      }
    }
  });
}

// From `scores`, products of gradients of outputs and of values: the gradients of the products of C
// and B, summed over heads, and of each token's log decay, by the pairs on either side of it. The
// matrix without step sizes takes the place of the scores.
void matrix_back(const at::Tensor& log, const at::Tensor& rest, const at::Tensor& steps,
                 const at::Tensor& products, at::Tensor& scores, at::Tensor& d_pairs,
                 at::Tensor& d_log) {
  const Chunks x(log, rest, steps, products);
  float *score = write(scores), *d_product = write(d_pairs), *by_log = write(d_log);
  at::parallel_for(0, x.chunks, x.grain(), [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    std::vector<Lanes> later(ceil_div(x.length, LANES));
    for (int64_t m = first * x.heads; m < end * x.heads; ++m) {
      const int64_t chunk = m / x.heads;
      const float *pairs = x.pairs + chunk * x.square(), *dt = x.dt + m * x.length;
      float* shared = d_product + chunk * x.square();
      if (m % x.heads == 0) std::fill(shared, shared + x.square(), 0.0f);
      std::fill(later.begin(), later.end(), Lanes{});
      for (int64_t i = x.length - 1; i >= 0; --i) {
        float* row = score + m * x.square() + i * x.length;
        float* shared_row = shared + i * x.length;
        Lanes earlier{};
        for_each_vector(i, x.length, [&](int64_t j, int64_t count) {
          const Lanes decay = x.decay(m, i, j, count);
          const Lanes scaled = decay * load(row + j, count) * load(dt + j, count);
          const Lanes product = load(pairs + i * x.length + j, count);
          store(shared_row + j, load(shared_row + j, count) + scaled, count);
          store(row + j, decay * product, count);
          // Sums over later tokens of the pairs with each earlier one: nothing is subtracted.
          later[j / LANES] += scaled * product;
          earlier += first_lanes(later[j / LANES], i - j);
        });
        by_log[m * x.length + i] = total(earlier);
        clear_rest(row, i, x.length);
      }
    }
  });
}

// A tensor (K, B, S, H, P), of which the last dimension is contiguous.
struct Tokens {
  at::IntArrayRef sizes, strides;

  explicit Tokens(const at::Tensor& x) : sizes(x.sizes()), strides(x.strides()) {
    TORCH_CHECK(x.dim() == 5 && x.stride(4) == 1 && x.scalar_type() == at::kFloat,
                "ssd was given a tensor whose last dimension is not contiguous float32");
  }

  int64_t rows() const { return sizes[0] * sizes[1] * sizes[2]; }
  int64_t heads() const { return sizes[3]; }
  int64_t width() const { return sizes[4]; }
  int64_t grain() const { return std::max<int64_t>(1, GRAIN / (heads() * width())); }
  int64_t at(int64_t row, int64_t head) const {
    const int64_t batch = row / sizes[2];
    return batch / sizes[1] * strides[0] + batch % sizes[1] * strides[1] +
           row % sizes[2] * strides[2] + head * strides[3];
  }
};

// Products summed over the last dimension.
void dots(const at::Tensor& left, const at::Tensor& right, at::Tensor& out) {
  const Tokens x(left), y(right);
  const float *a = left.const_data_ptr<float>(), *b = right.const_data_ptr<float>();
  float* target = write(out);
  at::parallel_for(0, x.rows(), x.grain(), [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      for (int64_t h = 0; h < x.heads(); ++h) {
        const float *c = a + x.at(row, h), *d = b + y.at(row, h);
        Lanes sum{};
        for (int64_t p = 0; p < x.width(); p += LANES) {
          const int64_t count = std::min(LANES, x.width() - p);
          sum += load(c + p, count) * load(d + p, count);
        }
        target[row * x.heads() + h] = total(sum);
      }
    }
  });
}

// From the gradients of what each token adds to the state, inside its chunk (K, B, H, Q, P) and,
// still to decay, behind it: those of values, and the share of those of step sizes.
void steps_back(const at::Tensor& inside, const at::Tensor& behind, const at::Tensor& leaving,
                const at::Tensor& steps, const at::Tensor& values, at::Tensor& d_values,
                at::Tensor& d_dt) {
  const Tokens x(values), y(d_values);
  const int64_t heads = x.heads(), width = x.width(), length = x.sizes[2];
  const float *within = read(inside), *after = read(behind), *decay = read(leaving);
  const float *dt = read(steps), *value = values.const_data_ptr<float>();
  float *target = d_values.mutable_data_ptr<float>(), *by_dt = write(d_dt);
  at::parallel_for(0, x.rows(), x.grain(), [&](int64_t first, int64_t end) {
    for (int64_t row = first; row < end; ++row) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t token = row * heads + h;
        const int64_t by_head = (row / length * heads + h) * length + row % length;
        Lanes sum{};
        for (int64_t p = 0; p < width; p += LANES) {
          const int64_t count = std::min(LANES, width - p);
          const Lanes gradient = load(within + by_head * width + p, count) +
                                 decay[token] * load(after + token * width + p, count);
          store(target + y.at(row, h) + p, dt[by_head] * gradient, count);
          sum += gradient * load(value + x.at(row, h) + p, count);
        }
        by_dt[token] = total(sum);
      }
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("ssd_matrix", &matrix);
  library.impl("ssd_matrix_back", &matrix_back);
  library.impl("ssd_dots", &dots);
  library.impl("ssd_steps_back", &steps_back);
}

}  // namespace crossladder
