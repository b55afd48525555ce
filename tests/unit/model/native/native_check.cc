// The kernels without XLA: products and attention beside float64, and a hash of the products' bits. For instruction sets
// that only an emulator has, and for sanitizers. Prints the instruction set and the hash; aborts on a difference.

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "attention.cc"
#include "layer.h"
#include "products.cc"

#if JAXLLAMA_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace jaxllama;

namespace {

// As Eigen's is when its queue is full: who schedules work does it.
struct FullPool {
  int64_t num_threads() const { return 2; }
  template <typename Work>
  void Schedule(Work&& work) {
    work();
  }
};

FullPool pool;
Team team(pool);
std::mt19937 bits(0);

float Random() { return static_cast<float>(bits() % 2001) / 1000.0f - 1.0f; }

BFloat16 Rounded(float x) {
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  return static_cast<BFloat16>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

void Expect(double got, double want, double tolerance, const char* what) {
  if (std::abs(got - want) <= tolerance) return;
  std::printf("%s: got %g, expected %g\n", what, got, want);
  std::abort();
}

void Put(float x, float* to) { *to = x; }
void Put(float x, BFloat16* to) { *to = Rounded(x); }
void Put(float x, int8_t* to) { *to = static_cast<int8_t>(x * 127.0f); }
double Value(float x) { return x; }
double Value(BFloat16 x) { return ToFloat(x); }
double Value(int8_t x) { return x; }

// One product in tasks of a few blocks; its outputs, whose bits go to `hash` unless rows are read as bfloat16.
template <typename W>
void CheckProduct(Format format, int64_t rows, int64_t in, int64_t out, uint64_t* hash) {
  constexpr int64_t kInputs = 4 / sizeof(W);
  const int64_t blocks = (out + 15) / 16, lines = (in + kInputs - 1) / kInputs;
  std::vector<W> weight(out * in), packed(blocks * lines * 16 * kInputs);
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t i = 0; i < in; ++i) {
      Put(Random(), &weight[o * in + i]);
      packed[((o / 16 * lines + i / kInputs) * 16 + o % 16) * kInputs + i % kInputs] = weight[o * in + i];
    }
  }
  const bool reads_pairs = Matrix{format}.reads_pairs();
  std::vector<float> x(rows * in), y(rows * out), scales(blocks * 16, 0.5f);
  for (float& value : x) value = ToFloat(Rounded(Random()));
  Inputs inputs;
  inputs.rows = rows;
  inputs.stride = Inputs::Stride(in);
  Convert(team, x.data(), in, &inputs);
  inputs.padded.assign(rows * inputs.stride, 0);
  for (int64_t i = 0; i < rows * in; ++i) inputs.padded[i / in * inputs.stride + i % in] = Rounded(x[i]);
  Task task{};
  task.format = format;
  task.lines = lines;
  task.block_bytes = lines * kLineBytes;
  task.out = out;
  for (bool as_pairs : {false, true}) {
  if (as_pairs && !reads_pairs) break;
  if (as_pairs) inputs.pairs = inputs.padded.data();
  std::fill(y.begin(), y.end(), 7.0f);
  for (int64_t block = 0; block < blocks; block += 5) {
    task.num_blocks = std::min<int64_t>(5, blocks - block);
    task.num_outputs = std::min(task.num_blocks * 16, out - block * 16);
    task.blocks = reinterpret_cast<const char*>(packed.data()) + block * task.block_bytes;
    task.scales = format == Format::kInt8 ? &scales[block * 16] : nullptr;
    task.y = &y[block * 16];
    Run(task, inputs);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t o = 0; o < out; ++o) {
      double want = 0;
      for (int64_t i = 0; i < in; ++i) want += x[r * in + i] * Value(weight[o * in + i]);
      Expect(y[r * out + o], format == Format::kInt8 ? want / 2 : want, format == Format::kInt8 ? 2e-3 : 2e-5, "product");
      uint32_t word;
      std::memcpy(&word, &y[r * out + o], sizeof word);
      if (!as_pairs) *hash = (*hash ^ word) * 1099511628211ull;
    }
  }
  }
}

