// Products of a few rows with stored weights, which are written out piece by piece into the first caches.
#pragma once

#include "expand_rows.h"

namespace jaxcompress {
namespace {

// `kRows` rows of sums, of columns [0, columns): sums += x · tile, where x[m] and tile[t] belong together along `count`.
template <class Simd, int kRows, int kVectors>
void add_columns(const float* x, int64_t inputs_pitch, const float* tile, int64_t tile_pitch, int64_t count,
                 int64_t columns, float* sums, int64_t sums_pitch) {
  using V = typename Simd::V;
  for (int64_t c = 0; c < columns; c += kVectors * Simd::kWidth) {
    V total[kRows][kVectors];
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
      each<kVectors>([&](auto i) JAXCOMPRESS_INLINE {
        total[m][i] = Simd::load(sums + m * sums_pitch + c + i * Simd::kWidth);
      });
    });
    for (int64_t t = 0; t < count; ++t) {
      V w[kVectors];
      each<kVectors>(
          [&](auto i) JAXCOMPRESS_INLINE { w[i] = Simd::load(tile + t * tile_pitch + c + i * Simd::kWidth); });
      each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
        const V input = Simd::spread(x[m * inputs_pitch + t]);
        each<kVectors>(
            [&](auto i) JAXCOMPRESS_INLINE { total[m][i] = Simd::multiply_add(input, w[i], total[m][i]); });
      });
    }
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
      each<kVectors>([&](auto i) JAXCOMPRESS_INLINE {
        Simd::save(sums + m * sums_pitch + c + i * Simd::kWidth, total[m][i]);
      });
    });
  }
}

// y[m, t] += Σ_c x[m, c] tile[t, c], of `kRows` rows of x and `kOutputs` of the tile.
template <class Simd, int kRows, int kOutputs>
void add_dots(const float* x, int64_t inputs_pitch, const float* tile, int64_t tile_pitch, int64_t columns, float* y,
              int64_t outputs_pitch) {
  using V = typename Simd::V;
  V total[kRows][kOutputs];
  each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
    each<kOutputs>([&](auto t) JAXCOMPRESS_INLINE { total[m][t] = Simd::none(); });
  });
  for (int64_t c = 0; c < columns; c += Simd::kWidth) {
    V w[kOutputs];
    each<kOutputs>([&](auto t) JAXCOMPRESS_INLINE { w[t] = Simd::load(tile + t * tile_pitch + c); });
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
      const V input = Simd::load(x + m * inputs_pitch + c);
      each<kOutputs>([&](auto t) JAXCOMPRESS_INLINE { total[m][t] = Simd::multiply_add(input, w[t], total[m][t]); });
    });
  }
  each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
    each<kOutputs>([&](auto t) JAXCOMPRESS_INLINE { y[m * outputs_pitch + t] += Simd::total(total[m][t]); });
  });
}

// Rows of a mask that are multiplied in registers at a time.
constexpr int kFusedRows = 4;
constexpr int64_t kTileRuns = 16;  // at most, of a tile by places across rows

// sums[m] += Σ_i x[m, i] · row i, of `columns` columns, whole vectors of them.
template <class Simd, int kRows, Scaling scaling, class From>
void add_masked(const uint8_t* const* bits, int64_t columns, const From* from, const float* const* scale,
                const float* const* zero, const float* x, int64_t inputs_pitch, float* sums, int64_t sums_pitch) {
  using V = typename Simd::V;
  From at[kFusedRows] = {from[0], from[1], from[2], from[3]};
  V inputs[kRows][kFusedRows];
  each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
    each<kFusedRows>([&](auto i) JAXCOMPRESS_INLINE { inputs[m][i] = Simd::spread(x[m * inputs_pitch + i]); });
  });
  for (int64_t c = 0; c < columns; c += Simd::kWidth) {
    V total[kRows];
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE { total[m] = Simd::load(sums + m * sums_pitch + c); });
    each<kFusedRows>([&](auto i) JAXCOMPRESS_INLINE {
      const unsigned mask = mask_at<Simd>(bits[i], c);
      V v = Simd::expand(mask, at[i]);
      if constexpr (scaling == Scaling::kShiftAndScale)
        v = Simd::masked(mask, Simd::scaled(Simd::shifted(v, zero[i] + c), scale[i] + c));
      if constexpr (scaling == Scaling::kScale) v = Simd::scaled(v, scale[i] + c);
      at[i] += __builtin_popcount(mask);
      each<kRows>([&](auto m) JAXCOMPRESS_INLINE { total[m] = Simd::multiply_add(inputs[m][i], v, total[m]); });
    });
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE { Simd::save(sums + m * sums_pitch + c, total[m]); });
  }
}

