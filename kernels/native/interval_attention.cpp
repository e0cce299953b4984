// Softmax attention of each query to an interval of keys on the CPU (Dao 2023, sections 3.1, 3.2).
//
// A block of queries meets its keys tile by tile, and a tile of scores never leaves the cache. A
// block ends where the next query sees nothing that this one sees, so that no number of one
// document meets those of another.

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "interval_attention.h"

namespace crossladder {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();

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
  const Attention in = attention_of(q, k, v, first, past, own_k, shown);
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

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("interval_attention_forward", &forward);
}

}  // namespace crossladder
