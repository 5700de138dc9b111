// Threads: OpenMP's where the compiler has it, else threads started for the call.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace karat {

// run(0) to run(threads - 1), at once.
template <typename Run>
void in_threads(int64_t threads, const Run& run) {
#ifdef _OPENMP
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
  for (int64_t t = 0; t < threads; ++t) run(t);
#else
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back([&run, t] { run(t); });
  run(0);
  for (std::thread& other : others) other.join();
#endif
}

}  // namespace karat
