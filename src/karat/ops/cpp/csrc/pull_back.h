// The gradient of scores through Fourier features without a base activation: dpsi = dPhi U^T and its pull-back at once,
// so that dpsi never leaves the registers.
#pragma once
#include "features.h"

namespace karat {

inline bool fuses(const Basis& basis) { return basis.family == FOURIER && basis.base == NONE; }

// ds[i, j] = sum_m m (cos(m s_ij) dpsi_sine - sin(m s_ij) dpsi_cosine), dpsi_f[i, j] = sum_e grad[i, e] u[e, f, j].
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

  template <int R, int V>
  void block(long row, long at) const {
    for (long m = 0; m < G; ++m) {
      vf dcosine[R][V], dsine[R][V];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) dcosine[r][v] = dsine[r][v] = vf{};
      const float *cosines = u + m * u_f + at, *sines = cosines + G * u_f, *factor = grad + row * ld_grad;
      for (long e = 0; e < E; ++e, cosines += u_e, sines += u_e, ++factor) {
        vf cosine[V], sine[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) cosine[v] = load(cosines + v * LANES), sine[v] = load(sines + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const vf x = splat(factor[r * ld_grad]);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) dcosine[r][v] += x * cosine[v], dsine[r][v] += x * sine[v];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const float *cosine = psi + (row + r) * psi_row + m * psi_f + at + v * LANES, *sine = cosine + G * psi_f;
          float* to = ds + (row + r) * ld + at + v * LANES;
          const vf term = (load(cosine) * dsine[r][v] - load(sine) * dcosine[r][v]) * static_cast<float>(m + 1);
          store(to, m ? load(to) + term : term);
        }
    }
  }
};

constexpr int PULL_VECTORS = BLOCK_VECTORS / 2;  // of keys: each has two sums
using PullBlock = void (*)(const PullBack&, long, long);

template <int... I>
PullBlock choose_pull(int index, std::integer_sequence<int, I...>) {
  static constexpr PullBlock table[] = {[](const PullBack& x, long row, long at) {
    x.block<I / PULL_VECTORS + 1, I % PULL_VECTORS + 1>(row, at);
  }...};
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
