// The gradients of attention to intervals on the CPU (Dao 2023, section 3.2): probabilities are
// recomputed from the log-sum-exp of each query.
//
// A task is a row and a key head, and sums the gradients of its keys over blocks of queries in
// order: results do not depend on the number of threads.

#include <torch/library.h>

#include <tuple>

#include "interval_attention.h"

namespace crossladder {
namespace {

struct Gradients {
  const float *outputs, *results, *logs;
  float *queries, *keys, *values;
};

// A block of a head's queries and output gradients, also transposed, and the query gradients.
struct Side {
  Workspace queries, transposed_queries, d_outputs, transposed_d_outputs, d_queries;
  alignas(Lanes) float logs[QUERIES], shared[QUERIES];

  explicit Side(const Attention& in)
      : queries(QUERIES * in.key_row()), transposed_queries(QUERIES * in.key_row()),
        d_outputs(QUERIES * in.value_row()), transposed_d_outputs(QUERIES * in.value_row()),
        d_queries(QUERIES * in.key_row()) {}

  void take(const Attention& in, const Gradients& to, const Block& block, int64_t head) {
    const int64_t at = in.output_at(block.row, block.begin, head), step = in.heads * in.value_width;
    gather_and_transpose(in.queries + in.query_at(block.row, block.begin, head),
                         in.heads * in.width, block.count, in.width, queries.data(),
                         transposed_queries.data());
    gather_and_transpose(to.outputs + at, step, block.count, in.value_width, d_outputs.data(),
                         transposed_d_outputs.data());
    std::fill(logs, logs + QUERIES, 0.0f);
    std::fill(shared, shared + QUERIES, 0.0f);
    const float* sums = to.logs + (block.row * in.heads + head) * in.length + block.begin;
    std::copy(sums, sums + block.count, logs);
    // The softmax's row term, <output, its gradient>: D in Dao 2023, algorithm 2.
    for (int64_t i = 0; i < block.count; ++i) {
      const int64_t of = at + i * step;
      shared[i] = total(dot(to.outputs + of, to.results + of, in.value_width));
    }
  }
};

struct Work {
  Segment segment;
  Side side;
  Workspace scores, slopes, d_keys, d_values;

