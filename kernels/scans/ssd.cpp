// SSD by chunks on the CPU, forward (Dao and Gu 2024, section 6): within a chunk of tokens the scan
// is a masked product of matrices, between chunks it is a recurrence of states.
//
// A task is a few heads of a row, few enough for their data to stay in a core's cache. It goes over
// the chunks in order. Tasks, and so results, do not depend on the number of threads.

#include <torch/library.h>

#include <cstring>
#include <tuple>

#include "ssd_chunks.h"

namespace crossladder {
namespace {

// Scratch memory of one thread.
struct Workspace {
  std::vector<Decays> decays;
  std::vector<float> matrix, tokens, state;

  explicit Workspace(const Inputs& in)
      : decays(in.heads_of_part()), matrix(CHUNK * CHUNK),
        tokens(CHUNK * in.heads_of_part() * in.width),
        state(in.heads_of_part() * in.width * in.states) {}
};

// Adds what the state before the chunk contributes to the outputs of its tokens.
void add_carried(const Inputs& in, const Part& x, Workspace& work, float* outputs) {
  const int64_t channels = x.heads * in.width;
  float* carried = work.tokens.data();
  multiply(x.length, channels, in.states, in.leaving(x), Matrix{work.state.data(), in.states, true},
           0.0f, carried, channels);
  for (int64_t q = 0; q < x.length; ++q) {
    for (int64_t h = 0; h < x.heads; ++h, carried += in.width) {
      float* output = outputs + q * in.channels() + h * in.width;
      const float entering = work.decays[h].entering[q];
      for_each_vector(in.width, [&](int64_t p, int64_t count) {
        store(output + p, load(output + p, count) + entering * load(carried + p, count), count);
      });
    }
  }
}

void write_chunk(const Inputs& in, const Part& x, const float* pairs, Workspace& work,
                 float* outputs) {
  for (int64_t h = 0; h < x.heads; ++h) {
    work.decays[h].fill(in, x, h);
    fill_matrix(work.decays[h], pairs, x.length, in.skip(x, h), work.matrix.data());
    multiply(x.length, in.width, x.length, Matrix{work.matrix.data(), x.length}, in.value(x, h),
             0.0f, outputs + h * in.width, in.channels());
  }
  if (x.begin > 0 || in.initial != nullptr) add_carried(in, x, work, outputs);
  fill_added(in, x, work.decays, work.tokens.data());
  advance(in, x, work.decays, work.tokens.data(), work.state.data());
}

std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& values, const at::Tensor& dt,
                                           const at::Tensor& A, const at::Tensor& B,
                                           const at::Tensor& C,
                                           const std::optional<at::Tensor>& initial,
                                           const std::optional<at::Tensor>& documents,
                                           const std::optional<at::Tensor>& D) {
  const Inputs in = inputs_of(values, dt, A, B, C, initial, documents, D);
  at::Tensor outputs = at::empty_like(values);
  at::Tensor final = at::empty({in.batch, in.heads, in.width, in.states}, values.options());
  float *target = outputs.mutable_data_ptr<float>(), *end_state = final.mutable_data_ptr<float>();
  const std::vector<float> pairs = products_of_pairs(in);
  at::parallel_for(0, in.tasks(), 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    Workspace work(in);
    for (int64_t task = first; task < end; ++task) {
      Part x = in.part(task);
      const size_t state = x.heads * in.width * in.states;
      std::fill(work.state.begin(), work.state.end(), 0.0f);
      if (in.initial != nullptr) std::copy_n(in.initial + in.state_at(x), state, work.state.data());
      for (int64_t chunk = 0; chunk < in.chunks(); ++chunk) {
        in.move_to(x, chunk);
        write_chunk(in, x, pairs_of(in, pairs, x), work, target + in.value_at(x));
      }
      std::copy_n(work.state.data(), state, end_state + in.state_at(x));
    }
  });
  return {outputs, final};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) { library.impl("ssd_forward", &forward); }

}  // namespace crossladder
