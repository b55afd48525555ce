// Products of some rows with packed weights.
#pragma once

#include <vector>

#include "parallel.h"
#include "tiles.h"

namespace jaxllama {

// A packed weight [out, in].
struct Matrix {
  Format format;
  const char* blocks;
  int64_t num_blocks, lines;
  const float* scales;  // one an output of every block, or null
  int64_t out;

  // Whether rows of bfloat16 are read as they are.
  bool reads_pairs() const {
    return format == Format::kBFloat16 ? kReadsPairs<BestBFloat16Lines>
                                       : format == Format::kInt8 && kReadsPairs<BestInt8Lines>;
  }
};

// A matrix product: some blocks of one weight.
struct Task {
  Format format;
  const char* blocks;
  int64_t num_blocks, block_bytes, lines;
  const float* scales;  // one an output, or null
  const char* next;  // what is likely to be read after these blocks
  float* y;  // of the first block
  int64_t out, first_output, num_outputs;  // a row's outputs in all, and those of these blocks
};

// Appends the tasks of y = x * w, of groups of blocks that get smaller and smaller, so that threads end together.
inline void Split(const Matrix& w, float* y, int64_t rows, int64_t num_threads, std::vector<Task>* tasks) {
  const int64_t unit = BlocksAtOnce(rows);
  for (int64_t block = 0; block < w.num_blocks;) {
    const int64_t left = w.num_blocks - block;
    Task task;
    task.format = w.format;
    task.lines = w.lines;
    task.block_bytes = w.lines * kLineBytes;
    task.num_blocks = std::min(left, std::max<int64_t>(1, left / (2 * num_threads) / unit) * unit);
    task.blocks = w.blocks + block * task.block_bytes;
    task.next = task.blocks + task.num_blocks * task.block_bytes;
    task.scales = w.scales == nullptr ? nullptr : w.scales + block * kBlockLanes;
    task.y = y == nullptr ? nullptr : y + block * kBlockLanes;
    task.out = w.out;
    task.first_output = block * kBlockLanes;
    task.num_outputs = std::min(task.num_blocks * kBlockLanes, w.out - block * kBlockLanes);
    tasks->push_back(task);
    block += task.num_blocks;
  }
}

// Says of each task which is likely to be the same thread's next.
inline void Chain(std::vector<Task>* tasks, int64_t num_threads) {
  for (size_t i = 0; i + num_threads < tasks->size(); ++i) (*tasks)[i].next = (*tasks)[i + num_threads].blocks;
}

// x [rows, in] in both forms in which products read it, each row padded with zeros to `stride`.
struct Inputs {
  int64_t rows, stride;
  Aligned<float> floats;
  const BFloat16* pairs = nullptr;
  Aligned<BFloat16> padded;

  // Whole lines, and whole tiles of a matrix unit.
  static int64_t Stride(int64_t in) { return (in + 31) / 32 * 32; }
};

// So many rows stay in the second-level cache while a task reads them for every block.
int64_t RowsInCache(const Inputs& x);

// y of a task: of some rows, which begin at `task.y`, or of all.
void Run(const Task& task, const Inputs& x, int64_t first_row, int64_t rows);
inline void Run(const Task& task, const Inputs& x) { Run(task, x, 0, x.rows); }

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

}  // namespace jaxllama
