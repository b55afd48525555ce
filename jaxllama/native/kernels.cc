// Matrix products and paged attention for CPUs with AVX-512 BF16, called by XLA through its foreign function interface.
//
// Sums are float32 and taken in one order, element by element, whatever the number of rows or queries, so that a token's
// bits do not depend on what is computed beside it. Both use the instruction that multiplies pairs of bfloat16 and adds
// them to float32 lanes (VDPBF16PS); the operand that it reads whole holds pairs of one lane beside each other.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
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
constexpr int64_t kQueries = 192;  // queries of one task of attention, at most, but for one token's
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

// x [rows, in], weight [out / 64, in / 2, 64, 2] to y [rows, out].
ffi::Error Multiply(ffi::ThreadPool pool, BFloat16Buffer x_buffer, BFloat16Buffer weight_buffer,
                    ffi::ResultBuffer<ffi::F32> y_buffer) {
  const auto shape = weight_buffer.dimensions();
  const int64_t blocks = shape[0], in = 2 * shape[1], out = kWidth * blocks, rows = x_buffer.element_count() / in;
  const auto* x = static_cast<const BFloat16*>(x_buffer.untyped_data());
  const auto* weight = static_cast<const BFloat16*>(weight_buffer.untyped_data());
  float* y = y_buffer->typed_data();
  const int64_t blocks_per_task = std::max<int64_t>(1, blocks / 32);
  ParallelFor(pool, (blocks + blocks_per_task - 1) / blocks_per_task, [&](int64_t task) {
    const int64_t end = std::min(blocks, (task + 1) * blocks_per_task);
    for (int64_t block = task * blocks_per_task; block < end; ++block) {
      for (int64_t row = 0; row < rows; row += kMaxRows) {
        Rows<Start::kZero>(std::min(rows - row, kMaxRows), x + row * in, in, weight + block * kWidth * in, 2 * kWidth,
                           in, y + row * out + block * kWidth, out);
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

// What a thread works in, for heads of any size that it meets.
struct Scratch {
  std::vector<BFloat16> queries, keys, values, probs;
  std::vector<float> scores, weighted, largest, total;
};

// Keys and values of one head at up to 128 positions, as they lie in the cache: a value follows its key.
struct Block {
  const BFloat16* keys[kBlock];
  int64_t count, head_dim;

  // To [head_dim / 2, 128, 2]. What lies past the end is not defined.
  void PackKeys(BFloat16* packed) const {
    for (int64_t k = 0; k < count; k += kLanes) {
      for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
        __m512i v[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) {
          v[i] = _mm512_loadu_si512(keys[std::min(k + i, count - 1)] + d);
        }
        Transpose(v);
        for (int64_t i = 0; i < kLanes; ++i) _mm512_storeu_si512(packed + ((d / 2 + i) * kBlock + k) * 2, v[i]);
      }
    }
  }

  // To [(count + 1) / 2, head_dim, 2]. Of an odd count the last has a 0 beside it: pages are reused without being
  // cleared, and what lies past the end may be NaN.
  void PackValues(BFloat16* packed) const {
    alignas(64) uint16_t low[2 * kLanes], high[2 * kLanes];
    for (int i = 0; i < kLanes; ++i) {
      low[2 * i] = i, low[2 * i + 1] = 2 * kLanes + i;
      high[2 * i] = kLanes + i, high[2 * i + 1] = 3 * kLanes + i;
    }
    const __m512i to_low = _mm512_load_si512(low), to_high = _mm512_load_si512(high);
    for (int64_t k = 0; k < count; k += 2) {
      for (int64_t d = 0; d < head_dim; d += 2 * kLanes) {
        const __m512i a = _mm512_loadu_si512(keys[k] + head_dim + d);
        const __m512i b =
            k + 1 < count ? _mm512_loadu_si512(keys[k + 1] + head_dim + d) : _mm512_setzero_si512();
        BFloat16* to = packed + (k / 2 * head_dim + d) * 2;
        _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, to_low, b));
        _mm512_storeu_si512(to + 2 * kLanes, _mm512_permutex2var_epi16(a, to_high, b));
      }
    }
  }
};

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

// q [rows, tokens, heads, head_dim], pages [pages, page_size, 2 * kv_heads, head_dim], page_table [rows, width] and
// positions [rows, tokens] (0 or more, not falling in a row) to out like q. Each query attends to its row's keys at positions up to its own, in blocks of 128
// with an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867). A block of which a query sees nothing leaves
// its sums as they are.
ffi::Error Attend(ffi::ThreadPool pool, BFloat16Buffer q_buffer, BFloat16Buffer pages_buffer, Int32Buffer table_buffer,
                  Int32Buffer positions_buffer, ffi::ResultBuffer<ffi::BF16> out_buffer) {
  const auto shape = q_buffer.dimensions(), pages_shape = pages_buffer.dimensions();
  const int64_t rows = shape[0], tokens = shape[1], heads = shape[2], head_dim = shape[3];
  const int64_t page_size = pages_shape[1], kv2 = pages_shape[2], kv_heads = kv2 / 2, group = heads / kv_heads;
  const int64_t width = table_buffer.dimensions()[1];
  const auto* q = static_cast<const BFloat16*>(q_buffer.untyped_data());
  const auto* pages = static_cast<const BFloat16*>(pages_buffer.untyped_data());
  const int32_t *tables = table_buffer.typed_data(), *all_positions = positions_buffer.typed_data();
  auto* out = static_cast<BFloat16*>(out_buffer->untyped_data());
  const float scale = 1.44269504088896340736f / std::sqrt(static_cast<float>(head_dim));
  const int64_t tokens_per_task = std::clamp<int64_t>(kQueries / group, 1, tokens);
  const int64_t tasks_per_head = (tokens + tokens_per_task - 1) / tokens_per_task;

  ParallelFor(pool, rows * tasks_per_head * kv_heads, [&](int64_t task) {
    const int64_t head = task % kv_heads, row = task / kv_heads / tasks_per_head;
    // The last queries have the most keys: they go first.
    const int64_t part = tasks_per_head - 1 - task / kv_heads % tasks_per_head;
    const int64_t first_token = part * tokens_per_task, last_token = std::min(tokens, first_token + tokens_per_task);
    const int32_t* positions = all_positions + row * tokens;
    const int32_t* table = tables + row * width;
    const int64_t queries = (last_token - first_token) * group;

    thread_local Scratch s;
    s.queries.resize(queries * head_dim);
    s.weighted.assign(queries * head_dim, 0.0f);
    s.largest.assign(queries, kMasked);
    s.total.assign(queries, 0.0f);
    s.keys.resize(kBlock * head_dim);
    s.values.resize(kBlock * head_dim);
    s.scores.resize(kMaxRows * kBlock);
    s.probs.resize(kMaxRows * kBlock);

    const auto query_at = [&](int64_t i) {
      return ((row * tokens + first_token + i / group) * heads + head * group + i % group) * head_dim;
    };
    for (int64_t i = 0; i < queries; ++i) {
      std::memcpy(&s.queries[i * head_dim], q + query_at(i), head_dim * sizeof(BFloat16));
    }
    const int64_t end = positions[last_token - 1] + 1;
    for (int64_t first = 0; first < end; first += kBlock) {
      Block block{{}, std::min(kBlock, end - first), head_dim};
      for (int64_t i = 0; i < block.count;) {
        const int64_t page = (first + i) / page_size, slot = (first + i) % page_size;
        const BFloat16* token = pages + ((table[page] * page_size + slot) * kv2 + 2 * head) * head_dim;
        for (int64_t n = std::min(block.count - i, page_size - slot); n > 0; --n, token += kv2 * head_dim) {
          block.keys[i++] = token;
        }
      }
      block.PackKeys(s.keys.data());
      block.PackValues(s.values.data());
      for (int64_t i = 0; i < queries; i += kMaxRows) {
        const int64_t some = std::min(kMaxRows, queries - i);
        float decays[kMaxRows];
        if (positions[first_token + (i + some - 1) / group] < first) continue;
        for (int64_t n = 0; n < block.count; n += kWidth) {
          Rows<Start::kZero>(some, &s.queries[i * head_dim], head_dim, &s.keys[2 * n], 2 * kBlock, head_dim,
                             &s.scores[n], kBlock);
        }
        for (int64_t r = 0; r < some; ++r) {
          const int64_t visible = positions[first_token + (i + r) / group] + 1 - first;
          decays[r] = Softmax(&s.scores[r * kBlock], visible, scale, &s.largest[i + r], &s.total[i + r],
                              &s.probs[r * kBlock]);
        }
        for (int64_t n = 0; n < head_dim; n += kWidth) {
          Rows<Start::kScaled>(some, s.probs.data(), kBlock, &s.values[2 * n], 2 * head_dim, block.count,
                               &s.weighted[i * head_dim + n], head_dim, decays);
        }
      }
    }
    for (int64_t i = 0; i < queries; ++i) {
      const __m512 total = _mm512_set1_ps(s.total[i]);
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const __m512 mean = _mm512_div_ps(_mm512_loadu_ps(&s.weighted[i * head_dim + d]), total);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + query_at(i) + d), (__m256i)_mm512_cvtneps_pbh(mean));
      }
    }
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jaxllama_multiply, Multiply,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<BFloat16Buffer>().Arg<BFloat16Buffer>().Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxllama_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<BFloat16Buffer>()
                                  .Arg<BFloat16Buffer>()
                                  .Arg<Int32Buffer>()
                                  .Arg<Int32Buffer>()
                                  .Ret<BFloat16Buffer>());
