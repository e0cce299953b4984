// Softmax attention of each query to an interval of keys on the CPU (Dao 2023, sections 3.1, 3.2).
//
// A task is a head and some consecutive blocks of queries, which go over their keys tile by tile; a
// tile of scores never leaves the cache.

#include <torch/library.h>

#include <limits>
#include <tuple>

#include "interval_attention.h"

namespace crossladder {
namespace {

constexpr float NOTHING = -std::numeric_limits<float>::infinity();
constexpr int64_t TOGETHER = 16;

// The online softmax: each query's largest score so far, and relative to it the sum of powers and
// the weighted values. Powers of 2 instead of e, with log2(e) folded into the scale.
struct Softmax {
  Lanes most[QUERIES / LANES], sum[QUERIES / LANES];
  Workspace mixed;
  bool begun = false;

  explicit Softmax(const Attention& in) : mixed(QUERIES * in.value_row()) {}

  void clear() {
    std::fill(most, most + QUERIES / LANES, Lanes{} + NOTHING);
    std::fill(sum, sum + QUERIES / LANES, Lanes{});
    begun = false;
  }

  // Replaces a tile's scores by powers; returns the factor that rescales the earlier sums.
  Lanes take(const Attention& in, const Block& block, const Range& tile, int64_t v, float* scores) {
    const float scale = LOG2_E * in.scale();
    const VisibleKeys visible(block, v * LANES, tile);
    float* column = scores + v * LANES - tile.begin * QUERIES;
    Lanes largest[VisibleKeys::CHAINS];
    std::fill(largest, largest + VisibleKeys::CHAINS, Lanes{} + NOTHING);
    visible.for_each_key([&](int64_t k, int64_t chain, const auto& keep) {
      largest[chain] = larger(largest[chain], keep(load(column + k * QUERIES, LANES), NOTHING));
    });
    for (const Lanes& found : largest) largest[0] = larger(largest[0], found);
    const Lanes now = larger(most[v], scale * largest[0]);
    // A query without any key so far: -inf minus -inf would be NaN.
    const Lanes shift = now == NOTHING ? Lanes{} : now;
    const Lanes factor = exp2(most[v] - shift);
    Lanes added{};
    visible.for_each_key([&](int64_t k, int64_t, const auto& keep) {
      const Lanes power = exp2(scale * load(column + k * QUERIES, LANES) - shift);
      const Lanes kept = keep(power, 0.0f);
      store(column + k * QUERIES, kept, LANES);
      added += kept;
    });
    visible.clear_rest(tile, scores + v * LANES);
    most[v] = now;
    sum[v] = sum[v] * factor + added;
    return factor;
  }

  void shrink(const Attention& in, int64_t v, Lanes factor) {
    for (int64_t i = 0; i < LANES; ++i) {
      if (factor[i] == 1.0f) continue;
      float* row = mixed.data() + (v * LANES + i) * in.value_row();
      for_each_vector(in.value_row(), [&](int64_t j, int64_t) {
        store(row + j, factor[i] * load(row + j, LANES), LANES);
      });
    }
  }
};

struct Work {
  Segment segment;
  Workspace together, transposed, scores;
  std::vector<Softmax> softmax;

  explicit Work(const Attention& in)
      : segment(in), together(QUERIES * in.key_row()), transposed(in.key_row() * QUERIES),
        scores(TILE * QUERIES) {
    for (int64_t i = 0; i < TOGETHER; ++i) softmax.emplace_back(in);
  }
};

void attend_segment(const Attention& in, const Block& block, int64_t head, Work& work,
                    Softmax& softmax) {
  const Range seen = block.seen().within(work.segment.places());
  if (seen.empty()) return;
  gather_and_transpose(in.queries + in.query_at(block.row, block.begin, head), in.heads * in.width,
                       block.count, in.width, work.together.data(), work.transposed.data());
  float* scores = work.scores.data();
  for_each_stretch(seen, TILE, [&](const Range& tile) {
    multiply_keys(block, tile, work.segment.key(in, tile.begin), in.key_row(), in.width,
                  work.transposed.data(), scores);
    for (int64_t v = 0; v < block.lanes() / LANES; ++v) {
      const Lanes factor = softmax.take(in, block, tile, v, scores);
      if (softmax.begun) softmax.shrink(in, v, factor);
    }
    mix_keys(block, tile, scores, work.segment.value(in, tile.begin), in.value_row(),
             softmax.begun, softmax.mixed.data());
    softmax.begun = true;
  });
}

void finish(const Attention& in, const Block& block, int64_t head, Softmax& softmax,
            float* outputs, float* logs) {
  for (int64_t i = 0; i < block.count; ++i) {
    const float sum = softmax.sum[i / LANES][i % LANES], most = softmax.most[i / LANES][i % LANES];
    const float share = 1.0f / sum;
    const float* mixed = softmax.mixed.data() + i * in.value_row();
    float* output = outputs + in.output_at(block.row, block.begin + i, head);
    // A query without keys gets zeros.
    for_each_vector(in.value_width, [&](int64_t j, int64_t count) {
      store(output + j, softmax.begun ? share * load(mixed + j, count) : Lanes{}, count);
    });
    logs[(block.row * in.heads + head) * in.length + block.begin + i] = most + std::log2(sum);
  }
}

// One head and some consecutive blocks of a row.
struct Task {
  const Block* blocks;
  int64_t count, head;
};

// Ordered by head, then block: under causality later blocks see more keys, and this order spreads
// them evenly over threads.
std::vector<Task> tasks_of(const Attention& in, const std::vector<std::vector<Block>>& rows) {
  std::vector<Task> tasks;
  for (const std::vector<Block>& blocks : rows) {
    for (int64_t head = 0; head < in.heads; ++head) {
      for_each_stretch({0, static_cast<int64_t>(blocks.size())}, TOGETHER,
                       [&](const Range& some) {
                         tasks.push_back({blocks.data() + some.begin, some.size(), head});
                       });
    }
  }
  return tasks;
}

void attend(const Attention& in, const Task& task, Work& work, float* outputs, float* logs) {
  const Range seen{task.blocks[0].seen().begin, task.blocks[task.count - 1].seen().end};
  for (int64_t i = 0; i < task.count; ++i) work.softmax[i].clear();
  for_each_stretch(seen, SEGMENT, [&](const Range& places) {
    work.segment.take(in, task.blocks[0].row, task.head / (in.heads / in.groups), places);
    for (int64_t i = 0; i < task.count; ++i) {
      attend_segment(in, task.blocks[i], task.head, work, work.softmax[i]);
    }
  });
  for (int64_t i = 0; i < task.count; ++i) {
    finish(in, task.blocks[i], task.head, work.softmax[i], outputs, logs);
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
  const std::vector<std::vector<Block>> rows = blocks_of(in);
  const std::vector<Task> tasks = tasks_of(in, rows);
  at::parallel_for(0, tasks.size(), 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Work work(in);
    for (int64_t i = begin; i < end; ++i) attend(in, tasks[i], work, target, sums);
  });
  return {outputs, logs};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("interval_attention_forward", &forward);
}

}  // namespace crossladder
