// Matrix products and paged attention for CPUs, called by XLA through its foreign function interface.
//
// Sums are float32 and taken in one order, element by element, whatever the number of rows or queries, so that a
// token's bits do not depend on what is computed beside it. Compiled once for each instruction set (`simd.h`).

#include <cstdint>
#include <string>
#include <vector>

#include "attention.h"
#include "layer.h"
#include "parallel.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using namespace jaxllama;

Format FormatOf(ffi::DataType type) {
  return type == ffi::BF16 ? Format::kBFloat16 : type == ffi::F32 ? Format::kFloat32 : Format::kInt8;
}

// A packed weight [out / 16, in / n, 16, n] of `out` outputs: n is 1 for float32, 2 for bfloat16, and 4 for int8, whose
// scales [out], a multiple of 16, follow. `next` is its place among `args`, and then that of what comes after it.
ffi::ErrorOr<Matrix> ReadMatrix(const ffi::RemainingArgs& args, int64_t out, size_t* next) {
  const auto weight = args.get<ffi::AnyBuffer>((*next)++);
  if (!weight.has_value()) return ffi::Unexpected(weight.error());
  const auto shape = weight->dimensions();
  Matrix matrix{FormatOf(weight->element_type()), static_cast<const char*>(weight->untyped_data()), shape[0], shape[1],
                nullptr, out};
  if (matrix.format == Format::kInt8) {
    const auto scales = args.get<ffi::Buffer<ffi::F32>>((*next)++);
    if (!scales.has_value()) return ffi::Unexpected(scales.error());
    matrix.scales = scales->typed_data();
  }
  return matrix;
}

// x [..., in], bfloat16 or float32, with weights to as many y [..., out] of float32. If there is one more argument, only
// so many rows, the first, are multiplied, and the others' results are zeros.
ffi::Error Multiply(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs weights, ffi::RemainingRets ys,
                    int64_t num_callers) {
  const int64_t in = x.dimensions().back(), all_rows = x.element_count() / in;
  std::vector<std::pair<Matrix, float*>> products;
  const bool is_bfloat16 = x.element_type() == ffi::BF16;
  bool needs_floats = false, needs_pairs = false;
  size_t next = 0;
  for (size_t i = 0; i < ys.size(); ++i) {
    const auto y = ys.get<ffi::Buffer<ffi::F32>>(i);
    if (!y.has_value()) return y.error();
    const auto weight = ReadMatrix(weights, (*y)->dimensions().back(), &next);
    if (!weight.has_value()) return weight.error();
    (is_bfloat16 && weight->reads_pairs() ? needs_pairs : needs_floats) = true;
    products.emplace_back(*weight, (*y)->typed_data());
  }
  Inputs inputs;
  inputs.rows = all_rows;
  if (next < weights.size()) {
    const auto count = weights.get<ffi::Buffer<ffi::S32>>(next);
    if (!count.has_value()) return count.error();
    inputs.rows = std::clamp<int64_t>(count->typed_data()[0], 0, all_rows);
    for (const auto& [weight, y] : products) std::fill(y + inputs.rows * weight.out, y + all_rows * weight.out, 0.0f);
    if (inputs.rows == 0) return ffi::Error::Success();
  }
  inputs.stride = Inputs::Stride(in);
  if (needs_pairs) {
    inputs.pairs = static_cast<const BFloat16*>(x.untyped_data());
    if (inputs.stride != in) {
      inputs.padded.assign(inputs.rows * inputs.stride, 0);
      for (int64_t row = 0; row < inputs.rows; ++row) {
        std::memcpy(&inputs.padded[row * inputs.stride], inputs.pairs + row * in, in * sizeof(BFloat16));
      }
      inputs.pairs = inputs.padded.data();
    }
  }
  Team team(pool, num_callers);
  if (needs_floats && is_bfloat16) {
    Convert(team, static_cast<const BFloat16*>(x.untyped_data()), in, &inputs);
  } else if (needs_floats) {
    Convert(team, static_cast<const float*>(x.untyped_data()), in, &inputs);
  }
  std::vector<Task> tasks;
  for (const auto& [weight, y] : products) Split(weight, y, inputs.rows, team.num_threads(), &tasks);
  Chain(&tasks, team.num_threads());
  team.For(tasks.size(), [&](int64_t i) { Run(tasks[i], inputs); });
  return ffi::Error::Success();
}

// q [rows, tokens, heads, head_dim] to out like q, with a cache, its page table and positions as in `AttentionCall`. Each
// query attends to its row's keys at positions up to its own, the last `window` of them (0: all), in blocks of 128 with
// an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867); segments of blocks are added up one after another (Dao et al. 2023,
// "Flash-Decoding"). What a query does not see leaves its sums as they are.
ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer pages, ffi::Buffer<ffi::S32> page_table,
                  ffi::Buffer<ffi::S32> positions, ffi::RemainingArgs scales, ffi::Result<ffi::AnyBuffer> out,
                  int64_t window, int64_t num_callers) {
  const auto shape = q.dimensions(), pages_shape = pages.dimensions();
  const bool is_int8 = pages.element_type() == ffi::S8;
  AttentionCall call{q.untyped_data(), FormatOf(pages.element_type()), pages.untyped_data(), nullptr,
                     page_table.typed_data(), positions.typed_data(), out->untyped_data(),
                     q.element_type() == ffi::F32, shape[0], shape[1], shape[2], shape[3],
                     pages_shape[is_int8 ? 2 : 1], pages_shape[is_int8 ? 1 : 2] / 2, page_table.dimensions()[1],
                     window};
  if (scales.size() > 0) {
    const auto buffer = scales.get<ffi::Buffer<ffi::F32>>(0);
    if (!buffer.has_value()) return buffer.error();
    call.scales = buffer->typed_data();
  }
  if (const std::string complaint = call.Complaint(); !complaint.empty()) return ffi::Error::InvalidArgument(complaint);
  Team team(pool, num_callers);
  call.Run(team);
  return ffi::Error::Success();
}

