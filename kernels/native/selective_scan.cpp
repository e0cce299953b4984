// Selective scan of Mamba-1 on the CPU: h = exp(dt A) h + dt B x, y = sum over the state of C h.
//
// Channels lie in vector lanes and the state's N entries are a loop, so nothing is summed across
// lanes but the gradients of B and C, once per tile of channels. Tiles have a fixed size and their
// partial sums are added in a fixed order: the result does not depend on the number of threads.
// The forward pass keeps the state before every chunk of tokens; the backward pass replays a chunk
// from there and walks it in reverse. A chunk is short enough for its states to stay in L1.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"
#include "slices.h"

namespace crossladder {
namespace {

constexpr int64_t TILE_CHANNELS = 4 * LANES;
// Tokens that the channels of a tile take in turn where no state is kept.
constexpr int64_t UNKEPT_CHUNK = 64;

// One vector of channels of one batch row.
struct Group {
  int64_t row, channel, count;
};

// The tensors of one call, as the pointers and sizes that the loops need.
struct Scan {
  int64_t batch, length, channels, states, chunk;
  const float* values;
  const float* dt;
  const float* A;
  const float* B;
  const float* C;
  const int32_t* documents;
  float* checkpoints;

  int64_t chunks() const { return ceil_div(length, chunk); }
  int64_t tiles() const { return ceil_div(channels, TILE_CHANNELS); }
  // Where (row, token, channel) lies in values, dt and outputs; (row, token) in B and C; and
  // (row, channel) in states.
  int64_t at(int64_t row, int64_t t, int64_t channel) const {
    return (row * length + t) * channels + channel;
  }
  int64_t coefficients_at(int64_t row, int64_t t) const { return (row * length + t) * states; }
  int64_t state_at(int64_t row, int64_t channel) const {
    return (row * channels + channel) * states;
  }
  // Checkpoints are (row, chunk, entry, channel), so that a vector of channels is contiguous.
  float* checkpoint(int64_t row, int64_t t, int64_t n, int64_t channel) const {
    return checkpoints + ((row * chunks() + t / chunk) * states + n) * channels + channel;
  }
  std::vector<Group> groups_of(int64_t row, int64_t tile) const {
    std::vector<Group> groups;
    const int64_t begin = tile * TILE_CHANNELS, end = std::min(begin + TILE_CHANNELS, channels);
    for (int64_t channel = begin; channel < end; channel += LANES) {
      groups.push_back({row, channel, std::min(LANES, end - channel)});
    }
    return groups;
  }
  bool starts_document(int64_t row, int64_t t) const {
    if (documents == nullptr) return false;
    const int32_t* id = documents + row * length + t;
    return id[0] != (t == 0 ? 0 : id[-1]);
  }
};

// Lane l of entry n of a state, as `state[l, n]` lies in memory.
Lanes load_entry(const float* state, int64_t count, int64_t states, int64_t n) {
  Lanes entry{};
  for (int64_t lane = 0; lane < count; ++lane) entry[lane] = state[lane * states + n];
  return entry;
}

void store_entry(float* state, Lanes entry, int64_t count, int64_t states, int64_t n) {
  for (int64_t lane = 0; lane < count; ++lane) state[lane * states + n] = entry[lane];
}

struct ForwardEntry {
  Lanes rate, state;
};

// Tokens from `begin` to `end - 1` of a group, whose states pass through `entries`.
void scan_tokens(const Scan& scan, const Group& group, int64_t begin, int64_t end,
                 ForwardEntry* entries, float* outputs) {
  const auto [row, channel, count] = group;
  const int64_t N = scan.states;
  for (int64_t t = begin; t < end; ++t) {
    if (scan.starts_document(row, t)) {
      for (int64_t n = 0; n < N; ++n) entries[n].state = Lanes{};
    }
    const int64_t at = scan.at(row, t, channel);
    const float* B = scan.B + scan.coefficients_at(row, t);
    const float* C = scan.C + scan.coefficients_at(row, t);
    const Lanes dt = load(scan.dt + at, count);
    const Lanes input = dt * load(scan.values + at, count);
    Lanes output{};
    for (int64_t n = 0; n < N; ++n) {
      ForwardEntry& entry = entries[n];
      entry.state = exp2(dt * entry.rate) * entry.state + input * B[n];
      output += entry.state * C[n];
    }
    store(outputs + at, output, count);
  }
}

// Chunk after chunk, so that all of a tile's channels are read where they lie side by side.
void forward_tile(const Scan& scan, int64_t row, int64_t tile, const float* initial,
                  float* outputs, float* final) {
  const std::vector<Group> groups = scan.groups_of(row, tile);
  const int64_t N = scan.states, step = scan.chunk > 0 ? scan.chunk : UNKEPT_CHUNK;
  std::vector<ForwardEntry> entries(groups.size() * N);
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto [_, channel, count] = groups[i / N];
    const int64_t n = i % N, state = scan.state_at(row, channel);
    entries[i].rate = LOG2_E * load_entry(scan.A + channel * N, count, N, n);
    entries[i].state = initial == nullptr ? Lanes{} : load_entry(initial + state, count, N, n);
  }
  for (int64_t begin = 0; begin < scan.length; begin += step) {
    for (size_t i = 0; scan.chunk > 0 && i < entries.size(); ++i) {
      const auto [_, channel, count] = groups[i / N];
      store(scan.checkpoint(row, begin, i % N, channel), entries[i].state, count);
    }
    const int64_t end = std::min(begin + step, scan.length);
    for (size_t group = 0; group < groups.size(); ++group) {
      scan_tokens(scan, groups[group], begin, end, &entries[group * N], outputs);
    }
  }
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto [_, channel, count] = groups[i / N];
    store_entry(final + scan.state_at(row, channel), entries[i].state, count, N, i % N);
  }
}

