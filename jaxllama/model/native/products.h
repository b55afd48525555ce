// Products of some rows with packed weights.
#pragma once

#include <vector>

#include "parallel.h"
#include "tiles.h"

namespace {

constexpr int64_t kRowsInCache = 90;  // whose inputs stay in the second-level cache

// A packed weight [out, in].
struct Matrix {
  Format format;
  const char* blocks;
  int64_t num_blocks, lines;
  const float* scales;  // one an output of every block, or null
  int64_t out;

  bool reads_pairs() const { return format == Format::kBFloat16 && JAXLLAMA_DOTS_PAIRS; }
};

// A matrix product: some blocks of one weight.
struct Task {
  Format format;
  const char* blocks;
  int64_t num_blocks, block_bytes, lines;
  const float* scales;  // one an output, or null
  float* y;  // of the first block
  int64_t out, num_outputs;  // a row's outputs in all, and of these blocks
};

// The tasks of y = x * w, about 32 of whole groups of blocks.
inline void Split(const Matrix& w, float* y, std::vector<Task>* tasks) {
  constexpr int64_t kTasks = 32;
  const int64_t step = std::max<int64_t>(1, w.num_blocks / kTasks / 4) * 4;
  for (int64_t block = 0; block < w.num_blocks; block += step) {
    Task task;
    task.format = w.format;
    task.lines = w.lines;
    task.block_bytes = w.lines * kLineBytes;
    task.num_blocks = std::min(step, w.num_blocks - block);
    task.blocks = w.blocks + block * task.block_bytes;
    task.scales = w.scales == nullptr ? nullptr : w.scales + block * kBlockLanes;
    task.y = y + block * kBlockLanes;
    task.out = w.out;
    task.num_outputs = std::min(task.num_blocks * kBlockLanes, w.out - block * kBlockLanes);
    tasks->push_back(task);
  }
}

// x [rows, in] in both forms in which products read it, padded with zeros to whole lines.
struct Inputs {
  int64_t rows, stride;
  std::vector<float> floats;
  const BFloat16* pairs = nullptr;
  std::vector<BFloat16> padded;
};

template <typename Lines, typename X>
void Product(const Task& task, const X* x, int64_t stride, int64_t rows) {
  thread_local std::vector<float> last(kRowsInCache * kBlockLanes);
  for (int64_t first = 0; first < rows; first += kRowsInCache) {
    const int64_t end = std::min(rows, first + kRowsInCache), whole = task.num_outputs / kBlockLanes;
    // Few blocks at a time: they stay in the first-level cache while rows go by.
    constexpr int64_t kAtOnce = 4;
    for (int64_t block = 0; block < task.num_blocks; block += kAtOnce) {
      const char* w = task.blocks + block * task.block_bytes;
      const int64_t count = end - first;
      float* y = task.y + first * task.out + block * kBlockLanes;
      Rows<Lines, Start::kZero>(count, x + first * stride, stride, w, task.block_bytes,
                                std::min(kAtOnce, whole - block), task.lines, y, task.out);
      if (block + kAtOnce > whole && whole < task.num_blocks) {
        Rows<Lines, Start::kZero>(count, x + first * stride, stride, task.blocks + whole * task.block_bytes,
                                  task.block_bytes, 1, task.lines, last.data(), kBlockLanes);
        for (int64_t r = 0; r < count; ++r) {
          std::memcpy(task.y + (first + r) * task.out + whole * kBlockLanes, &last[r * kBlockLanes],
                      task.num_outputs % kBlockLanes * sizeof(float));
        }
      }
      if (task.scales == nullptr) continue;
      const int64_t outputs = std::min(kAtOnce * kBlockLanes, task.num_outputs - block * kBlockLanes);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t i = 0; i < outputs; ++i) y[r * task.out + i] *= task.scales[block * kBlockLanes + i];
      }
    }
  }
}

void Run(const Task& task, const Inputs& x) {
  switch (task.format) {
    case Format::kBFloat16:
#if JAXLLAMA_DOTS_PAIRS
      if (x.pairs != nullptr) return Product<BFloat16PairLines>(task, x.pairs, x.stride, x.rows);
#endif
      return Product<BFloat16Lines>(task, x.floats.data(), x.stride, x.rows);
    case Format::kFloat32:
      return Product<FloatLines>(task, x.floats.data(), x.stride, x.rows);
    default:
      return Product<Int8Lines>(task, x.floats.data(), x.stride, x.rows);
  }
}

// x [rows, in] to `to->floats`.
template <typename X>
void Convert(Team& team, const X* x, int64_t in, Inputs* to) {
  to->floats.resize(to->rows * to->stride);
  constexpr int64_t kRows = 16;
  team.For((to->rows + kRows - 1) / kRows, [&](int64_t part) {
    for (int64_t row = part * kRows; row < std::min(to->rows, (part + 1) * kRows); ++row) {
      float* floats = &to->floats[row * to->stride];
      for (int64_t i = 0; i < in; ++i) floats[i] = ToFloat(x[row * in + i]);
      std::fill(floats + in, floats + to->stride, 0.0f);
    }
  });
}

}  // namespace
