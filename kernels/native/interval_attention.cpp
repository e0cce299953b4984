// Softmax attention of each query to an interval of keys on the CPU (Dao 2023, sections 3.1, 3.2).
//
// A block of queries meets its keys tile by tile, and a tile of scores never leaves the cache. A
// block ends where the next query sees nothing that this one sees, so that no number of one document
// meets those of another. Back, a task is a row and a head of keys, which sums their gradients over
// blocks in order: results do not depend on the number of threads.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"
#include "products.h"
#include "slices.h"

namespace crossladder {
namespace {

constexpr int64_t QUERIES = 64, KEYS = 512;
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

struct Attention {
  int64_t batch, length, heads, width, keys_in_all, groups, value_width;
  const float *queries, *keys, *values;
  const int32_t *first, *past;

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }
  int64_t token(int64_t row, int64_t t) const { return row * length + t; }
  Matrix query(int64_t row, int64_t t, int64_t head) const {
    return {queries + (token(row, t) * heads + head) * width, heads * width};
  }
  int64_t key_at(int64_t row, int64_t place, int64_t group) const {
    return (row * keys_in_all + place) * groups + group;
  }
  Matrix key(int64_t row, int64_t place, int64_t group) const {
    return {keys + key_at(row, place, group) * width, groups * width};
  }
  Matrix value(int64_t row, int64_t place, int64_t group) const {
    return {values + key_at(row, place, group) * value_width, groups * value_width};
  }
  int64_t output_at(int64_t row, int64_t t, int64_t head) const {
    return (token(row, t) * heads + head) * value_width;
  }
};

// Some neighbouring queries of a row.
struct Block {
  int64_t row, begin, count;
};

// Those of all rows in order; a row's begin at `first[row]`.
struct Blocks {
  std::vector<Block> all;
  std::vector<int64_t> first;

  explicit Blocks(const Attention& in) {
    for (int64_t row = 0; row < in.batch; ++row) {
      first.push_back(all.size());
      for (int64_t t = 0; t < in.length; ++t) {
        const int64_t at = in.token(row, t);
        const bool apart = t == 0 || in.first[at] >= in.past[at - 1];
        if (apart || all.back().count == QUERIES) all.push_back({row, t, 0});
        ++all.back().count;
      }
    }
    first.push_back(all.size());
  }
  int64_t count() const { return all.size(); }
};

// A block of one head's queries, and a tile of the keys that any of them sees.
struct Tile {
  int64_t row, head, group, begin, count, place, keys;
};

// What of a tile query i sees: first to past - 1.
struct Seen {
  int64_t first, past;

  Seen(const Attention& in, const Tile& x, int64_t i) {
    const int64_t at = in.token(x.row, x.begin + i);
    first = std::clamp<int64_t>(in.first[at] - x.place, 0, x.keys);
    past = std::clamp<int64_t>(in.past[at] - x.place, first, x.keys);
  }
};

const float* read(const at::Tensor& x) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat,
              "interval_attention was given a tensor that is not contiguous float32");
  return x.const_data_ptr<float>();
}

Attention describe(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                   const at::Tensor& first, const at::Tensor& past,
                   const std::optional<at::Tensor>& own, const std::optional<at::Tensor>& shown) {
  TORCH_CHECK(!own.has_value() && !shown.has_value(),
              "interval_attention on the CPU knows no own keys and no hidden ones");
  TORCH_CHECK(first.is_contiguous() && past.is_contiguous(), "intervals are not contiguous");
  return {q.size(0), q.size(1), q.size(2), q.size(3), k.size(1), k.size(2), v.size(3), read(q),
          read(k), read(v), first.const_data_ptr<int32_t>(), past.const_data_ptr<int32_t>()};
}

// Runs over the tiles of keys that a block of queries sees, in order.
template <typename Run>
void for_each_tile(const Attention& in, const Block& block, int64_t head, const Run& run) {
  const int64_t group = head / (in.heads / in.groups);
  Tile x{block.row, head, group, block.begin, block.count, 0, 0};
  const int64_t at = in.token(block.row, block.begin);
  // Ends never fall from query to query.
  const int64_t end = in.past[at + x.count - 1];
  for (x.place = in.first[at]; x.place < end; x.place += KEYS) {
    x.keys = std::min(KEYS, end - x.place);
    run(x);
  }
}

void fill_scores(const Attention& in, const Tile& x, float* scores) {
  multiply(x.count, x.keys, in.width, in.query(x.row, x.begin, x.head),
           in.key(x.row, x.place, x.group).transposed(), 0.0f, scores, x.keys);
}

