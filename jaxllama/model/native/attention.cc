// Paged attention for queries of float32 or bfloat16 over a cache of float32, bfloat16 or int8.
#include "attention.h"

#include <atomic>
#include <cmath>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "tiles.h"

namespace jaxllama {
namespace {

constexpr int64_t kBlock = 128;  // keys of one round of attention
constexpr int64_t kSegment = 256;  // keys whose sums are taken by themselves
constexpr int64_t kQueries = 192;  // queries of one task of a chunk, at most, but for one token's
constexpr float kMasked = -1e30f;

typedef uint32_t EightWords __attribute__((vector_size(32)));

// Up to 128 positions of a row: where their keys of the first of some heads lie. A head's value is one `stride` after
// its key, and the next head's key one after that. Of int8 there are scales, likewise.
template <typename KV>
struct Block {
  const KV* tokens[kBlock];
  const float* scales[kBlock];
  int64_t count = 0, num_rows = 0, stride = 0, scale_stride = 0;

  const KV* Row(int64_t token, int64_t row) const { return tokens[token] + row * stride; }
};

// Has the CPU fetch a block, in the order of memory, while another is packed. That one is read head by head, which
// alone would run at a quarter of the memory's speed.
template <typename KV>
class Fetch {
 public:
  Fetch(const Block<KV>& block, int64_t head_dim) : block_(block), row_bytes_(head_dim * sizeof(KV)) {}

  // Tokens up to a share of `part` in `parts`.
  void UpTo(int64_t part, int64_t parts) {
    for (const int64_t end = std::min(block_.count, kBlock * part / parts); token_ < end; ++token_) {
      for (int64_t row = 0; row < block_.num_rows; ++row) {
        const char* from = reinterpret_cast<const char*>(block_.Row(token_, row));
        for (int64_t i = 0; i < row_bytes_; i += kLineBytes) PrefetchToSecondLevel(from + i);
      }
    }
  }

 private:
  const Block<KV>& block_;
  int64_t row_bytes_, token_ = 0;
};

// Packs keys and values of a cache of `KV` to lines: float32, or pairs of bfloat16, which hold int8 exactly.
template <typename KV>
class Packer {
 public:
  static constexpr bool kPairs = !std::is_same_v<KV, float>;
  static constexpr int64_t kInputs = kPairs ? 2 : 1;  // a line

  explicit Packer(int64_t head_dim)
      : head_dim_(head_dim), num_words_(head_dim / kInputs), padded_((head_dim + 15) / 16 * 16),
        rows_(kBlockLanes * padded_ * sizeof(float)) {}

  int64_t key_block_bytes() const { return num_words_ * kLineBytes; }
  int64_t value_block_bytes() const { return kBlock / kInputs * kLineBytes; }
  int64_t keys_bytes() const { return kBlock / kBlockLanes * key_block_bytes(); }
  int64_t values_bytes() const { return padded_ / kBlockLanes * value_block_bytes(); }

  // Row `row` of 16 tokens from `k` on to their block of lines. What lies past the end is not defined.
  void Keys(const Block<KV>& block, int64_t k, int64_t row, char* packed) {
    const char* from[kBlockLanes];
    for (int64_t i = 0; i < kBlockLanes; ++i) {
      from[i] = Words(block.Row(std::min(k + i, block.count - 1), row), i, /*is_padded=*/false);
    }
    packed += k / kBlockLanes * key_block_bytes();
    int64_t word = 0;
    for (; word + kLanes <= num_words_; word += kLanes) {
      for (int part = 0; part < kVectors; ++part) {
        I32 v[kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) v[i] = Load<I32>(from[part * kLanes + i] + 4 * word);
        Transpose(v);
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) Store(packed + (word + i) * kLineBytes + part * (4 * kLanes), v[i]);
      }
    }
    for (; word < num_words_; ++word) {
      for (int64_t i = 0; i < kBlockLanes; ++i) std::memcpy(packed + word * kLineBytes + 4 * i, from[i] + 4 * word, 4);
    }
  }

