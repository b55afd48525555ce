// Matrix products and paged attention for CPUs with AVX-512 BF16, called by XLA through its foreign function interface.
//
// Sums are float32 and taken in one order, element by element, whatever the number of rows or queries, so that a
// token's bits do not depend on what is computed beside it. Both use the instruction that multiplies pairs of bfloat16
// and adds them to float32 lanes (VDPBF16PS); the operand that it reads whole holds the pairs of a lane together.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using BFloat16 = uint16_t;
using BFloat16Buffer = ffi::Buffer<ffi::BF16>;
using Int32Buffer = ffi::Buffer<ffi::S32>;

constexpr int64_t kLanes = 16;
constexpr int64_t kWidth = 64;  // outputs of one tile: four vectors
constexpr int64_t kMaxRows = 6;  // rows of one tile: 24 sums, 4 vectors of weights and a pair fill the 32 registers
constexpr int64_t kBlock = 128;  // keys of one round of attention
constexpr int64_t kSegment = 256;  // keys whose sums are taken by themselves
constexpr int64_t kQueries = 192;  // queries of one task of a chunk, at most, but for one token's
constexpr float kMasked = -1e30f;

// Runs body(0), body(1), … body(count - 1) on this thread and on those of the pool that are free, and returns when all
// have ended. It waits only for threads that have begun, so calls may be nested in the pool without a deadlock.
template <typename Body>
void ParallelFor(ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct Work {
    const Body* body;
    int64_t count;
    std::atomic<int64_t> begun{0}, ended{0};
    void Help() {
      for (int64_t i; (i = begun.fetch_add(1)) < count;) {
        (*body)(i);
        ended.fetch_add(1, std::memory_order_release);
      }
    }
  };
  auto work = std::make_shared<Work>();
  work->body = &body;
  work->count = count;
  // The calling thread takes part beside the pool's.
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->Help(); });
  work->Help();
  for (int spins = 0; work->ended.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) {
      _mm_pause();
    } else {
      std::this_thread::yield();
    }
  }
}

enum class Start { kZero, kScaled };

// y[r][n] = sum over k of x[r][k] * w[k][n], for R rows and 64 n; w holds, at `w + k / 2 * w_stride`, pairs of k.
// Start::kScaled: added to y[r][n] * scale[r].
template <int R, Start start>
__attribute__((always_inline)) inline void Tile(const BFloat16* x, int64_t x_stride, const BFloat16* w,
                                                int64_t w_stride, int64_t num_k, float* y, int64_t y_stride,
                                                const float* scale) {
  __m512 sums[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      sums[r][c] = start == Start::kZero ? _mm512_setzero_ps()
                                         : _mm512_mul_ps(_mm512_loadu_ps(y + r * y_stride + c * kLanes),
                                                         _mm512_set1_ps(scale[r]));
    }
  }
  for (int64_t k = 0; k < num_k; k += 2, w += w_stride) {
    __m512bh weights[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) weights[c] = (__m512bh)_mm512_loadu_si512(w + c * 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride + k, sizeof pair);
      const __m512bh pairs = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], pairs, weights[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_ps(y + r * y_stride + c * kLanes, sums[r][c]);
  }
}

// A tile of 1 to 6 rows.
template <Start start>
void Rows(int64_t rows, const BFloat16* x, int64_t x_stride, const BFloat16* w, int64_t w_stride, int64_t num_k,
          float* y, int64_t y_stride, const float* scale = nullptr) {
  switch (rows) {
    case 1: return Tile<1, start>(x, x_stride, w, w_stride, num_k, y, y_stride, scale);
    case 2: return Tile<2, start>(x, x_stride, w, w_stride, num_k, y, y_stride, scale);
    case 3: return Tile<3, start>(x, x_stride, w, w_stride, num_k, y, y_stride, scale);
    case 4: return Tile<4, start>(x, x_stride, w, w_stride, num_k, y, y_stride, scale);
    case 5: return Tile<5, start>(x, x_stride, w, w_stride, num_k, y, y_stride, scale);
    default: return Tile<6, start>(x, x_stride, w, w_stride, num_k, y, y_stride, scale);
  }
}