// Runs over the vectors of a row between two places.
template <typename Run>
inline void for_each_vector(int64_t first, int64_t past, const Run& run) {
  int64_t j = first;
  for (; j + LANES <= past; j += LANES) run(j, LANES);
  if (j < past) run(j, past - j);
}

float largest(const float* row, const Seen& seen) {
  Lanes most = Lanes{} + NOTHING;
  for_each_vector(seen.first, seen.past, [&](int64_t j, int64_t count) {
    const Lanes score = load(row + j, count);
    most = larger(most, INDEX < static_cast<int32_t>(count) ? score : most);
  });
  float found = NOTHING;
  for (int64_t i = 0; i < LANES; ++i) found = std::max(found, most[i]);
  return found;
}

void scale_row(float* row, int64_t size, float factor) {
  for_each_vector(0, size, [&](int64_t j, int64_t count) {
    store(row + j, factor * load(row + j, count), count);
  });
}

// exp2(scale * score - shift) of what is seen, zero elsewhere; returns the sum.
float exponentiate(float* row, const Seen& seen, int64_t keys, float scale, float shift) {
  Lanes sum{};
  std::fill(row, row + seen.first, 0.0f);
  std::fill(row + seen.past, row + keys, 0.0f);
  for_each_vector(seen.first, seen.past, [&](int64_t j, int64_t count) {
    const Lanes power = exp2(scale * load(row + j, count) - shift);
    store(row + j, power, count);
    sum += first_lanes(power, count);
  });
  return total(sum);
}

// The rows of a block of queries: largest score so far, and the sum of powers relative to it.
struct Softmax {
  float most[QUERIES], sum[QUERIES];

  Softmax() {
    std::fill(most, most + QUERIES, NOTHING);
    std::fill(sum, sum + QUERIES, 0.0f);
  }

  // Powers take the place of the scores, and what the outputs hold so far is made relative to the
  // new largest score.
  void take(const Attention& in, const Tile& x, float* scores, float* outputs) {
    const float scale = LOG2_E * in.scale();
    for (int64_t i = 0; i < x.count; ++i) {
      float* row = scores + i * x.keys;
      const Seen seen(in, x, i);
      const float now = std::max(most[i], scale * largest(row, seen));
      if (most[i] != now && sum[i] > 0.0f) {
        const float factor = std::exp2(most[i] - now);
        sum[i] *= factor;
        scale_row(outputs + i * in.heads * in.value_width, in.value_width, factor);
      }
      most[i] = now;
      sum[i] += exponentiate(row, seen, x.keys, scale, now);
    }
  }
};

void attend_block(const Attention& in, const Block& block, int64_t head, float* scores,
                  float* outputs, float* logs) {
  Softmax softmax;
  const int64_t stride = in.heads * in.value_width;
  float* target = outputs + in.output_at(block.row, block.begin, head);
  float kept = 0.0f;
  for_each_tile(in, block, head, [&](const Tile& x) {
    fill_scores(in, x, scores);
    softmax.take(in, x, scores, target);
    multiply(x.count, in.value_width, x.keys, Matrix{scores, x.keys},
             in.value(x.row, x.place, x.group), kept, target, stride);
    kept = 1.0f;
  });
  for (int64_t i = 0; i < block.count; ++i) {
    float* output = target + i * stride;
    // A query that sees nothing gets zeros.
    if (softmax.sum[i] == 0.0f) {
      std::fill(output, output + in.value_width, 0.0f);
    } else {
      scale_row(output, in.value_width, 1.0f / softmax.sum[i]);
    }
    logs[(block.row * in.heads + head) * in.length + block.begin + i] =
        softmax.most[i] + std::log2(softmax.sum[i]);
  }
}

// The second result is the log to base 2 of each softmax's sum, (batch, head, query).
std::tuple<at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& own_k, const std::optional<at::Tensor>&,
    const at::Tensor& first, const at::Tensor& past, const std::optional<at::Tensor>& shown) {
  const Attention in = describe(q, k, v, first, past, own_k, shown);
  at::Tensor outputs = at::empty({in.batch, in.length, in.heads, in.value_width}, q.options());
  at::Tensor logs = at::empty({in.batch, in.heads, in.length}, q.options());
  float *target = outputs.mutable_data_ptr<float>(), *sums = logs.mutable_data_ptr<float>();
  const Blocks blocks(in);
  at::parallel_for(0, blocks.count() * in.heads, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    std::vector<float> scores(QUERIES * KEYS);
    // Head after head within a row: its blocks see ever more keys, and threads share them alike.
    int64_t row = 0;
    for (int64_t task = begin; task < end; ++task) {
      while (blocks.first[row + 1] * in.heads <= task) ++row;
      const int64_t count = blocks.first[row + 1] - blocks.first[row];
      const int64_t place = task - blocks.first[row] * in.heads;
      const Block& block = blocks.all[blocks.first[row] + place % count];
      attend_block(in, block, place / count, scores.data(), target, sums);
    }
  });
  return {outputs, logs};
}