// Those rows from r on, of columns [0, columns), in registers; false if that is not possible there. `starts` move on.
template <class Simd, int kRows>
bool add_masked_rows(const SparseProduct& product, int64_t r, int64_t columns, int64_t* starts, float* sums) {
  const Expand& p = product.weights;
  const int64_t bytes = (p.columns + 7) / 8, item = p.stored == Stored::kWords ? 4 : 1;
  const int64_t pitch = p.stored == Stored::kNibbles ? (p.count + 1) / 2 : item * p.count;
  const uint8_t *bits[kFusedRows], *values[kFusedRows];
  const float *scale[kFusedRows] = {}, *zero[kFusedRows] = {};
  int64_t ends[kFusedRows];
  if ((p.scale.data && p.scale.column_size != 1) || (p.zero.data && p.zero.column_size != 1)) return false;
  for (int i = 0; i < kFusedRows; ++i) {
    const int64_t row = r + i;
    bits[i] = p.bits + row * bytes;
    values[i] = p.values + row / (p.rows / p.shards) * pitch;
    ends[i] = starts[i] + count_bits(bits[i], columns);
    if (starts[i] < 0 || ends[i] + Nibbles::kMargin > p.count) return false;
    scale[i] = blocks_of_row(p.scale, 0, row);
    zero[i] = blocks_of_row(p.zero, 0, row);
  }
  const auto add = [&](auto at) {
    using From = decltype(at(0));
    const From from[kFusedRows] = {at(0), at(1), at(2), at(3)};
    const auto multiply = p.zero.data    ? add_masked<Simd, kRows, Scaling::kShiftAndScale, From>
                          : p.scale.data ? add_masked<Simd, kRows, Scaling::kScale, From>
                                         : add_masked<Simd, kRows, Scaling::kNone, From>;
    multiply(bits, columns, from, scale, zero, product.x + r, product.inputs_pitch, sums, sums_pitch(product));
  };
  switch (p.stored) {
    case Stored::kNibbles: add([&](int i) { return Nibbles{values[i], starts[i], p.table}; }); break;
    case Stored::kInt8: add([&](int i) { return CodeBytes<true>{values[i] + starts[i]}; }); break;
    case Stored::kUint8: add([&](int i) { return CodeBytes<false>{values[i] + starts[i]}; }); break;
    default: add([&](int i) { return reinterpret_cast<const uint32_t*>(values[i]) + starts[i]; });
  }
  for (int i = 0; i < kFusedRows; ++i) starts[i] = ends[i];
  return true;
}

