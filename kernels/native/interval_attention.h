// What both directions of attention to intervals share: blocks of queries, tiles of keys, scores.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "lanes.h"
#include "products.h"
#include "slices.h"

namespace crossladder {

constexpr int64_t QUERIES = 64, KEYS = 512;

struct Attention {
  int64_t batch, length, heads, width, keys_in_all, groups, value_width;
  const float *queries, *keys, *values;
  const int32_t *first, *past;

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }
  int64_t token(int64_t row, int64_t t) const { return row * length + t; }
  Matrix query(int64_t row, int64_t t, int64_t head) const {
    return {queries + (token(row, t) * heads + head) * width, heads * width};
  }
  int64_t key_at(int64_t row, int64_t place, int64_t group) const {
    return (row * keys_in_all + place) * groups + group;
  }
  Matrix key(int64_t row, int64_t place, int64_t group) const {
    return {keys + key_at(row, place, group) * width, groups * width};
  }
  Matrix value(int64_t row, int64_t place, int64_t group) const {
    return {values + key_at(row, place, group) * value_width, groups * value_width};
  }
  int64_t output_at(int64_t row, int64_t t, int64_t head) const {
    return (token(row, t) * heads + head) * value_width;
  }
};

// Some neighbouring queries of a row.
struct Block {
  int64_t row, begin, count;
};

// Those of all rows in order; a row's begin at `first[row]`.
struct Blocks {
  std::vector<Block> all;
  std::vector<int64_t> first;

  explicit Blocks(const Attention& in) {
    for (int64_t row = 0; row < in.batch; ++row) {
      first.push_back(all.size());
      for (int64_t t = 0; t < in.length; ++t) {
        const int64_t at = in.token(row, t);
        const bool apart = t == 0 || in.first[at] >= in.past[at - 1];
        if (apart || all.back().count == QUERIES) all.push_back({row, t, 0});
        ++all.back().count;
      }
    }
    first.push_back(all.size());
  }
  int64_t count() const { return all.size(); }
};

// A block of one head's queries, and a tile of the keys that any of them sees.
struct Tile {
  int64_t row, head, group, begin, count, place, keys;
};

// What of a tile query i sees: first to past - 1.
struct Seen {
  int64_t first, past;

  Seen(const Attention& in, const Tile& x, int64_t i) {
    const int64_t at = in.token(x.row, x.begin + i);
    first = std::clamp<int64_t>(in.first[at] - x.place, 0, x.keys);
    past = std::clamp<int64_t>(in.past[at] - x.place, first, x.keys);
  }
};

inline Attention attention_of(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& first, const at::Tensor& past,
                              const std::optional<at::Tensor>& own,
                              const std::optional<at::Tensor>& shown) {
  TORCH_CHECK(!own.has_value() && !shown.has_value(),
              "interval_attention on the CPU knows no own keys and no hidden ones");
  TORCH_CHECK(first.is_contiguous() && past.is_contiguous(), "intervals are not contiguous");
  const char* kernel = "interval_attention";
  return {q.size(0), q.size(1), q.size(2), q.size(3), k.size(1), k.size(2), v.size(3),
          read(q, kernel), read(k, kernel), read(v, kernel), first.const_data_ptr<int32_t>(),
          past.const_data_ptr<int32_t>()};
}

// Runs over the tiles of keys that a block of queries sees, in order.
template <typename Run>
void for_each_tile(const Attention& in, const Block& block, int64_t head, const Run& run) {
  const int64_t group = head / (in.heads / in.groups);
  Tile x{block.row, head, group, block.begin, block.count, 0, 0};
  const int64_t at = in.token(block.row, block.begin);
  // Ends never fall from query to query.
  const int64_t end = in.past[at + x.count - 1];
  for (x.place = in.first[at]; x.place < end; x.place += KEYS) {
    x.keys = std::min(KEYS, end - x.place);
    run(x);
  }
}

inline void fill_scores(const Attention& in, const Tile& x, float* scores) {
  multiply(x.count, x.keys, in.width, in.query(x.row, x.begin, x.head),
           in.key(x.row, x.place, x.group).transposed(), 0.0f, scores, x.keys);
}

// exp2(scale * score - shift) of what is seen, zero elsewhere; returns the sum.
inline float exponentiate(float* row, const Seen& seen, int64_t keys, float scale, float shift) {
  Lanes sum{};
  std::fill(row, row + seen.first, 0.0f);
  std::fill(row + seen.past, row + keys, 0.0f);
  for_each_vector(seen.first, seen.past, [&](int64_t j, int64_t count) {
    const Lanes power = exp2(scale * load(row + j, count) - shift);
    store(row + j, power, count);
    sum += first_lanes(power, count);
  });
  return total(sum);
}

}  // namespace crossladder
