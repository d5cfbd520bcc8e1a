// y = x · dequantized codes for float32 x, written once for all vector types.
//
// `Simd` is a vector type: `kWidth` lanes; load, store, set1, fma(a, b, c) = a b + c, sum of lanes, first_lane
// (the others are 0); `Decoder<kind>`, whose
// `bytes(p)` widens `kWidth` codes of a byte each and `nibbles(p, low, high)` those of `kWidth` bytes. Everything here
// has internal linkage, because each translation unit is compiled for other instructions.
#pragma once

#include "problem.h"

namespace jaxcompress {
namespace {

template <Codes kind>
constexpr bool kIsNibbles = kind == Codes::kNibbles || kind == Codes::kTable;

// Parameters of one group for outputs [begin, begin + count).
inline const float* parameter_row(const Parameters& p, int64_t group, int64_t begin, int64_t count, float offset,
                                  float* buffer) {
  if (p.data == nullptr) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = offset;
  } else if (p.type == Type::kFloat32 && p.output_stride == 1) {
    const float* row = static_cast<const float*>(p.data) + group * p.group_stride + begin;
    if (offset == 0) return row;
    for (int64_t i = 0; i < count; ++i) buffer[i] = row[i] + offset;
  } else if (p.type == Type::kBfloat16 && p.output_stride == 1) {
    const uint16_t* row = static_cast<const uint16_t*>(p.data) + group * p.group_stride + begin;
    uint32_t* bits = reinterpret_cast<uint32_t*>(buffer);
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t wide = static_cast<uint32_t>(row[i]) << 16;
      std::memcpy(bits + i, &wide, sizeof(wide));
    }
    if (offset != 0)
      for (int64_t i = 0; i < count; ++i) buffer[i] += offset;
  } else if (p.type == Type::kUint8 && p.output_stride == 1) {
    const uint8_t* row = static_cast<const uint8_t*>(p.data) + group * p.group_stride + begin;
    for (int64_t i = 0; i < count; ++i) buffer[i] = row[i] + offset;
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = parameter_at(p, group, begin + i) + offset;
  }
  return buffer;
}

// ---- codes [K, N]: lanes are outputs.

// Adds to `sums` what `rows` rows of codes contribute to kRows x kVectors vectors.
template <class Simd, Codes kind, int kRows, int kVectors>
inline void add_rows(const typename Simd::template Decoder<kind>& decoder, const float* x, int64_t x_pitch,
                     const uint8_t* const* codes, int64_t pitch, int64_t rows,
                     typename Simd::V (&sums)[kRows][kVectors]) {
  using V = typename Simd::V;
  for (int64_t r = 0; r < rows; ++r) {
    // The rows of the next block, which lie in other pages, into the second cache: the processor does not see them
    // coming, and the first one does not hold the rows of a long tile. Past the end of the array this reads nothing.
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kVectors; j += 64 / Simd::kWidth) Simd::prefetch(codes[j] + (r + rows) * pitch);
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      if constexpr (kIsNibbles<kind>) {
        V low, high;
        decoder.nibbles(codes[j] + r * pitch, low, high);
        JAXCOMPRESS_UNROLL
        for (int m = 0; m < kRows; ++m) {
          sums[m][j] = Simd::fma(Simd::set1(x[m * x_pitch + 2 * r]), low, sums[m][j]);
          sums[m][j] = Simd::fma(Simd::set1(x[m * x_pitch + 2 * r + 1]), high, sums[m][j]);
        }
      } else {
        const V w = decoder.bytes(codes[j] + r * pitch);
        JAXCOMPRESS_UNROLL
        for (int m = 0; m < kRows; ++m) sums[m][j] = Simd::fma(Simd::set1(x[m * x_pitch + r]), w, sums[m][j]);
      }
    }
  }
}

// A tile of outputs [begin, end) of rows [m0, m0 + rows). Vector v holds the outputs from `column(v)` on; the last one
// overlaps the one before it where the width is no multiple of the lanes, and has a total of its own.
template <class Simd>
struct Tile {
  const WeightOnly& p;
  const int64_t begin, end, m0, rows, vectors;
  float totals[kTileRows * (kTileOutputs + kMaxWidth)];
  float scale_buffer[kLongTileOutputs + kMaxWidth], zero_buffer[kLongTileOutputs + kMaxWidth];
  const float *scale = nullptr, *zero = nullptr;

  Tile(const WeightOnly& p, int64_t begin, int64_t end, int64_t m0, int64_t rows)
      : p(p), begin(begin), end(end), m0(m0), rows(rows), vectors((end - begin + Simd::kWidth - 1) / Simd::kWidth) {}

  float* totals_of(int64_t m) { return totals + m * (kTileOutputs + kMaxWidth); }
  int64_t column(int64_t v) const { return least(begin + v * Simd::kWidth, end - Simd::kWidth); }

