// A whole Transformer layer: norms, products, rotation, the cache, attention and the feed-forward block. One call takes
// the place of some twenty small operations of XLA, which cost a step of one row as much as a fifth of its products,
// and seconds of compilation.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "products.h"

namespace jaxllama {

template <typename T>
inline T Rounded(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return x;
  } else {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return static_cast<T>(RoundToBFloat16(bits) >> 16);
  }
}

// What a layer writes between its steps. Kept for the next call: memory that is new costs a fault for every page.
struct LayerScratch {
  Aligned<float> x, q, k, v, y;
  Aligned<char> queries, attended;
  Inputs normed, of_o, of_down;
  std::vector<int32_t> tables, positions;
};

class ScratchShelf {
 public:
  std::unique_ptr<LayerScratch> Take() {
    std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<LayerScratch>();
    auto scratch = std::move(free_.back());
    free_.pop_back();
    return scratch;
  }
  void PutBack(std::unique_ptr<LayerScratch> scratch) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(scratch));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<LayerScratch>> free_;
};

// What enters a product is rounded to `Entry`. Of each row of x [rows, tokens, hidden] the first `written` tokens are
// computed, and their keys and values written to the cache; the others' results are zeros.
template <typename Entry>
struct Layer {
  static constexpr bool kIsFloat = std::is_same_v<Entry, float>;
  static constexpr int64_t kRowsAtOnce = 8;  // of what is done row by row

  const float* x;
  const int32_t *tables, *positions, *written;
  int32_t first_page;  // of this layer; tables hold the first layer's pages
  const float *cos, *sin;  // [rows, tokens, half]
  Format format;           // of the cache
  void* pages;
  float* scales;
  const Entry *attention_norm, *mlp_norm;
  Matrix q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj;
  float epsilon;
  float* out;
  int64_t rows, tokens, hidden, heads, kv_heads, head_dim, half, ffn, page_size, width;
  int64_t window;  // as `AttentionCall`'s

