// The gradient of scores through Fourier features without a base activation: dpsi = dPhi U^T and its pull-back at once,
// so that dpsi never leaves the registers.
#pragma once
#include "features.h"

namespace karat {

inline bool fuses(const Basis& basis) { return basis.family == FOURIER && basis.base == NONE; }

// ds[i, j] = sum_m cos(m s_ij) dpsi_sine - sin(m s_ij) dpsi_cosine, dpsi_f[i, j] = sum_e grad[i, e] u[e, f, j]; the
// derivative's factor m is in u.
struct PullBack {
  long E, G;
  const float* grad;  // (queries, ld_grad)
  long ld_grad;
  const float* u;  // (E,F,keys)
  long u_e, u_f;
  const float* psi;  // (queries,F,keys)
  long psi_row, psi_f;
  float* ds;  // (queries, ld)
  long ld;
};

template <int R, int V>
void pull_block(const PullBack x, long row, long at) {  // a copy: what is stored can't change it
  const float *cosines = x.u + at, *cosine = x.psi + row * x.psi_row + at;
  const long to_sines = x.G * x.u_f, to_sine = x.G * x.psi_f;
  for (long m = 0; m < x.G; ++m, cosines += x.u_f, cosine += x.psi_f) {
    vf dcosine[R][V], dsine[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) dcosine[r][v] = dsine[r][v] = vf{};
    const float *p = cosines, *factor = x.grad + row * x.ld_grad;
    for (long e = 0; e < x.E; ++e, p += x.u_e, ++factor) {
      vf with_cosine[V], with_sine[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) with_cosine[v] = load(p + v * LANES), with_sine[v] = load(p + to_sines + v * LANES);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const vf g = splat(factor[r * x.ld_grad]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) dcosine[r][v] += g * with_cosine[v], dsine[r][v] += g * with_sine[v];
      }
    }
    const float* values = cosine;
    float* to = x.ds + row * x.ld + at;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r, values += x.psi_row, to += x.ld)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        const vf before = m ? load(to + v * LANES) : vf{};
        store(to + v * LANES, load(values + v * LANES) * dsine[r][v] +
                                  (before - load(values + to_sine + v * LANES) * dcosine[r][v]));
      }
  }
}

constexpr int PULL_VECTORS = BLOCK_VECTORS / 2;  // of keys: each has two sums
using PullBlock = void (*)(PullBack, long, long);

template <int... I>
PullBlock choose_pull(int index, std::integer_sequence<int, I...>) {
  static constexpr PullBlock table[] = {pull_block<I / PULL_VECTORS + 1, I % PULL_VECTORS + 1>...};
  return table[index];
}

inline void pull_back_fourier(const PullBack& x, long rows, long vectors) {
  constexpr auto sizes = std::make_integer_sequence<int, BLOCK_ROWS * PULL_VECTORS>{};
  for (long v = 0; v < vectors; v += PULL_VECTORS) {
    const long width = std::min<long>(PULL_VECTORS, vectors - v);
    for (long row = 0; row < rows; row += BLOCK_ROWS) {
      const long height = std::min<long>(BLOCK_ROWS, rows - row);
      choose_pull(static_cast<int>((height - 1) * PULL_VECTORS + width - 1), sizes)(x, row, v * LANES);
    }
  }
}

}  // namespace karat
