// Paged attention, whatever the cache's type.
#pragma once

#include <string>

#include "parallel.h"
#include "tiles.h"

namespace jaxllama {

// Pages are [pages, page_size, 2 * kv_heads, head_dim], of int8 [pages, 2 * kv_heads, page_size, head_dim] with scales
// [pages, 2 * kv_heads, page_size]; tables [rows, width] and positions [rows, tokens] (0 or more, not falling in a row).
// A query sees the last `window` keys up to its own (0: all). Of keys that none of a row's queries sees, those are read
// that share a block of 128 with one that is seen: their probability is 0, and they must be finite.
struct AttentionCall {
  const void* q;
  Format format;
  const void* pages;
  const float* scales;
  const int32_t *tables, *positions;
  void* out;
  bool is_float;  // queries and results; else they are bfloat16
  int64_t rows, tokens, heads, head_dim, page_size, kv_heads, width;
  int64_t window = 0;

  void Run(Team& team) const;

  // What is wrong with the positions, or nothing.
  std::string Complaint() const;
};

}  // namespace jaxllama