  // Returns what is wrong, or nothing.
  std::string Run(Team& team, LayerScratch& scratch) const {
    std::vector<int64_t> chosen;
    int64_t most = 0;
    for (int64_t row = 0; row < rows; ++row) {
      if (written[row] <= 0) continue;
      chosen.push_back(row);
      most = std::max<int64_t>(most, std::min<int64_t>(written[row], tokens));
    }
    const int64_t num_rows = chosen.size(), n = num_rows * most;
    if (n < rows * tokens) std::fill(out, out + rows * tokens * hidden, 0.0f);
    if (n == 0) return "";
    const auto source = [&](int64_t i) { return chosen[i / most] * tokens + i % most; };
    scratch.tables.resize(num_rows * width);
    scratch.positions.resize(n);
    for (int64_t i = 0; i < num_rows; ++i) {
      const int32_t* table = tables + chosen[i] * width;
      std::transform(table, table + width, &scratch.tables[i * width], [&](int32_t page) { return first_page + page; });
    }
    for (int64_t i = 0; i < n; ++i) scratch.positions[i] = positions[source(i)];
    scratch.queries.resize(n * heads * head_dim * sizeof(Entry));
    scratch.attended.resize(scratch.queries.size());
    const AttentionCall attention{scratch.queries.data(), format, pages, scales, scratch.tables.data(),
                                  scratch.positions.data(), scratch.attended.data(), kIsFloat, num_rows, most, heads,
                                  head_dim, page_size, kv_heads, width, window};
    if (const std::string complaint = attention.Complaint(); !complaint.empty()) return complaint;

    Resize(&scratch.normed, n, hidden, q_proj);
    Resize(&scratch.of_o, n, heads * head_dim, o_proj);
    Resize(&scratch.of_down, n, ffn, down_proj);
    scratch.x.resize(n * hidden);
    scratch.y.resize(n * hidden);
    scratch.q.resize(n * heads * head_dim);
    scratch.k.resize(n * kv_heads * head_dim);
    scratch.v.resize(n * kv_heads * head_dim);

    ByRows(team, n, [&](int64_t i) {
      std::copy_n(x + source(i) * hidden, hidden, &scratch.x[i * hidden]);
      Norm(&scratch.x[i * hidden], attention_norm, i, &scratch.normed);
    });
    std::vector<Task> tasks;
    Split(q_proj, scratch.q.data(), n, team.num_threads(), &tasks);
    Split(k_proj, scratch.k.data(), n, team.num_threads(), &tasks);
    Split(v_proj, scratch.v.data(), n, team.num_threads(), &tasks);
    Chain(&tasks, team.num_threads());
    team.For(tasks.size(), [&](int64_t i) { jaxllama::Run(tasks[i], scratch.normed); });
    ByRows(team, n, [&](int64_t i) {
      const float *c = cos + source(i) * half, *s = sin + source(i) * half;
      Rotate(&scratch.q[i * heads * head_dim], heads, c, s);
      Rotate(&scratch.k[i * kv_heads * head_dim], kv_heads, c, s);
      auto* queries = reinterpret_cast<Entry*>(scratch.queries.data()) + i * heads * head_dim;
      for (int64_t d = 0; d < heads * head_dim; ++d) queries[d] = Rounded<Entry>(scratch.q[i * heads * head_dim + d]);
      if (i % most < written[chosen[i / most]]) Write(scratch, i, i / most);
    });
    attention.Run(team);
    ByRows(team, n, [&](int64_t i) {
      const auto* attended = reinterpret_cast<const Entry*>(scratch.attended.data()) + i * heads * head_dim;
      Enter(heads * head_dim, i, &scratch.of_o, [&](int64_t d) { return attended[d]; });
    });
    Product(team, o_proj, scratch.of_o, scratch.y.data(), &tasks);
    ByRows(team, n, [&](int64_t i) {
      float* row = &scratch.x[i * hidden];
      for (int64_t d = 0; d < hidden; ++d) row[d] += scratch.y[i * hidden + d];
      Norm(row, mlp_norm, i, &scratch.normed);
    });
    FeedForward(team, n, scratch, &tasks);
    Product(team, down_proj, scratch.of_down, scratch.y.data(), &tasks);
    ByRows(team, n, [&](int64_t i) {
      float* row = out + source(i) * hidden;
      for (int64_t d = 0; d < hidden; ++d) row[d] = scratch.x[i * hidden + d] + scratch.y[i * hidden + d];
    });
    return "";
  }

 private:
  template <typename Body>
  static void ByRows(Team& team, int64_t n, const Body& body) {
    team.For((n + kRowsAtOnce - 1) / kRowsAtOnce, [&](int64_t part) {
      for (int64_t i = part * kRowsAtOnce; i < std::min(n, (part + 1) * kRowsAtOnce); ++i) body(i);
    });
  }

  static bool ReadsPairs(const Matrix& w) { return !kIsFloat && w.reads_pairs(); }

  static void Resize(Inputs* inputs, int64_t n, int64_t in, const Matrix& reader) {
    inputs->rows = n;
    inputs->stride = Inputs::Stride(in);
    inputs->pairs = nullptr;
    if (ReadsPairs(reader)) {
      inputs->padded.resize(n * inputs->stride);
      inputs->pairs = inputs->padded.data();
    } else {
      inputs->floats.resize(n * inputs->stride);
    }
  }

  // Row i of what a product takes in: `get` of each of `in` places, rounded already.
  template <typename Get>
  static void Enter(int64_t in, int64_t i, Inputs* inputs, const Get& get) {
    if (inputs->pairs != nullptr) {
      if constexpr (!kIsFloat) {
        BFloat16* row = &inputs->padded[i * inputs->stride];
        for (int64_t d = 0; d < in; ++d) row[d] = get(d);
        std::fill(row + in, row + inputs->stride, 0);
      }
      return;
    }
    float* row = &inputs->floats[i * inputs->stride];
    for (int64_t d = 0; d < in; ++d) row[d] = ToFloat(get(d));
    std::fill(row + in, row + inputs->stride, 0.0f);
  }

