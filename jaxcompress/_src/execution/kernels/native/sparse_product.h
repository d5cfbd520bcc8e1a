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

// f(Index<4>, m), then f(Index<1>, m) for what is left of `count`.
template <class F>
JAXCOMPRESS_INLINE inline void by_fours(int64_t count, const F& f) {
  int64_t m = 0;
  for (; m + 4 <= count; m += 4) f(Index<4>{}, m);
  for (; m < count; ++m) f(Index<1>{}, m);
}

template <class Simd>
void sparse_product(const SparseProduct& p, int64_t begin, int64_t end, float* sums, float* scratch) {
  const Expand& weights = p.weights;
  const Tile size = tile_of(weights);
  const int64_t tile_pitch = size.columns + kExpandPadding / 4, pitch = sums_pitch(p), outputs = weights.rows;
  float* const tile = scratch + expand_scratch(weights);
  MaskedRows<Simd, uint32_t> rows(weights, scratch);
  if (p.sums_columns) {
    for (int64_t m = 0; m < p.M; ++m) std::memset(p.y + m * outputs + begin, 0, (end - begin) * sizeof(float));
  } else {
    std::memset(sums, 0, p.M * pitch * sizeof(float));
  }
  int64_t starts[256];
  for (int64_t r = begin; r < end; r += size.rows) {
    const int64_t count = least(size.rows, end - r);
    for (int64_t i = 0; i < count; ++i) starts[i] = weights.layout == Layout::kMask ? weights.starts[r + i] : 0;
    for (int64_t c = 0; c < weights.columns; c += size.columns) {
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
  }
}

}  // namespace
}  // namespace jaxcompress
