// Weights of which a bit mask says which are stored, written out with their zeros.
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

// out[e, r, c] = (value − zero) · scale where bit c of row r is set, else 0; without zero points, 0 · scale. Words and
// halves without scales are copied.
//
// Rows are cut into `shards` equal runs; the kept values of row r lie, in the order of their columns, from `starts[r]`
// on among the `count` ones of its run. A place outside of them means the nearest one inside.
struct Expand {
  int64_t entries, rows, columns, shards, count;
  Stored stored;
  float table[16];        // what nibbles stand for
  const uint8_t* values;  // [entries, shards, count]; nibbles are two to a byte, the low one first
  const uint8_t* bits;    // [entries, rows, ceil(columns / 8)], the lowest bit first
  const int32_t* starts;  // [entries, rows]
  Blocks scale, zero;     // no zero without a scale
  uint8_t* out;           // [entries, rows, columns]: halves without scales stay halves; else words
};

// Works on rows [begin, end) of all entries, with `expand_scratch` floats of memory.
using ExpandRows = void (*)(const Expand&, int64_t begin, int64_t end, float* scratch);

extern const ExpandRows kPortableExpand;
#if defined(__x86_64__)
extern const ExpandRows kAvx2Expand, kAvx512Expand;
#endif

constexpr int64_t kExpandPadding = 64;  // floats behind each row of scratch that vectors may touch

inline int64_t expand_scratch(const Expand& p) { return 3 * (p.columns + kExpandPadding); }

}  // namespace jaxcompress