// By places across rows, `kRows` rows of sums of columns [0, columns), whole vectors of them: each stored value times
// the input that its place picks. `tables` are inputs [runs, M, lanes], those of a run again and again.
template <class Simd, int kRows, Stored stored>
void add_picked(const Expand& p, int64_t begin, int64_t end, int64_t columns, const float* tables,
                int64_t tables_pitch, float* sums, int64_t sums_pitch) {
  using V = typename Simd::V;
  const int low = (1 << p.place_bits) - 1;
  const float *scales[kTileRuns], *zeros[kTileRuns];
  for (int64_t row = begin, i = 0; row < end; row += p.run, ++i) {
    scales[i] = blocks_of_row(p.scale, 0, row);
    zeros[i] = blocks_of_row(p.zero, 0, row);
  }
  const bool has_scale = p.scale.data != nullptr, has_zero = p.zero.data != nullptr;
  for (int64_t c = 0; c < columns; c += Simd::kWidth) {
    V total[kRows];
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE { total[m] = Simd::load(sums + m * sums_pitch + c); });
    const float* table = tables;
    int64_t slot = begin / p.run * p.kept;
    for (int64_t row = begin, run = 0; row < end; row += p.run, ++run, table += tables_pitch) {
      for (int64_t i = 0; i < p.kept; ++i, ++slot) {
        V v = stored_lanes<Simd, uint32_t>(p, stored, p.values, slot, c);
        if (has_zero) v = Simd::shifted(v, zeros[run] + c);
        if (has_scale) v = Simd::scaled(v, scales[run] + c);
        const int64_t bit = slot * p.place_bits;
        const V place = Simd::fields(p.bits + (bit >> 3) * p.columns + c, static_cast<int>(bit & 7), low);
        each<kRows>([&](auto m) JAXCOMPRESS_INLINE {
          total[m] = Simd::multiply_add(Simd::lookup(place, table + m * Simd::kWidth), v, total[m]);
        });
      }
    }
    each<kRows>([&](auto m) JAXCOMPRESS_INLINE { Simd::save(sums + m * sums_pitch + c, total[m]); });
  }
}

// f(Index<4>, m), then f(Index<1>, m) for what is left of `count`.
template <class F>
JAXCOMPRESS_INLINE inline void by_fours(int64_t count, const F& f) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) f(Index<4>{}, m);
  for (; m < count; ++m) f(Index<1>{}, m);
}

// Rows [begin, end), few runs, of columns [0, columns); false if that is not possible there.
template <class Simd>
bool add_picked_rows(const SparseProduct& p, int64_t begin, int64_t end, int64_t columns, float* sums,
                     float* tables) {
  const Expand& w = p.weights;
  const auto shares_blocks = [&](const Blocks& blocks) {
    return !blocks.data || (blocks.column_size == 1 && (blocks.row_blocks == 1 || blocks.row_size % w.run == 0));
  };
  if (Simd::kWidth % w.run || !shares_blocks(w.scale) || !shares_blocks(w.zero)) return false;
  float check = 0;
  float* table = tables;
  for (int64_t row = begin; row < end; row += w.run)
    for (int64_t m = 0; m < p.M; ++m, table += Simd::kWidth)
      for (int64_t i = 0; i < Simd::kWidth; ++i) {
        table[i] = i >= w.run ? table[i - w.run] : row + i < end ? p.x[m * p.inputs_pitch + row + i] : 0.0f;
        check += table[i] * 0.0f;
      }
  // What is not stored matters where inputs are infinite.
  if (!(check == 0.0f)) return false;
  by_fours(p.M, [&](auto few, int64_t m) JAXCOMPRESS_INLINE {
    constexpr int kRows = few;
    const auto add = [&](auto f) {
      f(w, begin, end, columns, tables + m * Simd::kWidth, p.M * Simd::kWidth, sums + m * sums_pitch(p), sums_pitch(p));
    };
    switch (w.stored) {
      case Stored::kNibbles: add(add_picked<Simd, kRows, Stored::kNibbles>); break;
      case Stored::kInt8: add(add_picked<Simd, kRows, Stored::kInt8>); break;
      case Stored::kUint8: add(add_picked<Simd, kRows, Stored::kUint8>); break;
      default: add(add_picked<Simd, kRows, Stored::kWords>);
    }
  });
  return true;
}

