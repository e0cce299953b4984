// What the forward and the backward pass of attention to intervals share: blocks of queries, tiles
// of keys, and their products.
//
// Keys and values are copied to contiguous memory segment by segment. Scores are stored as (key,
// query), so that each query's softmax stays in one vector lane.
#pragma once

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "lanes.h"
#include "panels.h"
#include "slices.h"

namespace crossladder {

constexpr int64_t QUERIES = 64, SEGMENT = 1024, TILE = 128;

struct Attention {
  int64_t batch, length, heads, width, keys_in_all, groups, value_width;
  const float *queries, *keys, *values;
  const int32_t *first, *past;

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(width)); }
  // Keys of a segment at most.
  int64_t segment() const { return std::min(SEGMENT, keys_in_all); }
  // Padded widths of a key and a value in a workspace.
  int64_t key_row() const { return whole_vectors(width); }
  int64_t value_row() const { return whole_vectors(value_width); }
  int64_t token(int64_t row, int64_t t) const { return row * length + t; }
  int64_t query_at(int64_t row, int64_t t, int64_t head) const {
    return (token(row, t) * heads + head) * width;
  }
  int64_t output_at(int64_t row, int64_t t, int64_t head) const {
    return (token(row, t) * heads + head) * value_width;
  }
  // Index of a (row, token, key head) among all keys.
  int64_t key_at(int64_t row, int64_t place, int64_t group) const {
    return (row * keys_in_all + place) * groups + group;
  }
};

// Consecutive queries of a row and the keys that each sees, an interval with nondecreasing ends.
// The last query's interval pads the arrays to whole vectors.
struct Block {
  int64_t row, begin, count = 0;
  int32_t first[QUERIES], past[QUERIES];

  Range seen() const { return {first[0], past[count - 1]}; }
  int64_t lanes() const { return whole_vectors(count); }
  // The keys that any of the given queries sees, and the queries that see any of the given keys.
  Range keys_of(const Range& queries) const {
    return {first[queries.begin], past[queries.end - 1]};
  }
  Range queries_of(const Range& keys) const {
    const bool all = past[0] > keys.begin && first[count - 1] < keys.end;
    if (all) return {0, count};
    return {std::upper_bound(past, past + count, keys.begin) - past,
            std::lower_bound(first, first + count, keys.end) - first};
  }
};

// The blocks of a row in order. A block also ends where the next query shares no key with this one:
// so no product mixes documents, where 0 * NaN would carry a NaN across.
inline std::vector<Block> blocks_of(const Attention& in, int64_t row) {
  std::vector<Block> all;
  int32_t end = 0;
  for (int64_t t = 0; t < in.length; ++t) {
    const int64_t at = in.token(row, t);
    if (t == 0 || in.first[at] >= end || all.back().count == QUERIES) all.push_back({row, t});
    end = in.past[at];
    Block& block = all.back();
    const int64_t place = block.count++;
    std::fill(block.first + place, block.first + QUERIES, in.first[at]);
    std::fill(block.past + place, block.past + QUERIES, std::max(in.first[at], end));
  }
  return all;
}

inline std::vector<std::vector<Block>> blocks_of(const Attention& in) {
  std::vector<std::vector<Block>> rows;
  for (int64_t row = 0; row < in.batch; ++row) rows.push_back(blocks_of(in, row));
  return rows;
}

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

// A contiguous copy of some consecutive keys and values of one head.
class Segment {
 public:
  explicit Segment(const Attention& in)
      : keys_(in.segment() * in.key_row()), values_(in.segment() * in.value_row()) {}

  void take(const Attention& in, int64_t row, int64_t group, const Range& places) {
    places_ = places;
    const int64_t at = in.key_at(row, places.begin, group);
    gather(in.keys + at * in.width, in.groups * in.width, places.size(), in.width, keys_.data(),
           in.key_row());
    gather(in.values + at * in.value_width, in.groups * in.value_width, places.size(),
           in.value_width, values_.data(), in.value_row());
  }
  const Range& places() const { return places_; }
  const float* key(const Attention& in, int64_t place) {
    return keys_.data() + (place - places_.begin) * in.key_row();
  }
  const float* value(const Attention& in, int64_t place) {
    return values_.data() + (place - places_.begin) * in.value_row();
  }

