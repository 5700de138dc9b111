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

// Row length of a right-hand factor, whose panels are read down the rows: an odd number of lines of the cache, so that
// the rows spread over all of it.
inline int64_t odd_lines(int64_t n) {
  const int64_t lines = (padded(n) + 15) / 16;
  return 16 * (lines % 2 ? lines : lines + 1);
}

// A thread's memory, kept between calls unless large.
class Arena {
 public:
  float* reserve(int64_t floats) {
    if (floats <= size_) return memory_.get();
    memory_.reset();
    memory_.reset(static_cast<float*>(std::aligned_alloc(256, static_cast<size_t>(floats) * sizeof(float))));
    size_ = floats;
    return memory_.get();
  }
  void release_if_large() {
    if (size_ > (int64_t{1} << 21)) memory_.reset(), size_ = 0;
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

inline thread_local Arena arena;

// Buffers out of it: named first, then all taken at once.
class Plan {
 public:
  void add(float*& buffer, int64_t floats) {
    buffers_[count_] = &buffer, starts_[count_++] = total_;
    total_ += (floats + 63) / 64 * 64;
  }
  void take() {
    float* memory = arena.reserve(total_);
    for (int i = 0; i < count_; ++i) *buffers_[i] = memory + starts_[i];
  }

 private:
  float** buffers_[32];
  int64_t starts_[32], total_ = 0;
  int count_ = 0;
};

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

// Rows of whole vectors times a factor.
inline void scale_rows(float* x, int64_t ld, int64_t rows, int64_t columns, float factor) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; j += LANES) store(x + i * ld + j, load(x + i * ld + j) * factor);
}

// The transpose: to[column, row], squares of LANES rows and columns at a time; ld is a multiple of LANES.
template <typename From>
void pack_transposed(const From* x, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                     float factor, float* to, int64_t ld) {
  for (int64_t first = 0; first < ld; first += LANES) {
    const int64_t some = std::min<int64_t>(LANES, rows - first);
    int64_t j = 0;
    for (; column_stride == 1 && j + LANES <= columns; j += LANES) {
      vf square[LANES];
      for (int64_t i = 0; i < LANES; ++i) square[i] = i < some ? load(x + (first + i) * row_stride + j) * factor : vf{};
      transpose<LANES / 2>(square);
      for (int64_t i = 0; i < LANES; ++i) store(to + (j + i) * ld + first, square[i]);
    }
    for (; j < columns; ++j)
      for (int64_t i = first; i < std::min<int64_t>(first + LANES, ld); ++i)
        to[j * ld + i] = i < rows ? value_of(x[i * row_stride + j * column_stride]) * factor : 0.0f;
  }
}

// The matrix of image b and head h, from query or key `row` on.
template <typename T, typename Pointer>
T* place(Pointer* x, const int64_t* strides, int64_t b, int64_t h, int64_t row = 0) {
  return static_cast<T*>(x) + b * strides[0] + h * strides[1] + row * strides[2];
}

}  // namespace karat
