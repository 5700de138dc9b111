// Memory of a thread, and copies into it in the shape that the products like.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "simd.h"

namespace karat {

inline int64_t vectors_of(int64_t n) { return (n + LANES - 1) / LANES; }
inline int64_t padded(int64_t n) { return vectors_of(n) * LANES; }

// Row length of a wide buffer: rows a multiple of 4 KB apart would fall into the same lines of the cache.
inline int64_t row_length(int64_t n) { return padded(n) % 512 == 0 ? padded(n) + LANES : padded(n); }

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

inline thread_local Arena arena;

// rows x columns of x (any strides), times factor, into rows of length ld, filled up with zeros.
template <typename From, typename To>
void pack(const From* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, float factor, To* to,
          int64_t ld) {
  for (int64_t i = 0; i < rows; ++i, x += row_stride, to += ld) {
    int64_t j = 0;
    if (column_stride == 1) {
      for (; j + LANES <= columns; j += LANES) store(to + j, load(x + j) * factor);
    }
    for (; j < columns; ++j) assign(to[j], value_of(x[j * column_stride]) * factor);
    for (; j < ld; ++j) assign(to[j], 0.0f);
  }
}

// The transpose: to[column, row], squares of LANES rows and columns at a time.
template <typename From>
void pack_transposed(const From* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, float* to,
                     int64_t ld) {
  for (int64_t first = 0; first < ld; first += LANES) {
    const int64_t some = std::min<int64_t>(LANES, rows - first);
    int64_t j = 0;
    for (; column_stride == 1 && j + LANES <= columns; j += LANES) {
      vf square[LANES];
      for (int64_t i = 0; i < LANES; ++i) square[i] = i < some ? load(x + (first + i) * row_stride + j) : vf{};
      transpose<LANES / 2>(square);
      for (int64_t i = 0; i < LANES; ++i) store(to + (j + i) * ld + first, square[i]);
    }
    for (; j < columns; ++j)
      for (int64_t i = first; i < std::min<int64_t>(first + LANES, ld); ++i)
        to[j * ld + i] = i < rows ? value_of(x[i * row_stride + j * column_stride]) : 0.0f;
  }
}

// The matrix of image b and head h, from query or key `row` on.
template <typename T, typename Pointer>
T* place(Pointer* x, const int64_t* strides, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<T*>(x) + b * strides[0] + h * strides[1] + row * strides[2];
}

}  // namespace karat