// x [rows, in] with weights [out / 64, in / 2, 64, 2] to as many y [rows, out].
ffi::Error Multiply(ffi::ThreadPool pool, BFloat16Buffer x_buffer, ffi::RemainingArgs weights, ffi::RemainingRets ys) {
  struct Task {
    const BFloat16* weight;
    float* y;
    int64_t blocks, out;
  };
  const auto* x = static_cast<const BFloat16*>(x_buffer.untyped_data());
  std::vector<Task> tasks;
  int64_t in = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto weight = weights.get<BFloat16Buffer>(i);
    const auto y = ys.get<ffi::Buffer<ffi::F32>>(i);
    if (!weight.has_value()) return weight.error();
    if (!y.has_value()) return y.error();
    const auto shape = weight->dimensions();
    in = 2 * shape[1];
    const int64_t blocks = shape[0], step = std::max<int64_t>(1, blocks / 32);
    for (int64_t block = 0; block < blocks; block += step) {
      tasks.push_back({static_cast<const BFloat16*>(weight->untyped_data()) + block * kWidth * in,
                       (*y)->typed_data() + block * kWidth, std::min(step, blocks - block), blocks * kWidth});
    }
  }
  const int64_t rows = x_buffer.element_count() / in;
  ParallelFor(pool, tasks.size(), [&](int64_t i) {
    const Task& task = tasks[i];
    for (int64_t block = 0; block < task.blocks; ++block) {
      for (int64_t row = 0; row < rows; row += kMaxRows) {
        Rows<Start::kZero>(std::min(rows - row, kMaxRows), x + row * in, in, task.weight + block * kWidth * in,
                           2 * kWidth, in, task.y + row * task.out + block * kWidth, task.out);
      }
    }
  });
  return ffi::Error::Success();
}

// 2^x for x ≤ 0, to 2e-7 of it: 1 at 0, and 0 from -127 on. NaN stays NaN. The polynomial is the least-maximum fit of
// its degree to 2^f for |f| ≤ 1/2 among those that are 1 at 0.
inline __m512 Exp2(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);  // of NaN and a number, the second
  const __m512 shift = _mm512_set1_ps(12582912.0f);  // 1.5 × 2^23: the sum's low bits are the nearest integer
  const __m512 shifted = _mm512_add_ps(x, shift);
  const __m512 f = _mm512_sub_ps(x, _mm512_sub_ps(shifted, shift));
  __m512 p = _mm512_set1_ps(0.001326472731307149f);
  for (float c : {0.009671512991189957f, 0.05550733581185341f, 0.24022242426872253f, 0.6931470036506653f, 1.0f}) {
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
  }
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

// Rows of 16 to columns of 16.
inline void Transpose(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// Up to 128 positions of a row: where their tokens lie, and of a token the elements that a task reads, the keys and
// values of one KV head or more (K0 V0 K1 V1 …).
struct Block {
  const BFloat16* tokens[kBlock];
  int64_t count = 0, num_elements = 0;
};

// Has the CPU fetch a block, in the order of memory, while another is packed. That one is read head by head, which
// alone would run at a quarter of the memory's speed.
class Fetch {
 public:
  explicit Fetch(const Block& block) : block_(block) {}

  // Tokens up to a share of `part` in `parts`.
  void UpTo(int64_t part, int64_t parts) {
    for (const int64_t end = std::min(block_.count, kBlock * part / parts); token_ < end; ++token_) {
      for (int64_t i = 0; i < block_.num_elements; i += 2 * kLanes) {
        _mm_prefetch(block_.tokens[token_] + i, _MM_HINT_T1);
      }
    }
  }

 private:
  const Block& block_;
  int64_t token_ = 0;
};

// Elements `at … at + head_dim` of 16 tokens from `k` on to their place in [head_dim / 2, 128, 2]. What lies past the
// end is not defined.
void PackKeys(const Block& block, int64_t k, int64_t at, int64_t head_dim, BFloat16* packed) {
  for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
    __m512i v[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      v[i] = _mm512_loadu_si512(block.tokens[std::min(k + i, block.count - 1)] + at + d);
    }
    Transpose(v);
    for (int64_t i = 0; i < kLanes; ++i) _mm512_storeu_si512(packed + ((d / 2 + i) * kBlock + k) * 2, v[i]);
  }
}

// Likewise to [(count + 1) / 2, head_dim, 2]. Of an odd count the last has a 0 beside it: pages are reused without
// being cleared, and what lies past the end may be NaN.
void PackValues(const Block& block, int64_t first, int64_t at, int64_t head_dim, BFloat16* packed) {
  alignas(64) uint16_t low[2 * kLanes], high[2 * kLanes];
  for (int i = 0; i < kLanes; ++i) {
    low[2 * i] = i, low[2 * i + 1] = 2 * kLanes + i;
    high[2 * i] = kLanes + i, high[2 * i + 1] = 3 * kLanes + i;
  }
  const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
  for (int64_t k = first; k < std::min(first + kLanes, block.count); k += 2) {
    for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
      const __m512i a = _mm512_loadu_si512(block.tokens[k] + at + d);
      const __m512i b = k + 1 < block.count ? _mm512_loadu_si512(block.tokens[k + 1] + at + d) : _mm512_setzero_si512();
      BFloat16* to = packed + k * head_dim + 2 * d;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, to_low, b));
      _mm512_storeu_si512(to + 2 * kLanes, _mm512_permutex2var_epi16(a, to_high, b));
    }
  }
}

