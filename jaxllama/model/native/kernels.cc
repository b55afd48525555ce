// Matrix products and paged attention for CPUs, called by XLA through its foreign function interface.
//
// Sums are float32 and taken in one order, element by element, whatever the number of rows or queries, so that a
// token's bits do not depend on what is computed beside it. Compiled once for each instruction set (`simd.h`).

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "parallel.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// x [..., in], bfloat16 or float32, with weights [out / 16, in / n, 16, n] to as many y [..., out] of float32: n is 1
// for float32, 2 for bfloat16, and 4 for int8, whose scales [out], a multiple of 16, follow.
ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs weights, ffi::RemainingRets ys) {
  constexpr int64_t kTasks = 32;  // a weight, about
  const int64_t in = x.dimensions().back();
  std::vector<Task> tasks;
  bool needs_floats = false;
  size_t next = 0;
  for (size_t i = 0; i < ys.size(); ++i) {
    const auto y = ys.get<ffi::Buffer<ffi::F32>>(i);
    const auto weight = weights.get<ffi::AnyBuffer>(next++);
    if (!weight.has_value()) return weight.error();
    if (!y.has_value()) return y.error();
    Task task{};
    const ffi::DataType type = weight->element_type();
    task.format = type == ffi::BF16 ? Format::kBFloat16 : type == ffi::F32 ? Format::kFloat32 : Format::kInt8;
    if (task.format == Format::kInt8) {
      const auto scales = weights.get<ffi::Buffer<ffi::F32>>(next++);
      if (!scales.has_value()) return scales.error();
      task.scales = scales->typed_data();
    }
    needs_floats |= task.format != Format::kBFloat16 || !JAXLLAMA_DOTS_PAIRS || x.element_type() != ffi::BF16;
    const auto shape = weight->dimensions();
    task.lines = shape[1];
    task.block_bytes = task.lines * kLineBytes;
    task.out = (*y)->dimensions().back();
    const int64_t step = std::max<int64_t>(1, shape[0] / kTasks / 4) * 4;
    for (int64_t block = 0; block < shape[0]; block += step) {
      task.num_blocks = std::min(step, shape[0] - block);
      task.blocks = static_cast<const char*>(weight->untyped_data()) + block * task.block_bytes;
      task.y = (*y)->typed_data() + block * kBlockLanes;
      task.num_outputs = std::min(task.num_blocks * kBlockLanes, task.out - block * kBlockLanes);
      tasks.push_back(task);
      if (task.scales != nullptr) task.scales += task.num_blocks * kBlockLanes;
    }
  }
  Inputs inputs;
  inputs.rows = x.element_count() / in;
  inputs.stride = (in + 3) / 4 * 4;
  if (x.element_type() == ffi::BF16 && JAXLLAMA_DOTS_PAIRS) {
    inputs.pairs = static_cast<const BFloat16*>(x.untyped_data());
    if (inputs.stride != in) {
      inputs.padded.assign(inputs.rows * inputs.stride, 0);
      for (int64_t row = 0; row < inputs.rows; ++row) {
        std::memcpy(&inputs.padded[row * inputs.stride], inputs.pairs + row * in, in * sizeof(BFloat16));
      }
      inputs.pairs = inputs.padded.data();
    }
  }
  if (needs_floats && x.element_type() == ffi::BF16) {
    Convert(pool, static_cast<const BFloat16*>(x.untyped_data()), in, &inputs);
  } else if (needs_floats) {
    Convert(pool, static_cast<const float*>(x.untyped_data()), in, &inputs);
  }
  ParallelFor(pool, tasks.size(), [&](int64_t i) { Run(tasks[i], inputs); });
  return ffi::Error::Success();
}

// q [rows, tokens, heads, head_dim], pages [pages, page_size, 2 * kv_heads, head_dim], of int8 [pages, 2 * kv_heads,
// page_size, head_dim] with scales [pages, 2 * kv_heads, page_size], page_table [rows, width] and positions [rows,
// tokens] (0 or more, not falling in a row) to out like q. Each query attends to its row's keys at positions up to its
// own, in blocks of 128 with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867); segments of blocks are
// added up one after another (Dao et al. 2023, "Flash-Decoding"). What a query does not see leaves its sums as they
// are.
template <typename Lines, typename KV>
ffi::Error AttendWith(ffi::ThreadPool& pool, ffi::AnyBuffer q, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> page_table,
                      ffi::Buffer<ffi::S32> positions, const float* scales, ffi::AnyBuffer out) {
  constexpr bool kIsInt8 = std::is_same_v<KV, int8_t>;
  const auto shape = q.dimensions(), pages_shape = pages.dimensions();
  const Attention<Lines, KV> attention{q.untyped_data(),
                                       static_cast<const KV*>(pages.untyped_data()),
                                       scales,
                                       page_table.typed_data(),
                                       positions.typed_data(),
                                       out.untyped_data(),
                                       q.element_type() == ffi::F32,
                                       shape[1],
                                       shape[2],
                                       shape[3],
                                       pages_shape[kIsInt8 ? 2 : 1],
                                       pages_shape[kIsInt8 ? 1 : 2] / 2,
                                       page_table.dimensions()[1]};
  if (const int64_t row = attention.FirstRowWithoutPages(shape[0]); row >= 0) {
    return ffi::Error::InvalidArgument("row " + std::to_string(row) + " has a query at position " +
                                       std::to_string(attention.positions[(row + 1) * attention.tokens - 1]) +
                                       ", and pages for " + std::to_string(attention.width * attention.page_size) +
                                       " tokens");
  }
  if (attention.tokens == 1) {
    attention.AttendOnce(pool, shape[0]);
  } else {
    attention.AttendChunk(pool, shape[0]);
  }
  return ffi::Error::Success();
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> page_table,
                  ffi::Buffer<ffi::S32> positions, ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> out) {
  const float* scale = nullptr;
  if (scales.size() > 0) {
    const auto buffer = scales.get<ffi::Buffer<ffi::F32>>(0);
    if (!buffer.has_value()) return buffer.error();
    scale = buffer->typed_data();
  }
  const auto run = [&](auto attend) { return attend(pool, q, pages, page_table, positions, scale, *out); };
  const bool is_float = q.element_type() == ffi::F32;
  switch (pages.element_type()) {
    case ffi::BF16:
      return run(is_float ? AttendWith<BFloat16Lines, BFloat16> : AttendWith<BestBFloat16Lines, BFloat16>);
    case ffi::F32:
      return run(AttendWith<FloatLines, float>);
    default:
      return run(is_float ? AttendWith<BFloat16Lines, int8_t> : AttendWith<BestBFloat16Lines, int8_t>);
  }
}

}  // namespace

extern "C" const char* jaxllama_instruction_set() { return kInstructionSet; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_multiply, Multiply,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().RemainingArgs()
                                  .RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>());
