// Expansion of stored weights, written once for all vector types.
//
// `Simd` is a vector of `kWidth` lanes of 32 bits, V: `expand(mask, from)` puts the next words or halves where the mask
// is set and 0 elsewhere; `store` writes lanes as words or halves; `scaled(v, scale)` and `shifted(v, zero)` take them
// for floats; `masked(mask, v)` clears lanes. `nibbles(from, table, to)` and `bytes<is_signed>(from, to)` turn `kBytes`
// bytes into floats. By places across rows, lanes are columns: `words` and `codes` read what is stored, `fields` places.
// `multiply_add(a, b, c)` is a · b + c, `total` the sum of all lanes. Everything here has internal linkage, because each translation unit is compiled for other
// instructions.
#pragma once

#include "expand.h"
#include "plain_lanes.h"

namespace jaxcompress {
namespace {

enum class Scaling { kNone, kScale, kShiftAndScale };

// Where the scales or zero points of a row begin.
inline const float* blocks_of_row(const Blocks& blocks, int64_t entry, int64_t row) {
  if (blocks.data == nullptr) return nullptr;
  const int64_t block = entry * blocks.row_blocks + least(row / blocks.row_size, blocks.row_blocks - 1);
  return blocks.data + block * blocks.column_blocks;
}

// The scales or zero points of a piece of one row after another, one for each column.
class BlockRow {
 public:
  BlockRow(const Blocks& blocks, float* buffer) : blocks_(blocks), buffer_(buffer) {}

  const float* at(int64_t entry, int64_t row, int64_t begin, int64_t end) {
    const float* from = blocks_of_row(blocks_, entry, row);
    if (from == nullptr) return nullptr;
    if (blocks_.column_size == 1) return from + begin;
    if (from != filled_ || begin != begin_) {
      for (int64_t c = begin, i = begin / blocks_.column_size; c < end; ++i) {
        const float value = from[i];
        const int64_t stop = least(end, (i + 1) * blocks_.column_size);
        for (; c < stop; ++c) buffer_[c - begin] = value;
      }
      filled_ = from;
      begin_ = begin;
    }
    return buffer_;
  }

