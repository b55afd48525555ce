// Small matrix products on packed matrices, which both the model's products and attention consist of.
//
// A packed matrix has its outputs in blocks of 16. Of a block, a line of 64 bytes holds one float32, two bfloat16 or
// four int8 inputs of each output, side by side, so that a lane of 32 bits has one output's. Sums are float32 and taken
// input by input, whatever the number of rows or outputs at once.
#pragma once

#include <algorithm>
#include <type_traits>

#include "simd.h"

#if JAXLLAMA_AMX
#include "amx.h"
#endif

namespace jaxllama {

constexpr int64_t kMaxRows = 6;  // rows of one tile, at most
constexpr int64_t kAhead = 24;  // lines that are fetched before they are read
// Of many rows: what is read of some blocks and rows, and what of the blocks is fetched, fits the nearest cache.
constexpr int64_t kInputsAtOnce = kLanes == 16 ? 64 : 128;

// What weights and caches consist of.
enum class Format { kFloat32, kBFloat16, kInt8 };

// What a line holds, and the type of what it is multiplied with. In tiles of R rows one number of it is `kUnit` times what
// `Expand` gives.
struct FloatLines {
  using X = float;
  static constexpr int kInputs = 1;
  template <int R>
  static constexpr float kUnit = 1.0f;
  template <int kInput, int R>
  static F32 Expand(I32 line) {
    return (F32)line;
  }
};

struct BFloat16Lines {
  using X = float;
  static constexpr int kInputs = 2;
  template <int R>
  static constexpr float kUnit = 1.0f;
  template <int kInput, int R>
  static F32 Expand(I32 line) {
    return (F32)(kInput == 0 ? (U32)line << 16 : (U32)line & 0xffff0000u);
  }
};

struct Int8Lines {
  using X = float;
  static constexpr int kInputs = 4;
  // For few rows a byte goes to the top of its lane, which is one operation less; the sums are brought back by a power of
  // two, which changes no bit.
  template <int R>
  static constexpr float kUnit = R <= 2 ? 0x1p-24f : 1.0f;
  template <int kInput, int R>
  static F32 Expand(I32 line) {
    if constexpr (R <= 2) return Floats(TopByte<kInput>(line));
    return Floats((I32)((U32)line << (24 - 8 * kInput)) >> 24);
  }
};

struct BFloat16PairLines {  // as BFloat16Lines, multiplied in pairs
  using X = BFloat16;
  static constexpr int kInputs = 2;
  template <int R>
  static constexpr float kUnit = 1.0f;
};

// What multiplies bfloat16 with weights best.
#if JAXLLAMA_AMX
using BestBFloat16Lines = BFloat16TileLines;
using BestInt8Lines = Int8TileLines;
#elif JAXLLAMA_DOTS_PAIRS
using BestBFloat16Lines = BFloat16PairLines;
using BestInt8Lines = Int8Lines;
#else
using BestBFloat16Lines = BFloat16Lines;
using BestInt8Lines = Int8Lines;
#endif

template <typename Lines>
constexpr bool kReadsPairs = std::is_same_v<typename Lines::X, BFloat16>;

// Of the same numbers as float32, which several tiles of rows share.
template <typename Lines>
constexpr bool kIsWidened = !kReadsPairs<Lines> && !std::is_same_v<Lines, FloatLines>;

// Lines whose numbers are also stored as float32, one input a line.
template <typename Lines>
struct KeptLines : Lines {};
template <typename Lines>
constexpr bool kKeeps = false;
template <typename Lines>
constexpr bool kKeeps<KeptLines<Lines>> = true;

// How many blocks a tile of so many rows takes: enough sums that none is waited for, and no more than there are
// registers.
#if defined(__AVX512F__)
constexpr int BlocksAtOnce(int64_t) {
  return 4;
}
#elif defined(__AVX2__)
constexpr int BlocksAtOnce(int64_t rows) {
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}
#else
constexpr int BlocksAtOnce(int64_t rows) {
  return rows == 1 ? 2 : 1;
}
#endif

template <typename Lines, int R, int C>
struct Sums {
  F32 at[R][C * kVectors];
  char* kept = nullptr;  // of KeptLines: of each of C blocks `kInputsAtOnce` lines

