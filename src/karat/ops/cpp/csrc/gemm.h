// The one matrix product that everything here is made of: C (+)= A B, a block of C held in registers.
#pragma once
#include <algorithm>
#include <utility>

#include "simd.h"

namespace karat {

// C[r, :] (+)= sum_p A[r, p] B[p, :] for R rows and V vectors of columns; A has two strides, B and C one each.
template <int R, int V>
void block_product(long k, const float* a, long a_row, long a_p, const float* b, long b_p, float* c, long c_row,
                   bool add) {
  vf sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = add ? load(c + r * c_row + v * LANES) : vf{};
  for (long p = 0; p < k; ++p, a += a_p, b += b_p) {
    vf column[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) column[v] = load(b + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf x = splat(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] += x * column[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * LANES, sum[r][v]);
}

using BlockProduct = void (*)(long, const float*, long, long, const float*, long, float*, long, bool);

template <int... I>
BlockProduct choose_block(int index, std::integer_sequence<int, I...>) {
  static constexpr BlockProduct table[] = {block_product<I / BLOCK_VECTORS + 1, I % BLOCK_VECTORS + 1>...};
  return table[index];
}

// The same for any number of rows and vectors. A panel of B stays in the first-level cache for all rows.
inline void multiply(long rows, long vectors, long k, const float* a, long a_row, long a_p, const float* b, long b_p,
                     float* c, long c_row, bool add) {
  constexpr auto sizes = std::make_integer_sequence<int, BLOCK_ROWS * BLOCK_VECTORS>{};
  const long panels = (vectors + BLOCK_VECTORS - 1) / BLOCK_VECTORS;
  for (long panel = 0; panel < panels; ++panel) {
    const long first = vectors * panel / panels, width = vectors * (panel + 1) / panels - first;
    for (long row = 0; row < rows; row += BLOCK_ROWS) {
      const long height = std::min<long>(BLOCK_ROWS, rows - row);
      choose_block(static_cast<int>((height - 1) * BLOCK_VECTORS + width - 1), sizes)(
          k, a + row * a_row, a_row, a_p, b + first * LANES, b_p, c + row * c_row + first * LANES, c_row, add);
    }
  }
}

}  // namespace karat