 private:
  const Blocks& blocks_;
  float* const buffer_;
  const float* filled_ = nullptr;
  int64_t begin_ = -1;
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

// The mask of as many columns as a vector has lanes.
template <class Simd>
unsigned mask_at(const uint8_t* bits, int64_t column) {
  if constexpr (Simd::kWidth == 8) return bits[column / 8];
  uint16_t mask;  // of processors that store the low byte first
  std::memcpy(&mask, bits + column / 8, sizeof(mask));
  return mask;
}

// One row whose values lie at `from`, with as many behind them as a vector reads.
template <class Simd, class Word, Scaling scaling, class From>
void expand_row(const uint8_t* bits, int64_t columns, From from, const float* scale, const float* zero,
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
    const unsigned mask = mask_at<Simd>(bits, c);
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

// For each byte of four places in two runs of 2:4, the mask of eight columns.
struct MasksOfPairs {
  uint8_t masks[256];
  constexpr MasksOfPairs() : masks() {
    for (int byte = 0; byte < 256; ++byte)
      masks[byte] = static_cast<uint8_t>(1 << (byte & 3) | 1 << (byte >> 2 & 3) | 16 << (byte >> 4 & 3) |
                                         16 << (byte >> 6 & 3));
  }
};

constexpr MasksOfPairs kMasksOfPairs;

// The mask of `columns` columns from the `first` one on, which begins a run and a byte of the mask.
inline void mask_of_places(const Expand& p, const uint8_t* places, int64_t first, int64_t columns, uint8_t* mask) {
  const int64_t bytes = (columns + 7) / 8;
  if (p.kept == 2 && p.run == 4 && p.place_bits == 2) {
    for (int64_t i = 0; i < bytes; ++i) mask[i] = kMasksOfPairs.masks[places[first / 8 + i]];
    return;
  }
  std::memset(mask, 0, bytes);
  const int low = (1 << p.place_bits) - 1;
  int64_t bit = first / p.run * p.kept * p.place_bits;
  for (int64_t begin = 0; begin < columns; begin += p.run)
    for (int64_t i = 0; i < p.kept; ++i, bit += p.place_bits) {
      const int place = places[bit >> 3] >> (bit & 7) & low;
      const int64_t column = begin + place;
      if (place < p.run && column < columns) mask[column / 8] |= static_cast<uint8_t>(1 << (column % 8));
    }
}

// Rows of which a mask, or places along them, say what is stored; piece by piece.
template <class Simd, class Word>
class MaskedRows {
 public:
  MaskedRows(const Expand& p, float* scratch)
      : p_(p),
        buffer_(scratch),
        scales_(p.scale, scratch + p.columns + kExpandPadding),
        zeros_(p.zero, scratch + 2 * (p.columns + kExpandPadding)),
        mask_(reinterpret_cast<uint8_t*>(scratch + 3 * (p.columns + kExpandPadding))) {}

  // Columns [begin, end) of row r of all entries, of which the values begin at `start`. Returns where those end.
  int64_t expand(int64_t r, int64_t begin, int64_t end, int64_t start, Word* out) {
    const bool has_codes = p_.stored != Stored::kWords && p_.stored != Stored::kHalves;
    const int64_t width = has_codes ? 1 : sizeof(Word), columns = end - begin;
    const int64_t pitch = p_.stored == Stored::kNibbles ? (p_.count + 1) / 2 : width * p_.count;
    const int64_t entry = r / p_.rows, row = r % p_.rows;
    const uint8_t *bits = mask_, *values = p_.values + r * pitch;
    if (p_.layout == Layout::kMask) {
      bits = p_.bits + r * ((p_.columns + 7) / 8) + begin / 8;
      values = p_.values + (entry * p_.shards + row / (p_.rows / p_.shards)) * pitch;
    } else {
      mask_of_places(p_, p_.bits + r * p_.place_bytes, begin, columns, mask_);
      start = begin / p_.run * p_.kept;
    }
    const int64_t kept = count_bits(bits, columns);
    const float *scale = scales_.at(entry, row, begin, end), *zero = zeros_.at(entry, row, begin, end);
    const auto write = [&](auto from) {
      if (zero)
        expand_row<Simd, Word, Scaling::kShiftAndScale>(bits, columns, from, scale, zero, out);
      else if (scale)
        expand_row<Simd, Word, Scaling::kScale>(bits, columns, from, scale, zero, out);
      else
        expand_row<Simd, Word, Scaling::kNone>(bits, columns, from, scale, zero, out);
    };
    const bool is_within = start >= 0 && start + kept <= p_.count;
    const auto has_margin = [&](int64_t margin) { return is_within && start + kept + margin <= p_.count; };
    if (p_.stored == Stored::kNibbles && has_margin(Nibbles::kMargin)) {
      write(Nibbles{values, start, p_.table});
    } else if (p_.stored == Stored::kInt8 && has_margin(CodeBytes<true>::kMargin)) {
      write(CodeBytes<true>{values + start});
    } else if (p_.stored == Stored::kUint8 && has_margin(CodeBytes<false>::kMargin)) {
      write(CodeBytes<false>{values + start});
    } else if (has_codes && is_within) {
      write(reinterpret_cast<const Word*>(decode<Simd>(p_, values, start, kept, buffer_)));
    } else if (!has_codes && has_margin(Simd::kWidth)) {
      write(reinterpret_cast<const Word*>(values) + start);
    } else {
      // Vectors would read behind the last value.
      for (int64_t i = 0; i < kept; ++i) {
        const int64_t place = start + i < 0 ? 0 : least(start + i, p_.count - 1);
        if (has_codes)
          buffer_[i] = decoded(p_, values, place);
        else
          std::memcpy(reinterpret_cast<uint8_t*>(buffer_) + i * sizeof(Word), values + place * sizeof(Word),
                      sizeof(Word));
      }
      write(reinterpret_cast<const Word*>(buffer_));
    }
    return start + kept;
  }

 private:
  const Expand& p_;
  float* const buffer_;
  BlockRow scales_, zeros_;
  uint8_t* const mask_;
};

// Those of as many columns as a vector has lanes; from `buffer` if columns share them.
template <class Simd>
const float* lanes_of_blocks(const Blocks& blocks, const float* from, int64_t column, float* buffer) {
  if (blocks.column_size == 1) return from + column;
  for (int64_t i = 0; i < Simd::kWidth; ++i) buffer[i] = from[(column + i) / blocks.column_size];
  return buffer;
}

// Value `slot` of as many columns as a vector has lanes.
template <class Simd, class Word>
JAXCOMPRESS_INLINE inline typename Simd::V stored_lanes(const Expand& p, Stored stored, const uint8_t* values,
                                                        int64_t slot, int64_t column) {
  switch (stored) {
    case Stored::kNibbles:
      return Simd::nibble_codes(values + slot / 2 * p.columns + column, slot % 2 * 4, p.table);
    case Stored::kInt8: return Simd::template codes<true>(values + slot * p.columns + column);
    case Stored::kUint8: return Simd::template codes<false>(values + slot * p.columns + column);
    default: return Simd::words(reinterpret_cast<const Word*>(values) + slot * p.columns + column);
  }
}

// One run of rows, of columns [column, column + lanes). `kept` is that of the pattern, or 0 for any, of which places and
// values then go through `scratch`.
template <class Simd, class Word, int kKept, Scaling scaling>
void expand_run(const Expand& p, int64_t entry, int64_t first, int64_t column, const float* const* scales,
                const float* const* zeros, Word* out, int64_t pitch, float* scratch) {
  using V = typename Simd::V;
  const int64_t kept = kKept ? kKept : p.kept, bytes = sizeof(Word);
  const int low = (1 << p.place_bits) - 1;
  const bool has_codes = p.stored != Stored::kWords && p.stored != Stored::kHalves;
  const int64_t stored_rows = p.stored == Stored::kNibbles ? (p.count + 1) / 2 : p.count;
  const uint8_t* values = p.values + entry * stored_rows * p.columns * (has_codes ? 1 : bytes);
  const uint8_t* places = p.bits + entry * p.place_bytes * p.columns + column;
  V value[kKept ? kKept : 1], place[kKept ? kKept : 1];
  const int64_t slot = first / p.run * kept;
  const auto read = [&](int64_t i, V& v, V& at) JAXCOMPRESS_INLINE {
    v = stored_lanes<Simd, Word>(p, p.stored, values, slot + i, column);
    const int64_t bit = (slot + i) * p.place_bits;
    at = Simd::fields(places + (bit >> 3) * p.columns, static_cast<int>(bit & 7), low);
  };
  uint32_t* const kept_places = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* const kept_values = kept_places + kept * Simd::kWidth;
  if constexpr (kKept > 0) {
    each<kKept>([&](auto i) JAXCOMPRESS_INLINE { read(i, value[i], place[i]); });
  } else {
    for (int64_t i = 0; i < kept; ++i) {
      read(i, value[0], place[0]);
      Simd::store(kept_values + i * Simd::kWidth, value[0]);
      Simd::store(kept_places + i * Simd::kWidth, place[0]);
    }
  }
  for (int64_t row = first; row < least(first + p.run, p.rows); ++row, out += pitch) {
    const uint32_t at = static_cast<uint32_t>(row - first);
    V v = Simd::none(), is_kept = Simd::none();
    const auto pick = [&](V where, V what) JAXCOMPRESS_INLINE {
      v = Simd::where_equal(where, at, what, v);
      if constexpr (scaling == Scaling::kShiftAndScale) is_kept = Simd::where_equal(where, at, Simd::all(), is_kept);
    };
    if constexpr (kKept > 0) {
      each<kKept>([&](auto i) JAXCOMPRESS_INLINE { pick(place[i], value[i]); });
    } else {
      for (int64_t i = 0; i < kept; ++i)
        pick(Simd::words(kept_places + i * Simd::kWidth), Simd::words(kept_values + i * Simd::kWidth));
    }
    float buffer[Simd::kWidth];
    if constexpr (scaling == Scaling::kShiftAndScale)
      v = Simd::shifted(v, lanes_of_blocks<Simd>(p.zero, zeros[at], column, buffer));
    if constexpr (scaling != Scaling::kNone)
      v = Simd::scaled(v, lanes_of_blocks<Simd>(p.scale, scales[at], column, buffer));
    if constexpr (scaling == Scaling::kShiftAndScale) v = Simd::both(is_kept, v);
    Simd::store(out, v);
  }
}

// Rows [begin, end) of all entries, which are whole runs of one, of columns [left, right).
template <class Simd, class Word, int kKept, Scaling scaling>
void expand_runs(const Expand& p, int64_t begin, int64_t end, int64_t left, int64_t right, Word* out, int64_t pitch,
                 float* scratch) {
  const int64_t entry = begin / p.rows;
  const float *scales[kLongestRun], *zeros[kLongestRun];
  for (int64_t r = begin; r < end; r += p.run) {
    const int64_t row = r - entry * p.rows;
    for (int64_t i = 0; i < p.run; ++i) {
      scales[i] = blocks_of_row(p.scale, entry, row + i);
      zeros[i] = blocks_of_row(p.zero, entry, row + i);
    }
    Word* const to = out + (r - begin) * pitch;
    if (right - left < Simd::kWidth) {
      for (int64_t c = left; c < right; ++c)
        expand_run<PlainLanes<1>, Word, 0, scaling>(p, entry, row, c, scales, zeros, to + c - left, pitch, scratch);
      continue;
    }
    for (int64_t c = left; c < right; c += Simd::kWidth) {
      // The last vector begins where it ends with the columns.
      const int64_t at = least(c, right - Simd::kWidth);
      expand_run<Simd, Word, kKept, scaling>(p, entry, row, at, scales, zeros, to + at - left, pitch, scratch);
    }
  }
}

template <class Simd, class Word, Scaling scaling>
void expand_runs(const Expand& p, int64_t begin, int64_t end, int64_t left, int64_t right, Word* out, int64_t pitch,
                 float* scratch) {
  const auto expand = p.kept == 1   ? expand_runs<Simd, Word, 1, scaling>
                      : p.kept == 2 ? expand_runs<Simd, Word, 2, scaling>
                      : p.kept == 4 ? expand_runs<Simd, Word, 4, scaling>
                                    : expand_runs<Simd, Word, 0, scaling>;
  expand(p, begin, end, left, right, out, pitch, scratch);
}

template <class Simd, class Word>
void expand_runs(const Expand& p, int64_t begin, int64_t end, int64_t left, int64_t right, Word* out, int64_t pitch,
                 float* scratch) {
  if (p.zero.data)
    expand_runs<Simd, Word, Scaling::kShiftAndScale>(p, begin, end, left, right, out, pitch, scratch);
  else if (p.scale.data)
    expand_runs<Simd, Word, Scaling::kScale>(p, begin, end, left, right, out, pitch, scratch);
  else
    expand_runs<Simd, Word, Scaling::kNone>(p, begin, end, left, right, out, pitch, scratch);
}

template <class Simd, class Word>
void expand_words(const Expand& p, int64_t begin, int64_t end, float* scratch) {
  Word* const out = reinterpret_cast<Word*>(p.out);
  if (p.layout == Layout::kAcrossRows)
    return expand_runs<Simd, Word>(p, begin, end, 0, p.columns, out + begin * p.columns, p.columns, scratch);
  MaskedRows<Simd, Word> rows(p, scratch);
  for (int64_t r = begin; r < end; ++r) {
    const int64_t start = p.layout == Layout::kMask ? p.starts[r] : 0;
    rows.expand(r, 0, p.columns, start, out + r * p.columns);
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
