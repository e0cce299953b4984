// What both passes of Mamba-1's selective scan share: h = exp(dt A) h + dt B x, y = <C, h> + D x.
//
// Channels lie in vector lanes and the state's N entries are a loop. Tiles of channels have a fixed
// size, and partial sums of tiles are added in a fixed order: no result depends on the number of
// threads. The forward pass keeps the state before every chunk of tokens; the backward pass replays
// a chunk from there. A chunk is short enough for its states to stay in L1.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "lanes.h"
#include "slices.h"

namespace crossladder {

constexpr int64_t TILE_CHANNELS = 4 * LANES;

// One vector of channels of one batch row.
struct Group {
  int64_t row, channel, count;
};

// The tensors of one call, as the pointers and sizes that the loops need.
struct SelectiveScan {
  int64_t batch, length, channels, states, chunk;
  const float* values;
  const float* dt;
  const float* A;
  const float* B;
  const float* C;
  // Null if not given.
  const float* D;
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
  Lanes skip(const Group& group) const {
    return D == nullptr ? Lanes{} : load(D + group.channel, group.count);
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

// Gathers entry n of `count` channels from a state stored as (channel, entry).
inline Lanes load_entry(const float* state, int64_t count, int64_t states, int64_t n) {
  Lanes entry{};
  for (int64_t lane = 0; lane < count; ++lane) entry[lane] = state[lane * states + n];
  return entry;
}

inline void store_entry(float* state, Lanes entry, int64_t count, int64_t states, int64_t n) {
  for (int64_t lane = 0; lane < count; ++lane) state[lane * states + n] = entry[lane];
}

inline SelectiveScan selective_scan_of(const at::Tensor& values, const at::Tensor& dt,
                                       const at::Tensor& A, const at::Tensor& B,
                                       const at::Tensor& C,
                                       const std::optional<at::Tensor>& documents, int64_t chunk,
                                       const std::optional<at::Tensor>& D) {
  const char* kernel = "selective_scan";
  return {values.size(0), values.size(1), values.size(2), A.size(1), chunk,
          read(values, kernel), read(dt, kernel), read(A, kernel), read(B, kernel),
          read(C, kernel), D.has_value() ? read(*D, kernel) : nullptr,
          documents.has_value() ? documents->const_data_ptr<int32_t>() : nullptr, nullptr};
}

}  // namespace crossladder