// Of one query: scores of a block's keys, of which it sees `visible`, to probabilities relative to the largest score so
// far. Returns what earlier sums are to be multiplied with.
inline float Softmax(const float* scores, int64_t visible, float scale, float* largest, float* total, BFloat16* probs) {
  constexpr int kVectors = kBlock / kLanes;
  __m512 x[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const int64_t lanes = std::clamp<int64_t>(visible - i * kLanes, 0, kLanes);
    x[i] = _mm512_mask_loadu_ps(_mm512_set1_ps(kMasked), static_cast<__mmask16>((1u << lanes) - 1),
                                scores + i * kLanes);
  }
  __m512 most = x[0];
  for (int i = 1; i < kVectors; ++i) most = _mm512_max_ps(most, x[i]);
  const float before = *largest, now = std::max(before, _mm512_reduce_max_ps(most));
  const __m512 by = _mm512_set1_ps(scale);
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < kVectors; ++i) {
    const __m512 p = Exp2(_mm512_mul_ps(_mm512_sub_ps(x[i], _mm512_set1_ps(now)), by));
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(p);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(probs + i * kLanes), rounded);
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16)));
  }
  const float decay = _mm512_cvtss_f32(Exp2(_mm512_set1_ps((before - now) * scale)));
  *largest = now;
  *total = *total * decay + _mm512_reduce_add_ps(sum);
  return decay;
}

// What some queries have seen: the largest score of each, and the sums of probabilities relative to it and of values
// weighted with them.
struct Sums {
  std::vector<float> largest, total, weighted;

  void Clear(int64_t queries, int64_t head_dim) {
    largest.assign(queries, kMasked);
    total.assign(queries, 0.0f);
    weighted.assign(queries * head_dim, 0.0f);
  }

  // Adds what query i has seen of later keys.
  void Add(const Sums& later, int64_t i, int64_t head_dim, float scale) {
    const float now = std::max(largest[i], later.largest[i]);
    const __m512 before = Exp2(_mm512_set1_ps((largest[i] - now) * scale));
    const __m512 after = Exp2(_mm512_set1_ps((later.largest[i] - now) * scale));
    largest[i] = now;
    total[i] = total[i] * _mm512_cvtss_f32(before) + later.total[i] * _mm512_cvtss_f32(after);
    for (int64_t d = i * head_dim; d < (i + 1) * head_dim; d += kLanes) {
      const __m512 sum = _mm512_mul_ps(_mm512_loadu_ps(&weighted[d]), before);
      _mm512_storeu_ps(&weighted[d], _mm512_fmadd_ps(_mm512_loadu_ps(&later.weighted[d]), after, sum));
    }
  }
};

// The arguments of `Attend`, and what a thread does of it.
struct Attention {
  const BFloat16 *q, *pages;
  const int32_t *tables, *positions;
  BFloat16* out;
  int64_t tokens, heads, head_dim, page_size, kv_heads, width;
  int64_t group = heads / kv_heads;
  float scale = 1.44269504088896340736f / std::sqrt(static_cast<float>(head_dim));

  // The queries of some tokens of a row, for some of the KV heads: numbered by KV head, then token.
  struct Queries {
    int64_t row, first_head, num_heads, first_token, num_tokens;
  };

  int64_t Count(const Queries& some) const { return some.num_heads * some.num_tokens * group; }

  int64_t Token(const Queries& some, int64_t query) const {
    return some.row * tokens + some.first_token + query / group % some.num_tokens;
  }

  int64_t At(const Queries& some, int64_t query) const {
    const int64_t head = some.first_head + query / (some.num_tokens * group);
    return (Token(some, query) * heads + head * group + query % group) * head_dim;
  }

  int64_t Position(const Queries& some, int64_t query) const { return positions[Token(some, query)]; }

  int64_t End(const Queries& some) const { return Position(some, some.num_tokens * group - 1) + 1; }