  // Likewise of values, whose outputs are a head's elements: of each 16, pairs have first those at even places, then
  // those at odd ones. Of an odd count the last has a 0 beside it: pages are reused without being cleared, and what
  // lies past the end may be NaN.
  void Values(const Block<KV>& block, int64_t first, int64_t row, char* packed) {
    for (int64_t k = first; k < std::min(first + kBlockLanes, block.count); k += kInputs) {
      const char* a = Words(block.Row(k, row), 0, /*is_padded=*/true);
      const char* b = kPairs && k + 1 < block.count ? Words(block.Row(k + 1, row), 1, /*is_padded=*/true) : nullptr;
      char* line = packed + k / kInputs * kLineBytes;
      for (int64_t d = 0; d < padded_; d += kBlockLanes, line += value_block_bytes()) {
        if constexpr (kPairs) {
          const EightWords one = Load<EightWords>(a + 2 * d);
          const EightWords two = b == nullptr ? EightWords{} : Load<EightWords>(b + 2 * d);
          Store(line, EightWords((one & 0xffffu) | (two << 16)));
          Store(line + 32, EightWords((one >> 16) | (two & 0xffff0000u)));
        } else {
          std::memcpy(line, a + 4 * d, kLineBytes);
        }
      }
    }
  }

  // A head's elements in their order, of sums in the order of `Values`.
  template <typename Out>
  void Write(const float* sums, float total, Out* out) {
    for (int64_t d = 0; d < padded_; d += kBlockLanes) {
      float mean[kBlockLanes];
      for (int i = 0; i < kBlockLanes; ++i) {
        mean[i] = (kPairs ? sums[d + i / 2 + i % 2 * 8] : sums[d + i]) / total;
      }
      Out rounded[kBlockLanes];
      if constexpr (std::is_same_v<Out, float>) {
        std::memcpy(rounded, mean, sizeof mean);
      } else {
        for (int i = 0; i < kBlockLanes; i += 8) {
          const EightWords bits = RoundToBFloat16(Load<EightWords>(mean + i));
          for (int j = 0; j < 8; ++j) rounded[i + j] = static_cast<BFloat16>(bits[j] >> 16);
        }
      }
      std::memcpy(out + d, rounded, std::min<int64_t>(kBlockLanes, head_dim_ - d) * sizeof(Out));
    }
  }

 private:
  // A row as words of a line: itself, or a copy in place `index` if it has to be converted or padded.
  const char* Words(const KV* row, int64_t index, bool is_padded) {
    char* copy = &rows_[index * padded_ * sizeof(float)];
    if constexpr (std::is_same_v<KV, int8_t>) {
      typedef int8_t EightBytes __attribute__((vector_size(8)));
      typedef int32_t EightInts __attribute__((vector_size(32)));
      typedef float EightFloats __attribute__((vector_size(32)));
      typedef uint16_t EightHalves __attribute__((vector_size(16)));
      int64_t d = 0;
      for (; d + 8 <= head_dim_; d += 8) {
        const auto ints = __builtin_convertvector(Load<EightBytes>(row + d), EightInts);
        const auto bits = (EightWords)__builtin_convertvector(ints, EightFloats);
        Store(copy + 2 * d, __builtin_convertvector(bits >> 16, EightHalves));
      }
      for (; d < head_dim_; ++d) {
        const float value = row[d];
        std::memcpy(copy + 2 * d, reinterpret_cast<const char*>(&value) + 2, 2);
      }
      return copy;
    } else if (!is_padded || head_dim_ == padded_) {
      return reinterpret_cast<const char*>(row);
    }
    std::memcpy(copy, row, head_dim_ * sizeof(KV));
    return copy;
  }

  int64_t head_dim_, num_words_, padded_;
  std::vector<char> rows_;
};

// What some queries have seen: the largest score of each, and the sums of probabilities relative to it and of values
// weighted with them, `width` of them a query.
struct Seen {
  std::vector<float> largest, total, weighted;

