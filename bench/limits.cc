// What two of this machine's resources allow: bytes read from memory and float32 operations in a second, by all threads
// at once. Prints GB/s and GFLOP/s, each the best of seven.

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

template <typename Work>
double Seconds(int threads, const Work& work) {
  double best = 1e9;
  for (int i = 0; i < 7; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; ++t) team.emplace_back([&work, t] { work(t); });
    for (auto& one : team) one.join();
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

volatile float sink;

int main(int, char** args) {
  const int threads = std::atoi(args[1]);
  const size_t count = size_t{64} << 20;  // floats a thread, 256 MiB
  std::vector<float> memory(count * threads, 1.0f);
  const double read = Seconds(threads, [&](int t) {
    const float* from = &memory[t * count];
    __m256 sums[8] = {};
    for (size_t i = 0; i < count; i += 64) {
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) sums[j] = _mm256_add_ps(sums[j], _mm256_loadu_ps(from + i + 8 * j));
    }
    for (int j = 1; j < 8; ++j) sums[0] = _mm256_add_ps(sums[0], sums[j]);
    sink = sums[0][0];
  });
  const int64_t rounds = 10'000'000;
  const double multiplied = Seconds(threads, [&](int) {
    __m256 sums[10];
    for (int j = 0; j < 10; ++j) sums[j] = _mm256_set1_ps(1.0f + j);
    const __m256 by = _mm256_set1_ps(0.999f);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 10
      for (int j = 0; j < 10; ++j) sums[j] = _mm256_fmadd_ps(sums[j], by, by);
    }
    for (int j = 1; j < 10; ++j) sums[0] = _mm256_add_ps(sums[0], sums[j]);
    sink = sums[0][0];
  });
  std::printf("%.1f %.1f\n", 4e-9 * count * threads / read, 1e-9 * rounds * 10 * 16 * threads / multiplied);
}
