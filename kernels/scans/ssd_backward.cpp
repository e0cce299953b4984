// The gradients of SSD by chunks on the CPU (Dao and Gu 2024, section 6).
//
// A task recomputes and keeps the states between chunks, then goes over the chunks from the last to
// the first. Gradients that heads of several tasks contribute to are summed in a fixed order.

#include <torch/library.h>

#include <tuple>

#include "ssd_chunks.h"

namespace crossladder {
namespace {

// Gradients of B, C, A and D, which heads share; a slice per task: (part, row, group, ...).
struct Shared {
  at::Tensor enter, leave, rates, skips;

  explicit Shared(const Inputs& in)
      : enter(at::empty({in.parts_of_group(), in.batch, in.length, in.groups, in.states})),
        leave(at::empty_like(enter)), rates(at::zeros({in.batch, in.heads})),
        skips(at::zeros({in.batch, in.skips == nullptr ? 0 : in.heads})) {}

  int64_t at(const Inputs& in, const Part& x) const {
    const int64_t part = (x.first - x.group * in.heads_of_group()) / in.heads_of_part();
    return part * in.batch * in.length * in.groups * in.states + in.shared_at(x);
  }
};

struct Gradients {
  const float *outputs, *final;
  float *values, *dt, *initial;
};

// Scratch memory of one thread; `d_state` is the gradient of the state after the chunk.
struct Workspace {
  std::vector<Decays> decays;
  std::vector<float> carried, added, tokens, steps, states, d_state;
  float matrix[CHUNK * CHUNK], pairs[CHUNK * CHUNK];
  // Gradients of the log decays, (head, token): through pairs inside the chunk, through `entering`
  // and through `leaving`; (head) through the decay across the chunk; and dt's other gradient.
  std::vector<float> inside, by_entering, by_leaving, across, by_dt;

