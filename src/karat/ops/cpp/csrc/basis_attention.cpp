// Attention by a basis on the CPU (SPEC letters): sums = sum_j sum_f mask psi_f(scale q.k_j + bias) u[f, j, :]; where
// asked for softmax attention over the same scores; and with a projector what follows, attended += gate sums (w^T v).
// With a projector the sums may begin with a number for each query, and without features they are no more than that.
//
// A task is one head of one image, or a range of its queries. Its scores, features and their gradients exist for
// one tile of queries and keys at a time; both passes are small matrix products (gemm.h) around the features
// (features.h). Buffers that serve as right-hand factors are padded to whole vectors. Threads own contiguous ranges
// of tasks, head by head: gradients of u, w and places are added up by one thread, and where a head falls to several
// threads, their parts are added in the order of the threads, so that two runs give the same bits.
#include "backward.h"
#include "forward.h"
#include "threads.h"

using namespace karat;

// Each of `threads` ranges of tasks is one thread's; what it computes doesn't depend on who runs it.
extern "C" void karat_forward(const Call* c) {
  const int64_t tasks = c->B * c->H * c->parts, threads = c->threads;
  in_threads(threads, [=](int64_t t) {
    (c->half ? forward_range<bf16> : forward_range<float>)(*c, tasks * t / threads, tasks * (t + 1) / threads);
  });
}

extern "C" void karat_backward(const Call* c) {
  const int64_t tasks = c->B * c->H * c->parts, threads = c->threads;
  std::vector<Unfinished> unfinished(static_cast<size_t>(2 * threads));
  in_threads(threads, [&](int64_t t) {
    (c->half ? backward_range<bf16> : backward_range<float>)(*c, tasks * t / threads, tasks * (t + 1) / threads, t,
                                                             &unfinished[2 * t]);
  });
  in_threads(threads, [&](int64_t t) {
    int64_t written = -1;
    for (Unfinished& part : unfinished) {
      if (part.group < 0) continue;
      write_group(*c, part.group, part.sums.data(), part.group == written, t, threads);
      written = part.group;
    }
    apply_factors(*c, t, threads);
  });
}

// For the tests: sines and cosines of n numbers (a multiple of 16), as the kernel computes them.
extern "C" void karat_sincos(const float* x, float* sine, float* cosine, int64_t n) {
  const Basis basis = {FOURIER, NONE, 1, 0, 0.0f};
  std::vector<float> psi(2 * LANES);
  for (int64_t at = 0; at < n; at += LANES) {
    write_features(basis, {const_cast<float*>(x) + at, LANES, psi.data(), 2 * LANES, LANES, 1, 1});
    std::memcpy(cosine + at, psi.data(), sizeof(float) * LANES);
    std::memcpy(sine + at, psi.data() + LANES, sizeof(float) * LANES);
  }
}
