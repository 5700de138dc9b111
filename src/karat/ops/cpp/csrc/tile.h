// What a call asks for, how it is cut into tasks, and what both passes do with a tile of scores.
#pragma once
#include "buffers.h"
#include "curves.h"
#include "gemm.h"

namespace karat {

// Mirrored by cpp/task.py; strides count elements. What is void is float, or bfloat16 where `half` says so.
struct Call {
  int64_t B, H, M, N, D, F, E;
  int64_t threads, parts, tile_queries, tile_keys, shared_u, half, softmax;
  Basis basis;
  float scale;
  const void *q, *k;
  const float *u, *bias;
  const void* grad;
  const uint8_t* mask;
  int64_t q_strides[4], k_strides[4], u_strides[5], bias_strides[4], mask_strides[4], grad_strides[4];
  // The sums (B,H,M,E), of any strides; written by the forward pass, with a projector read by the other.
  void* sums;
  int64_t sums_strides[4];
  void *dq, *dk;  // (B,H,M,D); (parts,B,H,N,D), float where parts > 1; contiguous, null where not wanted, as all below
  float* du;      // like u
  float* dbias;   // (threads or 1, ...): the bias's shape, zeros
  int64_t dbias_strides[4], dbias_thread_stride;
  // Values, for softmax over the same scores and for the projector; null where there is neither.
  int64_t Dv;
  const void *v, *grad_attended;
  void* attended;    // what the forward pass makes of the values; last stride 1; softmax's other pass reads it
  float* logsumexp;  // of softmax, likewise; (B,H,M) contiguous
  void* dv;          // as dk
  int64_t v_strides[4], attended_strides[4], grad_attended_strides[4];
  // The projector: attended += gate sums (w^T v). Null without it, the gate where it is one.
  const float *w, *gate;
  float *dw, *dgate;  // (H,N,E), (H)
  int64_t w_strides[3];
  const float *u_factor, *w_factor;  // (F), (1): u and w are what is given times these; null where that is one
  // What the sums begin with, (H,M,E), the same for all images, and its gradient; without features it is the sums.
  const float* places;
  float* dplaces;
  int64_t places_strides[3];
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

// Keys [j0, j1) of a task's queries: where their biases and masks begin, for query 0.
inline const float* bias_of(const Call& c, const Task& t, int64_t j0) {
  const int64_t* s = c.bias_strides;
  return c.bias + t.b * s[0] + t.h * s[1] + j0 * s[3];
}
inline const uint8_t* mask_of(const Call& c, const Task& t, int64_t i, int64_t j) {
  const int64_t* s = c.mask_strides;
  return c.mask + t.b * s[0] + t.h * s[1] + i * s[2] + j * s[3];
}

// The values (N,Dv) in rows of length ld. With a projector masks are of keys alone, and a masked key's values, which
// may be anything, become zero.
template <typename T>
void pack_values(const Call& c, const Task& t, float* values, int64_t ld) {
  const int64_t* s = c.v_strides;
  pack(place<const T>(c.v, s, t.b, t.h), s[2], s[3], c.N, c.Dv, 1.0f, values, ld);
  for (int64_t j = 0; c.w && c.mask && j < c.N; ++j)
    if (!*mask_of(c, t, 0, j)) std::fill(values + j * ld, values + (j + 1) * ld, 0.0f);
}

// Where a head's sums begin, for query i.
inline const float* places_of(const Call& c, const Task& t, int64_t i) {
  return c.places + t.h * c.places_strides[0] + i * c.places_strides[1];
}

inline float factor_of_u(const Call& c, int64_t f) { return c.u_factor ? c.u_factor[f] : 1.0f; }
inline float factor_of_w(const Call& c) { return c.w_factor ? *c.w_factor : 1.0f; }

// w (N,E) of a head, in rows of length ld; its masked keys are those of the values.
inline void pack_projector(const Call& c, int64_t h, float* to, int64_t ld) {
  pack(c.w + h * c.w_strides[0], c.w_strides[1], c.w_strides[2], c.N, c.E, factor_of_w(c), to, ld);
}

}  // namespace karat