// A `Layer`: its cache is the same memory as result and argument. `rest` are pages, of int8 their scales, the norms
// before attention and before the feed-forward block, and the weights of q, k, v, o, gate, up and down.
template <typename Entry>
ffi::Error RunLayer(ffi::ThreadPool& pool, ffi::Buffer<ffi::F32>& x, ffi::Buffer<ffi::S32>& page_table,
                    ffi::Buffer<ffi::S32>& first_page, ffi::Buffer<ffi::S32>& positions,
                    ffi::Buffer<ffi::S32>& written, ffi::Buffer<ffi::F32>& cos, ffi::Buffer<ffi::F32>& sin, ffi::RemainingArgs& rest, ffi::Result<ffi::Buffer<ffi::F32>>& out,
                    ffi::RemainingRets& cache, int64_t heads, int64_t ffn, int64_t window, float epsilon) {
  static ScratchShelf& shelf = *new ScratchShelf;
  size_t next = 0;
  const auto pages = rest.get<ffi::AnyBuffer>(next++);
  const auto result = cache.get<ffi::AnyBuffer>(0);
  if (!pages.has_value()) return pages.error();
  if (!result.has_value()) return result.error();
  if ((*result)->untyped_data() != pages->untyped_data()) return ffi::Error::Internal("the cache was copied");
  const bool is_int8 = pages->element_type() == ffi::S8;
  const auto shape = x.dimensions(), pages_shape = pages->dimensions();
  Layer<Entry> layer{};
  layer.format = FormatOf(pages->element_type());
  layer.pages = pages->untyped_data();
  if (is_int8) {
    const auto scales = rest.get<ffi::Buffer<ffi::F32>>(next++);
    const auto new_scales = cache.get<ffi::Buffer<ffi::F32>>(1);
    if (!scales.has_value()) return scales.error();
    if (!new_scales.has_value()) return new_scales.error();
    layer.scales = scales->typed_data();
    if ((*new_scales)->typed_data() != layer.scales) return ffi::Error::Internal("the cache's scales were copied");
  }
  layer.x = x.typed_data();
  layer.tables = page_table.typed_data();
  layer.first_page = first_page.typed_data()[0];
  layer.positions = positions.typed_data();
  layer.written = written.typed_data();
  layer.cos = cos.typed_data();
  layer.sin = sin.typed_data();
  layer.out = out->typed_data();
  layer.epsilon = epsilon;
  layer.rows = shape[0];
  layer.tokens = shape[1];
  layer.hidden = shape[2];
  layer.heads = heads;
  layer.ffn = ffn;
  layer.half = cos.dimensions().back();
  layer.head_dim = pages_shape[3];
  layer.page_size = pages_shape[is_int8 ? 2 : 1];
  layer.kv_heads = pages_shape[is_int8 ? 1 : 2] / 2;
  layer.width = page_table.dimensions()[1];
  layer.window = window;
  for (const Entry** norm : {&layer.attention_norm, &layer.mlp_norm}) {
    const auto buffer = rest.get<ffi::AnyBuffer>(next++);
    if (!buffer.has_value()) return buffer.error();
    *norm = static_cast<const Entry*>(buffer->untyped_data());
  }
  const int64_t of_heads = heads * layer.head_dim, of_kv = layer.kv_heads * layer.head_dim;
  const std::pair<Matrix*, int64_t> weights[] = {{&layer.q_proj, of_heads}, {&layer.k_proj, of_kv},
                                                 {&layer.v_proj, of_kv},    {&layer.o_proj, layer.hidden},
                                                 {&layer.gate_proj, ffn},   {&layer.up_proj, ffn},
                                                 {&layer.down_proj, layer.hidden}};
  for (const auto& [weight, outputs] : weights) {
    const auto matrix = ReadMatrix(rest, outputs, &next);
    if (!matrix.has_value()) return matrix.error();
    *weight = *matrix;
  }
  auto scratch = shelf.Take();
  Team team(pool);
  const std::string complaint = layer.Run(team, *scratch);
  shelf.PutBack(std::move(scratch));
  return complaint.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(complaint);
}

ffi::Error LayerOf(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> page_table,
                   ffi::Buffer<ffi::S32> first_page, ffi::Buffer<ffi::S32> positions, ffi::Buffer<ffi::S32> written,
                   ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin, ffi::RemainingArgs rest, ffi::Result<ffi::Buffer<ffi::F32>> out,
                   ffi::RemainingRets cache, int64_t heads, int64_t ffn, int64_t window, bool is_float,
                   float epsilon) {
  return (is_float ? RunLayer<float> : RunLayer<BFloat16>)(pool, x, page_table, first_page, positions, written, cos, sin,
                                                           rest, out, cache, heads, ffn, window, epsilon);
}

}  // namespace

#pragma GCC visibility push(default)

extern "C" const char* jaxllama_instruction_set() { return jaxllama::kInstructionSet; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_multiply, Multiply,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("num_callers"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("num_callers"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_layer, LayerOf,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .RemainingRets()
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("ffn")
                                  .Attr<int64_t>("window")
                                  .Attr<bool>("is_float")
                                  .Attr<float>("epsilon"));

#pragma GCC visibility pop