  void Clear(int64_t queries, int64_t width) {
    largest.assign(queries, kMasked);
    total.assign(queries, 0.0f);
    weighted.assign(queries * width, 0.0f);
  }

  // Adds what query i has seen of later keys.
  void Add(const Seen& later, int64_t i, int64_t width, float scale) {
    const float now = std::max(largest[i], later.largest[i]);
    const F32 before = Exp2(Set1((largest[i] - now) * scale));
    const F32 after = Exp2(Set1((later.largest[i] - now) * scale));
    largest[i] = now;
    total[i] = total[i] * before[0] + later.total[i] * after[0];
    for (int64_t d = i * width; d < (i + 1) * width; d += kLanes) {
      const F32 sum = Load<F32>(&weighted[d]) * before;
      Store(&weighted[d], Fma(Load<F32>(&later.weighted[d]), after, sum));
    }
  }
};

// Of one query: scores of a block's keys, of which it sees those from `hidden` up to `visible`, to probabilities relative
// to the largest score so far. Returns what earlier sums are to be multiplied with. `key_scales` and `value_scales` may
// be null.
inline float Softmax(const float* scores, const float* key_scales, const float* value_scales, int64_t hidden,
                     int64_t visible, float scale, float* largest, float* total, float* probs) {
  constexpr int kCount = kBlock / kLanes;
  I32 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  const int32_t end = static_cast<int32_t>(std::min(visible, kBlock));
  const int32_t begin = static_cast<int32_t>(std::clamp<int64_t>(hidden, 0, kBlock));
  F32 x[kCount];
#pragma GCC unroll 2
  for (int i = 0; i < kCount; ++i) {
    x[i] = Load<F32>(scores + i * kLanes);
    if (key_scales != nullptr) x[i] = x[i] * Load<F32>(key_scales + i * kLanes);
    x[i] = lanes < end - i * kLanes ? x[i] : Set1(kMasked);
    if (begin > 0) x[i] = lanes < begin - i * kLanes ? Set1(kMasked) : x[i];
  }
  F32 most = x[0];
  for (int i = 1; i < kCount; ++i) most = Max(most, x[i]);
  const float before = *largest;
  const float now = std::max(before, Fold(most, [](float a, float b) { return std::max(a, b); }));
  const F32 by = Set1(scale);
  F32 sum = Set1(0.0f);
  for (int i = 0; i < kCount; ++i) {
    F32 p = Exp2((x[i] - Set1(now)) * by);
    // A query that has seen nothing yet has the mask for its largest score.
    if (begin > 0) p = x[i] == Set1(kMasked) ? Set1(0.0f) : p;
    sum = sum + p;
    if (value_scales != nullptr) p = p * Load<F32>(value_scales + i * kLanes);
    Store(probs + i * kLanes, p);
  }
  const float decay = Exp2(Set1((before - now) * scale))[0];
  *largest = now;
  *total = *total * decay + Fold(sum, [](float a, float b) { return a + b; });
  return decay;
}

// The arguments of `Attend`, and what a thread does of it. `Lines` are what keys of a cache of `KV` are packed to. Values
// are multiplied in float32, so that probabilities are not rounded to bfloat16.
template <typename Lines, typename KV>
struct Attention {
  using X = typename Lines::X;
  using ValueLines = std::conditional_t<std::is_same_v<KV, float>, FloatLines, BFloat16Lines>;
  static constexpr bool kIsInt8 = std::is_same_v<KV, int8_t>;

  const void* q;
  const KV* pages;
  const float* scales;
  const int32_t *tables, *positions;
  void* out;
  bool is_float;  // queries and results; else they are bfloat16
  int64_t tokens, heads, head_dim, page_size, kv_heads, width, window;
  int64_t group = heads / kv_heads;
  int64_t padded_dim = (head_dim + 15) / 16 * 16;
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

  // How many keys, from position 0 on, a query at `position` does not see any more.
  int64_t Hidden(int64_t position) const { return window > 0 ? std::max<int64_t>(position + 1 - window, 0) : 0; }

