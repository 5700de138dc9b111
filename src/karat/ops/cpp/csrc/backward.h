// The backward pass, queries first: a range of queries meets tiles of keys, whose scores and features are computed again
// and stay in the second-level cache.
#pragma once
#include <vector>

#include "pull_back.h"
#include "softmax.h"

namespace karat {

// What a head's gradients are added up in; those that a thread could not finish alone are kept for the others.
struct GroupSums {
  float *du, *dw, *dplaces, *dgate;  // (E,F,row_length(N)), (N,padded(E)), (M,padded(E)), (1)
};
inline int64_t du_floats(const Call& c) { return c.E * c.F * row_length(c.N); }
inline int64_t dw_floats(const Call& c) { return c.w ? c.N * padded(c.E) : 0; }
inline int64_t dplaces_floats(const Call& c) { return c.dplaces ? c.M * padded(c.E) : 0; }
inline int64_t group_floats(const Call& c) { return du_floats(c) + dw_floats(c) + dplaces_floats(c) + 1; }
inline GroupSums sums_in(const Call& c, float* memory) {
  float *dw = memory + du_floats(c), *dplaces = dw + dw_floats(c);
  return {memory, dw, dplaces, dplaces + dplaces_floats(c)};
}

// Gradients of u, w and places of the first and the last group of a thread's range.
struct Unfinished {
  int64_t group = -1;
  std::vector<float> sums;
};

inline void put(float& to, float x, bool add) { to = add ? to + x : x; }

// A group's gradients as results; of several threads each writes its share.
inline void write_group(const Call& c, int64_t group, float* memory, bool add, int64_t thread = 0,
                        int64_t threads = 1) {
  const GroupSums sums = sums_in(c, memory);
  const int64_t ld = row_length(c.N), j0 = c.N * thread / threads, j1 = c.N * (thread + 1) / threads;
  const int64_t place_of_u = c.shared_u ? group : group % c.B * c.H + group / c.B;
  for (int64_t f = 0; c.du && f < c.F; ++f)
    for (int64_t j = j0; j < j1; ++j)
      for (int64_t e = 0; e < c.E; ++e)
        put(c.du[((place_of_u * c.F + f) * c.N + j) * c.E + e], sums.du[(e * c.F + f) * ld + j], add);
  for (int64_t j = j0; c.dw && j < j1; ++j)
    for (int64_t e = 0; e < c.E; ++e) put(c.dw[(group * c.N + j) * c.E + e], sums.dw[j * padded(c.E) + e], add);
  for (int64_t i = c.M * thread / threads; c.dplaces && i < c.M * (thread + 1) / threads; ++i)
    for (int64_t e = 0; e < c.E; ++e)
      put(c.dplaces[(group * c.M + i) * c.E + e], sums.dplaces[i * padded(c.E) + e], add);
  if (c.dgate && thread == 0) put(c.dgate[group], *sums.dgate, add);
}

// Gradients of what was given, before the factors of u and w: a thread's share of keys in all that is written.
inline void apply_factors(const Call& c, int64_t thread, int64_t threads) {
  const int64_t j0 = c.N * thread / threads, j1 = c.N * (thread + 1) / threads;
  for (int64_t row = 0; c.u_factor && c.du && row < (c.shared_u ? c.H : c.B * c.H) * c.F; ++row)
    for (int64_t at = (row * c.N + j0) * c.E; at < (row * c.N + j1) * c.E; ++at) c.du[at] *= c.u_factor[row % c.F];
  for (int64_t h = 0; c.w_factor && c.dw && h < c.H; ++h)
    for (int64_t at = (h * c.N + j0) * c.E; at < (h * c.N + j1) * c.E; ++at) c.dw[at] *= *c.w_factor;
}

// Memory and lengths for a thread's tasks.
struct Work {
  int64_t rows, ld, ld_keys, ld_d, ld_v, ld_e;  // queries of a range; row lengths of tiles, keys, D, Dv, E
  float *scores, *psi, *weights, *keeps, *dpsi, *dweights;
  float *keys_t, *keys, *dk, *u, *queries, *dq, *grad;
  float *values, *values_t, *dv, *grad_v, *delta;
  float *w, *projected_t, *hidden, *dprojected, *dprojected_t;
  float* group;

