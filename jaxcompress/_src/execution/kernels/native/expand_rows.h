// Expansion by bit masks, written once for all vector types.
//
// `Simd` is a vector of `kWidth` lanes of 32 bits, V: `expand(mask, from)` puts the next words or halves where the mask
// is set and 0 elsewhere; `store` writes lanes as words or halves; `scaled(v, scale)` and `shifted(v, zero)` take them
// for floats; `masked(mask, v)` clears lanes. `nibbles(from, table, to)` and `bytes<is_signed>(from, to)` turn `kBytes`
// bytes into floats. Everything here has internal linkage, because each translation unit is compiled for other
// instructions.
#pragma once

#include "expand.h"

namespace jaxcompress {
namespace {

enum class Scaling { kNone, kScale, kShiftAndScale };

// The scales or zero points of one row after another, one for each column.
class BlockRow {
 public:
  BlockRow(const Blocks& blocks, int64_t columns, float* buffer)
      : blocks_(blocks), columns_(columns), buffer_(buffer) {}

  const float* at(int64_t entry, int64_t row) {
    if (blocks_.data == nullptr) return nullptr;
    const int64_t block = entry * blocks_.row_blocks + least(row / blocks_.row_size, blocks_.row_blocks - 1);
    const float* from = blocks_.data + block * blocks_.column_blocks;
    if (blocks_.column_size == 1) return from;
    if (block != filled_) {
      for (int64_t c = 0, i = 0; c < columns_; c += blocks_.column_size, ++i) {
        const float value = from[i];
        const int64_t end = least(columns_, c + blocks_.column_size);
        for (int64_t j = c; j < end; ++j) buffer_[j] = value;
      }
      filled_ = block;
    }
    return buffer_;
  }

