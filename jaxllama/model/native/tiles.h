// Small matrix products on packed matrices, which both the model's products and attention consist of.
//
// A packed matrix has its outputs in blocks of 16. Of a block, a line of 64 bytes holds one float32, two bfloat16 or
// four int8 inputs of each output, side by side, so that a lane of 32 bits has one output's. Sums are float32 and taken
// input by input, whatever the number of rows or outputs at once.
#pragma once

#include <algorithm>

#include "simd.h"

namespace jaxllama {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kMaxRows = 6;  // rows of one tile, at most
constexpr int64_t kAhead = 24;  // lines that are fetched before they are read

// What weights and caches consist of.
enum class Format { kFloat32, kBFloat16, kInt8 };

// What a line holds, and the type of what it is multiplied with.
struct FloatLines {
  using X = float;
  static constexpr int kInputs = 1;
  template <int kInput>
  static F32 Expand(I32 line) {
    return (F32)line;
  }
};

struct BFloat16Lines {
  using X = float;
  static constexpr int kInputs = 2;
  template <int kInput>
  static F32 Expand(I32 line) {
    return (F32)(kInput == 0 ? (U32)line << 16 : (U32)line & 0xffff0000u);
  }
};

struct Int8Lines {
  using X = float;
  static constexpr int kInputs = 4;
  template <int kInput>
  static F32 Expand(I32 line) {
    return Floats((I32)((U32)line << (24 - 8 * kInput)) >> 24);
  }
};

struct BFloat16PairLines {  // as BFloat16Lines, multiplied in pairs
  using X = BFloat16;
  static constexpr int kInputs = 2;
};

#if JAXLLAMA_DOTS_PAIRS
using BestBFloat16Lines = BFloat16PairLines;
#else
using BestBFloat16Lines = BFloat16Lines;
#endif

// How many rows a tile takes at most, and how many blocks one of so many rows takes: enough sums that none is waited
// for, and no more than there are registers.
#if defined(__AVX512F__)
template <typename Lines>
constexpr int64_t kRowsAtOnce = kMaxRows;
template <typename Lines>
constexpr int BlocksAtOnce(int64_t) {
  return 4;
}
#elif defined(__AVX2__)
template <typename Lines>
constexpr int64_t kRowsAtOnce = Lines::kInputs == 2 ? 5 : kMaxRows;
template <typename Lines>
constexpr int BlocksAtOnce(int64_t rows) {
  return rows == 1 ? 4 : rows == 2 ? 2 : 1;
}
#else
template <typename Lines>
constexpr int64_t kRowsAtOnce = kMaxRows;
template <typename Lines>
constexpr int BlocksAtOnce(int64_t rows) {
  return rows == 1 ? 2 : 1;
}
#endif

template <typename Lines, int R, int C>
struct Sums {
  F32 at[R][C * kVectors];

  template <int kInput>
  __attribute__((always_inline)) void AddInput(const float* x, int64_t x_stride, const char* line,
                                               int64_t block_bytes) {
    F32 w[C * kVectors];
#pragma GCC unroll 16
    for (int i = 0; i < C * kVectors; ++i) {
      w[i] = Lines::template Expand<kInput>(
          Load<I32>(line + i / kVectors * block_bytes + i % kVectors * (4 * kLanes)));
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

  // Adds lines first … end, and has the CPU fetch those `ahead` of them.
  __attribute__((always_inline)) void AddLines(const typename Lines::X* x, int64_t x_stride, const char* w,
                                               int64_t block_bytes, int64_t first, int64_t end, const char* ahead) {
    for (int64_t n = first; n < end; ++n) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) Prefetch(ahead + c * block_bytes + n * kLineBytes);
      AddLine(x + n * Lines::kInputs, x_stride, w + n * kLineBytes, block_bytes);
    }
  }
};

enum class Start { kZero, kScaled };

// A product of R rows and C blocks. `next` is where the next such product's blocks are.
template <typename Lines, int R, int C, Start start>
__attribute__((noinline)) void Tile(const typename Lines::X* x, int64_t x_stride, const char* w, int64_t block_bytes,
                                    int64_t lines, const char* next, float* y, int64_t y_stride, const float* scale) {
  Sums<Lines, R, C> sums;
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * kVectors; ++i) {
      sums.at[r][i] = start == Start::kZero ? Set1(0.0f) : Load<F32>(y + r * y_stride + i * kLanes) * Set1(scale[r]);
    }
  }
  const int64_t near_end = std::max<int64_t>(0, lines - kAhead);
  sums.AddLines(x, x_stride, w, block_bytes, 0, near_end, w + kAhead * kLineBytes);
  sums.AddLines(x, x_stride, w, block_bytes, near_end, lines, next - near_end * kLineBytes);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int i = 0; i < C * kVectors; ++i) Store(y + r * y_stride + i * kLanes, sums.at[r][i]);
  }
}

template <typename Lines, int R, Start start>
void RowsOf(const typename Lines::X* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t blocks,
            int64_t lines, float* y, int64_t y_stride, const float* scale) {
  constexpr int C = BlocksAtOnce<Lines>(R);
  int64_t block = 0;
  for (; block + C <= blocks; block += C, w += C * block_bytes, y += C * kBlockLanes) {
    Tile<Lines, R, C, start>(x, x_stride, w, block_bytes, lines, w + C * block_bytes, y, y_stride, scale);
  }
  for (; block < blocks; ++block, w += block_bytes, y += kBlockLanes) {
    Tile<Lines, R, 1, start>(x, x_stride, w, block_bytes, lines, w + block_bytes, y, y_stride, scale);
  }
}

// y[r][n] = sum over k of x[r][k] * w[k][n], for so many rows and `blocks`, each `block_bytes` after the other.
// Start::kScaled: added to y[r][n] * scale[r].
template <typename Lines, Start start>
void Rows(int64_t rows, const typename Lines::X* x, int64_t x_stride, const void* w, int64_t block_bytes,
          int64_t blocks, int64_t lines, float* y, int64_t y_stride, const float* scale = nullptr) {
  // Tiles of nearly the same size: those of few rows are slower.
  for (int64_t tiles = (rows + kRowsAtOnce<Lines> - 1) / kRowsAtOnce<Lines>; tiles > 0; --tiles) {
    const int64_t count = (rows + tiles - 1) / tiles;
    const auto run = [&](auto rows_of) {
      rows_of(x, x_stride, static_cast<const char*>(w), block_bytes, blocks, lines, y, y_stride, scale);
    };
    switch (count) {
      case 1: run(RowsOf<Lines, 1, start>); break;
      case 2: run(RowsOf<Lines, 2, start>); break;
      case 3: run(RowsOf<Lines, 3, start>); break;
      case 4: run(RowsOf<Lines, 4, start>); break;
      case 5: run(RowsOf<Lines, 5, start>); break;
      default: run(RowsOf<Lines, kRowsAtOnce<Lines>, start>);
    }
    rows -= count;
    x += count * x_stride;
    y += count * y_stride;
    if (start == Start::kScaled) scale += count;
  }
}

}  // namespace jaxllama