  // The first segment that any of them sees, and the first key of a segment that they read.
  int64_t FirstSegment(const Queries& some) const { return Hidden(Position(some, 0)) / kSegment; }

  int64_t Start(const Queries& some, int64_t segment) const {
    return std::max(segment * kSegment, Hidden(Position(some, 0)) / kBlock * kBlock);
  }

  // The tokens at `first …` that are before `end`, up to 128. Pages of floats hold tokens of heads, of int8 heads of
  // tokens.
  Block<KV> Find(const Queries& some, int64_t first, int64_t end) const {
    Block<KV> block;
    block.count = std::clamp<int64_t>(end - first, 0, kBlock);
    block.num_rows = 2 * some.num_heads;
    block.stride = kIsInt8 ? page_size * head_dim : head_dim;
    block.scale_stride = page_size;
    const int64_t size = kIsInt8 ? head_dim : 2 * kv_heads * head_dim;
    for (int64_t i = 0; i < block.count;) {
      const int64_t page = tables[some.row * width + (first + i) / page_size], slot = (first + i) % page_size;
      const int64_t at = page * page_size * 2 * kv_heads;
      const KV* token = pages + at * head_dim + 2 * some.first_head * block.stride + slot * size;
      const float* token_scale = kIsInt8 ? scales + at + 2 * some.first_head * page_size + slot : nullptr;
      for (int64_t n = std::min(block.count - i, page_size - slot); n > 0; --n, token += size) {
        block.scales[i] = token_scale;
        block.tokens[i++] = token;
        if (kIsInt8) ++token_scale;
      }
    }
    return block;
  }

  // The first block of a segment.
  Block<KV> First(const Queries& some, int64_t segment) const {
    return Find(some, Start(some, segment), std::min((segment + 1) * kSegment, End(some)));
  }

  // Whether so few queries share a head that to pack its values would take longer than to multiply with them.
  bool AddsDirectly(int64_t per_head) const {
#if defined(__AVX2__)
    return std::is_same_v<KV, BFloat16> && per_head <= kMaxRows && head_dim % kBlockLanes == 0;
#else
    return false;
#endif
  }

  // The sums of packed values, bit for bit, straight from the cache.
  void AddValues(int64_t rows, const Block<KV>& block, int64_t row, const float* probs, const float* decays,
                 float* weighted) const {
#if defined(__AVX2__)
    if constexpr (std::is_same_v<KV, BFloat16>) {
      const auto add = [&](auto count) { AddValuesOf<count>(block, row, probs, decays, weighted); };
      switch (rows) {
        case 1: return add(std::integral_constant<int, 1>());
        case 2: return add(std::integral_constant<int, 2>());
        case 3: return add(std::integral_constant<int, 3>());
        case 4: return add(std::integral_constant<int, 4>());
        case 5: return add(std::integral_constant<int, 5>());
        default: return add(std::integral_constant<int, 6>());
      }
    }
#endif
  }

#if defined(__AVX2__)
  template <int R>
  void AddValuesOf(const Block<KV>& block, int64_t row, const float* probs, const float* decays,
                   float* weighted) const {
    int64_t d = 0;
#if defined(__AVX512F__)
    for (; d + 4 * kBlockLanes <= head_dim; d += 4 * kBlockLanes) {
      AddElements<R, 2, __m512>(block, row, d, probs, decays, weighted + d);
    }
    for (; d + 2 * kBlockLanes <= head_dim; d += 2 * kBlockLanes) {
      AddElements<R, 1, __m512>(block, row, d, probs, decays, weighted + d);
    }
#endif
    for (; d < head_dim; d += kBlockLanes) AddElements<R, 1, __m256>(block, row, d, probs, decays, weighted + d);
  }