  template <Codes kind, int kRows, int kVectors>
  void add_block(const typename Simd::template Decoder<kind>& decoder, int64_t block, int64_t m, int64_t v) {
    using V = typename Simd::V;
    constexpr int64_t per_byte = kIsNibbles<kind> ? 2 : 1;
    const int64_t k = block * p.block, count = least(p.block, p.K - k);
    const uint8_t* codes[kVectors];
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kVectors; ++j) codes[j] = p.codes + k / per_byte * p.N + column(v + j);
    V sums[kRows][kVectors];
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAXCOMPRESS_UNROLL
      for (int j = 0; j < kVectors; ++j) sums[i][j] = Simd::set1(0);
    }
    add_rows<Simd, kind, kRows, kVectors>(decoder, p.inputs + (m0 + m) * p.inputs_pitch + k, p.inputs_pitch, codes, p.N,
                                          (count + per_byte - 1) / per_byte, sums);
    const int64_t blocks = (p.K + p.block - 1) / p.block;
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kVectors; ++j) {
      const int64_t at = column(v + j) - begin;
      const V s = Simd::load(scale + at);
      JAXCOMPRESS_UNROLL
      for (int i = 0; i < kRows; ++i) {
        if (zero)
          sums[i][j] = Simd::fma(Simd::load(zero + at), Simd::set1(-p.sums[(m0 + m + i) * blocks + block]), sums[i][j]);
        float* total = totals_of(m + i) + (v + j) * Simd::kWidth;
        Simd::store(total, Simd::fma(sums[i][j], s, Simd::load(total)));
      }
    }
  }

  template <Codes kind, int kRows>
  void add_block_rows(const typename Simd::template Decoder<kind>& decoder, int64_t block, int64_t m) {
    constexpr int whole = 64 / Simd::kWidth, fitting = Simd::kSums / kRows,
                  kVectors = fitting < whole ? fitting : whole;
    int64_t v = 0;
    // The last vector may overlap, which pointers to each of them allow for.
    for (; v + kVectors <= vectors; v += kVectors) add_block<kind, kRows, kVectors>(decoder, block, m, v);
    for (; v < vectors; ++v) add_block<kind, kRows, 1>(decoder, block, m, v);
  }

  template <Codes kind>
  void run(int64_t store_from) {
    const typename Simd::template Decoder<kind> decoder(p);
    for (int64_t m = 0; m < rows; ++m) std::memset(totals_of(m), 0, vectors * Simd::kWidth * sizeof(float));
    const int64_t blocks = (p.K + p.block - 1) / p.block, group_size = p.K / p.groups;
    int64_t group = -1;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t now = block * p.block / group_size;
      if (now != group) {
        group = now;
        scale = parameter_row(p.scale, group, begin, end - begin, 0, scale_buffer);
        if (p.sums) zero = parameter_row(p.zero, group, begin, end - begin, p.offset, zero_buffer);
      }
      int64_t m = 0;
      if constexpr (Simd::kMostRows >= 4)
        for (; m + 4 <= rows; m += 4) add_block_rows<kind, 4>(decoder, block, m);
      if constexpr (Simd::kMostRows >= 2)
        for (; m + 2 <= rows; m += 2) add_block_rows<kind, 2>(decoder, block, m);
      for (; m < rows; ++m) add_block_rows<kind, 1>(decoder, block, m);
    }
    for (int64_t m = 0; m < rows; ++m) {
      float* y = p.y + (m0 + m) * p.N;
      for (int64_t v = 0; v < vectors; ++v)
        for (int64_t i = 0; i < Simd::kWidth; ++i)
          if (column(v) + i >= store_from) y[column(v) + i] = totals_of(m)[v * Simd::kWidth + i];
    }
  }
};

template <class Simd>
void in_major(const WeightOnly& p, int64_t begin, int64_t end) {
  static_assert(kTileRows * kTileOutputs >= kLongTileOutputs);
  const int64_t outputs = p.M == 1 ? kLongTileOutputs : kTileOutputs;
  for (int64_t m = 0; m < p.M; m += kTileRows)
    for (int64_t n = begin; n < end; n += outputs) {
      const int64_t stop = least(n + outputs, end);
      // A tile is a vector wide at least; what it has in common with its neighbour is not stored twice.
      const int64_t start = least(n, stop - Simd::kWidth);
      Tile<Simd> tile(p, start, stop, m, least(kTileRows, p.M - m));
      switch (p.kind) {
        case Codes::kInt8: tile.template run<Codes::kInt8>(n); break;
        case Codes::kUint8: tile.template run<Codes::kUint8>(n); break;
        case Codes::kNibbles: tile.template run<Codes::kNibbles>(n); break;
        case Codes::kTable: tile.template run<Codes::kTable>(n); break;
      }
    }
}

// ---- codes [N, K]: lanes are inputs.