  explicit Work(const Call& c)
      : rows(c.tile_queries), ld(row_length(std::min(c.tile_keys, c.N))), ld_keys(row_length(c.N)),
        ld_d(odd_lines(c.D)), ld_v(c.v ? odd_lines(c.Dv) : 0), ld_e(padded(c.E)) {
    const bool softmax = c.softmax, projector = c.w, apart = !fuses(c.basis) && !curved(c.basis);
    Plan plan;
    plan.add(scores, rows * ld), plan.add(psi, rows * (curved(c.basis) ? CURVE_FLOATS : c.F * ld));
    plan.add(weights, softmax ? rows * ld : 0), plan.add(keeps, c.mask ? rows * ld : 0), plan.add(dpsi, apart ? BLOCK_ROWS * c.F * ld : 0);
    plan.add(dweights, softmax ? BLOCK_ROWS * ld : 0), plan.add(keys_t, c.D * ld_keys), plan.add(keys, c.N * ld_d);
    plan.add(dk, c.N * ld_d), plan.add(u, du_floats(c)), plan.add(queries, rows * ld_d), plan.add(dq, rows * ld_d);
    plan.add(grad, rows * ld_e), plan.add(values, projector ? c.N * ld_v : 0);
    plan.add(values_t, softmax ? c.Dv * ld_keys : 0), plan.add(dv, c.N * ld_v), plan.add(grad_v, rows * ld_v);
    plan.add(delta, rows), plan.add(w, projector ? c.N * ld_e : 0), plan.add(projected_t, projector ? c.Dv * ld_e : 0);
    plan.add(hidden, projector ? c.E * rows : 0), plan.add(dprojected, projector ? c.E * ld_v : 0);
    plan.add(dprojected_t, projector ? c.Dv * ld_e : 0), plan.add(group, group_floats(c));
    plan.take();
  }
  int32_t* keeps_of(const Call& c, int64_t i) const {
    return c.mask ? reinterpret_cast<int32_t*>(keeps) + i * ld : nullptr;
  }
};

// What a head brings to all of its images.
inline void begin_group(const Call& c, const Task& t, const Work& x) {
  const float* u = c.u + t.b * c.u_strides[0] + t.h * c.u_strides[1];
  const int64_t* s = c.u_strides;
  for (int64_t f = 0; f < c.F; ++f) {
    const float slope = fuses(c.basis) ? static_cast<float>(f % c.basis.grid + 1) : 1.0f;  // see PullBack
    for (int64_t e = 0; e < c.E; ++e) {  // to (E,F,N)
      float* to = x.u + (e * c.F + f) * x.ld_keys;
      pack(u + f * s[2] + e * s[4], 0, s[3], 1, c.N, factor_of_u(c, f), to, x.ld_keys);
      scale_rows(to, x.ld_keys, 1, x.ld_keys, slope);
    }
  }
  if (c.w) pack_projector(c, t.h, x.w, x.ld_e);
  float* dplaces = sums_in(c, x.group).dplaces;
  std::fill(dplaces, dplaces + dplaces_floats(c), 0.0f);
}

// What an image brings: keys, values, and what the projector makes of them.
template <typename T>
void begin_image(const Call& c, const Task& t, const Work& x) {
  const int64_t *s = c.k_strides, *sv = c.v_strides;
  const T* k = place<const T>(c.k, s, t.b, t.h);
  pack_transposed(k, s[2], s[3], c.N, c.D, c.scale, x.keys_t, x.ld_keys);
  if (c.dq) pack(k, s[2], s[3], c.N, c.D, 1.0f, x.keys, x.ld_d);
  if (c.softmax)
    pack_transposed(place<const T>(c.v, sv, t.b, t.h), sv[2], sv[3], c.N, c.Dv, 1.0f, x.values_t, x.ld_keys);
  if (!c.w) return;
  pack_values<T>(c, t, x.values, x.ld_v);
  multiply(c.Dv, x.ld_e / LANES, c.N, x.values, 1, x.ld_v, x.w, x.ld_e, x.projected_t, x.ld_e, false);
}

// Queries [i0, i0 + m): they themselves, and the gradients of their sums.
template <typename T>
void begin_queries(const Call& c, const Task& t, const Work& x, int64_t i0, int64_t m) {
  pack(place<const T>(c.q, c.q_strides, t.b, t.h, i0), c.q_strides[2], c.q_strides[3], m, c.D, 1.0f, x.queries, x.ld_d);
  const int64_t *s = c.grad_strides, *sv = c.grad_attended_strides, *ss = c.sums_strides;
  if (c.grad) pack(place<const T>(c.grad, s, t.b, t.h, i0), s[2], s[3], m, c.E, 1.0f, x.grad, x.ld_e);
  if (c.grad_attended)
    pack(place<const T>(c.grad_attended, sv, t.b, t.h, i0), sv[2], sv[3], m, c.Dv, 1.0f, x.grad_v, x.ld_v);
  if (c.w) {
    multiply(m, x.ld_e / LANES, c.Dv, x.grad_v, x.ld_v, 1, x.projected_t, x.ld_e, x.grad, x.ld_e, false);
    if (c.gate) scale_rows(x.grad, x.ld_e, m, x.ld_e, c.gate[t.h]);
    if (c.F)
      pack(place<const T>(c.sums, ss, t.b, t.h, i0), ss[3], ss[2], c.E, m, 1.0f, x.hidden, m);
    else
      pack(places_of(c, t, i0), c.places_strides[2], c.places_strides[1], c.E, m, 1.0f, x.hidden, m);
    float* dplaces = sums_in(c, x.group).dplaces + i0 * x.ld_e;
    for (int64_t at = 0; c.dplaces && at < m * x.ld_e; at += LANES)
      store(dplaces + at, load(dplaces + at) + load(x.grad + at));
    multiply(c.E, vectors_of(c.Dv), m, x.hidden, m, 1, x.grad_v, x.ld_v, x.dprojected, x.ld_v, i0 > t.first_query);
  }
  if (!c.softmax) return;
  const T* attended = place<const T>(c.attended, c.attended_strides, t.b, t.h, i0);
  for (int64_t i = 0; i < m; ++i) {
    x.delta[i] = product_of(attended + i * c.attended_strides[2], 1, x.grad_v + i * x.ld_v, c.Dv);
    if (c.w) x.delta[i] -= product_of(x.hidden + i, m, x.grad + i * x.ld_e, c.E);
  }
}

// Scores of queries [i0, i0 + m) and keys [j0, j0 + n), zero where masked, and their features, likewise.
inline void fill_tile(const Call& c, const Task& t, const Work& x, int64_t i0, int64_t m, int64_t j0, int64_t n) {
  const int64_t vectors = vectors_of(n), width = vectors * LANES;
  multiply(m, vectors, c.D, x.queries, x.ld_d, 1, x.keys_t + j0, x.ld_keys, x.scores, x.ld, false);
  for (int64_t i = 0; i < m; ++i) {
    float* scores = x.scores + i * x.ld;
    if (c.bias) {
      const float* bias = bias_of(c, t, j0) + (i0 + i) * c.bias_strides[2];
      if (c.bias_strides[3] == 1)
        for (int64_t j = 0; j < n; ++j) scores[j] += bias[j];
      else
        for (int64_t j = 0; j < n; ++j) scores[j] += bias[j * c.bias_strides[3]];
    }
    if (int32_t* keeps = x.keeps_of(c, i)) {
      const uint8_t* mask = mask_of(c, t, i0 + i, j0);
      for (int64_t j = 0; j < width; ++j) keeps[j] = j < n && mask[j * c.mask_strides[3]] ? -1 : 0;
      for (int64_t j = 0; j < width; j += LANES) store(scores + j, keep(load(keeps + j), load(scores + j)));
    }
  }
  if (!c.F || curved(c.basis)) return;
  write_features(c.basis, {x.scores, x.ld, x.psi, c.F * x.ld, x.ld, m, vectors});
  for (int64_t i = 0; c.mask && i < m; ++i)
    for (int64_t f = 0; f < c.F; ++f)
      for (int64_t j = 0; j < width; j += LANES) {
        float* psi = x.psi + (i * c.F + f) * x.ld + j;
        store(psi, keep(load(x.keeps_of(c, i) + j), load(psi)));
      }
}

// Scores become their gradients dS: sum_f psi_f' (dO U_f^T), and softmax's P (dO V^T - delta).
inline void scores_to_gradients(const Call& c, const Work& x, int64_t m, int64_t j0, int64_t n) {
  const int64_t vectors = vectors_of(n), width = vectors * LANES;
  const bool apart = !fuses(c.basis) && !curved(c.basis);  // curves have been through
  if (c.F && fuses(c.basis))
    pull_back_fourier({c.E, c.basis.grid, x.grad, x.ld_e, x.u + j0, c.F * x.ld_keys, x.ld_keys, x.psi, c.F * x.ld, x.ld,
                       x.scores, x.ld},
                      m, vectors);
  for (int64_t i = 0; i < m; i += BLOCK_ROWS) {
    const int64_t few = std::min<int64_t>(BLOCK_ROWS, m - i);
    for (int64_t f = 0; apart && f < c.F; ++f)
      multiply(few, vectors, c.E, x.grad + i * x.ld_e, x.ld_e, 1, x.u + f * x.ld_keys + j0, c.F * x.ld_keys,
               x.dpsi + f * x.ld, c.F * x.ld, false);
    if (c.softmax)
      multiply(few, vectors, c.Dv, x.grad_v + i * x.ld_v, x.ld_v, 1, x.values_t + j0, x.ld_keys, x.dweights, x.ld,
               false);
    for (int64_t r = 0; r < few; ++r) {
      float* scores = x.scores + (i + r) * x.ld;
      if (!c.F)
        std::fill(scores, scores + width, 0.0f);
      else if (apart)
        pull_back(c.basis, scores, x.psi + (i + r) * c.F * x.ld, x.dpsi + r * c.F * x.ld, x.ld, vectors);
      if (c.softmax)
        add_softmax(scores, x.weights + (i + r) * x.ld, x.dweights + r * x.ld, vectors, x.delta[i + r]);
      if (const int32_t* keeps = x.keeps_of(c, i + r))  // last: what a masked key's values are may be anything
        for (int64_t j = 0; j < width; j += LANES) store(scores + j, keep(load(keeps + j), load(scores + j)));
    }
  }
}

// A tile's part of all gradients.
inline void add_tile(const Call& c, const Task& t, const Work& x, int64_t thread, bool first_of_group, int64_t i0,
                     int64_t m, int64_t j0, int64_t n) {
  const bool first = i0 == t.first_query;
  const int64_t vectors = vectors_of(n);
  fill_tile(c, t, x, i0, m, j0, n);
  const bool whole = n == c.N;  // then rows of all features follow each other: one product
  const bool add = !first_of_group || !first;
  for (int64_t f = 0; c.du && !curved(c.basis) && f < (whole ? 1 : c.F); ++f)  // dU += dPhi^T psi
    multiply(c.E, whole ? c.F * x.ld / LANES : vectors, m, x.grad, 1, x.ld_e, x.psi + f * x.ld, c.F * x.ld,
             x.group + f * x.ld_keys + j0, c.F * x.ld_keys, add);
  const float* logsumexp = c.logsumexp + (t.b * c.H + t.h) * c.M + i0;
  for (int64_t i = 0; c.softmax && i < m; ++i)
    restore_weights(x.scores + i * x.ld, x.keeps_of(c, i), x.weights + i * x.ld, n, logsumexp[i]);
  if (c.dv && c.softmax)  // dV += P^T dO
    multiply(n, vectors_of(c.Dv), m, x.weights, 1, x.ld, x.grad_v, x.ld_v, x.dv + j0 * x.ld_v, x.ld_v, !first);
  if (c.F && curved(c.basis))
    curves_of(c.basis).pull_back(c.basis, {m, vectors, c.E, c.F, x.scores, x.keeps_of(c, 0), x.ld, x.grad, x.ld_e,
                                           x.u + j0, x.group + j0, x.ld_keys, add, x.psi});
  if (!c.dq && !c.dk && !c.dbias) return;
  scores_to_gradients(c, x, m, j0, n);
  for (int64_t i = 0; c.dbias && i < m; ++i) {
    const int64_t* s = c.dbias_strides;
    float* to = c.dbias + thread * c.dbias_thread_stride + t.b * s[0] + t.h * s[1] + (i0 + i) * s[2] + j0 * s[3];
    for (int64_t j = 0; j < n; ++j) to[j * s[3]] += x.scores[i * x.ld + j];
  }
  const int64_t columns = vectors_of(c.D);
  if (c.dq) multiply(m, columns, n, x.scores, x.ld, 1, x.keys + j0 * x.ld_d, x.ld_d, x.dq, x.ld_d, j0 > 0);
  if (c.dk) multiply(n, columns, m, x.scores, 1, x.ld, x.queries, x.ld_d, x.dk + j0 * x.ld_d, x.ld_d, !first);
}

// A task's rows (rows,columns) to their place in (parts,B,H,N,columns), as float where the parts are still to be added.
template <typename T>
void write_rows(const Call& c, const Task& t, const float* from, int64_t ld, int64_t columns, float factor, void* to) {
  const int64_t at = ((t.part * c.B + t.b) * c.H + t.h) * c.N * columns;
  if (c.parts == 1)
    for (int64_t j = 0; j < c.N; ++j)
      pack(from + j * ld, 0, 1, 1, columns, factor, static_cast<T*>(to) + at + j * columns, columns);
  else
    for (int64_t j = 0; j < c.N; ++j)
      pack(from + j * ld, 0, 1, 1, columns, factor, static_cast<float*>(to) + at + j * columns, columns);
}

// What the projector's gradients are, once an image's (or its part's) queries are through: of v, w and the gate.
inline void finish_projector(const Call& c, const Task& t, const Work& x, bool first_of_group) {
  const GroupSums sums = sums_in(c, x.group);
  const int64_t columns = vectors_of(c.Dv);
  pack_transposed(x.dprojected, x.ld_v, 1, c.E, c.Dv, 1.0f, x.dprojected_t, x.ld_e);
  if (c.gate) {
    float dgate = 0.0f;
    for (int64_t d = 0; d < c.Dv; ++d)
      dgate += product_of(x.projected_t + d * x.ld_e, 1, x.dprojected_t + d * x.ld_e, c.E);
    put(*sums.dgate, dgate, !first_of_group);
    scale_rows(x.dprojected, x.ld_v, c.E, padded(c.Dv), c.gate[t.h]);
    scale_rows(x.dprojected_t, x.ld_e, c.Dv, x.ld_e, c.gate[t.h]);
  }
  if (c.dw)
    multiply(c.N, x.ld_e / LANES, c.Dv, x.values, x.ld_v, 1, x.dprojected_t, x.ld_e, sums.dw, x.ld_e, !first_of_group);
  if (!c.dv) return;
  multiply(c.N, columns, c.E, x.w, x.ld_e, 1, x.dprojected, x.ld_v, x.dv, x.ld_v, c.softmax);
  for (int64_t j = 0; c.mask && j < c.N; ++j)
    if (!*mask_of(c, t, 0, j)) std::fill(x.dv + j * x.ld_v, x.dv + (j + 1) * x.ld_v, 0.0f);
}

template <typename T>
void backward_range(const Call& c, int64_t first_task, int64_t last_task, int64_t thread, Unfinished* unfinished) {
  const Work x(c);
  int64_t group = -1;
  bool first_of_group = false;
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task t = task_of(c, index);
    if (t.group != group) {
      begin_group(c, t, x);
      group = t.group;
      first_of_group = true;
    }
    begin_image<T>(c, t, x);
    for (int64_t i0 = t.first_query; i0 < t.last_query; i0 += x.rows) {
      const int64_t m = std::min(x.rows, t.last_query - i0);
      begin_queries<T>(c, t, x, i0, m);
      for (int64_t j0 = 0; j0 < c.N; j0 += c.tile_keys)
        add_tile(c, t, x, thread, first_of_group, i0, m, j0, std::min(c.tile_keys, c.N - j0));
      T* dq = static_cast<T*>(c.dq) + ((t.b * c.H + t.h) * c.M + i0) * c.D;
      for (int64_t i = 0; c.dq && i < m; ++i) pack(x.dq + i * x.ld_d, 0, 1, 1, c.D, c.scale, dq + i * c.D, c.D);
    }
    if (c.w) finish_projector(c, t, x, first_of_group);
    if (c.dv) write_rows<T>(c, t, x.dv, x.ld_v, c.Dv, 1.0f, c.dv);
    if (c.dk) write_rows<T>(c, t, x.dk, x.ld_d, c.D, c.scale, c.dk);
    first_of_group = false;
    const int64_t tasks = c.B * c.H * c.parts;
    const bool ends = index + 1 == last_task || task_of(c, index + 1).group != group;
    if (!ends || !(c.du || c.dw || c.dgate || c.dplaces)) continue;
    const bool begun_before = first_task > 0 && task_of(c, first_task - 1).group == group;
    const bool goes_on = index + 1 < tasks && task_of(c, index + 1).group == group;
    if (begun_before || goes_on) {
      Unfinished& part = unfinished[begun_before ? 0 : 1];
      part.group = group;
      part.sums.assign(x.group, x.group + group_floats(c));
    } else {
      write_group(c, group, x.group, false);
    }
  }
  arena.release_if_large();
}

}  // namespace karat
