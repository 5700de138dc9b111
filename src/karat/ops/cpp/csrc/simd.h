// Vectors of floats of the machine's width, and the functions on them that the features need.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

namespace karat {

#if defined(__AVX512F__)
constexpr int LANES = 16, BLOCK_ROWS = 6, BLOCK_VECTORS = 4;  // 32 registers: 24 sums, 4 columns
#elif defined(__AVX__)
constexpr int LANES = 8, BLOCK_ROWS = 6, BLOCK_VECTORS = 2;  // 16 registers: 12 sums, 2 columns
#elif defined(__aarch64__)
constexpr int LANES = 4, BLOCK_ROWS = 6, BLOCK_VECTORS = 4;
#else
constexpr int LANES = 4, BLOCK_ROWS = 6, BLOCK_VECTORS = 2;
#endif

typedef float vf __attribute__((vector_size(4 * LANES), may_alias));
typedef int32_t vi __attribute__((vector_size(4 * LANES), may_alias));
typedef vf vf_anywhere __attribute__((aligned(4)));  // buffers are aligned; rows of odd length need not be
typedef vi vi_anywhere __attribute__((aligned(4)));

inline vf load(const float* p) { return *reinterpret_cast<const vf_anywhere*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_anywhere*>(p) = x; }
inline vi load(const int32_t* p) { return *reinterpret_cast<const vi_anywhere*>(p); }

// bfloat16, the upper half of a float: read exactly, written to the nearest, ties to even.
struct bf16 {
  uint16_t bits;
};
typedef uint16_t vh __attribute__((vector_size(2 * LANES), may_alias));
typedef vh vh_anywhere __attribute__((aligned(2)));

inline vf load(const bf16* p) {
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_anywhere*>(p), vi) << 16);
}
inline void store(bf16* p, vf x) {
  vi bits = (vi)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const vi nan = x != x;  // stays one
  rounded = (nan & (bits | 0x400000)) | (~nan & rounded);
  *reinterpret_cast<vh_anywhere*>(p) = __builtin_convertvector(rounded >> 16, vh);
}
inline float value_of(float x) { return x; }
inline float value_of(bf16 x) {
  const int32_t bits = static_cast<int32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline void assign(float& to, float x) { to = x; }
inline void assign(bf16& to, float x) {
  vf all = x - vf{};
  bf16 rounded[LANES];
  store(rounded, all);
  to = rounded[0];
}

inline vf splat(float x) { return x - vf{}; }
inline vf select(vi which, vf yes, vf no) { return (vf)((which & (vi)yes) | (~which & (vi)no)); }
inline vf keep(vi which, vf x) { return (vf)(which & (vi)x); }
inline vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// Rows i and i + S of a square, in one step of its transposition: `high` says which of the two.
template <int S, bool high, int... L>
vf interleave(vf a, vf b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (high ? (L & S ? LANES + L : L + S) : (L & S ? LANES + L - S : L))...);
#else
  return __builtin_shuffle(a, b, vi{(high ? (L & S ? LANES + L : L + S) : (L & S ? LANES + L - S : L))...});
#endif
}

template <int S>
void transpose(vf* rows) {
  if constexpr (S > 0) {
    constexpr auto lanes = std::make_integer_sequence<int, LANES>{};
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) {
      if (i & S) continue;
      const vf a = rows[i], b = rows[i + S];
      rows[i] = interleave<S, false>(a, b, lanes);
      rows[i + S] = interleave<S, true>(a, b, lanes);
    }
    transpose<S / 2>(rows);
  }
}

constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits

// Sine and cosine for |x| <= SINCOS_LIMIT, to 2e-6 absolute (tests state it): x = n*pi + r with pi in three parts
// whose first products with n are exact (Cody and Waite), a minimax polynomial each on |r| <= pi/2, the sign of n.
// NaN gives NaN. Larger arguments are for sincos_exact: see `any_large`.
constexpr float SINCOS_LIMIT = 16384.0f;

inline void sincos(vf x, vf& sine, vf& cosine) {
  vf n = x * 0.318309886183790672f + ROUND;
  vi sign = (vi)n << 31;
  n -= ROUND;
  vf r = x - n * 3.140625f;
  r -= n * 9.67502593994140625e-4f;
  r -= n * 1.509957990978376432e-7f;
  vf y = r * r;
  vf s = y * 2.5999122499342775e-06f + -0.00019806552154477686f;
  s = s * y + 0.008333016186952591f;
  s = s * y + -0.16666656732559204f;
  s = s * y * r + r;
  vf c = y * -2.6075662162838853e-07f + 2.476180816302076e-05f;
  c = c * y + -0.0013888402609154582f;
  c = c * y + 0.04166664183139801f;
  c = c * y + -0.5f;
  c = c * y + 1.0f;
  sine = (vf)((vi)s ^ sign);
  cosine = (vf)((vi)c ^ sign);
}

inline bool any_lane(vi x) {
  int32_t bits = 0;
  for (int lane = 0; lane < LANES; ++lane) bits |= x[lane];
  return bits != 0;
}

__attribute__((noinline)) inline void sincos_exact(vf x, vf& sine, vf& cosine) {  // any argument; infinities give NaN
  for (int lane = 0; lane < LANES; ++lane) {
    double value = x[lane];
    sine[lane] = static_cast<float>(std::sin(value));
    cosine[lane] = static_cast<float>(std::cos(value));
  }
}

inline vf exponential(vf x) {  // relative error 1e-7 or so; saturates outside [-87, 88]
  x = select(x < -87.0f, splat(-87.0f), select(x > 88.0f, splat(88.0f), x));
  vf n = x * 1.44269504088896341f + ROUND;
  vi exponent = (vi)n << 23;
  n -= ROUND;
  vf r = x - n * 0.693359375f;
  r -= n * -2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (vf)((vi)p + exponent);
}

}  // namespace karat