  // Of kCount vectors of elements from `d` on.
  template <int R, int kCount, typename V>
  void AddElements(const Block<KV>& block, int64_t row, int64_t d, const float* probs, const float* decays,
                   float* weighted) const {
    typedef uint32_t Words __attribute__((vector_size(sizeof(V))));
    constexpr int64_t kElements = sizeof(V) / sizeof(BFloat16);
    V even[R][kCount], odd[R][kCount];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V decay = Broadcast<V>(decays[r]);
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) {
        const float* sums = weighted + r * padded_dim + i * kElements;
        even[r][i] = LoadHalves<V>(sums) * decay;
        odd[r][i] = LoadHalves<V>(sums + 8) * decay;
      }
    }
    const auto add = [&](int64_t k, const Words* pairs) __attribute__((always_inline)) {
      V first[kCount], second[kCount];
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) first[i] = (V)(pairs[i] << 16), second[i] = (V)(pairs[i] & 0xffff0000u);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const V p = Broadcast<V>(probs[r * kBlock + k]);
#pragma GCC unroll 2
        for (int i = 0; i < kCount; ++i) {
          even[r][i] = MultiplyAdd(p, first[i], even[r][i]);
          odd[r][i] = MultiplyAdd(p, second[i], odd[r][i]);
        }
      }
    };
    Words pairs[kCount] = {};
    for (int64_t k = 0; k < block.count; ++k) {
      const KV* from = block.Row(k, row) + d;
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) pairs[i] = Load<Words>(from + i * kElements);
      add(k, pairs);
    }
    // Packed, the last of an odd count has a 0 beside it.
    if (block.count % 2 != 0) {
      for (Words& pair : pairs) pair = Words{};
      add(block.count, pairs);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int i = 0; i < kCount; ++i) {
        float* sums = weighted + r * padded_dim + i * kElements;
        StoreHalves(sums, even[r][i]);
        StoreHalves(sums + 8, odd[r][i]);
      }
    }
  }

  // Sums of elements at even places, or at odd ones, of each 16 eight.
  template <typename V>
  static V LoadHalves(const float* from) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64) {
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from)), _mm256_loadu_ps(from + 16), 1);
    }