  template <int kInput>
  __attribute__((always_inline)) void AddInput(const float* x, int64_t x_stride, const char* line,
                                               int64_t block_bytes) {
    if constexpr (R == 1) {
      // One vector after another: they need no registers of their own.
      const F32 by = Set1(x[kInput]);
#pragma GCC unroll 16
      for (int i = 0; i < C * kVectors; ++i) {
        const char* part = line + i / kVectors * block_bytes + i % kVectors * (4 * kLanes);
        at[0][i] = Fma(by, Lines::template Expand<kInput, R>(Load<I32>(part)), at[0][i]);
        Wait(at[0][i], x, line);
      }
      return;
    }
    F32 w[C * kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < C * kVectors; ++i) {
      w[i] = Lines::template Expand<kInput, R>(
          Load<I32>(line + i / kVectors * block_bytes + i % kVectors * (4 * kLanes)));
      if constexpr (kKeeps<Lines>) {
        Store(kept + (i / kVectors * kInputsAtOnce + kInput) * kLineBytes + i % kVectors * (4 * kLanes), w[i]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32 by = Set1(x[r * x_stride + kInput]);
#pragma GCC unroll 16
      for (int i = 0; i < C * kVectors; ++i) at[r][i] = Fma(by, w[i], at[r][i]);
    }
  }

  // Adds the inputs of a line of each of C blocks.
  __attribute__((always_inline)) void AddLine(const float* x, int64_t x_stride, const char* line,
                                              int64_t block_bytes) {
    AddInput<0>(x, x_stride, line, block_bytes);
    AddFrom<1>(x, x_stride, line, block_bytes);
  }

  template <int kInput>
  __attribute__((always_inline)) void AddFrom(const float* x, int64_t x_stride, const char* line,
                                              int64_t block_bytes) {
    if constexpr (kInput < Lines::kInputs) {
      Wait(at[R - 1][C * kVectors - 1], x, line);
      AddInput<kInput>(x, x_stride, line, block_bytes);
      AddFrom<kInput + 1>(x, x_stride, line, block_bytes);
    }
  }

#if JAXLLAMA_DOTS_PAIRS
  __attribute__((always_inline)) void AddLine(const BFloat16* x, int64_t x_stride, const char* line,
                                              int64_t block_bytes) {
    I32 w[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) w[c] = Load<I32>(line + c * block_bytes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, x + r * x_stride, sizeof pair);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) at[r][c] = DotPairs(pair, w[c], at[r][c]);
    }
  }
#endif

  // Adds lines first … end, and has the CPU fetch what is `ahead`, so many bytes further with every line.
  __attribute__((always_inline)) void AddLines(const typename Lines::X* x, int64_t x_stride, const char* w,
                                               int64_t block_bytes, int64_t first, int64_t end, const char* ahead,
                                               int64_t ahead_bytes, int64_t ahead_block_bytes) {
    for (int64_t n = first; n < end; ++n) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) Prefetch(ahead + c * ahead_block_bytes + n * ahead_bytes);
      AddLine(x + n * Lines::kInputs, x_stride, w + n * kLineBytes, block_bytes);
      if constexpr (kKeeps<Lines>) kept += Lines::kInputs * kLineBytes;
    }
  }
};

// What sums begin with: zero, what is in y, or that scaled.
enum class Start { kZero, kAdded, kScaled };

// What a tile has the CPU fetch while it multiplies: before line `turn` what is at `first`, then what is at `rest`, each
// `bytes` further with every line, and of every block.
struct Ahead {
  const char* first;
  int64_t turn;
  const char* rest;
  int64_t bytes, block_bytes;
};