  explicit Workspace(const Inputs& in) : decays(in.heads_of_part()) {
    const int64_t heads = in.heads_of_part(), channels = heads * in.width;
    for (auto* x : {&carried, &added, &tokens}) x->resize(CHUNK * channels);
    steps.resize(CHUNK * in.width);
    states.resize(in.chunks() * channels * in.states);
    d_state.resize(channels * in.states);
    for (auto* x : {&inside, &by_entering, &by_leaving, &by_dt}) x->resize(heads * CHUNK);
    across.resize(heads);
  }
};

// Dot products of each head of each token, (head, token).
void dots(const Inputs& in, const Part& x, const float* a, const float* b, float* out) {
  for (int64_t q = 0; q < x.length; ++q) {
    for (int64_t h = 0; h < x.heads; ++h, a += in.width, b += in.width) {
      out[h * CHUNK + q] = total(dot(a, b, in.width));
    }
  }
}

// Gradients of what the state before the chunk contributes to the chunk's outputs.
void carried_backward(const Inputs& in, const Part& x, const float* d_outputs, const float* state,
                      Workspace& work, float* d_leave) {
  const int64_t channels = x.heads * in.width;
  float* carried = work.carried.data();
  for (int64_t q = 0; q < x.length; ++q) {
    for (int64_t h = 0; h < x.heads; ++h, carried += in.width) {
      const float* d_output = d_outputs + q * in.channels() + h * in.width;
      const float entering = work.decays[h].entering[q];
      for_each_vector(in.width, [&](int64_t p, int64_t count) {
        store(carried + p, entering * load(d_output + p, count), count);
      });
    }
  }
  multiply(x.length, channels, in.states, in.leaving(x), Matrix{state, in.states, true}, 0.0f,
           work.tokens.data(), channels);
  dots(in, x, work.tokens.data(), work.carried.data(), work.by_entering.data());
  multiply(x.length, in.states, channels, Matrix{work.carried.data(), channels},
           Matrix{state, in.states}, 0.0f, d_leave, in.groups * in.states);
}

// Gradients of what the tokens add to the state after the chunk; `tokens` gets the gradient of each
// token's contribution, before its decay is applied.
void added_backward(const Inputs& in, const Part& x, Workspace& work, float* d_enter) {
  const int64_t channels = x.heads * in.width;
  const float* d_state = work.d_state.data();
  fill_added(in, x, work.decays, work.added.data());
  multiply(x.length, channels, in.states, in.entering(x), Matrix{d_state, in.states, true}, 0.0f,
           work.tokens.data(), channels);
  dots(in, x, work.tokens.data(), work.added.data(), work.by_leaving.data());
  multiply(x.length, in.states, channels, Matrix{work.added.data(), channels},
           Matrix{d_state, in.states}, 0.0f, d_enter, in.groups * in.states);
}

// Turns the gradient of the state after the chunk into that of the state before it.
void state_backward(const Inputs& in, const Part& x, const float* state, Workspace& work) {
  const int64_t each = in.width * in.states, channels = x.heads * in.width;
  for (int64_t h = 0; h < x.heads; ++h) {
    float *own = work.d_state.data() + h * each, kept = work.decays[h].kept(x);
    work.across[h] = kept * total(dot(own, state + h * each, each));
    for_each_vector(each, [&](int64_t i, int64_t count) {
      store(own + i, kept * load(own + i, count), count);
    });
  }
  multiply(channels, in.states, x.length, Matrix{work.carried.data(), channels, true},
           in.leaving(x), 1.0f, work.d_state.data(), in.states);
}

// Gradients of one head's matrix, given `scores`, the products of output gradients and values: that
// of C B^T is added to `d_pairs`, that of each token's log decay goes to `by_log`. `scores` is
// overwritten by the matrix without step sizes.
void matrix_backward(const Decays& decays, const float* pairs, int64_t length, float* scores,
                     float* d_pairs, float* by_log) {
  Lanes later[CHUNK / LANES] = {};
  for (int64_t i = length - 1; i >= 0; --i) {
    float *row = scores + i * length, *shared = d_pairs + i * length;
    Lanes earlier{};
    for_each_vector(i + 1, [&](int64_t j, int64_t) {
      const int64_t count = std::min(LANES, length - j);
      const Lanes decay = decays.between(i, j, count);
      const Lanes scaled = decay * load(row + j, count) * load(decays.dt + j, count);
      const Lanes product = load(pairs + i * length + j, count);
      store(shared + j, load(shared + j, count) + scaled, count);
      store(row + j, decay * product, count);
      // A log decay is part of every pair that spans it. Adding these pairs up, instead of taking
      // differences of row and column sums, keeps the digits that strong decays leave.
      later[j / LANES] += scaled * product;
      earlier += first_lanes(later[j / LANES], i - j);
    });
    by_log[i] = total(earlier);
    const int64_t end = std::min(length, (i / LANES + 1) * LANES);
    std::fill(row + end, row + length, 0.0f);
  }
}

// Gradients of one head's values and step sizes, from those of dt x inside the chunk (`steps`) and
// in the state (`tokens`). Returns the gradient of D.
float steps_backward(const Inputs& in, const Part& x, int64_t head, const float* d_outputs,
                     Workspace& work, float* d_values) {
  const Decays& decays = work.decays[head];
  const float skip = in.skip(x, head);
  Lanes d_skip{};
  for (int64_t q = 0; q < x.length; ++q) {
    const float* d_output = d_outputs + q * in.channels() + head * in.width;
    const float* inside = work.steps.data() + q * in.width;
    const float* behind = work.tokens.data() + (q * x.heads + head) * in.width;
    const float* value = in.value(x, head).data + q * in.channels();
    float* d_value = d_values + q * in.channels() + head * in.width;
    Lanes sum{};
    for_each_vector(in.width, [&](int64_t p, int64_t count) {
      const Lanes gradient = load(inside + p, count) + decays.leaving[q] * load(behind + p, count);
      const Lanes given = load(d_output + p, count), own = load(value + p, count);
      store(d_value + p, decays.dt[q] * gradient + skip * given, count);
      sum += gradient * own;
      d_skip += given * own;
    });
    work.by_dt[head * CHUNK + q] = total(sum);
  }
  return total(d_skip);
}

void inside_backward(const Inputs& in, const Part& x, const float* d_outputs, const float* pairs,
                     Workspace& work, float* d_values, float* d_skips) {
  const int64_t length = x.length;
  std::fill(work.pairs, work.pairs + length * length, 0.0f);
  for (int64_t h = 0; h < x.heads; ++h) {
    const Matrix d_output = {d_outputs + h * in.width, in.channels()};
    multiply(length, length, in.width, d_output, in.value(x, h).transposed(), 0.0f, work.matrix,
             length);
    matrix_backward(work.decays[h], pairs, length, work.matrix, work.pairs,
                    &work.inside[h * CHUNK]);
    multiply(length, in.width, length, Matrix{work.matrix, length, true}, d_output, 0.0f,
             work.steps.data(), in.width);
    const float d_skip = steps_backward(in, x, h, d_outputs, work, d_values);
    if (d_skips != nullptr) d_skips[h] += d_skip;
  }
  mask_pairs(in, x, work.pairs);
}

// Gradients of dt and of each head's rate from those of the logarithms of decays.
void logs_backward(const Inputs& in, const Part& x, const Workspace& work, float* d_dt,
                   float* d_rates) {
  for (int64_t h = 0; h < x.heads; ++h) {
    const Decays& decays = work.decays[h];
    const float rate = in.rates[x.first + h];
    float by_log[CHUNK], before = 0.0f, after = 0.0f;
    for (int64_t q = 0; q < x.length; ++q) {
      by_log[q] = work.inside[h * CHUNK + q] + work.across[h] + before;
      before += work.by_leaving[h * CHUNK + q];
    }
    for (int64_t q = x.length - 1; q >= 0; --q) {
      by_log[q] += after += work.by_entering[h * CHUNK + q];
      d_dt[q * in.heads + h] = work.by_dt[h * CHUNK + q] + rate * by_log[q];
      d_rates[h] += decays.dt[q] * by_log[q];
    }
  }
}

// Fills `states` with the state before each chunk.
void recompute_states(const Inputs& in, Part x, Workspace& work) {
  const int64_t size = x.heads * in.width * in.states;
  float* state = work.states.data();
  std::fill(state, state + size, 0.0f);
  if (in.initial != nullptr) std::copy_n(in.initial + in.state_at(x), size, state);
  for (int64_t chunk = 0; chunk + 1 < in.chunks(); ++chunk, state += size) {
    in.move_to(x, chunk);
    for (int64_t h = 0; h < x.heads; ++h) work.decays[h].fill(in, x, h);
    fill_added(in, x, work.decays, work.added.data());
    std::copy_n(state, size, state + size);
    advance(in, x, work.decays, work.added.data(), state + size);
  }
}

void task_backward(const Inputs& in, Part x, const std::vector<float>& pairs, const Gradients& to,
                   const Shared& shared, Workspace& work) {
  const int64_t size = x.heads * in.width * in.states, spread = in.groups * in.states;
  recompute_states(in, x, work);
  std::fill(work.d_state.begin(), work.d_state.end(), 0.0f);
  if (to.final != nullptr) std::copy_n(to.final + in.state_at(x), size, work.d_state.data());
  const int64_t heads = x.row * in.heads + x.first;
  float* d_rates = shared.rates.mutable_data_ptr<float>() + heads;
  float* d_skips = in.skips == nullptr ? nullptr : shared.skips.mutable_data_ptr<float>() + heads;
  for (int64_t chunk = in.chunks() - 1; chunk >= 0; --chunk) {
    in.move_to(x, chunk);
    float* d_enter = shared.enter.mutable_data_ptr<float>() + shared.at(in, x);
    float* d_leave = shared.leave.mutable_data_ptr<float>() + shared.at(in, x);
    const float* d_outputs = to.outputs + in.value_at(x);
    const float* own = pairs_of(in, pairs, x);
    const float* state = work.states.data() + chunk * size;
    for (int64_t h = 0; h < x.heads; ++h) work.decays[h].fill(in, x, h);
    carried_backward(in, x, d_outputs, state, work, d_leave);
    added_backward(in, x, work, d_enter);
    state_backward(in, x, state, work);
    inside_backward(in, x, d_outputs, own, work, to.values + in.value_at(x), d_skips);
    multiply(x.length, in.states, x.length, Matrix{work.pairs, x.length, true}, in.leaving(x),
             1.0f, d_enter, spread);
    multiply(x.length, in.states, x.length, Matrix{work.pairs, x.length}, in.entering(x), 1.0f,
             d_leave, spread);
    logs_backward(in, x, work, to.dt + in.token(x) * in.heads + x.first, d_rates);
  }
  std::copy_n(work.d_state.data(), size, to.initial + in.state_at(x));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
backward(
    const at::Tensor& d_outputs, const std::optional<at::Tensor>& d_final, const at::Tensor& values,
    const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B, const at::Tensor& C,
    const std::optional<at::Tensor>& initial, const std::optional<at::Tensor>& documents,
    const std::optional<at::Tensor>& D) {
  const Inputs in = inputs_of(values, dt, A, B, C, initial, documents, D);
  at::Tensor d_values = at::empty_like(values), d_dt = at::empty_like(dt);
  at::Tensor d_initial = at::empty({in.batch, in.heads, in.width, in.states}, values.options());
  const Gradients to{read(d_outputs), d_final.has_value() ? read(*d_final) : nullptr,
                     d_values.mutable_data_ptr<float>(), d_dt.mutable_data_ptr<float>(),
                     d_initial.mutable_data_ptr<float>()};
  const Shared shared(in);
  const std::vector<float> pairs = products_of_pairs(in);
  at::parallel_for(0, in.tasks(), 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    Workspace work(in);
    for (int64_t task = first; task < end; ++task) {
      task_backward(in, in.part(task), pairs, to, shared, work);
    }
  });
  return {d_values,                  d_dt,
          sum_slices(shared.rates),  sum_slices(shared.enter),
          sum_slices(shared.leave),  d_initial,
          sum_slices(shared.skips)};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) { library.impl("ssd_backward", &backward); }

}  // namespace crossladder
