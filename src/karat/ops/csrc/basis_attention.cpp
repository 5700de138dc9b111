// Basis attention on the CPU (SPEC letters): out = sum_j sum_f mask psi_f(scale q.k_j + bias) u[f, j, :].
//
// A task is one head of one image, or a range of its queries. Its scores, features and their gradients exist for
// one tile of queries and keys at a time, in buffers that stay in the second-level cache; both passes are five
// small matrix products (gemm.h) around the features (features.h). Buffers that serve as right-hand factors are
// padded to whole vectors. Threads own contiguous ranges of tasks, head by head: gradients of u are added up by
// one thread, and where a head falls to several threads, their parts are added in the order of the threads, so
// that two runs give the same bits.
#include <cstdlib>
#include <memory>
#include <vector>

#include "features.h"
#include "gemm.h"

namespace karat {

struct Call {  // mirrored by cpp_attention.py; strides count elements
  int64_t B, H, M, N, D, F, E;
  int64_t threads, parts, tile_queries, tile_keys, shared_u;
  Basis basis;
  float scale;
  const float *q, *k, *u, *bias, *grad;
  const uint8_t* mask;
  int64_t q_strides[4], k_strides[4], u_strides[5], bias_strides[4], mask_strides[4], grad_strides[4];
  float *out;              // (B,H,M,E)
  float *dq, *dk, *du;     // (B,H,M,D), (parts,B,H,N,D), like u; contiguous, null where not wanted
  float *dbias;            // (threads or 1, ...): the bias's shape, zeros
  int64_t dbias_strides[4], dbias_thread_stride;
};

static int64_t vectors_of(int64_t n) { return (n + LANES - 1) / LANES; }
static int64_t padded(int64_t n) { return vectors_of(n) * LANES; }

// Row length of a wide buffer: rows a multiple of 4 KB apart would fall into the same lines of the cache.
static int64_t row_length(int64_t n) { return padded(n) % 512 == 0 ? padded(n) + LANES : padded(n); }

// A thread's buffers, kept between calls unless large.
class Arena {
 public:
  float* take(int64_t floats) {
    float* taken = memory_.get() + used_;
    used_ += (floats + 63) / 64 * 64;
    return taken;
  }
  static int64_t rounded(int64_t floats) { return (floats + 63) / 64 * 64; }
  void reserve(int64_t floats) {
    used_ = 0;
    if (floats <= size_) return;
    memory_.reset();
    memory_.reset(static_cast<float*>(std::aligned_alloc(256, static_cast<size_t>(floats) * sizeof(float))));
    size_ = floats;
  }
  void release_if_large() {
    if (size_ > (int64_t{1} << 21)) memory_.reset(), size_ = 0;
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0, used_ = 0;
};

static thread_local Arena arena;

struct Task {
  int64_t h, b, part, group, first_query, last_query;  // group: which set of u (and of its gradient) it uses
};

static Task task_of(const Call& c, int64_t index) {
  Task t;
  t.part = index % c.parts;
  t.b = index / c.parts % c.B;
  t.h = index / c.parts / c.B;
  t.group = c.shared_u ? t.h : t.h * c.B + t.b;
  t.first_query = c.M * t.part / c.parts;
  t.last_query = c.M * (t.part + 1) / c.parts;
  return t;
}

// rows x columns of x (any strides), times factor, into rows of length ld, filled up with zeros.
static void pack(const float* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                 float factor, float* to, int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, x += row_stride, to += ld) {
    int64_t j = 0;
    if (column_stride == 1) {
      for (; j + LANES <= columns; j += LANES) store(to + j, load(x + j) * factor);
    }
    for (; j < columns; ++j) to[j] = x[j * column_stride] * factor;
    for (; j < ld; ++j) to[j] = 0.0f;
  }
}

// The transpose: to[column, row]. Blocks of rows, so that both sides stay in the first-level cache.
static void pack_transposed(const float* x, int64_t row_stride, int64_t column_stride, int64_t rows,
                            int64_t columns, float* to, int64_t ld) {
  for (int64_t first = 0; first < ld; first += LANES)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t i = first; i < std::min<int64_t>(first + LANES, ld); ++i)
        to[j * ld + i] = i < rows ? x[i * row_stride + j * column_stride] : 0.0f;
}

// One tile: scores, then features of queries [i0, i1) and keys [j0, j1) of a task.
struct Tile {
  float *scores, *psi;
  int32_t* keep;  // all ones where a pair takes part; null without a mask
  int64_t ld;     // row length of scores and keep; psi has F such rows a query
};