// A row of `length` tokens, of which the last `tokens` are queries: as a chunk, then one by one.
template <typename Lines, typename KV>
void CheckAttention(int64_t head_dim, int64_t length, int64_t tokens) {
  constexpr int64_t kHeads = 6, kKvHeads = 2, kPage = 5;
  constexpr bool kIsInt8 = std::is_same_v<KV, int8_t>;
  const int64_t width = (length + kPage - 1) / kPage, pages = width + 1;
  std::vector<KV> pool_pages(pages * kPage * 2 * kKvHeads * head_dim);
  for (KV& value : pool_pages) Put(Random(), &value);
  std::vector<float> scales(pages * kPage * 2 * kKvHeads, kIsInt8 ? 1 / 127.0f : 1.0f);
  std::vector<int32_t> table(width), positions(tokens);
  for (int64_t i = 0; i < width; ++i) table[i] = static_cast<int32_t>(width - i);
  for (int64_t i = 0; i < tokens; ++i) positions[i] = static_cast<int32_t>(length - tokens + i);
  std::vector<float> q(tokens * kHeads * head_dim), chunk(q.size()), single(q.size());
  for (float& value : q) value = 2 * Random();
  const auto run = [&](int64_t first, int64_t count, float* out) {
    const Attention<Lines, KV> attention{&q[first * kHeads * head_dim], pool_pages.data(), scales.data(), table.data(),
                                         &positions[first], out + first * kHeads * head_dim, true, count, kHeads,
                                         head_dim, kPage, kKvHeads, width};
    count == 1 ? attention.AttendOnce(team, 1) : attention.AttendChunk(team, 1);
  };
  run(0, tokens, chunk.data());
  for (int64_t i = 0; i < tokens; ++i) run(i, 1, single.data());
  const auto at = [&](int64_t position, int64_t row, int64_t d) {
    const int64_t page = table[position / kPage], slot = position % kPage;
    const int64_t index = kIsInt8 ? (page * 2 * kKvHeads + row) * kPage + slot : (page * kPage + slot) * 2 * kKvHeads + row;
    return Value(pool_pages[index * head_dim + d]) * (kIsInt8 ? 1 / 127.0f : 1.0f);
  };
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < kHeads; ++h) {
      const int64_t row = 2 * (h / (kHeads / kKvHeads)), first = (t * kHeads + h) * head_dim;
      std::vector<double> want(head_dim);
      double total = 0;
      for (int64_t k = 0; k <= positions[t]; ++k) {
        double score = 0;
        for (int64_t d = 0; d < head_dim; ++d) score += q[first + d] * at(k, row, d);
        const double p = std::exp(score / std::sqrt(static_cast<double>(head_dim)));
        total += p;
        for (int64_t d = 0; d < head_dim; ++d) want[d] += p * at(k, row + 1, d);
      }
      for (int64_t d = 0; d < head_dim; ++d) {
        Expect(chunk[first + d], want[d] / total, 1e-5, "attention");
        Expect(single[first + d], chunk[first + d], 0, "one query and a chunk");
      }
    }
  }
}

