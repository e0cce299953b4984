// What both directions of SSD share: chunks of tokens, the heads of a task, decays, matrices.
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
// Channels that a task takes on: enough for its products, few enough for a core's cache.
constexpr int64_t TOGETHER = 256;

// Smaller decays count for nothing, but the denormal numbers that they lead to are slow.
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
  // By head; null where the values themselves are not added to the outputs.
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
// Sets to zero what `products_of_pairs` does.
void hide_pairs(const Inputs& in, const Part& x, float* pairs);

// Decays inside one chunk, for each head of a part (head, token).
struct Decays {
  // The sum of dt A over the document's tokens in the chunk, as two floats: differences lose
  // nothing. Decay from the state before the chunk, and to the state after it, zero in other
  // documents; and dt times the latter.
  float log[CHUNK], rest[CHUNK], entering[CHUNK], leaving[CHUNK], dt[CHUNK], share[CHUNK];

  void fill(const Inputs& in, const Part& x, int64_t head);
  float kept(const Part& x) const { return entering[x.length - 1]; }
  // From tokens `j` on to token i.
  Lanes between(int64_t i, int64_t j, int64_t count) const {
    return decay_of((log[i] - load(log + j, count)) + (rest[i] - load(rest + j, count)));
  }
};

// The matrix from values to outputs inside a chunk: decay, product of C and B, step size; and on its
// diagonal what the values themselves count.
void fill_matrix(const Decays& decays, const float* pairs, int64_t length, float skip, float* out);

// Values times their share of the state after the chunk, (token, head and channel).
void fill_left(const Inputs& in, const Part& x, const std::vector<Decays>& decays, float* out);

// The state after a chunk in place of that before it; `left` is what `fill_left` gives.
void advance(const Inputs& in, const Part& x, const std::vector<Decays>& decays, const float* left,
             float* state);

}  // namespace crossladder