struct Gradients {
  const float *outputs, *results, *logs;
  float *queries, *keys, *values;
};

// What of the gradients of powers is that of their sum: <output, its gradient>, for each query.
void fill_shared(const Attention& in, const Tile& x, const Gradients& to, float* shared) {
  for (int64_t i = 0; i < x.count; ++i) {
    const int64_t at = in.output_at(x.row, x.begin + i, x.head);
    Lanes sum{};
    for_each_vector(0, in.value_width, [&](int64_t j, int64_t count) {
      sum += load(to.outputs + at + j, count) * load(to.results + at + j, count);
    });
    shared[i] = total(sum);
  }
}

// Probabilities take the place of scores, and the gradients of scores that of `slopes`.
void slopes_of_scores(const Attention& in, const Tile& x, const Gradients& to, float* scores,
                      float* slopes) {
  const float* logs = to.logs + (x.row * in.heads + x.head) * in.length + x.begin;
  float shared[QUERIES];
  fill_shared(in, x, to, shared);
  for (int64_t i = 0; i < x.count; ++i) {
    float *row = scores + i * x.keys, *slope = slopes + i * x.keys;
    const Seen seen(in, x, i);
    exponentiate(row, seen, x.keys, LOG2_E * in.scale(), logs[i]);
    std::fill(slope, slope + seen.first, 0.0f);
    std::fill(slope + seen.past, slope + x.keys, 0.0f);
    for_each_vector(seen.first, seen.past, [&](int64_t j, int64_t count) {
      const Lanes share = in.scale() * load(row + j, count);
      store(slope + j, share * (load(slope + j, count) - shared[i]), count);
    });
  }
}

void tile_back(const Attention& in, const Tile& x, const Gradients& to, float* scores,
               float* slopes, float kept) {
  const int64_t key = in.key_at(x.row, x.place, x.group), Q = in.value_width;
  const Matrix d_output = {to.outputs + in.output_at(x.row, x.begin, x.head), in.heads * Q};
  const Matrix query = in.query(x.row, x.begin, x.head);
  fill_scores(in, x, scores);
  multiply(x.count, x.keys, Q, d_output, in.value(x.row, x.place, x.group).transposed(), 0.0f,
           slopes, x.keys);
  slopes_of_scores(in, x, to, scores, slopes);
  multiply(x.keys, Q, x.count, Matrix{scores, x.keys, true}, d_output, 1.0f, to.values + key * Q,
           in.groups * Q);
  multiply(x.keys, in.width, x.count, Matrix{slopes, x.keys, true}, query, 1.0f,
           to.keys + key * in.width, in.groups * in.width);
  multiply(x.count, in.width, x.keys, Matrix{slopes, x.keys}, in.key(x.row, x.place, x.group),
           kept, to.queries + (query.data - in.queries), in.heads * in.width);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_outputs, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& own_k, const std::optional<at::Tensor>&,
    const at::Tensor& first, const at::Tensor& past, const std::optional<at::Tensor>& shown,
    const at::Tensor& outputs, const at::Tensor& logs) {
  const Attention in = describe(q, k, v, first, past, own_k, shown);
  at::Tensor d_q = at::zeros_like(q), d_k = at::zeros_like(k), d_v = at::zeros_like(v);
  const Gradients to{read(d_outputs), read(outputs), read(logs), d_q.mutable_data_ptr<float>(),
                     d_k.mutable_data_ptr<float>(), d_v.mutable_data_ptr<float>()};
  const int64_t together = in.heads / in.groups;
  const Blocks blocks(in);
  at::parallel_for(0, in.batch * in.groups, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    std::vector<float> scores(QUERIES * KEYS), slopes(QUERIES * KEYS);
    for (int64_t task = begin * together; task < end * together; ++task) {
      const int64_t row = task / in.heads;
      for (int64_t i = blocks.first[row]; i < blocks.first[row + 1]; ++i) {
        float kept = 0.0f;
        for_each_tile(in, blocks.all[i], task % in.heads, [&](const Tile& x) {
          tile_back(in, x, to, scores.data(), slopes.data(), kept);
          kept = 1.0f;
        });
      }
    }
  });
  return {d_q, d_k, d_v, at::empty({0}, q.options()), at::empty({0}, q.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("interval_attention_forward", &forward);
  library.impl("interval_attention_backward", &backward);
}

}  // namespace crossladder