// A layer of bfloat16: a row's tokens at once, then one by one, with another row beside that takes no part.
void CheckLayer(Format cache) {
  constexpr int64_t kHidden = 20, kHeads = 4, kKvHeads = 2, kHeadDim = 6, kFfn = 37, kPage = 4, kWidth = 3, kTokens = 9;
  std::vector<std::vector<BFloat16>> weights;
  const auto matrix = [&](int64_t in, int64_t out) {
    auto& lines = weights.emplace_back((out + 15) / 16 * ((in + 1) / 2) * 32);
    for (BFloat16& value : lines) value = Rounded(Random());
    if (in % 2 != 0) {
      for (size_t i = 0; i < lines.size(); ++i) lines[i] = i % 2 == 1 && i / 32 % ((in + 1) / 2) == in / 2 ? 0 : lines[i];
    }
    return Matrix{Format::kBFloat16, reinterpret_cast<char*>(lines.data()), (out + 15) / 16, (in + 1) / 2, nullptr, out};
  };
  const std::vector<BFloat16> norm(kHidden, Rounded(1.0f));
  Layer<BFloat16> layer{};
  layer.attention_norm = layer.mlp_norm = norm.data();
  layer.q_proj = matrix(kHidden, kHeads * kHeadDim);
  layer.k_proj = matrix(kHidden, kKvHeads * kHeadDim);
  layer.v_proj = matrix(kHidden, kKvHeads * kHeadDim);
  layer.o_proj = matrix(kHeads * kHeadDim, kHidden);
  layer.gate_proj = matrix(kHidden, kFfn);
  layer.up_proj = matrix(kHidden, kFfn);
  layer.down_proj = matrix(kFfn, kHidden);
  layer.epsilon = 1e-5f;
  layer.hidden = kHidden, layer.heads = kHeads, layer.kv_heads = kKvHeads, layer.head_dim = kHeadDim;
  layer.half = kHeadDim / 2, layer.ffn = kFfn, layer.page_size = kPage, layer.width = kWidth, layer.format = cache;
  std::vector<float> x(2 * kTokens * kHidden), cos(2 * kTokens * 3), sin(cos.size()), whole(x.size()), one(2 * kHidden);
  for (auto* values : {&x, &cos, &sin}) {
    for (float& value : *values) value = Random();
  }
  const int32_t tables[] = {1, 2, 3, 4, 5, 6};
  LayerScratch scratch;
  std::vector<float> pages[2], scales[2];
  for (int i = 0; i < 2; ++i) {
    pages[i].assign(7 * kPage * 2 * kKvHeads * kHeadDim, 0.0f);
    scales[i].assign(7 * kPage * 2 * kKvHeads, 0.0f);
  }
  const auto run = [&](int64_t tokens, const float* from, const float* c, const float* s, const int32_t* positions,
                       std::vector<int32_t> written, int cache_id, float* out) {
    layer.x = from, layer.cos = c, layer.sin = s, layer.positions = positions, layer.written = written.data();
    layer.tables = tables, layer.pages = pages[cache_id].data(), layer.scales = scales[cache_id].data();
    layer.rows = written.size(), layer.tokens = tokens, layer.out = out;
    if (!layer.Run(team, scratch).empty()) std::abort();
  };
  std::vector<int32_t> positions(2 * kTokens);
  for (int64_t i = 0; i < 2 * kTokens; ++i) positions[i] = static_cast<int32_t>(i % kTokens);
  run(kTokens, x.data(), cos.data(), sin.data(), positions.data(), {kTokens, 0}, 0, whole.data());
  for (int64_t t = 0; t < kTokens; ++t) {
    const int32_t now[] = {static_cast<int32_t>(t), 0};
    std::vector<float> rows(2 * kHidden), c(6), s(6);
    std::copy_n(&x[t * kHidden], kHidden, rows.data());
    std::copy_n(&cos[t * 3], 3, c.data());
    std::copy_n(&sin[t * 3], 3, s.data());
    run(1, rows.data(), c.data(), s.data(), now, {1, 0}, 1, one.data());
    for (int64_t d = 0; d < kHidden; ++d) {
      Expect(one[d], whole[t * kHidden + d], 0, "one token and a chunk of a layer");
      Expect(one[kHidden + d], 0, 0, "a row that takes no part");
    }
  }
  const auto differ = [](const std::vector<float>* of) {
    return std::memcmp(of[0].data(), of[1].data(), of[0].size() * sizeof(float)) != 0;
  };
  if (differ(pages) || differ(scales)) std::abort();
}

}  // namespace

int main() {
#if JAXLLAMA_AMX
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 1;
#endif
  uint64_t hash = 14695981039346656037ull;
  for (int64_t rows : {1, 2, 3, 4, 5, 6, 7, 95}) {
    for (const auto& [in, out] : {std::pair<int64_t, int64_t>{96, 160}, {33, 101}, {300, 37}, {1, 1}}) {
      CheckProduct<float>(Format::kFloat32, rows, in, out, &hash);
      CheckProduct<BFloat16>(Format::kBFloat16, rows, in, out, &hash);
      CheckProduct<int8_t>(Format::kInt8, rows, in, out, &hash);
    }
  }
  for (int64_t head_dim : {64, 6, 34}) {
    for (const auto& [length, tokens] : {std::pair<int64_t, int64_t>{1, 1}, {131, 9}, {600, 20}}) {
      CheckAttention<FloatLines, float>(head_dim, length, tokens);
      CheckAttention<BFloat16Lines, BFloat16>(head_dim, length, tokens);
      CheckAttention<BFloat16Lines, int8_t>(head_dim, length, tokens);
    }
  }
  for (Format cache : {Format::kBFloat16, Format::kFloat32, Format::kInt8}) CheckLayer(cache);
  std::printf("%s %016llx\n", kInstructionSet, static_cast<unsigned long long>(hash));
}