// A product of R rows and C blocks.
template <typename Lines, int R, int C, Start start>
__attribute__((noinline)) void Tile(const typename Lines::X* x, int64_t x_stride, const char* w, int64_t block_bytes,
                                    int64_t lines, const Ahead& ahead, float* y, int64_t y_stride,
                                    const float* scale, char* kept = nullptr) {
  static_assert(start == Start::kZero || Lines::template kUnit<R> == 1.0f);
  Sums<Lines, R, C> sums;
  sums.kept = kept;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * kVectors; ++i) {
      sums.at[r][i] = start == Start::kZero ? Set1(0.0f) : Load<F32>(y + r * y_stride + i * kLanes);
      if constexpr (start == Start::kScaled) sums.at[r][i] = sums.at[r][i] * Set1(scale[r]);
    }
  }
  sums.AddLines(x, x_stride, w, block_bytes, 0, ahead.turn, ahead.first, ahead.bytes, ahead.block_bytes);
  sums.AddLines(x, x_stride, w, block_bytes, ahead.turn, lines, ahead.rest, ahead.bytes, ahead.block_bytes);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * kVectors; ++i) {
      constexpr float kUnit = Lines::template kUnit<R>;
      Store(y + r * y_stride + i * kLanes, kUnit == 1.0f ? sums.at[r][i] : sums.at[r][i] * Set1(kUnit));
    }
  }
}

// One tile's rows, through all blocks.
template <typename Lines, int R, Start start>
void OneTile(const typename Lines::X* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t blocks,
             int64_t lines, const char* next, float* y, int64_t y_stride, const float* scale) {
  constexpr int C = BlocksAtOnce(R);
  const int64_t turn = std::max<int64_t>(0, lines - kAhead);
  for (int64_t left = blocks; left > 0;) {
    const int64_t count = left >= C ? C : 1;
    const char* after = left == count ? next : w + count * block_bytes;
    const Ahead ahead{w + kAhead * kLineBytes, turn, after - turn * kLineBytes, kLineBytes, block_bytes};
    const auto tile = count == C ? &Tile<Lines, R, C, start> : &Tile<Lines, R, 1, start>;
    tile(x, x_stride, w, block_bytes, lines, ahead, y, y_stride, scale, nullptr);
    left -= count;
    w += count * block_bytes;
    y += count * kBlockLanes;
  }
}

// Several tiles of 3 rows or more, and C blocks: all tiles go through some inputs, then through the next, so that what
// they read stays in the nearest cache. The first tile keeps what it widens for the others. Each has a share of what comes
// next fetched: so memory is read while there is much to multiply.
template <typename Lines, int C>
void TilesOfBlocks(int64_t tiles, int64_t rows, const typename Lines::X* x, int64_t x_stride, const char* w,
                   int64_t block_bytes, int64_t lines, const char* next, float* y, int64_t y_stride) {
  constexpr int64_t kLines = kReadsPairs<Lines> ? INT64_MAX : kInputsAtOnce / Lines::kInputs;
  alignas(kLineBytes) char kept[kIsWidened<Lines> ? C * kInputsAtOnce * kLineBytes : 1];
  for (int64_t first = 0; first < lines; first += kLines) {
    const int64_t count = std::min(kLines, lines - first), end = first + count;
    const char* after = end < lines ? w + end * kLineBytes : next;
    const int64_t fetched = std::min(kLines, end < lines ? lines - end : lines) * kLineBytes / tiles;
    for (int64_t n = 0, row = 0; n < tiles; ++n, after += fetched) {
      // Tiles of nearly the same size: those of few rows are slower.
      const int64_t size = (rows - row) / (tiles - n);
      const auto run = [&](auto lines_of, auto size_of, const char* from, int64_t from_bytes, int64_t num_lines) {
        using Read = decltype(lines_of);
        constexpr int R = size_of();
        const Ahead ahead{after, num_lines, nullptr, (fetched + num_lines - 1) / num_lines, block_bytes};
        const auto tile = first > 0 ? &Tile<Read, R, C, Start::kAdded> : &Tile<Read, R, C, Start::kZero>;
        tile(x + first * Lines::kInputs + row * x_stride, x_stride, from, from_bytes, num_lines, ahead,
             y + row * y_stride, y_stride, nullptr, kept);
      };
      const auto read = [&](auto size_of) {
        if constexpr (kIsWidened<Lines>) {
          if (n > 0) {
            return run(FloatLines(), size_of, kept, kInputsAtOnce * kLineBytes, count * Lines::kInputs);
          }
        }
        using Read = std::conditional_t<kIsWidened<Lines>, KeptLines<Lines>, Lines>;
        run(Read(), size_of, w + first * kLineBytes, block_bytes, count);
      };
      switch (size) {
        case 3: read(std::integral_constant<int, 3>()); break;
        case 4: read(std::integral_constant<int, 4>()); break;
        case 5: read(std::integral_constant<int, 5>()); break;
        default: read(std::integral_constant<int, kMaxRows>());
      }
      row += size;
    }
  }
}