  // The tokens at `first …` that are before `end`, up to 128.
  Block Find(const Queries& some, int64_t first, int64_t end) const {
    Block block;
    block.count = std::clamp<int64_t>(end - first, 0, kBlock);
    block.num_elements = 2 * some.num_heads * head_dim;
    const int64_t size = 2 * kv_heads * head_dim;
    for (int64_t i = 0; i < block.count;) {
      const int64_t page = tables[some.row * width + (first + i) / page_size], slot = (first + i) % page_size;
      const BFloat16* token = pages + (page * page_size + slot) * size + 2 * some.first_head * head_dim;
      for (int64_t n = std::min(block.count - i, page_size - slot); n > 0; --n, token += size) {
        block.tokens[i++] = token;
      }
    }
    return block;
  }

  // The first block of a segment.
  Block First(const Queries& some, int64_t segment) const {
    return Find(some, segment * kSegment, std::min((segment + 1) * kSegment, End(some)));
  }

  // What they see of the keys of one segment. `after` is what this thread reads next.
  void See(const Queries& some, int64_t segment, const Block& after, Sums* sums) const {
    const int64_t per_head = some.num_tokens * group, packed_size = kBlock * head_dim;
    thread_local std::vector<BFloat16> queries, keys, values, probs;
    thread_local std::vector<float> scores;
    thread_local std::vector<int64_t> visible;  // how many keys, from position 0 on
    queries.resize(Count(some) * head_dim);
    keys.resize(some.num_heads * packed_size);
    values.resize(some.num_heads * packed_size);
    probs.resize(kMaxRows * kBlock);
    scores.resize(kMaxRows * kBlock);
    visible.resize(Count(some));
    for (int64_t i = 0; i < Count(some); ++i) {
      visible[i] = Position(some, i) + 1;
      std::memcpy(&queries[i * head_dim], q + At(some, i), head_dim * sizeof(BFloat16));
    }
    sums->Clear(Count(some), head_dim);
    const int64_t start = segment * kSegment, end = std::min(start + kSegment, End(some));
    Block next = First(some, segment);
    for (int64_t first = start; first < end; first += kBlock) {
      const Block block = next;
      next = Find(some, first + kBlock, end);
      Fetch fetch(next.count > 0 ? next : after);
      for (int64_t head = 0; head < some.num_heads; ++head) {
        for (int64_t k = 0; k < block.count; k += kLanes) {
          PackKeys(block, k, 2 * head * head_dim, head_dim, &keys[head * packed_size]);
          PackValues(block, k, (2 * head + 1) * head_dim, head_dim, &values[head * packed_size]);
          fetch.UpTo(head * kBlock + k + kLanes, some.num_heads * kBlock);
        }
      }
      for (int64_t head = 0; head < some.num_heads; ++head) {
        for (int64_t n = 0; n < per_head; n += kMaxRows) {
          const int64_t i = head * per_head + n, rows = std::min(kMaxRows, per_head - n);
          if (visible[i + rows - 1] <= first) continue;
          for (int64_t k = 0; k < block.count; k += kWidth) {
            Rows<Start::kZero>(rows, &queries[i * head_dim], head_dim, &keys[head * packed_size + 2 * k], 2 * kBlock,
                               head_dim, &scores[k], kBlock);
          }
          float decays[kMaxRows];
          for (int64_t r = 0; r < rows; ++r) {
            decays[r] = Softmax(&scores[r * kBlock], visible[i + r] - first, scale, &sums->largest[i + r],
                                &sums->total[i + r], &probs[r * kBlock]);
          }
          for (int64_t d = 0; d < head_dim; d += kWidth) {
            Rows<Start::kScaled>(rows, probs.data(), kBlock, &values[head * packed_size + 2 * d], 2 * head_dim,
                                 block.count, &sums->weighted[i * head_dim + d], head_dim, decays);
          }
        }
      }
    }
  }

  void Write(const Queries& some, const Sums& sums) const {
    for (int64_t i = 0; i < Count(some); ++i) {
      const __m512 total = _mm512_set1_ps(sums.total[i]);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const __m512 mean = _mm512_div_ps(_mm512_loadu_ps(&sums.weighted[i * head_dim + d]), total);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + At(some, i) + d), (__m256i)_mm512_cvtneps_pbh(mean));
      }
    }
  }
};