// Adds the products of inputs [k, k + step), of which `codes[j]` are the codes.
template <class Simd, Codes kind, int kRows, int kOutputs>
inline void add_step(const typename Simd::template Decoder<kind>& decoder, const float* x, int64_t x_pitch,
                     const uint8_t* const* codes, int64_t byte, typename Simd::V (&sums)[kRows][kOutputs]) {
  using V = typename Simd::V;
  JAXCOMPRESS_UNROLL
  for (int j = 0; j < kOutputs; ++j) {
    if constexpr (kIsNibbles<kind>) {
      V low, high;
      decoder.nibbles(codes[j] + byte, low, high);
      JAXCOMPRESS_UNROLL
      for (int m = 0; m < kRows; ++m) {
        sums[m][j] = Simd::fma(Simd::load(x + m * x_pitch), low, sums[m][j]);
        sums[m][j] = Simd::fma(Simd::load(x + m * x_pitch + Simd::kWidth), high, sums[m][j]);
      }
    } else {
      const V w = decoder.bytes(codes[j] + byte);
      JAXCOMPRESS_UNROLL
      for (int m = 0; m < kRows; ++m) sums[m][j] = Simd::fma(Simd::load(x + m * x_pitch), w, sums[m][j]);
    }
  }
}

template <class Simd, Codes kind, int kRows, int kOutputs>
void out_major_block(const WeightOnly& p, const typename Simd::template Decoder<kind>& decoder, int64_t m, int64_t n) {
  using V = typename Simd::V;
  constexpr int64_t per_byte = kIsNibbles<kind> ? 2 : 1, step = Simd::kWidth * per_byte;
  const int64_t pitch = (p.K + per_byte - 1) / per_byte, group_size = p.K / p.groups;
  const uint8_t* codes[kOutputs];
  JAXCOMPRESS_UNROLL
  for (int j = 0; j < kOutputs; ++j) codes[j] = p.codes + (n + j) * pitch;
  const float* x = p.inputs + m * p.inputs_pitch;
  V totals[kRows][kOutputs];
  JAXCOMPRESS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kOutputs; ++j) totals[i][j] = Simd::set1(0);
  }
  for (int64_t group = 0; group < p.groups; ++group) {
    V sums[kRows][kOutputs];
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      JAXCOMPRESS_UNROLL
      for (int j = 0; j < kOutputs; ++j) sums[i][j] = Simd::set1(0);
    }
    if (p.sums) {  // they begin with what the zero point takes away
      JAXCOMPRESS_UNROLL
      for (int j = 0; j < kOutputs; ++j) {
        const float zero = p.offset + (p.zero.data ? parameter_at(p.zero, group, n + j) : 0.0f);
        JAXCOMPRESS_UNROLL
        for (int i = 0; i < kRows; ++i) sums[i][j] = Simd::first_lane(-zero * p.sums[(m + i) * p.groups + group]);
      }
    }
    int64_t k = group * group_size;
    const int64_t stop = k + group_size;
    for (; k + step <= stop; k += step)
      add_step<Simd, kind, kRows, kOutputs>(decoder, x + k, p.inputs_pitch, codes, k / per_byte, sums);
    if (k < stop) {  // a single group, whose inputs are padded
      uint8_t tails[kOutputs][Simd::kWidth] = {};
      const uint8_t* tail[kOutputs];
      JAXCOMPRESS_UNROLL
      for (int j = 0; j < kOutputs; ++j)
        tail[j] = static_cast<const uint8_t*>(std::memcpy(tails[j], codes[j] + k / per_byte, pitch - k / per_byte));
      add_step<Simd, kind, kRows, kOutputs>(decoder, x + k, p.inputs_pitch, tail, 0, sums);
    }
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kOutputs; ++j) {
      const float s = parameter_at(p.scale, group, n + j);
      JAXCOMPRESS_UNROLL
      for (int i = 0; i < kRows; ++i) totals[i][j] = Simd::fma(sums[i][j], Simd::set1(s), totals[i][j]);
    }
  }
  JAXCOMPRESS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < kOutputs; ++j) p.y[(m + i) * p.N + n + j] = Simd::sum(totals[i][j]);
  }
}

template <class Simd, Codes kind>
void out_major_of(const WeightOnly& p, int64_t begin, int64_t end) {
  const typename Simd::template Decoder<kind> decoder(p);
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    int64_t m = 0;
    if constexpr (Simd::kMostRows >= 4)
      for (; m + 4 <= p.M; m += 4)
        for (int64_t j = n; j < n + 4; j += 2) out_major_block<Simd, kind, 4, 2>(p, decoder, m, j);
    if constexpr (Simd::kMostRows >= 2)
      for (; m + 2 <= p.M; m += 2)
        for (int64_t j = n; j < n + 4; j += 2) out_major_block<Simd, kind, 2, 2>(p, decoder, m, j);
    for (; m < p.M; ++m) out_major_block<Simd, kind, 1, 4>(p, decoder, m, n);
  }
  for (; n < end; ++n)
    for (int64_t m = 0; m < p.M; ++m) out_major_block<Simd, kind, 1, 1>(p, decoder, m, n);
}

template <class Simd>
void out_major(const WeightOnly& p, int64_t begin, int64_t end) {
  switch (p.kind) {
    case Codes::kInt8: return out_major_of<Simd, Codes::kInt8>(p, begin, end);
    case Codes::kUint8: return out_major_of<Simd, Codes::kUint8>(p, begin, end);
    case Codes::kNibbles: return out_major_of<Simd, Codes::kNibbles>(p, begin, end);
    case Codes::kTable: return out_major_of<Simd, Codes::kTable>(p, begin, end);
  }
}

}  // namespace
}  // namespace jaxcompress
