// Softmax over the scores of a tile: a running maximum forward, keys first; the probabilities again backward.
#pragma once
#include <limits>

#include "tile.h"

namespace karat {

constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline float sum_of(vf x) {
  float sum = x[0];
  for (int lane = 1; lane < LANES; ++lane) sum += x[lane];
  return sum;
}

// Running softmax of a panel of queries: sum_j exp(s_j - top) v_j, a row each, and sum_j exp(s_j - top).
struct Running {
  float *sums, *top, *total;
  int64_t ld, width;  // of sums: from row to row, and what is used of it
};

// Weights of one tile's scores (keys n, queries of `vectors`); what was summed before shrinks to the new maximum.
inline void weigh(const float* scores, const int32_t* keeps, float* weights, const Running& running, int64_t n,
                  int64_t vectors, bool first) {
  const int64_t ld = vectors * LANES;
  for (int64_t at = 0; at < ld; at += LANES) {
    const vf before = first ? splat(-INFINITE) : load(running.top + at);
    vf top = before, sum = vf{};
    for (int64_t j = 0; j < n; ++j) {
      vf score = load(scores + j * ld + at);
      if (keeps) score = select(load(keeps + j * ld + at), score, splat(-INFINITE));
      top = select(score > top, score, top);
    }
    const vf start = select(top == -INFINITE, vf{}, top);
    for (int64_t j = 0; j < n; ++j) {
      vf weight = exponential(load(scores + j * ld + at) - start);
      if (keeps) weight = keep(load(keeps + j * ld + at), weight);
      sum += weight;
      store(weights + j * ld + at, weight);
    }
    if (!first) {
      for (int lane = 0; lane < LANES; ++lane) {
        const float shrink = std::exp(before[lane] - start[lane]);
        sum[lane] += running.total[at + lane] * shrink;
        scale_rows(running.sums + (at + lane) * running.ld, running.ld, 1, running.width, shrink);
      }
    }
    store(running.top + at, top);
    store(running.total + at, sum);
  }
}

// The attended values of `rows` queries in place of their sums, and the logarithm of each row's sum of exponentials.
inline void finish_softmax(const Running& running, int64_t rows, float* logsumexp) {
  for (int64_t i = 0; i < rows; ++i) {
    const bool empty = running.total[i] == 0.0f;
    scale_rows(running.sums + i * running.ld, running.ld, 1, running.width, empty ? 0.0f : 1.0f / running.total[i]);
    logsumexp[i] = empty ? INFINITE : running.top[i] + std::log(running.total[i]);
  }
}

// The probabilities of a row of n scores, zero where it doesn't take part and beyond the last.
inline void restore_weights(const float* scores, const int32_t* keeps, float* weights, int64_t n, float logsumexp) {
  vi lane;
  for (int i = 0; i < LANES; ++i) lane[i] = i;
  for (int64_t at = 0; at < n; at += LANES) {
    vf weight = exponential(load(scores + at) - logsumexp);
    if (keeps)
      weight = keep(load(keeps + at), weight);
    else if (at + LANES > n)
      weight = keep(lane < static_cast<int32_t>(n - at), weight);
    store(weights + at, weight);
  }
}

// A row of dS: that of the features, already in the place of the scores, and softmax's own, made in that of dweights.
// Two loops: its product is rounded before it is added, whatever multiply-adds a compiler would make of one.
inline void add_softmax(float* scores, const float* weights, float* dweights, int64_t vectors, float delta) {
  for (int64_t j = 0; j < vectors * LANES; j += LANES)
    store(dweights + j, load(weights + j) * (load(dweights + j) - delta));
  for (int64_t j = 0; j < vectors * LANES; j += LANES) store(scores + j, load(scores + j) + load(dweights + j));
}

// The product of two rows, such as a row's output and that output's gradient.
template <typename T>
float product_of(const T* x, int64_t stride, const float* y, int64_t n) {
  vf sum = vf{};
  int64_t at = 0;
  for (; stride == 1 && at + LANES <= n; at += LANES) sum += load(x + at) * load(y + at);
  float rest = sum_of(sum);
  for (; at < n; ++at) rest += value_of(x[at * stride]) * y[at];
  return rest;
}

}  // namespace karat
