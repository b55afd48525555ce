// Products of some rows with packed weights: what a task does.
#include "products.h"

namespace jaxllama {
namespace {

constexpr int64_t kRowsInCache = 90;  // whose inputs stay in the second-level cache

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

}  // namespace

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

}  // namespace jaxllama