  // The root-mean-square norm (Zhang and Sennrich 2019, arXiv:1910.07467); squares are added up in 16 sums.
  void Norm(const float* row, const Entry* weight, int64_t i, Inputs* to) const {
    float sums[kBlockLanes] = {};
    int64_t d = 0;
    for (; d + kBlockLanes <= hidden; d += kBlockLanes) {
      for (int lane = 0; lane < kBlockLanes; ++lane) sums[lane] += row[d + lane] * row[d + lane];
    }
    for (int lane = 0; d < hidden; ++d, ++lane) sums[lane] += row[d] * row[d];
    for (int left = kBlockLanes / 2; left > 0; left /= 2) {
      for (int lane = 0; lane < left; ++lane) sums[lane] += sums[lane + left];
    }
    const float scale = 1.0f / std::sqrt(sums[0] / static_cast<float>(hidden) + epsilon);
    Enter(hidden, i, to, [&](int64_t at) { return Rounded<Entry>(row[at] * scale * ToFloat(weight[at])); });
  }

  // Su et al. 2021, arXiv:2104.09864, in the half-split order; dimensions past those with angles stay as they are.
  void Rotate(float* row, int64_t num_heads, const float* c, const float* s) const {
    for (int64_t head = 0; head < num_heads; ++head, row += head_dim) {
      for (int64_t d = 0; d < half; ++d) {
        const float first = row[d], second = row[d + half];
        row[d] = first * c[d] - second * s[d];
        row[d + half] = second * c[d] + first * s[d];
      }
    }
  }

