// The gradients of Mamba-1's selective scan on the CPU (Gu and Dao 2023, section 3.3): each chunk's
// states are recomputed from its checkpoint, then the adjoint recurrence runs from the chunk's end.
// Only the gradients of B and C are summed across lanes, once per tile of channels.

#include <torch/library.h>

#include <tuple>

#include "selective_scan.h"

namespace crossladder {
namespace {

// Inputs and outputs of the backward pass. The gradients of A and D have a slice per row, those of
// B and C a slice per tile; the slices are summed afterwards in a fixed order.
struct Gradients {
  const float* outputs;
  const float* final;
  float* values;
  float* dt;
  float* A;
  float* B;
  float* C;
  float* D;
  float* initial;
};

// One tile of channels in the backward pass.
class TileBackward {
 public:
  TileBackward(const SelectiveScan& scan, const Gradients& gradients, int64_t row, int64_t tile)
      : scan_(scan), gradients_(gradients), row_(row), tile_(tile), N_(scan.states),
        groups_(scan.groups_of(row, tile)) {
    entries_.resize(groups_.size() * N_);
    d_D_.resize(groups_.size());
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
          reverse(group, &entries_[group * N_], t, &tokens_[(t - begin) * N_]);
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
    if (scan_.D == nullptr) return;
    store(gradients_.D + row_ * scan_.channels + group.channel, d_D_[first / N_], group.count);
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
  void reverse(size_t place, ChannelEntry* channels, int64_t t, TokenEntry* before) {
    const Group& group = groups_[place];
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
    d_D_[place] += d_output * value;
    store(gradients_.values + at, dt * d_input + scan_.skip(group) * d_output, group.count);
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

  const SelectiveScan& scan_;
  const Gradients& gradients_;
  const int64_t row_, tile_, N_;
  const std::vector<Group> groups_;
  std::vector<ChannelEntry> entries_;
  // By group.
  std::vector<Lanes> d_D_;
  std::vector<TokenEntry> tokens_;
};

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
backward(
    const at::Tensor& d_outputs, const std::optional<at::Tensor>& d_final,
    const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& documents,
    const at::Tensor& checkpoints, int64_t chunk, const std::optional<at::Tensor>& D) {
  SelectiveScan scan = selective_scan_of(values, dt, A, B, C, documents, chunk, D);
  scan.checkpoints = checkpoints.data_ptr<float>();
  at::Tensor d_values = at::empty_like(values);
  at::Tensor d_dt = at::empty_like(dt);
  at::Tensor d_A = at::empty({scan.batch, scan.channels, scan.states}, values.options());
  at::Tensor d_initial = at::empty_like(d_A);
  at::Tensor d_D = at::empty({scan.batch, D.has_value() ? scan.channels : 0}, values.options());
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
      d_D.mutable_data_ptr<float>(),
      d_initial.mutable_data_ptr<float>()};
  at::parallel_for(0, scan.batch * scan.tiles(), 1, [&](int64_t first, int64_t end) {
    const FlushDenormals flush;
    for (int64_t task = first; task < end; ++task) {
      TileBackward(scan, gradients, task / scan.tiles(), task % scan.tiles()).run();
    }
  });
  return {d_values,        d_dt,      sum_slices(d_A), sum_slices(d_B),
          sum_slices(d_C), d_initial, sum_slices(d_D)};
}

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("selective_scan_backward", &backward);
}

}  // namespace crossladder
