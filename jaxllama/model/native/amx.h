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
#include <type_traits>

#include "simd.h"

namespace jaxllama {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileInputs = 32;
constexpr int64_t kTileBytes = 16 * kLineBytes;  // of weights
constexpr int64_t kRowsOfTiles = 2 * kTileRows;  // rows that are multiplied at once, at most
constexpr int64_t kPanelBytes = 1 << 19;  // of weights that stay in the second-level cache

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
    std::memcpy(scratch, lines, count * kLineBytes);
    std::memset(scratch + count * kLineBytes, 0, kTileBytes - count * kLineBytes);
    return scratch;
  }
};

struct Int8TileLines {
  using X = BFloat16;
  static constexpr int kInputs = 4;

  static const char* Tile(const char* lines, int64_t count, char* scratch) {
    for (int64_t i = 0; i < count; ++i) {
      const I32 line = jaxllama::Load<I32>(lines + i * kLineBytes);
      // Integers have as many bits as a bfloat16 is precise to: the lower half of the float32 is zeros.
      const F32 unit = Set1(0x1p-24f);
      const auto first = (U32)(Floats(TopByte<0>(line)) * unit), second = (U32)(Floats(TopByte<1>(line)) * unit);
      const auto third = (U32)(Floats(TopByte<2>(line)) * unit), fourth = (U32)(Floats(TopByte<3>(line)) * unit);
      jaxllama::Store(scratch + 2 * i * kLineBytes, first >> 16 | second);
      jaxllama::Store(scratch + (2 * i + 1) * kLineBytes, third >> 16 | fourth);
    }
    const int64_t made = 2 * count * kLineBytes;
    if (made < kTileBytes) std::memset(scratch + made, 0, kTileBytes - made);
    return scratch;
  }
};

// What is read next is fetched while tiles are multiplied, some lines with each.
struct AheadOfTiles {
  const char* next;
  int64_t lines;

  void Fetch() {
    for (int64_t i = 0; i < lines; ++i, next += kLineBytes) PrefetchToSecondLevel(next);
  }
};

// The sums of up to 16 or 32 rows and one or two blocks, to `y`.
template <typename Lines, int kRowTiles, int kBlocks>
void MultiplyTiles(const BFloat16* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t lines,
                   AheadOfTiles ahead, float* y, int64_t y_stride) {
  constexpr int64_t kLines = kTileInputs / Lines::kInputs;
  alignas(64) char scratch[2][kBlocks][kTileBytes];
  float* lower = y + kTileRows * y_stride;
  const auto each = [&](auto do_one) __attribute__((always_inline)) {
    do_one(std::integral_constant<int, 0>(), y);
    if constexpr (kBlocks == 2) do_one(std::integral_constant<int, 1>(), y + kBlockLanes);
    if constexpr (kRowTiles == 2) do_one(std::integral_constant<int, 2>(), lower);
    if constexpr (kRowTiles == 2 && kBlocks == 2) do_one(std::integral_constant<int, 3>(), lower + kBlockLanes);
  };
  each([](auto tile, float*) __attribute__((always_inline)) { Tiles::Zero<tile()>(); });
  // A tile is made while the one before is multiplied.
  const char* made[2][kBlocks];
  const auto make = [&](int64_t line, int64_t turn) __attribute__((always_inline)) {
    for (int block = 0; block < kBlocks; ++block) {
      const char* from = w + block * block_bytes + line * kLineBytes;
      made[turn][block] = Lines::Tile(from, std::min(kLines, lines - line), scratch[turn][block]);
    }
  };
  make(0, 0);
  for (int64_t line = 0, turn = 0; line < lines; line += kLines, turn ^= 1, x += kTileInputs) {
    ahead.Fetch();
    if (line + kLines < lines) make(line + kLines, turn ^ 1);
    Tiles::Load<4>(x, 2 * x_stride);
    if constexpr (kRowTiles == 2) Tiles::Load<5>(x + kTileRows * x_stride, 2 * x_stride);
    Tiles::Load<6>(made[turn][0], kLineBytes);
    Tiles::Multiply<0, 4, 6>();
    if constexpr (kRowTiles == 2) Tiles::Multiply<2, 5, 6>();
    if constexpr (kBlocks == 2) {
      Tiles::Load<7>(made[turn][1], kLineBytes);
      Tiles::Multiply<1, 4, 7>();
      if constexpr (kRowTiles == 2) Tiles::Multiply<3, 5, 7>();
    }
  }
  each([&](auto tile, float* at) __attribute__((always_inline)) { Tiles::Store<tile()>(at, 4 * y_stride); });
}

// As `Rows` of tiles.h, from zero on; rows of x are padded with zeros to whole tiles.
template <typename Lines>
void RowsOfTiles(int64_t rows, const BFloat16* x, int64_t x_stride, const char* w, int64_t block_bytes, int64_t blocks,
                 int64_t lines, const char* next, float* y, int64_t y_stride) {
  constexpr int64_t kLines = kTileInputs / Lines::kInputs;
  const int64_t parts = (rows + kRowsOfTiles - 1) / kRowsOfTiles, tiles = (lines + kLines - 1) / kLines;
  // So many blocks stay in the cache while part after part of the rows is multiplied with them.
  const int64_t panel = parts == 1 ? 2 : std::max<int64_t>(2, kPanelBytes / (tiles * kTileBytes) / 2 * 2);
  Tiles registers;
  for (int64_t first = 0; first < blocks; first += panel) {
    const int64_t end = std::min(blocks, first + panel), num_pairs = (end - first + 1) / 2;
    const char* after = end < blocks ? w + end * block_bytes : next;
    if constexpr (Lines::kInputs != BFloat16TileLines::kInputs) {
      if (parts > 1) {
        thread_local Aligned<char> expanded;
        expanded.resize((end - first) * tiles * kTileBytes);
        for (int64_t block = first, tile = 0; block < end; ++block) {
          for (int64_t line = 0; line < lines; line += kLines, ++tile) {
            const char* from = w + block * block_bytes + line * kLineBytes;
            Lines::Tile(from, std::min(kLines, lines - line), &expanded[tile * kTileBytes]);
          }
        }
        RowsOfTiles<BFloat16TileLines>(rows, x, x_stride, expanded.data(), tiles * kTileBytes, end - first,
                                       tiles * kTileBytes / kLineBytes, after, y + first * kBlockLanes, y_stride);
        continue;
      }
    }
    const int64_t share = ((end - first) * lines + parts * num_pairs * tiles - 1) / (parts * num_pairs * tiles);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t row = part * kRowsOfTiles, count = std::min(kRowsOfTiles, rows - row);
      registers.Shape(count);
      for (int64_t block = first; block < end; block += 2, after += tiles * share * kLineBytes) {
        float* to = y + row * y_stride + block * kBlockLanes;
        const AheadOfTiles ahead{after, share};
        const auto run = [&](auto multiply) {
          multiply(x + row * x_stride, x_stride, w + block * block_bytes, block_bytes, lines, ahead, to, y_stride);
        };
        const bool is_pair = block + 1 < end;
        if (count <= kTileRows) {
          is_pair ? run(MultiplyTiles<Lines, 1, 2>) : run(MultiplyTiles<Lines, 1, 1>);
        } else {
          is_pair ? run(MultiplyTiles<Lines, 2, 2>) : run(MultiplyTiles<Lines, 2, 1>);
        }
      }
    }
  }
}

}  // namespace jaxllama
