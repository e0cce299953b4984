// Attention to intervals on the CPU, back (Dao 2023, section 3.2): probabilities are computed again
// from the logs of their sums.
//
// A task is a row and a head of keys, which sums their gradients over blocks in order: results do
// not depend on the number of threads.

#include <torch/library.h>

#include <tuple>

#include "interval_attention.h"

namespace crossladder {
namespace {

struct Gradients {
  const float *outputs, *results, *logs;
  float *queries, *keys, *values;
};

// What of the gradients of powers is that of their sum: <output, its gradient>, for each query.
void fill_shared(const Attention& in, const Tile& x, const Gradients& to, float* shared) {
  for (int64_t i = 0; i < x.count; ++i) {
    const int64_t at = in.output_at(x.row, x.begin + i, x.head);
    shared[i] = total(dot(to.outputs + at, to.results + at, in.value_width));
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
  const Attention in = attention_of(q, k, v, first, past, own_k, shown);
  at::Tensor d_q = at::zeros_like(q), d_k = at::zeros_like(k), d_v = at::zeros_like(v);
  const char* kernel = "interval_attention";
  const Gradients to{read(d_outputs, kernel), read(outputs, kernel), read(logs, kernel),
                     d_q.mutable_data_ptr<float>(), d_k.mutable_data_ptr<float>(),
                     d_v.mutable_data_ptr<float>()};
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
  library.impl("interval_attention_backward", &backward);
}

}  // namespace crossladder