#endif
    if constexpr (sizeof(V) == 32) return _mm256_loadu_ps(from);
  }
  static void StoreHalves(float* to, __m256 sums) { _mm256_storeu_ps(to, sums); }
  static __m256 MultiplyAdd(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
#if defined(__AVX512F__)
  static void StoreHalves(float* to, __m512 sums) {
    _mm256_storeu_ps(to, _mm512_castps512_ps256(sums));
    _mm256_storeu_ps(to + 16, _mm512_extractf32x8_ps(sums, 1));
  }
  static __m512 MultiplyAdd(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
#endif
  template <typename V>
  static V Broadcast(float x) {
    return x - V{};
  }
#endif

  // What they see of the keys of one segment. `after` is what this thread reads next.
  __attribute__((noinline)) void See(const Queries& some, int64_t segment, const Block<KV>& after, Seen* seen) const {
    const int64_t per_head = some.num_tokens * group;
    const bool adds_directly = AddsDirectly(per_head);
    Packer<KV> packer(head_dim);
    const int64_t query_stride = (head_dim + 31) / 32 * 32;  // whole tiles of a matrix unit
    thread_local Aligned<X> queries;
    thread_local std::vector<char> keys, values;
    thread_local std::vector<float> scores, probs, row_scales;
    thread_local std::vector<int64_t> visible;  // how many keys, from position 0 on
    queries.assign(Count(some) * query_stride, 0);
    keys.resize(some.num_heads * packer.keys_bytes());
    values.resize(some.num_heads * packer.values_bytes());
    probs.resize(kMaxRows * kBlock);
    scores.resize(kMaxRows * kBlock);
    row_scales.resize(kIsInt8 ? 2 * some.num_heads * kBlock : 0);
    visible.resize(Count(some));
    for (int64_t i = 0; i < Count(some); ++i) {
      visible[i] = Position(some, i) + 1;
      const char* query = static_cast<const char*>(q) + At(some, i) * (is_float ? sizeof(float) : sizeof(BFloat16));
      if (std::is_same_v<X, BFloat16> || is_float) {
        std::memcpy(&queries[i * query_stride], query, head_dim * sizeof(X));
      } else {
        const auto* from = reinterpret_cast<const BFloat16*>(query);
        for (int64_t d = 0; d < head_dim; ++d) queries[i * query_stride + d] = ToFloat(from[d]);
      }
    }
    seen->Clear(Count(some), padded_dim);
    const int64_t start = Start(some, segment), end = std::min((segment + 1) * kSegment, End(some));
    Block<KV> next = First(some, segment);
    for (int64_t first = start; first < end; first += kBlock) {
      const Block<KV> block = next;
      next = Find(some, first + kBlock, end);
      Fetch<KV> fetch(next.count > 0 ? next : after, head_dim);
      for (int64_t head = 0; head < some.num_heads; ++head) {
        for (int64_t k = 0; k < block.count; k += kBlockLanes) {
          packer.Keys(block, k, 2 * head, &keys[head * packer.keys_bytes()]);
          if (!adds_directly) packer.Values(block, k, 2 * head + 1, &values[head * packer.values_bytes()]);
          fetch.UpTo(head * kBlock + k + kBlockLanes, some.num_heads * kBlock);
        }
      }
      for (int64_t i = 0; i < static_cast<int64_t>(row_scales.size()); ++i) {
        // What is past the end is not seen, but its probability of 0 is multiplied too.
        row_scales[i] = i % kBlock < block.count ? block.scales[i % kBlock][i / kBlock * block.scale_stride] : 0.0f;
      }
      const int64_t num_blocks = (block.count + kBlockLanes - 1) / kBlockLanes;
      const int64_t value_lines = (block.count + ValueLines::kInputs - 1) / ValueLines::kInputs;
      for (int64_t head = 0; head < some.num_heads; ++head) {
        const float* key_scales = kIsInt8 ? &row_scales[2 * head * kBlock] : nullptr;
        const float* value_scales = kIsInt8 ? key_scales + kBlock : nullptr;
        for (int64_t n = 0; n < per_head; n += kMaxRows) {
          const int64_t i = head * per_head + n, rows = std::min(kMaxRows, per_head - n);
          if (visible[i + rows - 1] <= first || Hidden(visible[i] - 1) >= first + kBlock) continue;
          Rows<Lines, Start::kZero>(rows, &queries[i * query_stride], query_stride, &keys[head * packer.keys_bytes()],
                                    packer.key_block_bytes(), num_blocks, head_dim / Lines::kInputs,
                                    &values[head * packer.values_bytes()], scores.data(), kBlock);
          float decays[kMaxRows];
          for (int64_t r = 0; r < rows; ++r) {
            decays[r] = Softmax(&scores[r * kBlock], key_scales, value_scales, Hidden(visible[i + r] - 1) - first,
                                visible[i + r] - first, scale, &seen->largest[i + r], &seen->total[i + r],
                                &probs[r * kBlock]);
          }
          if (adds_directly) {
            AddValues(rows, block, 2 * head + 1, probs.data(), decays, &seen->weighted[i * padded_dim]);
            continue;
          }
          Rows<ValueLines, Start::kScaled>(rows, probs.data(), kBlock, &values[head * packer.values_bytes()],
                                           packer.value_block_bytes(), padded_dim / kBlockLanes, value_lines,
                                           keys.data(), &seen->weighted[i * padded_dim], padded_dim, decays);
        }
      }
    }
  }

  __attribute__((noinline)) void Write(const Queries& some, const Seen& seen) const {
    Packer<KV> packer(head_dim);
    for (int64_t i = 0; i < Count(some); ++i) {
      const float* sums = &seen.weighted[i * padded_dim];
      if (is_float) {
        packer.Write(sums, seen.total[i], static_cast<float*>(out) + At(some, i));
      } else {
        packer.Write(sums, seen.total[i], static_cast<BFloat16*>(out) + At(some, i));
      }
    }
  }

  // One token a row: a task takes one segment of a row, with all heads. The last of a row to end adds them up.
  void AttendOnce(Team& team, int64_t rows) const {
    struct Row {
      Queries queries;
      std::vector<Seen> segments;
      std::atomic<int64_t> left;
      int64_t first_segment;
    };
    std::vector<Row> all(rows);
    std::vector<std::pair<Row*, int64_t>> tasks;
    for (int64_t i = 0; i < rows; ++i) {
      Row& row = all[i];
      row.queries = {i, 0, kv_heads, 0, 1};
      row.first_segment = FirstSegment(row.queries);
      row.left = (End(row.queries) + kSegment - 1) / kSegment - row.first_segment;
      row.segments.resize(row.left);
      for (int64_t n = 0; n < row.left; ++n) tasks.emplace_back(&row, row.first_segment + n);
    }
    const int64_t count = tasks.size(), num_threads = team.num_threads();
    team.For(count, [&](int64_t task) {
      Row& row = *tasks[task].first;
      const int64_t segment = tasks[task].second;
      // Most likely this thread's next.
      const auto& later = tasks[std::min(task + num_threads, count - 1)];
      const Block<KV> after = First(later.first->queries, later.second);
      See(row.queries, segment, after, &row.segments[segment - row.first_segment]);
      if (row.left.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      Seen& seen = row.segments[0];
      for (size_t n = 1; n < row.segments.size(); ++n) {
        for (int64_t i = 0; i < heads; ++i) seen.Add(row.segments[n], i, padded_dim, scale);
      }
      Write(row.queries, seen);
    });
  }

  // Many tokens a row: a task takes some of them through all segments, with one KV head.
  void AttendChunk(Team& team, int64_t rows) const {
    const int64_t step = std::clamp<int64_t>(kQueries / group, 1, tokens);
    const int64_t parts = (tokens + step - 1) / step;
    team.For(rows * parts * kv_heads, [&](int64_t task) {
      // The last queries have the most keys: they go first.
      const int64_t row = task / kv_heads / parts, part = parts - 1 - task / kv_heads % parts;
      const Queries some{row, task % kv_heads, 1, part * step, std::min(step, tokens - part * step)};
      thread_local Seen seen, later;
      const int64_t first = FirstSegment(some);
      See(some, first, First(some, first + 1), &seen);
      for (int64_t segment = first + 1; segment * kSegment < End(some); ++segment) {
        See(some, segment, First(some, segment + 1), &later);
        for (int64_t i = 0; i < Count(some); ++i) {
          if (Position(some, i) >= segment * kSegment) seen.Add(later, i, padded_dim, scale);
        }
      }
      Write(some, seen);
    });
  }
};

template <typename Lines, typename KV>
void AttendWith(const AttentionCall& call, Team& team) {
  const Attention<Lines, KV> attention{call.q,      static_cast<const KV*>(call.pages), call.scales, call.tables,
                                       call.positions, call.out, call.is_float, call.tokens, call.heads, call.head_dim,
                                       call.page_size, call.kv_heads, call.width, call.window};
  if (call.tokens == 1) {
    attention.AttendOnce(team, call.rows);
  } else {
    attention.AttendChunk(team, call.rows);
  }
}

}  // namespace

void AttentionCall::Run(Team& team) const {
  switch (format) {
    case Format::kBFloat16:
      return is_float ? AttendWith<BFloat16Lines, BFloat16>(*this, team)
                      : AttendWith<BestBFloat16Lines, BFloat16>(*this, team);
    case Format::kFloat32:
      return AttendWith<FloatLines, float>(*this, team);
    case Format::kInt8:
      return is_float ? AttendWith<BFloat16Lines, int8_t>(*this, team)
                      : AttendWith<BestBFloat16Lines, int8_t>(*this, team);
  }
}

std::string AttentionCall::Complaint() const {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t last = positions[(row + 1) * tokens - 1];
    if (last >= 0 && last < width * page_size) continue;
    return "row " + std::to_string(row) + " has a query at position " + std::to_string(last) + ", and pages for " +
           std::to_string(width * page_size) + " tokens";
  }
  return "";
}

}  // namespace jaxllama
