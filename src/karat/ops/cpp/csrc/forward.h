// The forward pass, keys first: a panel of a few vectors of queries meets all keys, so that sums over keys and features
// have the queries in their lanes and no padding in E. Features exist for a chunk of keys that stays in the first-level
// cache.
#pragma once
#include "softmax.h"

namespace karat {

constexpr int64_t CHUNK_FLOATS = 4096;  // half of a first-level cache

// What a task's panel of queries is multiplied with.
struct Factors {
  const float *keys, *u, *values, *projected;  // (N,D); (N,F,E); (N,Dv), (E,Dv) in rows of ld_v
  int64_t ld_keys, ld_v;
};

// Memory for one panel.
struct Panel {
  float *queries, *scores, *weights, *psi, *sums;  // (D,·), (tile's keys,·) twice, (chunk,F,·), (E,·)
  int32_t* keeps;                                  // like scores; all ones where a pair takes part
  Running running;                                 // its sums are the panel's output
  int64_t chunk;                                   // keys
};

// Scores of keys [j0, j0 + n) and queries [i0, i0 + m), masked ones zero.
inline void panel_scores(const Call& c, const Task& t, const Factors& factors, const Panel& panel, int64_t i0,
                         int64_t m, int64_t j0, int64_t n) {
  const int64_t vectors = vectors_of(m), ld = vectors * LANES;
  multiply(n, vectors, c.D, factors.keys + j0 * factors.ld_keys, factors.ld_keys, 1, panel.queries, ld, panel.scores,
           ld, false);
  if (c.bias) {
    const int64_t* s = c.bias_strides;
    pack_transposed(bias_of(c, t, j0) + i0 * s[2], s[2], s[3], m, n, 1.0f, panel.weights, ld);
    for (int64_t at = 0; at < n * ld; at += LANES)
      store(panel.scores + at, load(panel.scores + at) + load(panel.weights + at));
  }
  if (c.mask) {  // a masked score may be anything, so it becomes zero before the features, and they after
    for (int64_t j = 0; j < n; ++j)
      for (int64_t i = 0; i < ld; ++i)
        panel.keeps[j * ld + i] = i < m && *mask_of(c, t, i0 + i, j0 + j) ? -1 : 0;
    for (int64_t at = 0; at < n * ld; at += LANES)
      store(panel.scores + at, keep(load(panel.keeps + at), load(panel.scores + at)));
  }
}

// Sums over the features of the tile's keys, chunk by chunk, or over their curves.
inline void add_features(const Call& c, const Factors& factors, const Panel& panel, int64_t vectors, int64_t j0,
                         int64_t n) {
  const int64_t ld = vectors * LANES, row = c.F * ld;
  if (curved(c.basis)) {
    if (!c.places && j0 == 0) std::fill(panel.sums, panel.sums + c.E * ld, 0.0f);
    curves_of(c.basis).add(c.basis, {n, vectors, c.E, c.F, ld, panel.scores, factors.u + j0 * c.F * c.E,
                                     c.mask ? panel.keeps : nullptr, panel.sums});
    return;
  }
  for (int64_t j = 0; j < n; j += panel.chunk) {
    const int64_t some = std::min(panel.chunk, n - j);
    write_features(c.basis, {panel.scores + j * ld, ld, panel.psi, row, ld, some, vectors});
    for (int64_t r = 0; c.mask && r < some; ++r)
      for (int64_t f = 0; f < c.F; ++f)
        for (int64_t at = 0; at < ld; at += LANES) {
          float* psi = panel.psi + r * row + f * ld + at;
          store(psi, keep(load(panel.keeps + (j + r) * ld + at), load(psi)));
        }
    multiply(c.E, vectors, some * c.F, factors.u + (j0 + j) * c.F * c.E, 1, c.E, panel.psi, ld, panel.sums, ld,
             c.places || j0 + j > 0);
  }
}

template <typename T>
void write_sums(const Call& c, const Task& t, const float* sums, int64_t ld, int64_t i0, int64_t m) {
  const int64_t* s = c.sums_strides;
  T* to = place<T>(c.sums, s, t.b, t.h, i0);
  for (int64_t e = 0; e < c.E; ++e)
    if (s[2] == 1)
      pack(sums + e * ld, 0, 1, 1, m, 1.0f, to + e * s[3], m);
    else
      for (int64_t i = 0; i < m; ++i) assign(to[i * s[2] + e * s[3]], sums[e * ld + i]);
}

// A panel's queries [i0, i0 + m) of a task.
template <typename T>
void forward_panel(const Call& c, const Task& t, const Factors& factors, const Panel& panel, int64_t i0, int64_t m) {
  const int64_t vectors = vectors_of(m), ld = vectors * LANES;
  const int64_t* s = c.q_strides;
  pack_transposed(place<const T>(c.q, s, t.b, t.h, i0), s[2], s[3], m, c.D, c.scale, panel.queries, ld);
  if (c.places)
    pack_transposed(places_of(c, t, i0), c.places_strides[1], c.places_strides[2], m, c.E, 1.0f, panel.sums, ld);
  for (int64_t j0 = 0; j0 < c.N; j0 += c.tile_keys) {
    const int64_t n = std::min(c.tile_keys, c.N - j0);
    panel_scores(c, t, factors, panel, i0, m, j0, n);
    if (c.softmax) {
      weigh(panel.scores, c.mask ? panel.keeps : nullptr, panel.weights, panel.running, n, vectors, j0 == 0);
      multiply(m, vectors_of(c.Dv), n, panel.weights, 1, ld, factors.values + j0 * factors.ld_v, factors.ld_v,
               panel.running.sums, panel.running.ld, j0 > 0);
    }
    if (c.F) add_features(c, factors, panel, vectors, j0, n);
  }
  if (c.F) write_sums<T>(c, t, panel.sums, ld, i0, m);
  if (!c.attended) return;
  T* attended = place<T>(c.attended, c.attended_strides, t.b, t.h, i0);
  float* out = panel.running.sums;
  int64_t row = panel.running.ld;
  const bool in_place = sizeof(T) == sizeof(float) && !c.softmax && c.Dv % LANES == 0;
  if (in_place) out = reinterpret_cast<float*>(attended), row = c.attended_strides[2];
  if (c.softmax) finish_softmax(panel.running, m, c.logsumexp + (t.b * c.H + t.h) * c.M + i0);
  if (c.w)
    multiply(m, vectors_of(c.Dv), c.E, panel.sums, 1, ld, factors.projected, factors.ld_v, out, row, c.softmax);
  for (int64_t i = 0; !in_place && i < m; ++i)
    pack(out + i * row, 0, 1, 1, c.Dv, 1.0f, attended + i * c.attended_strides[2], c.Dv);
}

template <typename T>
void forward_range(const Call& c, int64_t first_task, int64_t last_task) {
  const int64_t width = PANEL_VECTORS * LANES, tile = std::min(c.tile_keys, c.N) * width;
  const int64_t ld_v = c.v ? odd_lines(c.Dv) : 0;
  const int64_t fitting = CHUNK_FLOATS / (std::max<int64_t>(c.F, 1) * width);
  const int64_t chunk = fitting < BLOCK_ROWS ? BLOCK_ROWS : fitting;
  Plan plan;
  float *keys, *u, *values, *w, *projected;
  Panel panel;
  panel.chunk = chunk;
  panel.running.ld = ld_v, panel.running.width = c.v ? padded(c.Dv) : 0;
  plan.add(keys, c.N * c.D), plan.add(u, c.F * c.N * c.E), plan.add(values, c.N * ld_v);
  plan.add(w, c.w ? c.N * c.E : 0), plan.add(projected, c.E * ld_v), plan.add(panel.queries, c.D * width);
  plan.add(panel.scores, tile), plan.add(panel.weights, c.softmax || c.bias ? tile : 0);
  plan.add(panel.psi, chunk * c.F * width), plan.add(panel.sums, c.E * width);
  float* keeps;
  plan.add(keeps, c.mask ? tile : 0), plan.add(panel.running.sums, width * ld_v);
  plan.add(panel.running.top, width), plan.add(panel.running.total, width);
  plan.take();
  panel.keeps = reinterpret_cast<int32_t*>(keeps);
  int64_t group = -1;
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task t = task_of(c, index);
    const int64_t* s = c.k_strides;
    const T* k = place<const T>(c.k, s, t.b, t.h);
    Factors factors = {keys, u, values, projected, c.D, ld_v};
    if (sizeof(T) == sizeof(float) && s[3] == 1)
      factors.keys = reinterpret_cast<const float*>(k), factors.ld_keys = s[2];
    else
      pack(k, s[2], s[3], c.N, c.D, 1.0f, keys, c.D);
    if (t.group != group) {
      const float* from = c.u + t.b * c.u_strides[0] + t.h * c.u_strides[1];
      for (int64_t j = 0; j < c.N; ++j)
        for (int64_t f = 0; f < c.F; ++f)
          pack(from + j * c.u_strides[3] + f * c.u_strides[2], 0, c.u_strides[4], 1, c.E, factor_of_u(c, f),
               u + (j * c.F + f) * c.E, c.E);
      if (c.w) pack_projector(c, t.h, w, c.E);
      group = t.group;
    }
    if (c.v) pack_values<T>(c, t, values, ld_v);
    if (c.w) {
      multiply(c.E, vectors_of(c.Dv), c.N, w, 1, c.E, values, ld_v, projected, ld_v, false);
      if (c.gate) scale_rows(projected, ld_v, c.E, padded(c.Dv), c.gate[t.h]);
    }
    for (int64_t i0 = t.first_query; i0 < t.last_query; i0 += width)
      forward_panel<T>(c, t, factors, panel, i0, std::min(width, t.last_query - i0));
  }
  arena.release_if_large();
}

}  // namespace karat