 private:
  Range places_{0, 0};
  Workspace keys_, values_;
};

// Calls run(stretch) for consecutive stretches of `places` of at most `size`.
template <typename Run>
void for_each_stretch(const Range& places, int64_t size, const Run& run) {
  for (int64_t begin = places.begin; begin < places.end; begin += size) {
    run(Range{begin, std::min(begin + size, places.end)});
  }
}

// Copies a block's rows to contiguous memory, and to its transpose (channel, query).
inline void gather_and_transpose(const float* source, int64_t stride, int64_t rows, int64_t size,
                                 float* together, float* transposed) {
  const int64_t padded = whole_vectors(size);
  gather(source, stride, rows, size, together, padded);
  std::fill(together + rows * padded, together + whole_vectors(rows) * padded, 0.0f);
  transpose(together, whole_vectors(rows), padded, padded, transposed, QUERIES);
}

// Products of a tile's keys (or values) with a block's queries (or output gradients), (key, query).
// `transposed` is (channel, query). Products that no query of a vector needs are skipped.
inline void multiply_keys(const Block& block, const Range& tile, const float* keys, int64_t row,
                          int64_t width, const float* transposed, float* scores) {
  product(tile.size(), {keys, row, 1}, {transposed, QUERIES}, false, scores, QUERIES,
          [&](const Range& some) {
            const Range queries =
                block.queries_of({tile.begin + some.begin, tile.begin + some.end});
            return Extent{{0, width}, {queries.begin / LANES * LANES, whole_vectors(queries.end)}};
          });
}

// out[query] += sum over a tile's keys of scores[key, query] * rows[key].
inline void mix_keys(const Block& block, const Range& tile, const float* scores, const float* rows,
                     int64_t row, bool kept, float* out) {
  product(block.count, {scores, 1, QUERIES}, {rows, row}, kept, out, row,
          [&](const Range& some) {
            const Range keys = block.keys_of(some).within(tile);
            return Extent{{keys.begin - tile.begin, keys.end - tile.begin}, {0, row}};
          });
}

// The keys of a tile that a vector of queries sees: `some` by any of them, `all` by all of them.
struct VisibleKeys {
  static constexpr int64_t CHAINS = 4;
  IntegerLanes first, past;
  Range some, all;

  VisibleKeys(const Block& block, int64_t lane, const Range& tile) {
    std::memcpy(&first, block.first + lane, sizeof(first));
    std::memcpy(&past, block.past + lane, sizeof(past));
    some = Range{first[0], past[LANES - 1]}.within(tile);
    all = Range{first[LANES - 1], past[0]}.within(some);
    if (all.empty()) all = {some.end, some.end};
  }

  // Calls run(key, chain, keep) for the keys in `some`. keep(x, other) is x for the queries that
  // see the key and `other` for the rest. Consecutive keys have different chains, so that a
  // reduction can use independent accumulators.
  template <typename Run>
  void for_each_key(const Run& run) const {
    const auto keep = [](Lanes x, float) { return x; };
    for_each_masked({some.begin, all.begin}, run);
    int64_t k = all.begin;
    for (; k + CHAINS <= all.end; k += CHAINS) {
#pragma GCC unroll 4
      for (int64_t chain = 0; chain < CHAINS; ++chain) run(k + chain, chain, keep);
    }
    for (; k < all.end; ++k) run(k, 0, keep);
    for_each_masked({all.end, some.end}, run);
  }

  // Zeroes the scores of keys that none of the queries sees.
  void clear_rest(const Range& tile, float* scores) const {
    for (int64_t k = tile.begin; k < tile.end; ++k) {
      if (k == some.begin) k = std::max(k, some.end);
      if (k < tile.end) store(scores + (k - tile.begin) * QUERIES, Lanes{}, LANES);
    }
  }

 private:
  template <typename Run>
  void for_each_masked(const Range& keys, const Run& run) const {
    for (int64_t k = keys.begin; k < keys.end; ++k) {
      const int32_t key = static_cast<int32_t>(k);
      const IntegerLanes seen = (first <= key) & (past > key);
      run(k, 0, [&](Lanes x, float other) { return seen ? x : Lanes{} + other; });
    }
  }
};

}  // namespace crossladder