// One token a row: a task takes one segment of a row, with all heads. The last of a row to end adds them up.
void AttendOnce(ffi::ThreadPool& pool, const Attention& attention, int64_t rows) {
  struct Row {
    Attention::Queries queries;
    std::vector<Sums> segments;
    std::atomic<int64_t> left;
  };
  std::vector<Row> all(rows);
  std::vector<std::pair<Row*, int64_t>> tasks;
  for (int64_t i = 0; i < rows; ++i) {
    Row& row = all[i];
    row.queries = {i, 0, attention.kv_heads, 0, 1};
    row.left = (attention.End(row.queries) + kSegment - 1) / kSegment;
    row.segments.resize(row.left);
    for (int64_t n = 0; n < row.left; ++n) tasks.emplace_back(&row, n);
  }
  const int64_t count = tasks.size(), num_threads = pool.num_threads();
  ParallelFor(pool, count, [&](int64_t task) {
    Row& row = *tasks[task].first;
    const int64_t segment = tasks[task].second;
    // Most likely this thread's next.
    const auto& later = tasks[std::min(task + num_threads, count - 1)];
    const Block after = attention.First(later.first->queries, later.second);
    attention.See(row.queries, segment, after, &row.segments[segment]);
    if (row.left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    Sums& sums = row.segments[0];
    for (size_t n = 1; n < row.segments.size(); ++n) {
      for (int64_t i = 0; i < attention.heads; ++i) sums.Add(row.segments[n], i, attention.head_dim, attention.scale);
    }
    attention.Write(row.queries, sums);
  });
}

// Many tokens a row: a task takes some of them through all segments, with one KV head.
void AttendChunk(ffi::ThreadPool& pool, const Attention& attention, int64_t rows) {
  const int64_t tokens = attention.tokens, step = std::clamp<int64_t>(kQueries / attention.group, 1, tokens);
  const int64_t parts = (tokens + step - 1) / step;
  ParallelFor(pool, rows * parts * attention.kv_heads, [&](int64_t task) {
    // The last queries have the most keys: they go first.
    const int64_t row = task / attention.kv_heads / parts, part = parts - 1 - task / attention.kv_heads % parts;
    const Attention::Queries some{row, task % attention.kv_heads, 1, part * step, std::min(step, tokens - part * step)};
    thread_local Sums sums, later;
    attention.See(some, 0, attention.First(some, 1), &sums);
    for (int64_t segment = 1; segment * kSegment < attention.End(some); ++segment) {
      attention.See(some, segment, attention.First(some, segment + 1), &later);
      for (int64_t i = 0; i < attention.Count(some); ++i) {
        if (attention.Position(some, i) >= segment * kSegment) {
          sums.Add(later, i, attention.head_dim, attention.scale);
        }
      }
    }
    attention.Write(some, sums);
  });
}

// q [rows, tokens, heads, head_dim], pages [pages, page_size, 2 * kv_heads, head_dim], page_table [rows, width] and
// positions [rows, tokens] (0 or more, not falling in a row) to out like q. Each query attends to its row's keys at
// positions up to its own, in blocks of 128 with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867);
// segments of blocks are added up one after another (Dao et al. 2023, "Flash-Decoding"). What a query does not see
// leaves its sums as they are.
ffi::Error Attend(ffi::ThreadPool pool, BFloat16Buffer q, BFloat16Buffer pages, Int32Buffer page_table,
                  Int32Buffer positions, ffi::ResultBuffer<ffi::BF16> out) {
  const auto shape = q.dimensions(), pages_shape = pages.dimensions();
  const Attention attention{static_cast<const BFloat16*>(q.untyped_data()),
                            static_cast<const BFloat16*>(pages.untyped_data()),
                            page_table.typed_data(),
                            positions.typed_data(),
                            static_cast<BFloat16*>(out->untyped_data()),
                            shape[1],
                            shape[2],
                            shape[3],
                            pages_shape[1],
                            pages_shape[2] / 2,
                            page_table.dimensions()[1]};
  for (int64_t row = 0; row < shape[0]; ++row) {
    const int64_t last = attention.positions[(row + 1) * attention.tokens - 1];
    if (last < 0 || last >= attention.width * attention.page_size) {
      return ffi::Error::InvalidArgument("row " + std::to_string(row) + " has a query at position " +
                                         std::to_string(last) + ", and pages for " +
                                         std::to_string(attention.width * attention.page_size) + " tokens");
    }
  }
  (attention.tokens == 1 ? AttendOnce : AttendChunk)(pool, attention, shape[0]);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllama_multiply, Multiply,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<BFloat16Buffer>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<BFloat16Buffer>()
                                  .Arg<BFloat16Buffer>()
                                  .Arg<Int32Buffer>()
                                  .Arg<Int32Buffer>()
                                  .Ret<BFloat16Buffer>());