// What the backward pass is given and writes; A has a slice per row, B and C one per tile.
struct Gradients {
  const float* outputs;
  const float* final;
  float* values;
  float* dt;
  float* A;
  float* B;
  float* C;
  float* initial;
};

// One tile of channels in the backward pass.
class TileBackward {
 public:
  TileBackward(const Scan& scan, const Gradients& gradients, int64_t row, int64_t tile)
      : scan_(scan), gradients_(gradients), row_(row), tile_(tile), N_(scan.states),
        groups_(scan.groups_of(row, tile)) {
    entries_.resize(groups_.size() * N_);
    // The sums over lanes read whole vectors of entries, up to LANES - 1 beyond the last.
    tokens_.resize((scan.chunk + 1) * N_ + LANES);
  }

  void run() {
    for (size_t group = 0; group < groups_.size(); ++group) start(groups_[group], group * N_);
    for (int64_t chunk = scan_.chunks() - 1; chunk >= 0; --chunk) {
      const int64_t begin = chunk * scan_.chunk;
      const int64_t end = std::min(begin + scan_.chunk, scan_.length);
      for (TokenEntry& entry : tokens_) entry.d_B = entry.d_C = Lanes{};
      for (size_t group = 0; group < groups_.size(); ++group) {
        replay(groups_[group], &entries_[group * N_], begin, end);
        for (int64_t t = end - 1; t >= begin; --t) {
          reverse(groups_[group], &entries_[group * N_], t, &tokens_[(t - begin) * N_]);
        }
      }
      for (int64_t t = begin; t < end; ++t) {
        store_coefficient_sums(t, &tokens_[(t - begin + 1) * N_]);
      }
    }
    for (size_t group = 0; group < groups_.size(); ++group) finish(groups_[group], group * N_);
  }

 private:
  // Entry n of the state of one group of channels.
  struct ChannelEntry {
    Lanes A, rate, adjoint, d_A;
  };
  // Entry n at one token of the chunk; the state is the one after the token.
  struct TokenEntry {
    Lanes decay, state, d_B, d_C;
  };

