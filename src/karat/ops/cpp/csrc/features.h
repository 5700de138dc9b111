// The features psi_f of scores, and their pull-back sum_f psi_f' g_f: what differs from basis to basis.
#pragma once
#include "gemm.h"

namespace karat {

// From RATIONAL on: curves.h.
enum Family : int64_t { FOURIER, BSPLINE, RATIONAL, MEXICAN_HAT, MORLET, DOG, MEYER, SHANNON, FAMILIES };
enum Base : int64_t { NONE = 0, IDENTITY = 1, SILU = 2, GELU = 3 };  // the first feature, if there is one
constexpr int MAX_ORDER = 5, MAX_DEGREE = 8;

struct Basis {
  int64_t family, base;
  int64_t grid, order;  // rational: m and n; shannon: whether the window is of the score
  float range;          // morlet: omega
};

inline void base_value_and_slope(int64_t base, vf x, vf& value, vf& slope) {
  if (base == SILU) {
    vf sigmoid = 1.0f / (1.0f + exponential(-x));
    value = x * sigmoid;
    slope = sigmoid * (1.0f + x * (1.0f - sigmoid));
  } else if (base == GELU) {  // normal distribution to 1e-7: Abramowitz and Stegun 7.1.26
    vf bell = exponential(-0.5f * x * x), z = magnitude(x);
    vf t = 1.0f / (1.0f + 0.23164189f * z);
    vf p = t * 1.061405429f + -1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t + -0.284496736f;
    p = p * t + 0.254829592f;
    vf tail = 0.5f * p * t * bell;
    vf below = select(x < 0.0f, tail, 1.0f - tail);
    value = x * below;
    slope = below + x * bell * 0.398942280401432678f;
  } else {
    value = x;
    slope = splat(1.0f);
  }
}

// The order + 1 B-splines that are not zero at x, or their derivatives: `first` is the index of the first of them.
// A knot lies at each whole number of t = (x + range) / step + order; B_i lives on [i, i + order + 1).
inline void splines(const Basis& basis, vf x, bool slopes, vi& first, vf* values) {
  const int k = static_cast<int>(basis.order);
  const float per_step = static_cast<float>(basis.grid) / (2.0f * basis.range), last = basis.grid + 2.0f * k;
  vf t = (x + basis.range) * per_step + static_cast<float>(k);
  vi inside = (t >= 0.0f) & (t < last);
  t = keep(inside, t);
  vi whole = __builtin_convertvector(t, vi);
  vf w = t - __builtin_convertvector(whole, vf);
  first = whole - k;
  values[0] = splat(1.0f);
  for (int d = 1; d <= k; ++d) {
    vf before = vf{};  // the (j-1)-th of the d splines of degree d - 1
    for (int j = 0; j <= d; ++j) {
      vf here = j < d ? values[j] : vf{};
      if (slopes && d == k) {
        values[j] = (before - here) * per_step;
      } else {
        const float inverse = 1.0f / static_cast<float>(d);
        values[j] = before * ((w + static_cast<float>(d - j)) * inverse) + here * ((j + 1.0f - w) * inverse);
      }
      before = here;
    }
  }
  for (int j = 0; j <= k; ++j) values[j] = keep(inside, values[j]);
}

// Rows of scores, whole vectors each, and their features: psi_f of scores[r, j] is psi[r, f, j].
struct Scores {
  float* scores;
  long ld;
  float* psi;
  long psi_row, psi_f;
  long rows, vectors;
};

inline bool any_large(const Scores& x) {
  vi large = {};
  for (long r = 0; r < x.rows; ++r)
    for (long v = 0; v < x.vectors; ++v) large |= ~(magnitude(load(x.scores + r * x.ld + v * LANES)) <= SINCOS_LIMIT);
  return any_lane(large);
}

// cos(mx), sin(mx) for m = 1 to G. Up to five, which GRID names, by the recurrence c_{m+1} = 2 c_1 c_m - c_{m-1}, whose
// error grows with m² about 0; where GRID is 0, by sums of angles, at two products more.
template <int GRID, bool EXACT>
void write_fourier(const Scores x, long grid) {
  const long G = GRID ? GRID : grid;
  for (long v = 0; v < x.vectors; ++v) {
    const float* score = x.scores + v * LANES;
    float *cosine = x.psi + v * LANES, *sine = cosine + G * x.psi_f;
    for (long r = 0; r < x.rows; ++r, score += x.ld, cosine += x.psi_row, sine += x.psi_row) {
      vf s, c, s_before = vf{}, c_before = splat(1.0f);
      if constexpr (EXACT)
        sincos_exact(load(score), s, c);
      else
        sincos(load(score), s, c);
      const vf first_s = s, first_c = c, twice = 2.0f * c;
#pragma GCC unroll 8
      for (long m = 0; m < G; ++m) {
        store(cosine + m * x.psi_f, c);
        store(sine + m * x.psi_f, s);
        const vf c_next = GRID ? twice * c - c_before : c * first_c - s * first_s;
        const vf s_next = GRID ? twice * s - s_before : s * first_c + c * first_s;
        c_before = c, s_before = s, c = c_next, s = s_next;
      }
    }
  }
}

inline void write_splines(const Basis& basis, const Scores& x) {
  for (long r = 0; r < x.rows; ++r)
    for (long v = 0; v < x.vectors; ++v) {
      vf values[MAX_ORDER + 1], score = load(x.scores + r * x.ld + v * LANES);
      vi first;
      splines(basis, score, false, first, values);
      vf poison = keep(score != score, score);  // NaN stays NaN
      for (long f = 0; f < basis.grid + basis.order; ++f) {
        vi offset = static_cast<int32_t>(f) - first;
        vf value = poison;
        for (int j = 0; j <= basis.order; ++j) value += keep(offset == j, values[j]);
        store(x.psi + r * x.psi_row + f * x.psi_f + v * LANES, value);
      }
    }
}

inline void write_features(const Basis& basis, Scores x) {
  if (basis.base != NONE) {
    for (long r = 0; r < x.rows; ++r)
      for (long v = 0; v < x.vectors; ++v) {
        vf value, slope;
        base_value_and_slope(basis.base, load(x.scores + r * x.ld + v * LANES), value, slope);
        store(x.psi + r * x.psi_row + v * LANES, value);
      }
    x.psi += x.psi_f;
  }
  if (basis.family == BSPLINE) return write_splines(basis, x);
  if (any_large(x)) return write_fourier<0, true>(x, basis.grid);
  using Write = void (*)(Scores, long);
  static constexpr Write by_grid[] = {write_fourier<0, false>, write_fourier<1, false>, write_fourier<2, false>,
                                      write_fourier<3, false>, write_fourier<4, false>, write_fourier<5, false>};
  by_grid[basis.grid <= 5 ? basis.grid : 0](x, basis.grid);
}

// x[j] <- sum_f psi_f'(x[j]) g_f[j]; psi as written above. Fourier: cos(mx)' = -m sin(mx), sin(mx)' = m cos(mx).
inline void pull_back(const Basis& basis, float* x, const float* psi, const float* g, long ld, long vectors) {
  const float* base_g = g;
  if (basis.base != NONE) psi += ld, g += ld;
  const long G = basis.grid;
  for (long at = 0; at < vectors * LANES; at += LANES) {
    vf sum = vf{}, score = load(x + at);
    if (basis.family == FOURIER) {
      for (long m = 0; m < G; ++m) {
        const float *cosine = psi + m * ld + at, *sine = cosine + G * ld;
        const float *g_cosine = g + m * ld + at, *g_sine = g_cosine + G * ld;
        sum += (load(cosine) * load(g_sine) - load(sine) * load(g_cosine)) * static_cast<float>(m + 1);
      }
    } else {
      vf slopes[MAX_ORDER + 1];
      vi first;
      splines(basis, score, true, first, slopes);
      for (long f = 0; f < G + basis.order; ++f) {
        vi offset = static_cast<int32_t>(f) - first;
        vf slope = vf{};
        for (int j = 0; j <= basis.order; ++j) slope += keep(offset == j, slopes[j]);
        sum += slope * load(g + f * ld + at);
      }
    }
    if (basis.base != NONE) {
      vf value, slope;
      base_value_and_slope(basis.base, score, value, slope);
      sum += slope * load(base_g + at);
    }
    store(x + at, sum);
  }
}

}  // namespace karat
