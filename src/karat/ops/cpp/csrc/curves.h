// Edge functions that are not linear in their parameters: every (key, sum) has a curve phi(x; p) of its own, which is
// evaluated for each score, forward with the queries in its lanes, backward with the keys.
//
// A curve says how many numbers it has (`numbers`), what it needs of them alone (`prepare`, behind them) and of a score
// alone (`terms`), its value, and its gradients: `pull` returns g dphi/dx and adds g dphi/dp to dp.
#pragma once
#include "features.h"

namespace karat {

inline bool curved(const Basis& basis) { return basis.family >= RATIONAL; }

// (a_0 + ... + a_m x^m) / (1 + |b_1 x + ... + b_n x^n|); above and below divided by w^n, w = max(|x|, 1). M and N are m
// and n, or 0 where they are read.
template <int M, int N>
struct Rational {
  static constexpr int MOST = M ? (M > N ? M : N) : MAX_DEGREE;
  int top, bottom;
  explicit Rational(const Basis& basis)
      : top(M ? M : static_cast<int>(basis.grid)), bottom(N ? N : static_cast<int>(basis.order)) {}
  int m() const { return M ? M : top; }
  int n() const { return N ? N : bottom; }
  int numbers() const { return m() + n() + 1; }
  static constexpr int MOST_NUMBERS = M ? M + N + 1 : 2 * MAX_DEGREE + 1;
  void prepare(vf*) const {}

  struct Terms {
    vf power[MOST + 1];  // x^i / w^n
  };

  Terms terms(vf x) const {
    const vf size = magnitude(x), w = select(size > 1.0f, size, splat(1.0f)), inverse = 1.0f / w, y = x / w;
    const int last = m() > n() ? m() : n();
    Terms t;
    vf power = splat(1.0f);
    for (int i = 0; i <= last; ++i, power *= y) t.power[i] = power;
    power = splat(1.0f);
    for (int i = n(); i >= 0; --i, power *= inverse) t.power[i] *= power;
    power = w;
    for (int i = n() + 1; i <= last; ++i, power *= w) t.power[i] *= power;
    return t;
  }

  vf value(const Terms& t, const vf* p) const {
    vf above = p[0] * t.power[0], inner = vf{};
    for (int i = 1; i <= m(); ++i) above += p[i] * t.power[i];
    for (int j = 1; j <= n(); ++j) inner += p[m() + j] * t.power[j];
    return above / (t.power[0] + magnitude(inner));
  }

  vf pull(const Terms& t, const vf* p, vf g, vf* dp) const {
    vf above = p[0] * t.power[0], inner = vf{}, rise = vf{}, bend = vf{};
    for (int i = 1; i <= m(); ++i)
      above += p[i] * t.power[i], rise += p[i] * (static_cast<float>(i) * t.power[i - 1]);
    for (int j = 1; j <= n(); ++j)
      inner += p[m() + j] * t.power[j], bend += p[m() + j] * (static_cast<float>(j) * t.power[j - 1]);
    const vf inverse = 1.0f / (t.power[0] + magnitude(inner)), share = g * inverse;
    const vf back = above * inverse * share;  // times -sign(inner), the denominator's part
    const vf fall = keep(inner != 0.0f, select(inner < 0.0f, back, -back));
    for (int i = 0; i <= m(); ++i) dp[i] += share * t.power[i];
    for (int j = 1; j <= n(); ++j) dp[m() + j] += fall * t.power[j];
    return share * rise + fall * bend;
  }
};

// weight * mother((x - translation) / dilation), the dilation's size at least LEAST_DILATION.
constexpr float LEAST_DILATION = 1e-3f;

template <class Mother>
struct Wavelet {
  Mother mother;
  explicit Wavelet(const Basis& basis) : mother(basis) {}
  int numbers() const { return 3; }
  static constexpr int MOST_NUMBERS = 4;
  static vi small(vf dilation) { return magnitude(dilation) < LEAST_DILATION; }
  void prepare(vf* p) const {
    const vf least = select(p[2] < 0.0f, splat(-LEAST_DILATION), splat(LEAST_DILATION));
    p[3] = 1.0f / select(small(p[2]), least, p[2]);
  }

  struct Terms {
    vf x;
  };
  Terms terms(vf x) const { return {x}; }