 private:
  const Blocks& blocks_;
  const int64_t columns_;
  float* const buffer_;
  int64_t filled_ = -1;
};

inline int64_t count_bits(const uint8_t* bits, int64_t columns) {
  int64_t count = 0, c = 0;
  for (; c + 64 <= columns; c += 64) {
    uint64_t word;
    std::memcpy(&word, bits + c / 8, 8);
    count += __builtin_popcountll(word);
  }
  for (; c + 8 <= columns; c += 8) count += __builtin_popcount(bits[c / 8]);
  if (c < columns) count += __builtin_popcount(bits[c / 8] & ((1u << (columns - c)) - 1));
  return count;
}

inline float decoded(const Expand& p, const uint8_t* from, int64_t place) {
  if (p.stored == Stored::kNibbles) return p.table[from[place / 2] >> (place % 2 * 4) & 15];
  return p.stored == Stored::kInt8 ? static_cast<float>(static_cast<int8_t>(from[place]))
                                   : static_cast<float>(from[place]);
}

// Codes [start, start + kept) of a run as floats, of which the first one lies where the result points to.
template <class Simd>
const float* decode(const Expand& p, const uint8_t* from, int64_t start, int64_t kept, float* to) {
  const int64_t per_byte = p.stored == Stored::kNibbles ? 2 : 1, pitch = (p.count + per_byte - 1) / per_byte;
  const int64_t first = start / per_byte, skipped = start % per_byte;
  const int64_t end = first + (skipped + kept + per_byte - 1) / per_byte;
  int64_t at = first;
  for (; at < end && at + Simd::kBytes <= pitch; at += Simd::kBytes) {
    float* place = to + (at - first) * per_byte;
    if (p.stored == Stored::kNibbles)
      Simd::nibbles(from + at, p.table, place);
    else if (p.stored == Stored::kInt8)
      Simd::template bytes<true>(from + at, place);
    else
      Simd::template bytes<false>(from + at, place);
  }
  for (int64_t i = at * per_byte; i < least(end * per_byte, p.count); ++i)
    to[i - first * per_byte] = decoded(p, from, i);
  return to + skipped;
}

// One row whose values lie at `from`, with as many behind them as a vector has lanes.
template <class Simd, class Word, Scaling scaling>
void expand_row(const uint8_t* bits, int64_t columns, const Word* from, const float* scale, const float* zero,
                Word* out) {
  constexpr int kWidth = Simd::kWidth;
  const auto lanes = [&](unsigned mask, const float* scales, const float* zeros) JAXCOMPRESS_INLINE {
    typename Simd::V v = Simd::expand(mask, from);
    if constexpr (scaling == Scaling::kShiftAndScale)
      v = Simd::masked(mask, Simd::scaled(Simd::shifted(v, zeros), scales));
    if constexpr (scaling == Scaling::kScale) v = Simd::scaled(v, scales);
    from += __builtin_popcount(mask);
    return v;
  };
  int64_t c = 0;
  for (; c + kWidth <= columns; c += kWidth) {
    unsigned mask = bits[c / 8];
    if constexpr (kWidth == 16) mask |= static_cast<unsigned>(bits[c / 8 + 1]) << 8;
    if constexpr (scaling == Scaling::kNone) Simd::store(out + c, lanes(mask, nullptr, nullptr));
    if constexpr (scaling == Scaling::kScale) Simd::store(out + c, lanes(mask, scale + c, nullptr));
    if constexpr (scaling == Scaling::kShiftAndScale) Simd::store(out + c, lanes(mask, scale + c, zero + c));
  }
  if (c == columns) return;
  const int64_t left = columns - c;
  unsigned mask = bits[c / 8];
  if (left > 8) mask |= static_cast<unsigned>(bits[c / 8 + 1]) << 8;
  float scales[kWidth] = {}, zeros[kWidth] = {};
  for (int64_t i = 0; i < left; ++i) {
    if constexpr (scaling != Scaling::kNone) scales[i] = scale[c + i];
    if constexpr (scaling == Scaling::kShiftAndScale) zeros[i] = zero[c + i];
  }
  Word last[kWidth];
  Simd::store(last, lanes(mask & ((1u << left) - 1), scales, zeros));
  for (int64_t i = 0; i < left; ++i) out[c + i] = last[i];
}

template <class Simd, class Word>
void expand_words(const Expand& p, int64_t begin, int64_t end, float* scratch) {
  float* const buffer = scratch;
  BlockRow scales(p.scale, p.columns, scratch + p.columns + kExpandPadding);
  BlockRow zeros(p.zero, p.columns, scratch + 2 * (p.columns + kExpandPadding));
  const bool has_codes = p.stored != Stored::kWords && p.stored != Stored::kHalves;
  const int64_t bytes = (p.columns + 7) / 8, per_shard = p.rows / p.shards;
  const int64_t width = has_codes ? 1 : sizeof(Word);
  const int64_t pitch = p.stored == Stored::kNibbles ? (p.count + 1) / 2 : width * p.count;
  for (int64_t r = begin; r < end; ++r) {
    const int64_t entry = r / p.rows, row = r % p.rows;
    const uint8_t* bits = p.bits + r * bytes;
    const uint8_t* values = p.values + (entry * p.shards + row / per_shard) * pitch;
    const int64_t start = p.starts[r], kept = count_bits(bits, p.columns);
    const bool is_within = start >= 0 && start + kept <= p.count;
    const Word* from = reinterpret_cast<const Word*>(buffer);
    if (has_codes && is_within) {
      from = reinterpret_cast<const Word*>(decode<Simd>(p, values, start, kept, buffer));
    } else if (is_within && start + kept + Simd::kWidth <= p.count) {
      from = reinterpret_cast<const Word*>(values) + start;
    } else {
      // Vectors would read behind the last value.
      for (int64_t i = 0; i < kept; ++i) {
        const int64_t place = start + i < 0 ? 0 : least(start + i, p.count - 1);
        if (has_codes)
          buffer[i] = decoded(p, values, place);
        else
          std::memcpy(reinterpret_cast<uint8_t*>(buffer) + i * sizeof(Word), values + place * sizeof(Word), sizeof(Word));
      }
    }
    Word* const out = reinterpret_cast<Word*>(p.out) + r * p.columns;
    const float *scale = scales.at(entry, row), *zero = zeros.at(entry, row);
    if (zero)
      expand_row<Simd, Word, Scaling::kShiftAndScale>(bits, p.columns, from, scale, zero, out);
    else if (scale)
      expand_row<Simd, Word, Scaling::kScale>(bits, p.columns, from, scale, zero, out);
    else
      expand_row<Simd, Word, Scaling::kNone>(bits, p.columns, from, scale, zero, out);
  }
}

template <class Simd>
void expand_rows(const Expand& p, int64_t begin, int64_t end, float* scratch) {
  if (p.stored == Stored::kHalves)
    expand_words<Simd, uint16_t>(p, begin, end, scratch);
  else
    expand_words<Simd, uint32_t>(p, begin, end, scratch);
}

}  // namespace
}  // namespace jaxcompress