static Tile take_tile(const Call& c) {
  Tile tile;
  tile.ld = row_length(std::min(c.tile_keys, c.N));
  tile.scores = arena.take(c.tile_queries * tile.ld);
  tile.psi = arena.take(c.tile_queries * c.F * tile.ld);
  tile.keep = c.mask ? reinterpret_cast<int32_t*>(arena.take(c.tile_queries * tile.ld)) : nullptr;
  return tile;
}

static int64_t tile_floats(const Call& c) {
  return (c.F + 2) * Arena::rounded(c.tile_queries * row_length(std::min(c.tile_keys, c.N)));
}

static void fill_tile(const Call& c, const Task& t, const Tile& tile, const float* queries, int64_t ld_queries,
                      const float* keys, int64_t ld_keys, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  const int64_t vectors = vectors_of(j1 - j0);
  multiply(i1 - i0, vectors, c.D, queries, ld_queries, 1, keys + j0, ld_keys, tile.scores, tile.ld, false);
  for (int64_t i = i0; i < i1; ++i) {
    float* scores = tile.scores + (i - i0) * tile.ld;
    if (c.bias) {
      const int64_t* s = c.bias_strides;
      const float* bias = c.bias + t.b * s[0] + t.h * s[1] + i * s[2] + j0 * s[3];
      if (s[3] == 1)
        for (int64_t j = 0; j < j1 - j0; ++j) scores[j] += bias[j];
      else
        for (int64_t j = 0; j < j1 - j0; ++j) scores[j] += bias[j * s[3]];
    }
    if (c.mask) {  // a masked score may be anything, so it becomes zero before the features, and they after
      int32_t* keeps = tile.keep + (i - i0) * tile.ld;
      const int64_t* s = c.mask_strides;
      const uint8_t* mask = c.mask + t.b * s[0] + t.h * s[1] + i * s[2] + j0 * s[3];
      for (int64_t j = 0; j < vectors * LANES; ++j) keeps[j] = j < j1 - j0 && mask[j * s[3]] ? -1 : 0;
      for (int64_t j = 0; j < vectors * LANES; j += LANES) store(scores + j, keep(load(keeps + j), load(scores + j)));
    }
    float* psi = tile.psi + (i - i0) * c.F * tile.ld;
    write_features(c.basis, scores, psi, tile.ld, vectors);
    for (int64_t f = 0; c.mask && f < c.F; ++f)
      for (int64_t j = 0; j < vectors * LANES; j += LANES)
        store(psi + f * tile.ld + j, keep(load(tile.keep + (i - i0) * tile.ld + j), load(psi + f * tile.ld + j)));
  }
}

static void forward_range(const Call& c, int64_t first_task, int64_t last_task) {
  const int64_t ld_keys = row_length(c.N), ld_out = padded(c.E);
  arena.reserve(tile_floats(c) + Arena::rounded(c.D * ld_keys) + Arena::rounded(c.F * c.N * ld_out) +
                Arena::rounded(c.tile_queries * c.D) + Arena::rounded(c.tile_queries * ld_out));
  const Tile tile = take_tile(c);
  float *keys = arena.take(c.D * ld_keys), *weights = arena.take(c.F * c.N * ld_out);
  float *queries = arena.take(c.tile_queries * c.D), *out = arena.take(c.tile_queries * ld_out);
  int64_t group = -1;
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task t = task_of(c, index);
    const float* q = c.q + t.b * c.q_strides[0] + t.h * c.q_strides[1];
    const float* k = c.k + t.b * c.k_strides[0] + t.h * c.k_strides[1];
    pack_transposed(k, c.k_strides[2], c.k_strides[3], c.N, c.D, keys, ld_keys);
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
        for (int64_t f = 0; f < c.F; ++f)
          multiply(i1 - i0, ld_out / LANES, j1 - j0, tile.psi + f * tile.ld, c.F * tile.ld, 1,
                   weights + (f * c.N + j0) * ld_out, ld_out, out, ld_out, f > 0 || j0 > 0);
      }
      float* to = c.out + ((t.b * c.H + t.h) * c.M + i0) * c.E;
      for (int64_t i = 0; i < i1 - i0; ++i) std::memcpy(to + i * c.E, out + i * ld_out, sizeof(float) * c.E);
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