  vf value(const Terms& t, const vf* p) const {
    vf value, slope;
    mother((t.x - p[1]) * p[3], value, slope);
    return p[0] * value;
  }
  vf pull(const Terms& t, const vf* p, vf g, vf* dp) const {
    const vf moved = (t.x - p[1]) * p[3];
    vf value, slope;
    mother(moved, value, slope);
    const vf dx = g * p[0] * slope * p[3];
    dp[0] += g * value;
    dp[1] -= dx;
    dp[2] -= keep(~small(p[2]), dx * moved);
    return dx;
  }
};

// e^(-x^2/2), zero from 14 on, where a float has no number for it.
inline vf gaussian(vf square) { return select(square > 174.0f, vf{}, exponential(-0.5f * square)); }
inline vf near_zero(vf x) { return select(magnitude(x) > 14.0f, splat(14.0f), x); }
inline vf at_most(vf x, float most) { return select(x > most, splat(most), x); }  // NaN stays NaN

struct MexicanHat {
  explicit MexicanHat(const Basis&) {}
  void operator()(vf x, vf& value, vf& slope) const {
    const vf near = near_zero(x), square = near * near, bell = 0.867325070584078518f * gaussian(square);
    value = (square - 1.0f) * bell;
    slope = near * (3.0f - square) * bell;
  }
};

struct Morlet {
  float omega;
  explicit Morlet(const Basis& basis) : omega(basis.range) {}
  void operator()(vf x, vf& value, vf& slope) const {
    const vf near = near_zero(x), bell = gaussian(near * near);
    vf s, c;
    sincos(omega * near, s, c);
    value = c * bell;
    slope = -(omega * s + near * c) * bell;
  }
};

struct DerivativeOfGaussian {
  explicit DerivativeOfGaussian(const Basis&) {}
  void operator()(vf x, vf& value, vf& slope) const {
    const vf near = near_zero(x), square = near * near, bell = gaussian(square);
    value = near * bell;
    slope = (1.0f - square) * bell;
  }
};

struct Meyer {
  explicit Meyer(const Basis&) {}
  static constexpr float PI = 3.14159265358979324f;
  static vf step(vf t, vf& slope) {  // t^4 (35 - 84 t + 70 t^2 - 20 t^3) on [0, 1]
    t = at_most(select(t < 0.0f, vf{}, t), 1.0f);
    const vf rest = t * (1.0f - t), square = t * t;
    slope = 140.0f * rest * rest * rest;
    return square * square * (t * (t * (t * -20.0f + 70.0f) + -84.0f) + 35.0f);
  }
  void operator()(vf x, vf& value, vf& slope) const {
    const vf size = at_most(magnitude(x), 1.0f);
    vf rises, bends, s, c, s_window, window;
    const vf nu = step(size, rises), second = step(2.0f * nu - 1.0f, bends);
    sincos(PI * size, s, c);
    sincos(0.5f * PI * second, s_window, window);
    value = s * window;
    const vf rising = PI * c * window - s * (PI * s_window * bends * rises);
    slope = select(x < 0.0f, -rising, keep(x != 0.0f, rising));
  }
};

struct Shannon {
  bool windowed;
  explicit Shannon(const Basis& basis) : windowed(basis.grid != 0) {}
  static constexpr float EDGE = 15.7079632679489662f;  // 5 pi
  void operator()(vf x, vf& value, vf& slope) const {
    vf s, c;
    if (windowed) x = select(magnitude(x) > EDGE, splat(EDGE), x);
    if (any_lane(magnitude(x) > SINCOS_LIMIT))
      sincos_exact(x, s, c);
    else
      sincos(x, s, c);
    const vf square = x * x;
    const vi near = magnitude(x) < 0.05f;  // where the difference of the slope cancels
    const vf apart = select(near, splat(1.0f), x);
    value = select(near, 1.0f + square * (square * (1.0f / 120) - 1.0f / 6), s / apart);
    slope = select(near, x * (square * (1.0f / 30 - square * (1.0f / 840)) - 1.0f / 3), (c - value) / apart);
    if (!windowed) return;
    sincos(x * 0.2f, s, c);
    const vf window = 0.54f + 0.46f * c;
    const vi outside = x == EDGE;
    slope = select(outside, vf{}, slope * window - value * (0.092f * s));
    value = select(outside, vf{}, value * window);
  }
};

constexpr int64_t PANEL_VECTORS = 2;  // of queries, forward

// A tile of curves, forward: sums[e, i] += sum_j phi(scores[j, i]; u[j, :, e]), j over `keys`.
struct CurveSums {
  long keys, vectors, E, F, ld;  // at most PANEL_VECTORS
  const float *scores, *u;  // (keys, ld); (keys,F,E)
  const int32_t* keeps;     // like scores, or null
  float* sums;              // (E, ld)
};

template <class Curve>
void add_curves(const Basis& basis, const CurveSums x) {
  const Curve curve(basis);
  const int based = basis.base != NONE;
  for (long j = 0; j < x.keys; ++j) {
    typename Curve::Terms terms[PANEL_VECTORS];
    vf base[PANEL_VECTORS], slope;
    for (long v = 0; v < x.vectors; ++v) {
      const vf score = load(x.scores + j * x.ld + v * LANES);
      terms[v] = curve.terms(score);
      if (based) base_value_and_slope(basis.base, score, base[v], slope);
    }
    for (long e = 0; e < x.E; ++e) {
      const float* u = x.u + j * x.F * x.E + e;
      vf p[Curve::MOST_NUMBERS];
      for (int f = 0; f < curve.numbers(); ++f) p[f] = splat(u[(f + based) * x.E]);
      curve.prepare(p);
      for (long v = 0; v < x.vectors; ++v) {
        vf value = curve.value(terms[v], p);
        if (based) value += *u * base[v];
        if (x.keeps) value = keep(load(x.keeps + j * x.ld + v * LANES), value);
        float* sum = x.sums + e * x.ld + v * LANES;
        store(sum, load(sum) + value);
      }
    }
  }
}

// Backward: scores[i, j] becomes sum_e phi' grad[i, e], and du[e, f, j] (+)= sum_i dphi/dp_f grad[i, e].
struct CurveGradients {
  long rows, vectors, E, F;
  float* scores;         // (rows, ld)
  const int32_t* keeps;  // like scores, or null
  long ld;
  const float* grad;  // (rows, ld_grad)
  long ld_grad;
  const float* u;  // (E,F,keys), rows of ld_u, as du
  float* du;
  long ld_u;
  bool add;
  float* memory;  // (rows, terms and two numbers of whole vectors)
};

// What `pull_back_curves` needs of memory for a row: the terms of the widest curve, and three vectors.
constexpr int64_t CURVE_FLOATS = (MAX_DEGREE + 4) * LANES;

template <class Curve>
void pull_back_curves(const Basis& basis, const CurveGradients x) {
  struct Row {
    typename Curve::Terms terms;
    vf base, base_slope, dx;
  };
  static_assert(sizeof(Row) <= CURVE_FLOATS * sizeof(float), "a row has no room: raise CURVE_FLOATS");
  const Curve curve(basis);
  const int based = basis.base != NONE;
  Row* rows = reinterpret_cast<Row*>(x.memory);
  for (long at = 0; at < x.vectors * LANES; at += LANES) {
    for (long i = 0; i < x.rows; ++i) {
      const vf score = load(x.scores + i * x.ld + at);
      rows[i].terms = curve.terms(score), rows[i].dx = vf{};
      if (based) base_value_and_slope(basis.base, score, rows[i].base, rows[i].base_slope);
    }
    for (long e = 0; e < x.E; ++e) {
      vf p[Curve::MOST_NUMBERS], dp[Curve::MOST_NUMBERS], dbase = vf{};
      const float* u = x.u + e * x.F * x.ld_u + at;
      for (int f = 0; f < curve.numbers(); ++f) p[f] = load(u + (f + based) * x.ld_u), dp[f] = vf{};
      curve.prepare(p);
      for (long i = 0; i < x.rows; ++i) {
        vf g = splat(x.grad[i * x.ld_grad + e]);
        if (x.keeps) g = keep(load(x.keeps + i * x.ld + at), g);
        vf dx = curve.pull(rows[i].terms, p, g, dp);
        if (based) dx += g * load(u) * rows[i].base_slope, dbase += g * rows[i].base;
        rows[i].dx += dx;
      }
      float* du = x.du + e * x.F * x.ld_u + at;
      if (based) store(du, x.add ? load(du) + dbase : dbase);
      for (int f = 0; f < curve.numbers(); ++f) {
        float* to = du + (f + based) * x.ld_u;
        store(to, x.add ? load(to) + dp[f] : dp[f]);
      }
    }
    for (long i = 0; i < x.rows; ++i) store(x.scores + i * x.ld + at, rows[i].dx);
  }
}

struct Curves {
  void (*add)(const Basis&, CurveSums);
  void (*pull_back)(const Basis&, CurveGradients);
};

template <class Curve>
constexpr Curves both() {
  return {add_curves<Curve>, pull_back_curves<Curve>};
}

inline Curves curves_of(const Basis& basis) {
  static constexpr Curves by_family[] = {both<Rational<0, 0>>(),       both<Wavelet<MexicanHat>>(),
                                         both<Wavelet<Morlet>>(),      both<Wavelet<DerivativeOfGaussian>>(),
                                         both<Wavelet<Meyer>>(),       both<Wavelet<Shannon>>()};
  static_assert(sizeof(by_family) / sizeof(*by_family) == FAMILIES - RATIONAL, "one for each family from RATIONAL on");
  if (basis.family == RATIONAL && basis.grid == 5 && basis.order == 4) return both<Rational<5, 4>>();
  return by_family[basis.family - RATIONAL];
}

}  // namespace karat
