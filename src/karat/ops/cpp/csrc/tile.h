// What a call asks for, how it is cut into tasks, and the tiles of scores and features that every pass begins with.
#pragma once
#include "buffers.h"
#include "features.h"
#include "gemm.h"

namespace karat {

// Mirrored by cpp/attention.py; strides count elements. What is void is float, or bfloat16 where `half` says so.
struct Call {
  int64_t B, H, M, N, D, F, E;
  int64_t threads, parts, tile_queries, tile_keys, shared_u, half;
  Basis basis;
  float scale;
  const void *q, *k;
  const float *u, *bias;
  const void* grad;
  const uint8_t* mask;
  int64_t q_strides[4], k_strides[4], u_strides[5], bias_strides[4], mask_strides[4], grad_strides[4];
  void *out, *dq;          // (B,H,M,E), (B,H,M,D); results are contiguous, gradients null where not wanted
  float *dk, *du;          // (parts,B,H,N,D), like u
  float *dbias;            // (threads or 1, ...): the bias's shape, zeros
  int64_t dbias_strides[4], dbias_thread_stride;
  // Softmax over the same scores; v is null without it.
  int64_t Dv;
  const void *v, *grad_attended;
  void* attended;    // written by the forward pass, read by the other; last stride 1
  float* logsumexp;  // likewise; (B,H,M) contiguous
  float* dv;         // (parts,B,H,N,Dv)
  int64_t v_strides[4], attended_strides[4], grad_attended_strides[4];
};

struct Task {
  int64_t h, b, part, group, first_query, last_query;  // group: which set of u (and of its gradient) it uses
};

inline Task task_of(const Call& c, int64_t index) {
  Task t;
  t.part = index % c.parts;
  t.b = index / c.parts % c.B;
  t.h = index / c.parts / c.B;
  t.group = c.shared_u ? t.h : t.h * c.B + t.b;
  t.first_query = c.M * t.part / c.parts;
  t.last_query = c.M * (t.part + 1) / c.parts;
  return t;
}

// One tile: scores, then features of queries [i0, i1) and keys [j0, j1) of a task.
struct Tile {
  float *scores, *psi;
  float* weights;  // of softmax; null without it
  int32_t* keep;  // all ones where a pair takes part; null without a mask
  int64_t ld;     // row length of scores and keep; psi has F such rows a query
};

inline Tile take_tile(const Call& c) {
  Tile tile;
  tile.ld = row_length(std::min(c.tile_keys, c.N));
  tile.scores = arena.take(c.tile_queries * tile.ld);
  tile.psi = arena.take(c.tile_queries * c.F * tile.ld);
  tile.weights = c.v ? arena.take(c.tile_queries * tile.ld) : nullptr;
  tile.keep = c.mask ? reinterpret_cast<int32_t*>(arena.take(c.tile_queries * tile.ld)) : nullptr;
  return tile;
}

inline int64_t tile_floats(const Call& c) {
  return (c.F + 3) * Arena::rounded(c.tile_queries * row_length(std::min(c.tile_keys, c.N)));
}

inline void fill_tile(const Call& c, const Task& t, const Tile& tile, const float* queries, int64_t ld_queries,
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

}  // namespace karat
