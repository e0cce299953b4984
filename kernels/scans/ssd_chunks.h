// What the forward and the backward pass of SSD share: chunks, the heads of a task, decays.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "lanes.h"
#include "products.h"
#include "slices.h"

namespace crossladder {

// Equal to `CHUNK` of ssd.py, which a test checks; a constant here because it sizes stack arrays.
constexpr int64_t CHUNK = 64;
// Channels of a task: enough for efficient products, few enough for a core's cache.
constexpr int64_t TOGETHER = 256;

// exp(-60) is negligible; smaller decays would produce denormal numbers, which are slow.
constexpr float FLOOR = -60.0f;

inline Lanes decay_of(Lanes exponent) { return exp2(LOG2_E * clamp(exponent, FLOOR, 0.0f)); }

// Tokens of a chunk of one row, and the heads that a task works on, which share B and C.
struct Part {
  int64_t row, group, first, heads, begin, length;
};

struct Inputs {
  int64_t batch, length, heads, width, groups, states;
  const float *values, *dt, *rates, *enter, *leave, *initial;
  const int32_t* documents;
  // D, by head; null if not given.
  const float* skips;

  int64_t chunks() const { return ceil_div(length, CHUNK); }
  int64_t heads_of_group() const { return heads / groups; }
  int64_t heads_of_part() const {
    return std::clamp<int64_t>(TOGETHER / width, 1, heads_of_group());
  }
  int64_t parts_of_group() const { return ceil_div(heads_of_group(), heads_of_part()); }
  int64_t tasks() const { return batch * groups * parts_of_group(); }
  int64_t channels() const { return heads * width; }

  float skip(const Part& x, int64_t head) const {
    return skips == nullptr ? 0.0f : skips[x.first + head];
  }
  // The first chunk of a task.
  Part part(int64_t task) const {
    const int64_t place = task % parts_of_group() * heads_of_part();
    const int64_t group = task / parts_of_group() % groups, row = task / parts_of_group() / groups;
    const int64_t count = std::min(heads_of_part(), heads_of_group() - place);
    return {row, group, group * heads_of_group() + place, count, 0, 0};
  }
  void move_to(Part& x, int64_t chunk) const {
    x.begin = chunk * CHUNK;
    x.length = std::min(CHUNK, length - x.begin);
  }
  int64_t token(const Part& x) const { return x.row * length + x.begin; }
  int64_t value_at(const Part& x) const { return token(x) * channels() + x.first * width; }
  int64_t shared_at(const Part& x) const { return (token(x) * groups + x.group) * states; }
  int64_t state_at(const Part& x) const { return (x.row * heads + x.first) * width * states; }
  Matrix entering(const Part& x) const { return {enter + shared_at(x), groups * states}; }
  Matrix leaving(const Part& x) const { return {leave + shared_at(x), groups * states}; }
  Matrix value(const Part& x, int64_t head) const {
    return {values + value_at(x) + head * width, channels()};
  }
  const int32_t* ids(const Part& x) const {
    return documents == nullptr ? nullptr : documents + token(x);
  }
  // The document of the state before a chunk.
  int32_t id_before(const Part& x) const { return x.begin == 0 ? 0 : ids(x)[-1]; }
};

inline const float* read(const at::Tensor& x) { return read(x, "ssd"); }
Inputs inputs_of(const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A,
                 const at::Tensor& B, const at::Tensor& C, const std::optional<at::Tensor>& initial,
                 const std::optional<at::Tensor>& documents, const std::optional<at::Tensor>& D);

// C B^T of each chunk, (row, group, chunk) first; zero where the later token, which comes first,
// does not see the earlier one.
std::vector<float> products_of_pairs(const Inputs& in);
inline const float* pairs_of(const Inputs& in, const std::vector<float>& pairs, const Part& x) {
  const int64_t chunk = x.begin / CHUNK, group = x.row * in.groups + x.group;
  return pairs.data() + (group * in.chunks() + chunk) * CHUNK * CHUNK;
}
// In each token's row, zeroes the tokens of other documents and those after it.
void mask_pairs(const Inputs& in, const Part& x, float* pairs);

// Decays inside one chunk, for each head of a part (head, token).
struct Decays {
  // `log` + `rest`: the running sum of dt A over the document's tokens in the chunk, as two floats,
  // so that differences keep all digits. `entering`: the decay since the state before the chunk;
  // `leaving`: the decay until the state after it; both zero in other documents. `share`: dt times
  // `leaving`.
  float log[CHUNK], rest[CHUNK], entering[CHUNK], leaving[CHUNK], dt[CHUNK], share[CHUNK];

  void fill(const Inputs& in, const Part& x, int64_t head);
  float kept(const Part& x) const { return entering[x.length - 1]; }
  // From tokens `j` on to token i.
  Lanes between(int64_t i, int64_t j, int64_t count) const {
    return decay_of((log[i] - load(log + j, count)) + (rest[i] - load(rest + j, count)));
  }
};

// The matrix from values to outputs inside a chunk: decay * (C B^T) * dt, with D on its diagonal
// (Dao and Gu 2024, section 6, the diagonal blocks).
void fill_matrix(const Decays& decays, const float* pairs, int64_t length, float skip, float* out);

// What each token adds to the state after the chunk, before the product with B: (token, channel).
void fill_added(const Inputs& in, const Part& x, const std::vector<Decays>& decays, float* out);

// Replaces the state before a chunk by the state after it; `added` is what `fill_added` gives.
void advance(const Inputs& in, const Part& x, const std::vector<Decays>& decays, const float* added,
             float* state);

}  // namespace crossladder