  void start(const Group& group, int64_t first) {
    const float* A = scan_.A + group.channel * N_;
    const float* d_final = gradients_.final;
    if (d_final != nullptr) d_final += scan_.state_at(row_, group.channel);
    for (int64_t n = 0; n < N_; ++n) {
      ChannelEntry& entry = entries_[first + n];
      entry.A = load_entry(A, group.count, N_, n);
      entry.rate = LOG2_E * entry.A;
      entry.adjoint = d_final == nullptr ? Lanes{} : load_entry(d_final, group.count, N_, n);
      entry.d_A = Lanes{};
    }
  }

  void finish(const Group& group, int64_t first) {
    const int64_t at = scan_.state_at(row_, group.channel);
    for (int64_t n = 0; n < N_; ++n) {
      store_entry(gradients_.A + at, entries_[first + n].d_A, group.count, N_, n);
      store_entry(gradients_.initial + at, entries_[first + n].adjoint, group.count, N_, n);
    }
  }

  // The decays of a chunk and the states after each of its tokens, from the checkpoint before it.
  void replay(const Group& group, const ChannelEntry* channels, int64_t begin, int64_t end) {
    for (int64_t n = 0; n < N_; ++n) {
      tokens_[n].state = load(scan_.checkpoint(row_, begin, n, group.channel), group.count);
    }
    for (int64_t t = begin; t < end; ++t) {
      const int64_t at = scan_.at(row_, t, group.channel);
      const float* B = scan_.B + scan_.coefficients_at(row_, t);
      const Lanes dt = load(scan_.dt + at, group.count);
      const Lanes input = dt * load(scan_.values + at, group.count);
      const bool starts = scan_.starts_document(row_, t);
      const TokenEntry* before = &tokens_[(t - begin) * N_];
      TokenEntry* after = &tokens_[(t - begin + 1) * N_];
      for (int64_t n = 0; n < N_; ++n) {
        const Lanes state = starts ? Lanes{} : before[n].state;
        after[n].decay = exp2(dt * channels[n].rate);
        after[n].state = after[n].decay * state + input * B[n];
      }
    }
  }

  // One token of the adjoint recurrence: lambda = dy C + (decay lambda) of the token after it.
  void reverse(const Group& group, ChannelEntry* channels, int64_t t, TokenEntry* before) {
    const int64_t at = scan_.at(row_, t, group.channel);
    const float* B = scan_.B + scan_.coefficients_at(row_, t);
    const float* C = scan_.C + scan_.coefficients_at(row_, t);
    const Lanes dt = load(scan_.dt + at, group.count);
    const Lanes value = load(scan_.values + at, group.count);
    const Lanes d_output = load(gradients_.outputs + at, group.count);
    const Lanes input = dt * value;
    const bool starts = scan_.starts_document(row_, t);
    TokenEntry* after = before + N_;
    Lanes d_input{}, d_exponent{};
    for (int64_t n = 0; n < N_; ++n) {
      ChannelEntry& channel = channels[n];
      const Lanes lambda = channel.adjoint + d_output * C[n];
      after[n].d_C += d_output * after[n].state;
      after[n].d_B += lambda * input;
      d_input += lambda * B[n];
      const Lanes decayed = lambda * after[n].decay;
      const Lanes d_log_decay = starts ? Lanes{} : decayed * before[n].state;
      d_exponent += d_log_decay * channel.A;
      channel.d_A += d_log_decay * dt;
      channel.adjoint = starts ? Lanes{} : decayed;
    }
    store(gradients_.values + at, dt * d_input, group.count);
    store(gradients_.dt + at, value * d_input + d_exponent, group.count);
  }

  void store_coefficient_sums(int64_t t, const TokenEntry* token) {
    const int64_t slice = tile_ * scan_.batch * scan_.length * N_;
    float* d_B = gradients_.B + slice + scan_.coefficients_at(row_, t);
    float* d_C = gradients_.C + slice + scan_.coefficients_at(row_, t);
    constexpr int64_t STRIDE = sizeof(TokenEntry) / sizeof(Lanes);
    for (int64_t n = 0; n < N_; n += LANES) {
      store(d_B + n, sums(&token[n].d_B, STRIDE), std::min(LANES, N_ - n));
      store(d_C + n, sums(&token[n].d_C, STRIDE), std::min(LANES, N_ - n));
    }
  }

