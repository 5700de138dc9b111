// Basis attention on the CPU (SPEC letters): out = sum_j sum_f mask psi_f(scale q.k_j + bias) u[f, j, :], and, where
// values are given, softmax attention over the same scores (softmax.h).
//
// A task is one head of one image, or a range of its queries. Its scores, features and their gradients exist for
// one tile of queries and keys at a time, in buffers that stay in the second-level cache; both passes are
// small matrix products (gemm.h) around the features (features.h). Buffers that serve as right-hand factors are
// padded to whole vectors. Threads own contiguous ranges of tasks, head by head: gradients of u are added up by
// one thread, and where a head falls to several threads, their parts are added in the order of the threads, so
// that two runs give the same bits.
#include <vector>

#include "softmax.h"
#include "threads.h"

namespace karat {

template <typename T>
static void forward_range(const Call& c, int64_t first_task, int64_t last_task) {
  const int64_t ld_keys = row_length(c.N), ld_out = padded(c.E), ld_v = c.v ? padded(c.Dv) : 0;
  arena.reserve(Arena::rounded(c.N * ld_v) + Arena::rounded(c.tile_queries * ld_v) +
                2 * Arena::rounded(c.tile_queries) + tile_floats(c) + Arena::rounded(c.D * ld_keys) +
                Arena::rounded(c.F * c.N * ld_out) + Arena::rounded(c.tile_queries * c.D) + Arena::rounded(c.tile_queries * ld_out));
  const Tile tile = take_tile(c);
  float *keys = arena.take(c.D * ld_keys), *weights = arena.take(c.F * c.N * ld_out);
  float *queries = arena.take(c.tile_queries * c.D), *out = arena.take(c.tile_queries * ld_out);
  float* values = arena.take(c.N * ld_v);
  const Running running = {arena.take(c.tile_queries * ld_v), arena.take(c.tile_queries), arena.take(c.tile_queries),
                           ld_v};
  int64_t group = -1;
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task t = task_of(c, index);
    const T* q = place<const T>(c.q, c.q_strides, t.b, t.h);
    const T* k = place<const T>(c.k, c.k_strides, t.b, t.h);
    pack_transposed(k, c.k_strides[2], c.k_strides[3], c.N, c.D, keys, ld_keys);
    if (c.v)
      pack(place<const T>(c.v, c.v_strides, t.b, t.h), c.v_strides[2], c.v_strides[3], c.N, c.Dv, 1.0f, values, ld_v);
    if (t.group != group) {
      const float* u = c.u + t.b * c.u_strides[0] + t.h * c.u_strides[1];
      for (int64_t f = 0; f < c.F; ++f)
        pack(u + f * c.u_strides[2], c.u_strides[3], c.u_strides[4], c.N, c.E, 1.0f, weights + f * c.N * ld_out,
             ld_out);
      group = t.group;
    }
    for (int64_t i0 = t.first_query; i0 < t.last_query; i0 += c.tile_queries) {
      const int64_t i1 = std::min(i0 + c.tile_queries, t.last_query);
      pack(q + i0 * c.q_strides[2], c.q_strides[2], c.q_strides[3], i1 - i0, c.D, c.scale, queries, c.D);
      for (int64_t j0 = 0; j0 < c.N; j0 += c.tile_keys) {
        const int64_t j1 = std::min(j0 + c.tile_keys, c.N);
        fill_tile(c, t, tile, queries, c.D, keys, ld_keys, i0, i1, j0, j1);
        if (c.v) {
          weigh(tile, running, i1 - i0, j1 - j0, j0 == 0);
          multiply(i1 - i0, ld_v / LANES, j1 - j0, tile.weights, tile.ld, 1, values + j0 * ld_v, ld_v, running.sums,
                   ld_v, j0 > 0);
        }
        for (int64_t f = 0; f < c.F; ++f)
          multiply(i1 - i0, ld_out / LANES, j1 - j0, tile.psi + f * tile.ld, c.F * tile.ld, 1,
                   weights + (f * c.N + j0) * ld_out, ld_out, out, ld_out, f > 0 || j0 > 0);
      }
      if (c.v) write_attended<T>(c, t, running, i0, i1 - i0);
      pack(out, ld_out, 1, i1 - i0, c.E, 1.0f, static_cast<T*>(c.out) + ((t.b * c.H + t.h) * c.M + i0) * c.E, c.E);
    }
  }
  arena.release_if_large();
}

