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
    const int64_t count = end - first;
    float* y = task.y + first * task.out;
    const X* from = x + first * stride;
    const int64_t num_whole = std::min(whole, task.num_blocks);
    const char* rest = task.blocks + num_whole * task.block_bytes;
    Rows<Lines, Start::kZero>(count, from, stride, task.blocks, task.block_bytes, num_whole, task.lines,
                              end < rows ? task.blocks : task.next, y, task.out);
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
