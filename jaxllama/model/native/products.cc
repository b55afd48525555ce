// Products of some rows with packed weights: what a task does.
#include "products.h"

namespace jaxllama {
namespace {

// Whose inputs stay in the second-level cache.
constexpr int64_t kRowsInCache = 90, kPairRowsInCache = 256;

template <typename Lines, typename X>
void Product(const Task& task, const X* x, int64_t stride, int64_t first_row, int64_t rows) {
  constexpr int64_t kRows = kReadsPairs<Lines> ? kPairRowsInCache : kRowsInCache;
  thread_local std::vector<float> last(kRows * kBlockLanes);
  for (int64_t first = first_row; first < first_row + rows; first += kRows) {
    const int64_t end = std::min(first_row + rows, first + kRows), whole = task.num_outputs / kBlockLanes;
    const int64_t count = end - first;
    float* y = task.y + (first - first_row) * task.out;
    const X* from = x + first * stride;
    const int64_t num_whole = std::min(whole, task.num_blocks);
    const char* rest = task.blocks + num_whole * task.block_bytes;
    Rows<Lines, Start::kZero>(count, from, stride, task.blocks, task.block_bytes, num_whole, task.lines,
                              end < first_row + rows ? task.blocks : task.next, y, task.out);
    if (whole < task.num_blocks) {
      Rows<Lines, Start::kZero>(count, from, stride, rest, task.block_bytes, 1, task.lines, task.next, last.data(),
                                kBlockLanes);
      for (int64_t r = 0; r < count; ++r) {
        std::memcpy(y + r * task.out + whole * kBlockLanes, &last[r * kBlockLanes],
                    task.num_outputs % kBlockLanes * sizeof(float));
      }
    }
    if (task.scales == nullptr) continue;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < task.num_outputs; ++i) y[r * task.out + i] *= task.scales[i];
    }
  }
}

template <typename Best, typename Lines>
void ProductOf(const Task& task, const Inputs& x, int64_t first, int64_t rows) {
  if constexpr (kReadsPairs<Best>) {
    if (x.pairs != nullptr) return Product<Best>(task, x.pairs, x.stride, first, rows);
  }
  Product<Lines>(task, x.floats.data(), x.stride, first, rows);
}

}  // namespace

int64_t RowsInCache(const Inputs& x) { return x.pairs == nullptr ? kRowsInCache : kPairRowsInCache; }

void Run(const Task& task, const Inputs& x, int64_t first, int64_t rows) {
  switch (task.format) {
    case Format::kBFloat16:
      return ProductOf<BestBFloat16Lines, BFloat16Lines>(task, x, first, rows);
    case Format::kFloat32:
      return ProductOf<FloatLines, FloatLines>(task, x, first, rows);
    default:
      return ProductOf<BestInt8Lines, Int8Lines>(task, x, first, rows);
  }
}

}  // namespace jaxllama