  explicit Work(const Attention& in)
      : segment(in), side(in), scores(TILE * QUERIES), slopes(TILE * QUERIES),
        d_keys(in.segment() * in.key_row()), d_values(in.segment() * in.value_row()) {}
};

// Replaces scores by probabilities, and in `slopes` the probabilities' gradients by the scores'.
void slopes_of_scores(const Attention& in, const Block& block, const Range& tile, Work& work) {
  const float scale = in.scale(), log_scale = LOG2_E * scale;
  for (int64_t lane = 0; lane < block.lanes(); lane += LANES) {
    const VisibleKeys visible(block, lane, tile);
    const Lanes log = load(work.side.logs + lane, LANES);
    const Lanes shared = load(work.side.shared + lane, LANES);
    float* scores = work.scores.data() + lane;
    float* slopes = work.slopes.data() + lane;
    visible.for_each_key([&](int64_t k, int64_t, const auto& keep) {
      const int64_t at = (k - tile.begin) * QUERIES;
      const Lanes share = keep(exp2(log_scale * load(scores + at, LANES) - log), 0.0f);
      const Lanes slope = scale * share * (load(slopes + at, LANES) - shared);
      store(scores + at, share, LANES);
      store(slopes + at, keep(slope, 0.0f), LANES);
    });
    visible.clear_rest(tile, scores);
    visible.clear_rest(tile, slopes);
  }
}

// out[key] += sum over queries of scores[key, query] * rows[query].
void mix_queries(const Block& block, const Range& tile, const float* scores, const float* rows,
                 int64_t row, float* out) {
  product(tile.size(), {scores, QUERIES, 1}, {rows, row}, true, out, row,
          [&](const Range& some) {
            return Extent{block.queries_of({tile.begin + some.begin, tile.begin + some.end}),
                        {0, row}};
          });
}

void tile_backward(const Attention& in, const Block& block, const Range& tile, Work& work,
                   bool kept) {
  const int64_t key_row = in.key_row(), value_row = in.value_row();
  const int64_t place = tile.begin - work.segment.places().begin;
  Side& side = work.side;
  float *scores = work.scores.data(), *slopes = work.slopes.data();
  multiply_keys(block, tile, work.segment.key(in, tile.begin), key_row, in.width,
                side.transposed_queries.data(), scores);
  multiply_keys(block, tile, work.segment.value(in, tile.begin), value_row, in.value_width,
                side.transposed_d_outputs.data(), slopes);
  slopes_of_scores(in, block, tile, work);
  mix_queries(block, tile, scores, side.d_outputs.data(), value_row,
              work.d_values.data() + place * value_row);
  mix_queries(block, tile, slopes, side.queries.data(), key_row,
              work.d_keys.data() + place * key_row);
  mix_keys(block, tile, slopes, work.segment.key(in, tile.begin), key_row, kept,
           side.d_queries.data());
}

// Runs over a block's queries: run(i, where the gradient of query i lies).
template <typename Run>
void for_each_query(const Attention& in, const Gradients& to, const Block& block, int64_t head,
                    const Run& run) {
  for (int64_t i = 0; i < block.count; ++i) {
    run(i, to.queries + in.query_at(block.row, block.begin + i, head));
  }
}

// Adds to the queries' gradients, or sets them in the first segment that the block sees.
void block_backward(const Attention& in, const Gradients& to, const Block& block, int64_t head,
                    Work& work) {
  const Range seen = block.seen().within(work.segment.places());
  work.side.take(in, to, block, head);
  bool kept = false;
  for_each_stretch(seen, TILE, [&](const Range& tile) {
    tile_backward(in, block, tile, work, kept);
    kept = true;
  });
  const bool earlier = block.seen().begin < work.segment.places().begin;
  for_each_query(in, to, block, head, [&](int64_t i, float* target) {
    const float* found = work.side.d_queries.data() + i * in.key_row();
    for_each_vector(in.width, [&](int64_t j, int64_t count) {
      const Lanes before = earlier ? load(target + j, count) : Lanes{};
      store(target + j, before + load(found + j, count), count);
    });
  });
}

// Queries without keys appear in no segment; their gradients are zero.
void clear_unseeing(const Attention& in, const Gradients& to, const std::vector<Block>& blocks) {
  for (const Block& block : blocks) {
    if (!block.seen().empty()) continue;
    for (int64_t head = 0; head < in.heads; ++head) {
      for_each_query(in, to, block, head, [&](int64_t, float* target) {
        std::fill(target, target + in.width, 0.0f);
      });
    }
  }
}

void spread(const float* source, int64_t padded, int64_t rows, int64_t size, float* target,
            int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    std::copy(source + r * padded, source + r * padded + size, target + r * stride);
  }
}

void segment_backward(const Attention& in, const Gradients& to, const std::vector<Block>& blocks,
                      int64_t row, int64_t group, const Range& places, Work& work) {
  const int64_t together = in.heads / in.groups;
  float *d_keys = work.d_keys.data(), *d_values = work.d_values.data();
  work.segment.take(in, row, group, places);
  std::fill(d_keys, d_keys + places.size() * in.key_row(), 0.0f);
  std::fill(d_values, d_values + places.size() * in.value_row(), 0.0f);
  // Both ends of what the blocks see are nondecreasing, so a binary search finds the first block.
  const auto first = std::partition_point(
      blocks.begin(), blocks.end(),
      [&](const Block& block) { return block.seen().end <= places.begin; });
  for (int64_t head = group * together; head < (group + 1) * together; ++head) {
    for (auto block = first; block != blocks.end() && block->seen().begin < places.end; ++block) {
      if (!block->seen().empty()) block_backward(in, to, *block, head, work);
    }
  }
  const int64_t at = in.key_at(row, places.begin, group);
  spread(d_keys, in.key_row(), places.size(), in.width, to.keys + at * in.width,
         in.groups * in.width);
  spread(d_values, in.value_row(), places.size(), in.value_width, to.values + at * in.value_width,
         in.groups * in.value_width);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_outputs, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const std::optional<at::Tensor>& own_k, const std::optional<at::Tensor>&,
    const at::Tensor& first, const at::Tensor& past, const std::optional<at::Tensor>& shown,
    const at::Tensor& outputs, const at::Tensor& logs) {
  const Attention in = attention_of(q, k, v, first, past, own_k, shown);
  at::Tensor d_q = at::empty_like(q), d_k = at::empty_like(k), d_v = at::empty_like(v);
  const char* kernel = "interval_attention";
  const Gradients to{read(d_outputs, kernel), read(outputs, kernel), read(logs, kernel),
                     d_q.mutable_data_ptr<float>(), d_k.mutable_data_ptr<float>(),
                     d_v.mutable_data_ptr<float>()};
  const std::vector<std::vector<Block>> rows = blocks_of(in);
  for (const std::vector<Block>& blocks : rows) clear_unseeing(in, to, blocks);
  at::parallel_for(0, in.batch * in.groups, 1, [&](int64_t begin, int64_t end) {
    const FlushDenormals flush;
    Work work(in);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / in.groups, group = task % in.groups;
      for_each_stretch({0, in.keys_in_all}, SEGMENT, [&](const Range& places) {
        segment_backward(in, to, rows[row], row, group, places, work);
      });
    }
  });
  return {d_q, d_k, d_v, at::empty({0}, q.options()), at::empty({0}, q.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("interval_attention_backward", &backward);
}

}  // namespace crossladder