// Gradients of u that a thread could not finish alone: those of the first and the last group of its range.
struct Unfinished {
  int64_t group = -1;
  std::vector<float> sums;  // (E, F, ld)
};

// du of a group (F,N,E) from sums (E,F,ld), for features [f0, f1).
static void write_du(const Call& c, int64_t group, const float* sums, bool add, int64_t f0, int64_t f1) {
  const int64_t ld = row_length(c.N);
  if (!c.shared_u) group = group % c.B * c.H + group / c.B;
  float* du = c.du + group * c.F * c.N * c.E;
  for (int64_t f = f0; f < f1; ++f)
    for (int64_t j = 0; j < c.N; ++j)
      for (int64_t e = 0; e < c.E; ++e) {
        const float sum = sums[(e * c.F + f) * ld + j];
        float& to = du[(f * c.N + j) * c.E + e];
        to = add ? to + sum : sum;
      }
}

template <typename T>
static void backward_range(const Call& c, int64_t first_task, int64_t last_task, int64_t thread,
                           Unfinished* unfinished) {
  const int64_t ld_keys = row_length(c.N), ld_d = padded(c.D), rows = c.tile_queries;
  const int64_t u_floats = c.E * c.F * ld_keys;
  const bool need_scores = c.dq || c.dk || c.dbias;
  const int64_t ld_v = c.v ? padded(c.Dv) : 0;
  arena.reserve(Arena::rounded(c.Dv * ld_keys) + Arena::rounded(c.N * ld_v) + Arena::rounded(rows * ld_v) +
                Arena::rounded(rows) + Arena::rounded(BLOCK_ROWS * row_length(std::min(c.tile_keys, c.N))) +
                tile_floats(c) + Arena::rounded(c.D * ld_keys) + 2 * Arena::rounded(c.N * ld_d) +
                2 * Arena::rounded(u_floats) + 2 * Arena::rounded(rows * ld_d) + Arena::rounded(rows * c.E) +
                Arena::rounded(BLOCK_ROWS * c.F * row_length(std::min(c.tile_keys, c.N))));
  const Tile tile = take_tile(c);
  float *keys_t = arena.take(c.D * ld_keys), *keys = arena.take(c.N * ld_d), *dk = arena.take(c.N * ld_d);
  float *weights = arena.take(u_floats), *du = arena.take(u_floats);
  float *queries = arena.take(rows * ld_d), *dq = arena.take(rows * ld_d), *grad = arena.take(rows * c.E);
  float* dpsi = arena.take(BLOCK_ROWS * c.F * tile.ld);
  float *values_t = arena.take(c.Dv * ld_keys), *dv = arena.take(c.N * ld_v), *grad_v = arena.take(rows * ld_v);
  float *delta = arena.take(rows), *dweights = arena.take(BLOCK_ROWS * tile.ld);
  int64_t group = -1;
  bool first_of_group = false;
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task t = task_of(c, index);
    const T* q = place<const T>(c.q, c.q_strides, t.b, t.h);
    const T* k = place<const T>(c.k, c.k_strides, t.b, t.h);
    pack_transposed(k, c.k_strides[2], c.k_strides[3], c.N, c.D, keys_t, ld_keys);
    if (c.v)
      pack_transposed(place<const T>(c.v, c.v_strides, t.b, t.h), c.v_strides[2], c.v_strides[3], c.N, c.Dv, values_t,
                      ld_keys);
    if (c.dq) pack(k, c.k_strides[2], c.k_strides[3], c.N, c.D, 1.0f, keys, ld_d);
    if (t.group != group) {
      const float* u = c.u + t.b * c.u_strides[0] + t.h * c.u_strides[1];
      for (int64_t f = 0; need_scores && f < c.F; ++f)
        for (int64_t e = 0; e < c.E; ++e)
          pack(u + f * c.u_strides[2] + e * c.u_strides[4], 0, c.u_strides[3], 1, c.N, 1.0f,
               weights + (e * c.F + f) * ld_keys, ld_keys);
      group = t.group;
      first_of_group = true;
    }
    for (int64_t i0 = t.first_query; i0 < t.last_query; i0 += rows) {
      const int64_t i1 = std::min(i0 + rows, t.last_query), m = i1 - i0;
      pack(q + i0 * c.q_strides[2], c.q_strides[2], c.q_strides[3], m, c.D, c.scale, queries, ld_d);
      pack(place<const T>(c.grad, c.grad_strides, t.b, t.h, i0), c.grad_strides[2], c.grad_strides[3], m, c.E, 1.0f,
           grad, c.E);
      if (c.v) {
        const int64_t* s = c.grad_attended_strides;
        pack(place<const T>(c.grad_attended, s, t.b, t.h, i0), s[2], s[3], m, c.Dv, 1.0f, grad_v, ld_v);
        const T* attended = place<const T>(c.attended, c.attended_strides, t.b, t.h, i0);
        for (int64_t i = 0; i < m; ++i)
          delta[i] = delta_of(attended + i * c.attended_strides[2], grad_v + i * ld_v, c.Dv);
      }
      for (int64_t j0 = 0; j0 < c.N; j0 += c.tile_keys) {
        const int64_t j1 = std::min(j0 + c.tile_keys, c.N), n = j1 - j0, vectors = vectors_of(n);
        fill_tile(c, t, tile, queries, ld_d, keys_t, ld_keys, i0, i1, j0, j1);
        for (int64_t f = 0; c.du && f < c.F; ++f)  // dU += dO^T psi
          multiply(c.E, vectors, m, grad, 1, c.E, tile.psi + f * tile.ld, c.F * tile.ld, du + f * ld_keys + j0,
                   c.F * ld_keys, !first_of_group || i0 > t.first_query);
        const float* logsumexp = c.logsumexp + (t.b * c.H + t.h) * c.M + i0;
        for (int64_t i = 0; c.v && i < m; ++i) restore_weights(tile, i, n, logsumexp[i]);
        if (c.dv)  // dV += P^T dO
          multiply(n, ld_v / LANES, m, tile.weights, 1, tile.ld, grad_v, ld_v, dv + j0 * ld_v, ld_v,
                   i0 > t.first_query);
        if (!need_scores) continue;
        for (int64_t i = 0; i < m; i += BLOCK_ROWS) {  // dpsi = dO U^T of a few queries, then scores <- dS
          const int64_t few = std::min<int64_t>(BLOCK_ROWS, m - i);
          for (int64_t f = 0; f < c.F; ++f)
            multiply(few, vectors, c.E, grad + i * c.E, c.E, 1, weights + f * ld_keys + j0, c.F * ld_keys,
                     dpsi + f * tile.ld, c.F * tile.ld, false);
          if (c.v)
            multiply(few, vectors, c.Dv, grad_v + i * ld_v, ld_v, 1, values_t + j0, ld_keys, dweights, tile.ld, false);
          for (int64_t r = i; r < i + few; ++r) {
            float* scores = tile.scores + r * tile.ld;
            pull_back(c.basis, scores, tile.psi + r * c.F * tile.ld, dpsi + (r - i) * c.F * tile.ld, tile.ld, vectors);
            for (int64_t j = 0; c.mask && j < vectors * LANES; j += LANES)
              store(scores + j, keep(load(tile.keep + r * tile.ld + j), load(scores + j)));
            if (c.v) add_softmax(tile, r, vectors, dweights + (r - i) * tile.ld, delta[r]);
          }
        }
        if (c.dbias)
          for (int64_t i = 0; i < m; ++i) {
            const int64_t* s = c.dbias_strides;
            float* to = c.dbias + thread * c.dbias_thread_stride + t.b * s[0] + t.h * s[1] + (i0 + i) * s[2] + j0 * s[3];
            for (int64_t j = 0; j < n; ++j) to[j * s[3]] += tile.scores[i * tile.ld + j];
          }
        if (c.dq)
          multiply(m, ld_d / LANES, n, tile.scores, tile.ld, 1, keys + j0 * ld_d, ld_d, dq, ld_d, j0 > 0);
        if (c.dk)
          multiply(n, ld_d / LANES, m, tile.scores, 1, tile.ld, queries, ld_d, dk + j0 * ld_d, ld_d,
                   i0 > t.first_query);
      }
      if (c.dq)
        pack(dq, ld_d, 1, m, c.D, c.scale, static_cast<T*>(c.dq) + ((t.b * c.H + t.h) * c.M + i0) * c.D, c.D);
    }
    if (c.dv) pack(dv, ld_v, 1, c.N, c.Dv, 1.0f, c.dv + ((t.part * c.B + t.b) * c.H + t.h) * c.N * c.Dv, c.Dv);
    if (c.dk) pack(dk, ld_d, 1, c.N, c.D, 1.0f, c.dk + ((t.part * c.B + t.b) * c.H + t.h) * c.N * c.D, c.D);
    first_of_group = false;
    const int64_t tasks = c.B * c.H * c.parts;
    const bool ends = index + 1 == last_task || task_of(c, index + 1).group != group;
    if (!c.du || !ends) continue;
    const bool begun_before = first_task > 0 && task_of(c, first_task - 1).group == group;
    const bool goes_on = index + 1 < tasks && task_of(c, index + 1).group == group;
    if (begun_before || goes_on) {
      Unfinished& part = unfinished[begun_before ? 0 : 1];
      part.group = group;
      part.sums.assign(du, du + u_floats);
    } else {
      write_du(c, group, du, false, 0, c.F);
    }
  }
  arena.release_if_large();
}

}  // namespace karat