  const Scan& scan_;
  const Gradients& gradients_;
  const int64_t row_, tile_, N_;
  const std::vector<Group> groups_;
  std::vector<ChannelEntry> entries_;
  std::vector<TokenEntry> tokens_;
};

Scan describe(const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A,
              const at::Tensor& B, const at::Tensor& C,
              const std::optional<at::Tensor>& documents, int64_t chunk) {
  for (const at::Tensor* tensor : {&values, &dt, &A, &B, &C}) {
    TORCH_CHECK(tensor->is_contiguous() && tensor->scalar_type() == at::kFloat,
                "selective_scan was given a tensor that is not contiguous float32");
  }
  return {values.size(0), values.size(1), values.size(2), A.size(1), chunk,
          values.const_data_ptr<float>(), dt.const_data_ptr<float>(),
          A.const_data_ptr<float>(), B.const_data_ptr<float>(), C.const_data_ptr<float>(),
          documents.has_value() ? documents->const_data_ptr<int32_t>() : nullptr, nullptr};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& initial,
    const std::optional<at::Tensor>& documents, int64_t chunk) {
  Scan scan = describe(values, dt, A, B, C, documents, chunk);
  at::Tensor outputs = at::empty_like(values);
  at::Tensor final = at::empty({scan.batch, scan.channels, scan.states}, values.options());
  at::Tensor checkpoints = at::empty(
      {scan.batch, chunk > 0 ? scan.chunks() : 0, scan.states, scan.channels}, values.options());
  scan.checkpoints = checkpoints.mutable_data_ptr<float>();
  const float* start = initial.has_value() ? initial->const_data_ptr<float>() : nullptr;
  float* y = outputs.mutable_data_ptr<float>();
  float* last = final.mutable_data_ptr<float>();
  at::parallel_for(0, scan.batch * scan.tiles(), 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t task = first; task < end; ++task) {
      forward_tile(scan, task / scan.tiles(), task % scan.tiles(), start, y, last);
    }
  });
  return {outputs, final, checkpoints};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_outputs, const std::optional<at::Tensor>& d_final,
    const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& documents,
    const at::Tensor& checkpoints, int64_t chunk) {
  Scan scan = describe(values, dt, A, B, C, documents, chunk);
  scan.checkpoints = checkpoints.data_ptr<float>();
  at::Tensor d_values = at::empty_like(values);
  at::Tensor d_dt = at::empty_like(dt);
  at::Tensor d_A = at::empty({scan.batch, scan.channels, scan.states}, values.options());
  at::Tensor d_initial = at::empty_like(d_A);
  at::Tensor d_B =
      at::empty({scan.tiles(), scan.batch, scan.length, scan.states}, values.options());
  at::Tensor d_C = at::empty_like(d_B);
  const Gradients gradients{
      d_outputs.const_data_ptr<float>(),
      d_final.has_value() ? d_final->const_data_ptr<float>() : nullptr,
      d_values.mutable_data_ptr<float>(),
      d_dt.mutable_data_ptr<float>(),
      d_A.mutable_data_ptr<float>(),
      d_B.mutable_data_ptr<float>(),
      d_C.mutable_data_ptr<float>(),
      d_initial.mutable_data_ptr<float>()};
  at::parallel_for(0, scan.batch * scan.tiles(), 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t task = first; task < end; ++task) {
      TileBackward(scan, gradients, task / scan.tiles(), task % scan.tiles()).run();
    }
  });
  return {d_values, d_dt, sum_slices(d_A), sum_slices(d_B), sum_slices(d_C), d_initial};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("selective_scan_forward", &forward);
  library.impl("selective_scan_backward", &backward);
}

}  // namespace crossladder