// Several tiles of 3 rows or more, some blocks after the others.
template <typename Lines>
void ManyTiles(int64_t rows, const typename Lines::X* x, int64_t x_stride, const char* w, int64_t block_bytes,
               int64_t blocks, int64_t lines, const char* next, float* y, int64_t y_stride) {
  constexpr int C = BlocksAtOnce(3);
  const int64_t tiles = (rows + kMaxRows - 1) / kMaxRows;
  for (int64_t left = blocks; left > 0;) {
    const int64_t count = left >= C ? C : 1;
    const char* after = left == count ? next : w + count * block_bytes;
    const auto multiply = count == C ? &TilesOfBlocks<Lines, C> : &TilesOfBlocks<Lines, 1>;
    multiply(tiles, rows, x, x_stride, w, block_bytes, lines, after, y, y_stride);
    left -= count;
    w += count * block_bytes;
    y += count * kBlockLanes;
  }
}

// As `Rows`, with vectors.
template <typename Lines, Start start>
void RowsOfVectors(int64_t rows, const typename Lines::X* x, int64_t x_stride, const char* w, int64_t block_bytes,
                   int64_t blocks, int64_t lines, const char* next, float* y, int64_t y_stride, const float* scale) {
  const auto run = [&](auto rows_of) {
    rows_of(x, x_stride, w, block_bytes, blocks, lines, next, y, y_stride, scale);
  };
  if constexpr (start == Start::kZero) {
    if (rows > kMaxRows) {
      return ManyTiles<Lines>(rows, x, x_stride, w, block_bytes, blocks, lines, next, y, y_stride);
    }
  }
  switch (rows) {
    case 1: return run(OneTile<Lines, 1, start>);
    case 2: return run(OneTile<Lines, 2, start>);
    case 3: return run(OneTile<Lines, 3, start>);
    case 4: return run(OneTile<Lines, 4, start>);
    case 5: return run(OneTile<Lines, 5, start>);
    default: return run(OneTile<Lines, kMaxRows, start>);
  }
}

// y[r][n] = sum over k of x[r][k] * w[k][n], for so many rows and `blocks`, each `block_bytes` after the other. `next` is
// what is read after them. Start::kScaled: added to y[r][n] * scale[r].
template <typename Lines, Start start>
void Rows(int64_t rows, const typename Lines::X* x, int64_t x_stride, const void* blocks_at, int64_t block_bytes,
          int64_t blocks, int64_t lines, const void* next_at, float* y, int64_t y_stride,
          const float* scale = nullptr) {
  const char *w = static_cast<const char*>(blocks_at), *next = static_cast<const char*>(next_at);
#if JAXLLAMA_AMX
  if constexpr (kReadsPairs<Lines>) {
    static_assert(start == Start::kZero);
    RowsOfTiles<Lines>(rows, x, x_stride, w, block_bytes, blocks, lines, next, y, y_stride);
  } else
#endif
    RowsOfVectors<Lines, start>(rows, x, x_stride, w, block_bytes, blocks, lines, next, y, y_stride, scale);
}

}  // namespace jaxllama