static void backward_range(const Call& c, int64_t first_task, int64_t last_task, int64_t thread,
                           Unfinished* unfinished) {
  const int64_t ld_keys = row_length(c.N), ld_d = padded(c.D), rows = c.tile_queries;
  const int64_t u_floats = c.E * c.F * ld_keys;
  const bool need_scores = c.dq || c.dk || c.dbias;
  arena.reserve(tile_floats(c) + Arena::rounded(c.D * ld_keys) + 2 * Arena::rounded(c.N * ld_d) +
                2 * Arena::rounded(u_floats) + 2 * Arena::rounded(rows * ld_d) + Arena::rounded(rows * c.E) +
                Arena::rounded(BLOCK_ROWS * c.F * row_length(std::min(c.tile_keys, c.N))));
  const Tile tile = take_tile(c);
  float *keys_t = arena.take(c.D * ld_keys), *keys = arena.take(c.N * ld_d), *dk = arena.take(c.N * ld_d);
  float *weights = arena.take(u_floats), *du = arena.take(u_floats);
  float *queries = arena.take(rows * ld_d), *dq = arena.take(rows * ld_d), *grad = arena.take(rows * c.E);
  float* dpsi = arena.take(BLOCK_ROWS * c.F * tile.ld);
  int64_t group = -1;
  bool first_of_group = false;
  for (int64_t index = first_task; index < last_task; ++index) {
    const Task t = task_of(c, index);
    const float* q = c.q + t.b * c.q_strides[0] + t.h * c.q_strides[1];
    const float* k = c.k + t.b * c.k_strides[0] + t.h * c.k_strides[1];
    pack_transposed(k, c.k_strides[2], c.k_strides[3], c.N, c.D, keys_t, ld_keys);
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
      pack(c.grad + t.b * c.grad_strides[0] + t.h * c.grad_strides[1] + i0 * c.grad_strides[2], c.grad_strides[2],
           c.grad_strides[3], m, c.E, 1.0f, grad, c.E);
      for (int64_t j0 = 0; j0 < c.N; j0 += c.tile_keys) {
        const int64_t j1 = std::min(j0 + c.tile_keys, c.N), n = j1 - j0, vectors = vectors_of(n);
        fill_tile(c, t, tile, queries, ld_d, keys_t, ld_keys, i0, i1, j0, j1);
        for (int64_t f = 0; c.du && f < c.F; ++f)  // dU += dO^T psi
          multiply(c.E, vectors, m, grad, 1, c.E, tile.psi + f * tile.ld, c.F * tile.ld, du + f * ld_keys + j0,
                   c.F * ld_keys, !first_of_group || i0 > t.first_query);
        if (!need_scores) continue;
        for (int64_t i = 0; i < m; i += BLOCK_ROWS) {  // dpsi = dO U^T of a few queries, then scores <- dS
          const int64_t few = std::min<int64_t>(BLOCK_ROWS, m - i);
          for (int64_t f = 0; f < c.F; ++f)
            multiply(few, vectors, c.E, grad + i * c.E, c.E, 1, weights + f * ld_keys + j0, c.F * ld_keys,
                     dpsi + f * tile.ld, c.F * tile.ld, false);
          for (int64_t r = i; r < i + few; ++r) {
            float* scores = tile.scores + r * tile.ld;
            pull_back(c.basis, scores, tile.psi + r * c.F * tile.ld, dpsi + (r - i) * c.F * tile.ld, tile.ld, vectors);
            for (int64_t j = 0; c.mask && j < vectors * LANES; j += LANES)
              store(scores + j, keep(load(tile.keep + r * tile.ld + j), load(scores + j)));
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
        for (int64_t i = 0; i < m; ++i)
          pack(dq + i * ld_d, 0, 1, 1, c.D, c.scale, c.dq + ((t.b * c.H + t.h) * c.M + i0 + i) * c.D, c.D);
    }
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
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t) forward_range(*c, tasks * t / threads, tasks * (t + 1) / threads);
}

extern "C" void karat_backward(const Call* c) {
  const int64_t tasks = c->B * c->H * c->parts, threads = c->threads;
  std::vector<Unfinished> unfinished(static_cast<size_t>(2 * threads));
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t)
    backward_range(*c, tasks * t / threads, tasks * (t + 1) / threads, t, &unfinished[2 * t]);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t f = 0; f < c->F; ++f) {
    int64_t last = -1;
    for (const Unfinished& part : unfinished) {
      if (part.group < 0) continue;
      write_du(*c, part.group, part.sums.data(), part.group == last, f, f + 1);
      last = part.group;
    }
  }
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
