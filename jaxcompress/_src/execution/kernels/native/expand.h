// Weights of which only some are stored, written out with their zeros, in memory or for a product.
#pragma once

#include "problem.h"

namespace jaxcompress {

enum class Stored { kWords, kHalves, kInt8, kUint8, kNibbles };  // 32 or 16 bits, codes of 8 or 4 bits

// Scales or zero points: one for each block of rows and columns of each entry.
struct Blocks {
  const float* data = nullptr;  // [entries, row_blocks, column_blocks]; null: there are none
  int64_t row_blocks = 1, column_blocks = 1;
  int64_t row_size = 1, column_size = 1;  // of a block; the last ones may be smaller
};

// How it is said which weights are stored.
enum class Layout {
  kMask,        // by a bit for each of them
  kAlongRows,   // by the places of `kept` in every run of `run` along a row
  kAcrossRows,  // by those in every run of `run` rows of a column
};

// out[e, r, c] = (value − zero) · scale where it is stored, else 0; without zero points, 0 · scale. Words and halves
// without scales are copied. Nibbles are two to a byte, the low one first, along the values of one row or column.
//
// Under a mask, rows are cut into `shards` equal runs; the kept values of row r lie, in the order of their columns, from
// `starts[r]` on among the `count` ones of its run. A place outside of them means the nearest one inside. By places,
// `count` values of each row or column belong to one run after another; those of the last one may lie outside.
struct Expand {
  int64_t entries, rows, columns, shards, count;
  Stored stored;
  float table[16];        // what nibbles stand for
  const uint8_t* values;  // [entries, shards, count], [entries, rows, count] or [entries, count, columns]
  const uint8_t* bits;    // [entries, rows, ceil(columns / 8)], the lowest bit first; or places, as the values
  const int32_t* starts;  // [entries, rows], of a mask
  Blocks scale, zero;     // no zero without a scale
  uint8_t* out;           // [entries, rows, columns]: halves without scales stay halves; else words

  Layout layout = Layout::kMask;
  int64_t kept = 0, run = 0;  // by places
  int place_bits = 8;         // of a place: 1, 2, 4 or 8
  int64_t place_bytes = 0;    // of the places of a row or column
};

// y[m, c] = Σ_r x[m, r] w[r, c], or y[m, r] = Σ_c x[m, c] w[r, c] if `sums_columns`, of the one entry that there is.
struct SparseProduct {
  Expand weights;  // words or codes
  int64_t M;
  bool sums_columns;
  const float* x;
  float* y;

  // Set by `run`.
  int64_t inputs_pitch;  // of x, whose rows are padded with zeros if columns are summed
};

struct ExpandKernel {
  // Rows [begin, end) of all entries; by places across rows, whole runs of one entry.
  void (*rows)(const Expand&, int64_t begin, int64_t end, float* scratch);
  // Rows [begin, end); if rows are summed, into `sums`, [M, `sums_pitch`], which it clears.
  void (*product)(const SparseProduct&, int64_t begin, int64_t end, float* sums, float* scratch);
};

extern const ExpandKernel kPortableExpand;
#if defined(__x86_64__)
extern const ExpandKernel kAvx2Expand, kAvx512Expand;
#endif

constexpr int64_t kLongestRun = 256;
constexpr int64_t kExpandPadding = 64;  // floats behind each row of scratch that vectors may touch

inline int64_t sums_pitch(const SparseProduct& p) { return (p.weights.columns + 63) / 64 * 64; }

// Rows and columns that are written out at a time for a product: a piece that stays in the first caches.
struct Tile {
  int64_t rows, columns;
};

inline Tile tile_of(const Expand& p) {
  constexpr int64_t kRows = 16, kColumns = 512;
  if (p.layout == Layout::kMask) return {kRows, kColumns};
  const int64_t runs = 16 * p.run < kColumns ? kColumns / (16 * p.run) : 1;
  if (p.layout == Layout::kAlongRows) return {kRows, 16 * p.run * runs};
  if (p.run < kRows) return {kRows / p.run * p.run, kColumns};
  return {p.run, p.run < kRows * kColumns / 64 ? kRows * kColumns / p.run / 64 * 64 : 64};
}

// Floats of memory that `rows` and `product` need.
inline int64_t expand_scratch(const Expand& p) { return 4 * (p.columns + kExpandPadding) + 32 * (p.kept + 1); }

// Rows of x up to which products by places across rows pick inputs instead of writing weights out.
constexpr int64_t kPickedRows = 8;

inline int64_t picked_scratch(const SparseProduct& p) {
  return p.M > kPickedRows ? 0 : p.M * kMaxWidth * (tile_of(p.weights).rows / (p.weights.run ? p.weights.run : 1) + 1);
}

// Without what inputs are picked from.
inline int64_t product_scratch(const Expand& p) {
  const Tile tile = tile_of(p);
  return expand_scratch(p) + tile.rows * (tile.columns + kExpandPadding);
}

}  // namespace jaxcompress