  // Token i, of the row with table `row`, to the cache.
  void Write(const LayerScratch& scratch, int64_t i, int64_t row) const {
    const int64_t position = scratch.positions[i], slot = position % page_size;
    const int64_t page = scratch.tables[row * width + position / page_size];
    for (int64_t head = 0; head < 2 * kv_heads; ++head) {
      const auto& of = head % 2 == 0 ? scratch.k : scratch.v;
      const float* from = &of[(i * kv_heads + head / 2) * head_dim];
      const int64_t token = (page * page_size + slot) * 2 * kv_heads + head;
      const int64_t token_of_head = (page * 2 * kv_heads + head) * page_size + slot;
      if (format == Format::kBFloat16) {
        auto* to = static_cast<BFloat16*>(pages) + token * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) to[d] = Rounded<BFloat16>(from[d]);
      } else if (format == Format::kFloat32) {
        auto* to = static_cast<float*>(pages) + token * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) to[d] = ToFloat(Rounded<Entry>(from[d]));
      } else {
        auto* to = static_cast<int8_t*>(pages) + token_of_head * head_dim;
        scales[token_of_head] = Quantize(from, to);
      }
    }
  }

  // As `quantize_rows` in int8.py; returns the scale.
  float Quantize(const float* from, int8_t* to) const {
    float largest = 0.0f;
    bool is_finite = true;
    for (int64_t d = 0; d < head_dim; ++d) {
      const float magnitude = std::fabs(ToFloat(Rounded<Entry>(from[d])));
      is_finite &= std::isfinite(magnitude);
      largest = std::max(largest, magnitude);
    }
    if (!is_finite) {
      std::fill(to, to + head_dim, 0);
      return NAN;
    }
    const float per_step = 127.0f / (largest > 1e-30f ? largest : 1.0f);
    for (int64_t d = 0; d < head_dim; ++d) {
      const float step = std::nearbyint(ToFloat(Rounded<Entry>(from[d])) * per_step);
      to[d] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, step)));
    }
    return largest * (1.0f / 127.0f);
  }

  static void Product(Team& team, const Matrix& w, const Inputs& inputs, float* y, std::vector<Task>* tasks) {
    tasks->clear();
    Split(w, y, inputs.rows, team.num_threads(), tasks);
    Chain(tasks, team.num_threads());
    team.For(tasks->size(), [&](int64_t i) { jaxllama::Run((*tasks)[i], inputs); });
  }

  // silu(gate) * up to what down_proj takes in; a task has the same outputs of both.
  void FeedForward(Team& team, int64_t n, LayerScratch& scratch, std::vector<Task>* tasks) const {
    tasks->clear();
    Split(gate_proj, nullptr, n, team.num_threads(), tasks);
    const int64_t count = tasks->size();
    Split(up_proj, nullptr, n, team.num_threads(), tasks);
    for (int64_t i = 0; i < count; ++i) {
      (*tasks)[i].next = (*tasks)[count + i].blocks;
      (*tasks)[count + i].next = (*tasks)[std::min(count - 1, i + team.num_threads())].blocks;
    }
    Inputs& to = scratch.of_down;
    team.For(count, [&](int64_t i) {
      // The results of some rows at a time are taken while they are in a near cache.
      thread_local Aligned<float> gates, ups;
      Task gate = (*tasks)[i], up = (*tasks)[count + i];
      const int64_t first = gate.first_output, end = first + gate.num_outputs;
      const int64_t step = std::min(n, RowsInCache(scratch.normed));
      gate.out = up.out = gate.num_blocks * kBlockLanes;
      gates.resize(step * gate.out);
      ups.resize(step * gate.out);
      gate.y = gates.data();
      up.y = ups.data();
      // The last also writes the zeros after the outputs.
      const int64_t padded_end = end == ffn ? to.stride : end;
      for (int64_t row = 0; row < n; row += step) {
        const int64_t rows_now = std::min(step, n - row);
        jaxllama::Run(gate, scratch.normed, row, rows_now);
        jaxllama::Run(up, scratch.normed, row, rows_now);
        for (int64_t r = 0; r < rows_now; ++r) {
          const float *g = &gates[r * gate.out], *u = &ups[r * gate.out];
          for (int64_t d = first; d < padded_end; d += kBlockLanes) {
            float product[kBlockLanes];
            Activate(g + d - first, u + d - first, std::clamp<int64_t>(end - d, 0, kBlockLanes), product);
            Enter(product, (row + r) * to.stride + d, std::min<int64_t>(kBlockLanes, padded_end - d), &to);
          }
        }
      }
    });
  }

  // Up to 16 numbers, rounded, to place `at` of what a product takes in.
  static void Enter(const float* from, int64_t at, int64_t count, Inputs* to) {
    U32 bits[kVectors];
    float floats[kBlockLanes];
    for (int i = 0; i < kVectors; ++i) {
      bits[i] = Load<U32>(from + i * kLanes);
      if constexpr (!kIsFloat) bits[i] = RoundToBFloat16(bits[i]);
      Store(floats + i * kLanes, bits[i]);
    }
    if (to->pairs != nullptr) {
      typedef BFloat16 Halves __attribute__((vector_size(2 * kLanes)));
      BFloat16 halves[kBlockLanes];
      for (int i = 0; i < kVectors; ++i) Store(halves + i * kLanes, __builtin_convertvector(bits[i] >> 16, Halves));
      Copy(halves, count, &to->padded[at]);
    } else {
      Copy(floats, count, &to->floats[at]);
    }
  }

  // Up to 16.
  template <typename T>
  static void Copy(const T* from, int64_t count, T* to) {
    if (count == kBlockLanes) {
      std::memcpy(to, from, sizeof(T[kBlockLanes]));
    } else {
      std::memcpy(to, from, count * sizeof(T));
    }
  }

  // silu(gate) * up of up to 16.
  static void Activate(const float* gate, const float* up, int64_t count, float* to) {
    if (count < kBlockLanes) {
      float g[kBlockLanes] = {}, u[kBlockLanes] = {};
      std::memcpy(g, gate, count * sizeof(float));
      std::memcpy(u, up, count * sizeof(float));
      return Activate(g, u, kBlockLanes, to);
    }
    for (int i = 0; i < kBlockLanes; i += kLanes) {
      const F32 x = Load<F32>(gate + i);
      // Of the negative magnitude: the other way an exponential would overflow.
      const F32 e = Exp2((F32)((U32)x | 0x80000000u) * Set1(1.44269504088896340736f));
      const F32 sigmoid = (x < Set1(0.0f) ? e : Set1(1.0f)) / (Set1(1.0f) + e);
      Store(to + i, x * sigmoid * Load<F32>(up + i));
    }
  }
};

}  // namespace jaxllama