using namespace karat;

// Each of `threads` ranges of tasks is one thread's; what it computes doesn't depend on who runs it.
extern "C" void karat_forward(const Call* c) {
  const int64_t tasks = c->B * c->H * c->parts, threads = c->threads;
  in_threads(threads, [=](int64_t t) {
    (c->half ? forward_range<bf16> : forward_range<float>)(*c, tasks * t / threads, tasks * (t + 1) / threads);
  });
}

extern "C" void karat_backward(const Call* c) {
  const int64_t tasks = c->B * c->H * c->parts, threads = c->threads;
  std::vector<Unfinished> unfinished(static_cast<size_t>(2 * threads));
  in_threads(threads, [&](int64_t t) {
    (c->half ? backward_range<bf16> : backward_range<float>)(*c, tasks * t / threads, tasks * (t + 1) / threads, t,
                                                             &unfinished[2 * t]);
  });
  in_threads(threads, [&](int64_t t) {
    const int64_t first = c->F * t / threads, last = c->F * (t + 1) / threads;
    int64_t written = -1;
    for (const Unfinished& part : unfinished) {
      if (part.group < 0) continue;
      write_du(*c, part.group, part.sums.data(), part.group == written, first, last);
      written = part.group;
    }
  });
}

// For the tests: sines and cosines of n numbers (a multiple of 16), as the kernel computes them.
extern "C" void karat_sincos(const float* x, float* sine, float* cosine, int64_t n) {
  const Basis basis = {FOURIER, NONE, 1, 0, 0.0f};
  std::vector<float> psi(2 * LANES);
  for (int64_t at = 0; at < n; at += LANES) {
    write_features(basis, x + at, psi.data(), LANES, 1);
    std::memcpy(cosine + at, psi.data(), sizeof(float) * LANES);
    std::memcpy(sine + at, psi.data() + LANES, sizeof(float) * LANES);
  }
}
