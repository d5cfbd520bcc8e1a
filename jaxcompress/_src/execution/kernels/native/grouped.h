// y = (x − its zero points) · dequantized codes for int8 x: whole numbers within a group, one float product for each.
//
// Zero points of x take away their product with the sum of the codes of each segment, which is the product of the panel
// with a row of ones.
//
// Codes are packed into panels: quadruples of inputs for each output, as unsigned bytes (signed codes plus `offset`),
// in blocks of 8 inputs. A block of nibbles comes from 4 bytes, whose low nibbles are the first quadruple and whose
// high ones are the second, so that `inputs` are in that order too; a block of bytes is two quadruples in order.
#pragma once

#include "problem.h"
#include "weight_only.h"

namespace jaxcompress {
namespace {

// What one call multiplies: a block of inputs, with segments [first, last), and `strip`, a panel of outputs.
struct GroupedStrip {
  const Grouped& p;
  int64_t first, last;
  bool is_first;  // of the blocks: totals begin
  const uint8_t* panel;
  int64_t plane;                      // bytes from one plane of the panel to the next
  const float *const *scales, *const *zeros;  // of each segment, `pitch` apart; zeros may be null
  float* code_sums;                           // of each segment, `pitch` strips apart; may be null
  int64_t pitch;
};

// A block of 8 inputs for outputs [n, n + columns), zeros after them: the two quadruples lie `strip` outputs apart.
inline void pack_block(const Grouped& p, int64_t block, int64_t n, int64_t columns, int64_t strip, uint8_t* to) {
  const int64_t bytes = p.is_packed ? 4 : 8, rows = p.is_packed ? (p.K + 1) / 2 : p.K, begin = block * bytes,
                count = least(bytes, rows - begin);
  const uint8_t flip = !p.is_signed ? 0 : p.is_packed ? 0x88 : 0x80;
  for (int64_t i = 0; i < strip; ++i) {
    uint8_t column[8] = {};
    if (i < columns) {
      const uint8_t* from = p.codes + (p.out_major ? (n + i) * rows + begin : begin * p.N + n + i);
      for (int64_t k = 0; k < count; ++k) column[k] = from[k * (p.out_major ? 1 : p.N)] ^ flip;
    }
    for (int64_t k = 0; k < 4; ++k) {
      to[4 * i + k] = p.is_packed ? column[k] & 15 : column[k];
      to[4 * (strip + i) + k] = p.is_packed ? column[k] >> 4 : column[4 + k];
    }
  }
}

// Four codes of each output, which lie side by side.
template <int kOutputs>
inline void gather_quadruples(const uint8_t* from, int64_t pitch, uint8_t* to) {
  JAXCOMPRESS_UNROLL
  for (int i = 0; i < kOutputs; ++i) std::memcpy(to + 4 * i, from + i * pitch, 4);
}

// The sums of the codes of each segment: what its panel gives for the row of ones behind the inputs.
template <class Panels>
void sum_codes(const GroupedStrip& s) {
  const uint8_t* panel = s.panel;
  for (int64_t segment = s.first; segment < s.last; ++segment) {
    alignas(64) int32_t lanes[1][Panels::kStrip];
    panel = Panels::template whole_sums<1>(s, segment, panel, s.p.M, lanes);
    float* to = s.code_sums + (segment - s.first) * s.pitch * Panels::kStrip;
    for (int i = 0; i < Panels::kStrip; ++i) to[i] = static_cast<float>(lanes[0][i]);
  }
}

// Rows [m, m + kRows) of one strip. Totals are y itself, where the strip is whole.
template <class Panels, int kRows>
void multiply_strip(const GroupedStrip& s, int64_t m, int64_t n, int64_t columns) {
  constexpr int64_t kStrip = Panels::kStrip;
  float buffer[kRows][kStrip];
  float* totals[kRows];
  for (int i = 0; i < kRows; ++i) {
    float* y = s.p.y + (m + i) * s.p.N + n;
    totals[i] = columns == kStrip ? y : buffer[i];
    if (columns < kStrip && !s.is_first) std::memcpy(buffer[i], y, columns * sizeof(float));
  }
  Panels::template multiply<kRows>(s, m, totals);
  if (columns < kStrip)
    for (int i = 0; i < kRows; ++i) std::memcpy(s.p.y + (m + i) * s.p.N + n, buffer[i], columns * sizeof(float));
}

// Outputs [begin, end). `Panels` has `kStrip` outputs of a panel, `kRows` that are multiplied at a time, `planes(p)`,
// `pack(p, block, n, columns, to, plane)`, `whole_sums<rows>(strip, segment, panel, m, lanes)`, which returns the panel
// of the next segment, and `multiply<rows>(strip, m, totals)`.
template <class Panels>
void grouped(const Grouped& p, int64_t begin, int64_t end) {
  constexpr int64_t kStrip = Panels::kStrip, kAhead = 16, row_block = 96;
  constexpr int64_t kBytes = kGroupedBytes, kPointers = kBytes / 8 / kStrip;
  alignas(64) uint8_t panels[kBytes * Panels::kMostPlanes];
  float scale_buffer[kBytes / 8], zero_buffer[kBytes / 8], code_sums[kBytes / 8];
  const float *scales[kPointers], *zeros[kPointers];
  const int64_t planes = Panels::planes(p), tile = grouped_tile(p);
  const int64_t block_bytes = p.is_packed ? 4 : 8;
  for (int64_t n0 = begin; n0 < end; n0 += tile) {
    const int64_t stop = least(n0 + tile, end), strips = (stop - n0 + kStrip - 1) / kStrip;
    for (int64_t first = 0, last; first < p.segment_count; first = last) {
      const int64_t k0 = p.segments[first].begin;
      for (last = first; last < p.segment_count && p.segments[last].begin < k0 + p.depth; ++last) {
        const int64_t row = (last - first) * strips;
        for (int64_t j = 0; j < strips; ++j) {
          const int64_t n = n0 + j * kStrip, width = least(kStrip, stop - n), at = (row + j) * kStrip;
          const auto whole = [&](const Parameters& from, float* buffer) {
            const float* values = parameter_row(from, p.segments[last].group, n, width, 0, buffer);
            // Kernels read whole strips, of which the array may hold less.
            if (width == kStrip || values == buffer) return values;
            return static_cast<const float*>(std::memcpy(buffer, values, width * sizeof(float)));
          };
          scales[row + j] = whole(p.scale, scale_buffer + at);
          if (p.zero.data) zeros[row + j] = whole(p.zero, zero_buffer + at);
        }
      }
      const int64_t blocks = (p.segments[last - 1].end - k0) / 8, plane = blocks * 8 * kStrip;
      // Rows of codes are read from one strip to the next: they may lie a page apart.
      for (int64_t b = 0; b < blocks; ++b)
        for (int64_t j = 0; j < strips; ++j) {
          const int64_t n = n0 + j * kStrip;
          // Past the end of the array this reads nothing.
          if (!p.out_major && j * kStrip % 64 == 0)
            for (int64_t h = 0; h < block_bytes; ++h)
              __builtin_prefetch(p.codes + ((k0 / 8 + b) * block_bytes + kAhead + h) * p.N + n, 0, 2);
          Panels::pack(p, k0 / 8 + b, n, least(kStrip, stop - n), panels + j * planes * plane + b * 8 * kStrip, plane);
        }
      const auto strip_at = [&](int64_t j) {
        return GroupedStrip{p,
                            first,
                            last,
                            k0 == 0,
                            panels + j * planes * plane,
                            plane,
                            scales + j,
                            p.zero.data ? zeros + j : nullptr,
                            p.input_zeros ? code_sums + j * kStrip : nullptr,
                            strips};
      };
      if (p.input_zeros)
        for (int64_t j = 0; j < strips; ++j) sum_codes<Panels>(strip_at(j));
      for (int64_t m0 = 0; m0 < p.M; m0 += row_block)
        for (int64_t j = 0; j < strips; ++j) {
          const GroupedStrip strip = strip_at(j);
          const int64_t n = n0 + j * kStrip, width = least(kStrip, stop - n), m1 = least(m0 + row_block, p.M);
          int64_t m = m0;
          for (; m + Panels::kRows <= m1; m += Panels::kRows) multiply_strip<Panels, Panels::kRows>(strip, m, n, width);
          if constexpr (Panels::kRows > 2)
            for (; m + 2 <= m1; m += 2) multiply_strip<Panels, 2>(strip, m, n, width);
          for (; m < m1; ++m) multiply_strip<Panels, 1>(strip, m, n, width);
        }
    }
  }
}

}  // namespace
}  // namespace jaxcompress
