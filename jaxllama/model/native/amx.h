// Products of bfloat16 by Intel's matrix unit, AMX: one instruction multiplies 16 rows of 32 inputs with 16 outputs of
// as many, and 16 lines of a packed block are such a tile of weights as they lie in memory.
//
// A sum is taken 32 inputs at a time from the first on, those at even and at odd places by themselves (Intel's
// architecture manual, TDPBF16PS), whatever rows and outputs are multiplied beside it. So every number of rows goes
// through here: another instruction would add in another order. Subnormal numbers count as zeros.
//
// The instructions are spelled out: GCC 12's functions for them do not say which memory they read and write.
#pragma once

#include <algorithm>
#include <vector>

#include "simd.h"

namespace jaxllama {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileInputs = 32;
constexpr int64_t kTileBytes = 1024;  // of weights
constexpr int64_t kRowsOfTiles = 2 * kTileRows;  // rows that are multiplied at once, at most

// The unit's eight registers, while a thread has them: 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights.
class Tiles {
 public:
  Tiles() = default;
  ~Tiles() { __asm__ volatile("tilerelease" ::: "memory"); }
  Tiles(const Tiles&) = delete;

  // For so many rows, 32 at most.
  void Shape(int64_t rows) {
    if (rows == rows_) return;
    rows_ = rows;
    const auto first = static_cast<uint8_t>(std::min(rows, kTileRows));
    const auto second = static_cast<uint8_t>(std::max<int64_t>(rows - kTileRows, 1));
    const struct alignas(64) {
      uint8_t palette, start, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } shapes{1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {first, first, second, second, first, second, 16, 16}};
    static_assert(sizeof shapes == 64);
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));
  }

  template <int kTile>
  static void Zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static void Load(const void* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void Store(void* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(kTile) : "memory");
  }
  template <int kSums, int kRows, int kWeights>
  static void Multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kRows), "i"(kWeights));
  }

 private:
  int64_t rows_ = 0;
};

// Lines of bfloat16 and of int8 as tiles, 32 inputs each; past the last line there are zeros. int8 becomes bfloat16.
struct BFloat16TileLines {
  using X = BFloat16;
  static constexpr int kInputs = 2;

  static const char* Tile(const char* lines, int64_t count, char* scratch) {
    if (count == kTileInputs / kInputs) return lines;
    std::memcpy(scratch, lines, count * 64);
    std::memset(scratch + count * 64, 0, kTileBytes - count * 64);
    return scratch;
  }
};

struct Int8TileLines {
  using X = BFloat16;
  static constexpr int kInputs = 4;

  static const char* Tile(const char* lines, int64_t count, char* scratch) {
    for (int64_t i = 0; i < count; ++i) {
      const I32 line = jaxllama::Load<I32>(lines + i * 64);
      // Integers have as many bits as a bfloat16 is precise to: the lower half of the float32 is zeros.
      const F32 unit = Set1(0x1p-24f);
      const auto first = (U32)(Floats(TopByte<0>(line)) * unit), second = (U32)(Floats(TopByte<1>(line)) * unit);
      const auto third = (U32)(Floats(TopByte<2>(line)) * unit), fourth = (U32)(Floats(TopByte<3>(line)) * unit);
      jaxllama::Store(scratch + 128 * i, first >> 16 | second);
      jaxllama::Store(scratch + 128 * i + 64, third >> 16 | fourth);
    }
    if (count < kTileInputs / kInputs) std::memset(scratch + 128 * count, 0, kTileBytes - 128 * count);
    return scratch;
  }
};

// What comes next is fetched to a near cache, some lines with every tile.
struct AheadOfTiles {
  const char* at;
  int64_t lines;  // a tile

  void Fetch() {
    for (int64_t i = 0; i < lines; ++i, at += 64) PrefetchToSecondLevel(at);
  }
};

