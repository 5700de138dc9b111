// Softmax over the scores of a tile: a running maximum forward, the probabilities again backward.
#pragma once
#include <limits>

#include "tile.h"

namespace karat {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline vi valid_lanes(const Tile& tile, int64_t row, int64_t at, int64_t n) {
  if (tile.keep) return load(tile.keep + row * tile.ld + at);
  vi lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n - at);
}

inline float largest(vf x) {
  float top = x[0];
  for (int lane = 1; lane < LANES; ++lane) top = std::max(top, x[lane]);
  return top;
}

inline float sum_of(vf x) {
  float sum = x[0];
  for (int lane = 1; lane < LANES; ++lane) sum += x[lane];
  return sum;
}

// Running softmax of some queries: sum_j exp(s_j - top) v_j and sum_j exp(s_j - top).
struct Running {
  float *sums, *top, *total;  // (queries, ld), (queries), (queries)
  int64_t ld;
};

// Weights of one tile's scores; what was summed before shrinks to the new maximum.
inline void weigh(const Tile& tile, const Running& running, int64_t rows, int64_t n, bool first) {
  const int64_t vectors = vectors_of(n);
  for (int64_t i = 0; i < rows; ++i) {
    const float* scores = tile.scores + i * tile.ld;
    float* weights = tile.weights + i * tile.ld;
    const int64_t whole = tile.keep ? 0 : n / LANES;
    vf top = splat(first ? -INFINITE : running.top[i]), sum = vf{};
    for (int64_t v = 0; v < vectors; ++v) {
      vf score = load(scores + v * LANES);
      if (v >= whole) score = select(valid_lanes(tile, i, v * LANES, n), score, splat(-INFINITE));
      top = select(score > top, score, top);
    }
    const float highest = largest(top), start = highest == -INFINITE ? 0.0f : highest;
    for (int64_t v = 0; v < vectors; ++v) {
      vf weight = exponential(load(scores + v * LANES) - start);
      if (v >= whole) weight = keep(valid_lanes(tile, i, v * LANES, n), weight);
      sum += weight;
      store(weights + v * LANES, weight);
    }
    float total = sum_of(sum);
    if (!first) {
      const float shrink = std::exp(running.top[i] - start);
      total += running.total[i] * shrink;
      for (int64_t at = 0; at < running.ld; at += LANES)
        store(running.sums + i * running.ld + at, load(running.sums + i * running.ld + at) * shrink);
    }
    running.top[i] = highest, running.total[i] = total;
  }
}

// The sums of queries [i0, i0 + rows) as results.
template <typename T>
void write_attended(const Call& c, const Task& t, const Running& running, int64_t i0, int64_t rows) {
  T* to = place<T>(c.attended, c.attended_strides, t.b, t.h, i0);
  float* logsumexp = c.logsumexp + (t.b * c.H + t.h) * c.M + i0;
  for (int64_t i = 0; i < rows; ++i, to += c.attended_strides[2]) {
    const bool empty = running.total[i] == 0.0f;
    pack(running.sums + i * running.ld, 0, 1, 1, c.Dv, empty ? 0.0f : 1.0f / running.total[i], to, c.Dv);
    logsumexp[i] = empty ? INFINITE : running.top[i] + std::log(running.total[i]);
  }
}

// The probabilities of one row of a tile.
inline void restore_weights(const Tile& tile, int64_t row, int64_t n, float logsumexp) {
  const int64_t vectors = vectors_of(n), whole = tile.keep ? 0 : n / LANES;
  for (int64_t v = 0; v < vectors; ++v) {
    vf weight = exponential(load(tile.scores + row * tile.ld + v * LANES) - logsumexp);
    if (v >= whole) weight = keep(valid_lanes(tile, row, v * LANES, n), weight);
    store(tile.weights + row * tile.ld + v * LANES, weight);
  }
}

// A row of dS: that of the features, already in the place of the scores, and softmax's own, made in that of dweights.
// Two loops: its product is rounded before it is added, whatever multiply-adds a compiler would make of one.
inline void add_softmax(const Tile& tile, int64_t row, int64_t vectors, float* dweights, float delta) {
  float* scores = tile.scores + row * tile.ld;
  const float* weights = tile.weights + row * tile.ld;
  for (int64_t j = 0; j < vectors * LANES; j += LANES)
    store(dweights + j, load(weights + j) * (load(dweights + j) - delta));
  for (int64_t j = 0; j < vectors * LANES; j += LANES) store(scores + j, load(scores + j) + load(dweights + j));
}

// delta of a row: the product of its output and that output's gradient.
template <typename T>
float delta_of(const T* attended, const float* grad, int64_t n) {
  vf sum = vf{};
  int64_t at = 0;
  for (; at + LANES <= n; at += LANES) sum += load(attended + at) * load(grad + at);
  float rest = sum_of(sum);
  for (; at < n; ++at) rest += value_of(attended[at]) * grad[at];
  return rest;
}

}  // namespace karat