template <class Simd>
void sparse_product(const SparseProduct& p, int64_t begin, int64_t end, float* sums, float* scratch) {
  const Expand& weights = p.weights;
  const Tile size = tile_of(weights);
  const int64_t tile_pitch = size.columns + kExpandPadding / 4, pitch = sums_pitch(p), outputs = weights.rows;
  float* const tile = scratch + expand_scratch(weights);
  float* const tables = scratch + product_scratch(weights);
  MaskedRows<Simd, uint32_t> rows(weights, scratch);
  int64_t starts[256];
  // Rows [r, r + count) of columns from `first` on, where their values begin at `starts`.
  const auto by_tiles = [&](int64_t r, int64_t count, int64_t first) {
    for (int64_t c = first; c < weights.columns; c += size.columns) {
      const int64_t right = least(c + size.columns, weights.columns), width = right - c;
      const int64_t padded = (width + Simd::kWidth - 1) / Simd::kWidth * Simd::kWidth;
      if (weights.layout == Layout::kAcrossRows) {
        expand_runs<Simd, uint32_t>(weights, r, r + count, c, right, reinterpret_cast<uint32_t*>(tile), tile_pitch,
                                    scratch);
      } else {
        for (int64_t i = 0; i < count; ++i)
          starts[i] = rows.expand(r + i, c, right, starts[i], reinterpret_cast<uint32_t*>(tile + i * tile_pitch));
      }
      for (int64_t i = 0; i < count && width < padded; ++i)
        std::memset(tile + i * tile_pitch + width, 0, (padded - width) * sizeof(float));
      by_fours(p.M, [&](auto few, int64_t m) JAXCOMPRESS_INLINE {
        constexpr int kRows = few;
        const float* x = p.x + m * p.inputs_pitch + (p.sums_columns ? c : r);
        if (p.sums_columns) {
          by_fours(count, [&](auto several, int64_t t) JAXCOMPRESS_INLINE {
            constexpr int kOutputs = several;
            add_dots<Simd, kRows, kOutputs>(x, p.inputs_pitch, tile + t * tile_pitch, tile_pitch, padded,
                                            p.y + m * outputs + r + t, outputs);
          });
          return;
        }
        constexpr int kVectors = kRows == 1 ? 4 : Simd::kVectors;
        const int64_t whole = padded / (kVectors * Simd::kWidth) * (kVectors * Simd::kWidth);
        float* const to = sums + m * pitch + c;
        add_columns<Simd, kRows, kVectors>(x, p.inputs_pitch, tile, tile_pitch, count, whole, to, pitch);
        add_columns<Simd, kRows, 1>(x, p.inputs_pitch, tile + whole, tile_pitch, count, padded - whole, to + whole,
                                    pitch);
      });
    }
  };
  if (p.sums_columns) {
    for (int64_t m = 0; m < p.M; ++m) std::memset(p.y + m * outputs + begin, 0, (end - begin) * sizeof(float));
  } else {
    std::memset(sums, 0, p.M * pitch * sizeof(float));
  }
  const bool has_mask = weights.layout == Layout::kMask;
  const bool is_fused = !p.sums_columns && has_mask && p.M <= 4;
  const bool is_picked = !p.sums_columns && weights.layout == Layout::kAcrossRows && p.M <= kPickedRows;
  const int64_t whole = weights.columns / Simd::kWidth * Simd::kWidth;
  const int64_t step = is_fused ? kFusedRows : size.rows;
  for (int64_t r = begin; r < end; r += step) {
    const int64_t count = least(step, end - r);
    for (int64_t i = 0; i < count; ++i) starts[i] = has_mask ? weights.starts[r + i] : 0;
    bool is_done = false;
    if (is_fused && count == kFusedRows) {
      const auto add = p.M == 1   ? add_masked_rows<Simd, 1>
                       : p.M == 2 ? add_masked_rows<Simd, 2>
                       : p.M == 3 ? add_masked_rows<Simd, 3>
                                  : add_masked_rows<Simd, 4>;
      is_done = add(p, r, whole, starts, sums);
    }
    if (is_picked) is_done = add_picked_rows<Simd>(p, r, r + count, whole, sums, tables);
    by_tiles(r, count, is_done ? whole : 0);
  }
}

}  // namespace
}  // namespace jaxcompress