// The sums of up to 16 or 32 rows and one or two blocks, added to what the registers hold.
template <typename Lines, int kRowTiles, int kBlocks>
void AddTiles(int64_t rows, const BFloat16* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t lines,
              AheadOfTiles ahead) {
  constexpr int64_t kLines = kTileInputs / Lines::kInputs;
  alignas(64) char scratch[2][kBlocks][kTileBytes];
  alignas(64) BFloat16 padded[kRowsOfTiles * kTileInputs];
  for (int64_t line = 0, turn = 0; line < lines; line += kLines, turn ^= 1) {
    const int64_t count = std::min(kLines, lines - line);
    const BFloat16* from = x + line * Lines::kInputs;
    int64_t stride = x_stride;
    if (count < kLines) {
      std::fill(padded, padded + rows * kTileInputs, 0);
      for (int64_t r = 0; r < rows; ++r) std::copy_n(from + r * stride, count * Lines::kInputs, padded + r * kTileInputs);
      from = padded;
      stride = kTileInputs;
    }
    ahead.Fetch();
    Tiles::Load<4>(from, 2 * stride);
    if constexpr (kRowTiles == 2) Tiles::Load<5>(from + kTileRows * stride, 2 * stride);
    Tiles::Load<6>(Lines::Tile(w + line * 64, count, scratch[turn][0]), 64);
    Tiles::Multiply<0, 4, 6>();
    if constexpr (kRowTiles == 2) Tiles::Multiply<2, 5, 6>();
    if constexpr (kBlocks == 2) {
      Tiles::Load<7>(Lines::Tile(w + block_bytes + line * 64, count, scratch[turn][1]), 64);
      Tiles::Multiply<1, 4, 7>();
      if constexpr (kRowTiles == 2) Tiles::Multiply<3, 5, 7>();
    }
  }
}

// As `AddTiles`, from zeros or from `y` to `y`.
template <typename Lines, int kRowTiles, int kBlocks, bool kFromZero>
void MultiplyTiles(int64_t rows, const BFloat16* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t lines,
                   const AheadOfTiles& ahead, float* y, int64_t y_stride) {
  float* lower = y + kTileRows * y_stride;
  const auto each = [&](auto do_one) __attribute__((always_inline)) {
    do_one(std::integral_constant<int, 0>(), y);
    if constexpr (kBlocks == 2) do_one(std::integral_constant<int, 1>(), y + kBlockLanes);
    if constexpr (kRowTiles == 2) do_one(std::integral_constant<int, 2>(), lower);
    if constexpr (kRowTiles == 2 && kBlocks == 2) do_one(std::integral_constant<int, 3>(), lower + kBlockLanes);
  };
  each([&](auto tile, float* at) __attribute__((always_inline)) {
    if constexpr (kFromZero) {
      Tiles::Zero<tile()>();
    } else {
      Tiles::Load<tile()>(at, 4 * y_stride);
    }
  });
  AddTiles<Lines, kRowTiles, kBlocks>(rows, x, x_stride, w, block_bytes, lines, ahead);
  each([&](auto tile, float* at) __attribute__((always_inline)) { Tiles::Store<tile()>(at, 4 * y_stride); });
}

// As `Rows` of tiles.h; added to `y` as it is unless `kFromZero`.
template <typename Lines, bool kFromZero>
void RowsOfTiles(int64_t rows, const BFloat16* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t blocks,
                 int64_t lines, const char* next, float* y, int64_t y_stride) {
  constexpr int64_t kLines = kTileInputs / Lines::kInputs;
  const int64_t parts = (rows + kRowsOfTiles - 1) / kRowsOfTiles, tiles = (lines + kLines - 1) / kLines;
  Tiles registers;
  for (int64_t block = 0; block < blocks; block += 2, w += 2 * block_bytes, y += 2 * kBlockLanes) {
    const bool is_pair = block + 1 < blocks;
    const char* after = block + 2 < blocks ? w + 2 * block_bytes : next;
    const int64_t share = (2 * lines + parts * tiles - 1) / (parts * tiles);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * kRowsOfTiles, count = std::min(kRowsOfTiles, rows - first);
      registers.Shape(count);
      const AheadOfTiles ahead{after + part * tiles * share * 64, share};
      const auto run = [&](auto multiply) {
        multiply(count, x + first * x_stride, x_stride, w, block_bytes, lines, ahead, y + first * y_stride, y_stride);
      };
      if (count <= kTileRows) {
        is_pair ? run(MultiplyTiles<Lines, 1, 2, kFromZero>) : run(MultiplyTiles<Lines, 1, 1, kFromZero>);
      } else {
        is_pair ? run(MultiplyTiles<Lines, 2, 2, kFromZero>) : run(MultiplyTiles<Lines, 2, 1, kFromZero>);
      }
    }
  }
}

}  // namespace jaxllama
