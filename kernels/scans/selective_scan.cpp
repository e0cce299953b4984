// Selective scan of Mamba-1 on the CPU (Gu and Dao 2023, section 3.3): outputs and states.

#include <torch/library.h>

#include <tuple>

#include "selective_scan.h"

namespace crossladder {
namespace {

// Tokens of a chunk in inference, where no checkpoints are kept.
constexpr int64_t UNKEPT_CHUNK = 64;

struct ForwardEntry {
  Lanes rate, state;
};

// Tokens from `begin` to `end - 1` of a group, whose states pass through `entries`.
void scan_tokens(const SelectiveScan& scan, const Group& group, int64_t begin, int64_t end,
                 ForwardEntry* entries, float* outputs) {
  const auto [row, channel, count] = group;
  const int64_t N = scan.states;
  const Lanes skip = scan.skip(group);
  for (int64_t t = begin; t < end; ++t) {
    if (scan.starts_document(row, t)) {
      for (int64_t n = 0; n < N; ++n) entries[n].state = Lanes{};
    }
    const int64_t at = scan.at(row, t, channel);
    const float* B = scan.B + scan.coefficients_at(row, t);
    const float* C = scan.C + scan.coefficients_at(row, t);
    const Lanes dt = load(scan.dt + at, count);
    const Lanes value = load(scan.values + at, count), input = dt * value;
    Lanes output = skip * value;
    for (int64_t n = 0; n < N; ++n) {
      ForwardEntry& entry = entries[n];
      entry.state = exp2(dt * entry.rate) * entry.state + input * B[n];
      output += entry.state * C[n];
    }
    store(outputs + at, output, count);
  }
}

// Chunk by chunk over all channels of a tile, so that the rows of a chunk stay in the cache.
void forward_tile(const SelectiveScan& scan, int64_t row, int64_t tile, const float* initial,
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

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A, const at::Tensor& B,
    const at::Tensor& C, const std::optional<at::Tensor>& initial,
    const std::optional<at::Tensor>& documents, int64_t chunk, const std::optional<at::Tensor>& D) {
  SelectiveScan scan = selective_scan_of(values, dt, A, B, C, documents, chunk, D);
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

}  // namespace

TORCH_LIBRARY_IMPL(crossladder, CPU, library) {
  library.impl("selective_scan_forward", &forward);
}

}  // namespace crossladder
