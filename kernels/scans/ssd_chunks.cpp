// Decays and matrices of one chunk of SSD, which both passes use.

#include "ssd_chunks.h"

namespace crossladder {

Inputs inputs_of(const at::Tensor& values, const at::Tensor& dt, const at::Tensor& A,
                 const at::Tensor& B, const at::Tensor& C, const std::optional<at::Tensor>& initial,
                 const std::optional<at::Tensor>& documents, const std::optional<at::Tensor>& D) {
  const int32_t* ids = nullptr;
  if (documents.has_value()) {
    TORCH_CHECK(documents->is_contiguous(), "ssd was given documents that are not contiguous");
    ids = documents->const_data_ptr<int32_t>();
  }
  return {values.size(0), values.size(1), values.size(2), values.size(3), B.size(2), B.size(3),
          read(values), read(dt), read(A), read(B), read(C),
          initial.has_value() ? read(*initial) : nullptr, ids,
          D.has_value() ? read(*D) : nullptr};
}

std::vector<float> products_of_pairs(const Inputs& in) {
  const int64_t parts = in.parts_of_group(), count = in.batch * in.groups * in.chunks();
  std::vector<float> pairs(count * CHUNK * CHUNK);
  at::parallel_for(0, count, 1, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      Part x = in.part(i / in.chunks() * parts);
      in.move_to(x, i % in.chunks());
      float* out = pairs.data() + i * CHUNK * CHUNK;
      multiply(x.length, x.length, in.states, in.leaving(x), in.entering(x).transposed(), 0.0f,
               out, x.length);
      mask_pairs(in, x, out);
    }
  });
  return pairs;
}

void mask_pairs(const Inputs& in, const Part& x, float* pairs) {
  const int32_t* ids = in.ids(x);
  for (int64_t i = 0; i < x.length; ++i) {
    float* row = pairs + i * x.length;
    int64_t first = 0;
    while (ids != nullptr && ids[first] != ids[i]) ++first;
    std::fill(row, row + first, 0.0f);
    std::fill(row + i + 1, row + x.length, 0.0f);
  }
}

void Decays::fill(const Inputs& in, const Part& x, int64_t head) {
  const float* steps = in.dt + in.token(x) * in.heads + x.first + head;
  const double rate = in.rates[x.first + head];
  const int32_t* ids = in.ids(x);
  const int64_t last = x.length - 1;
  // In float64: the exponential turns the absolute rounding of these sums into a relative error of
  // the decays.
  double sum = 0.0, exact[CHUNK];
  for (int64_t q = 0; q <= last; ++q) {
    if (ids != nullptr && q > 0 && ids[q] != ids[q - 1]) sum = 0.0;
    dt[q] = steps[q * in.heads];
    exact[q] = sum += dt[q] * rate;
    log[q] = exact[q];
    rest[q] = exact[q] - log[q];
    entering[q] = log[q];
  }
  for (int64_t q = 0; q <= last; ++q) leaving[q] = exact[last] - exact[q];
  for_each_vector(x.length, [&](int64_t q, int64_t count) {
    store(entering + q, decay_of(load(entering + q, count)), count);
    store(leaving + q, decay_of(load(leaving + q, count)), count);
  });
  for (int64_t q = 0; q <= last; ++q) {
    if (ids != nullptr && ids[q] != in.id_before(x)) entering[q] = 0.0f;
    if (ids != nullptr && ids[q] != ids[last]) leaving[q] = 0.0f;
    share[q] = leaving[q] * dt[q];
  }
}

void fill_matrix(const Decays& decays, const float* pairs, int64_t length, float skip, float* out) {
  for (int64_t i = 0; i < length; ++i) {
    float* row = out + i * length;
    std::fill(row + i, row + length, 0.0f);
    for_each_vector(i + 1, [&](int64_t j, int64_t) {
      const int64_t count = std::min(LANES, length - j);
      const Lanes product = load(pairs + i * length + j, count) * load(decays.dt + j, count);
      store(row + j, decays.between(i, j, count) * product, count);
    });
    row[i] += skip;
  }
}

void fill_added(const Inputs& in, const Part& x, const std::vector<Decays>& decays, float* out) {
  for (int64_t q = 0; q < x.length; ++q) {
    for (int64_t h = 0; h < x.heads; ++h, out += in.width) {
      const float* value = in.value(x, h).data + q * in.channels();
      const float share = decays[h].share[q];
      for_each_vector(in.width, [&](int64_t p, int64_t count) {
        store(out + p, share * load(value + p, count), count);
      });
    }
  }
}

void advance(const Inputs& in, const Part& x, const std::vector<Decays>& decays, const float* added,
             float* state) {
  const int64_t each = in.width * in.states, channels = x.heads * in.width;
  for (int64_t h = 0; h < x.heads; ++h) {
    float *own = state + h * each, kept = decays[h].kept(x);
    for_each_vector(each, [&](int64_t i, int64_t count) {
      store(own + i, kept * load(own + i, count), count);
    });
  }
  multiply(channels, in.states, x.length, Matrix{added, channels, true}, in.entering(x), 1.0f,
           state, in.states);
}

}  // namespace crossladder
