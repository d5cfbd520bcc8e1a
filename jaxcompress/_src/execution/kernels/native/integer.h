// What integer kernels of all instruction sets share.
#pragma once

#include "problem.h"

namespace jaxcompress {
namespace {

inline int32_t code_at(const Integer& p, int64_t k, int64_t n) {
  const uint8_t code = p.out_major ? p.codes[n * p.K + k] : p.codes[k * p.N + n];
  return p.is_signed ? static_cast<int8_t>(code) : code;
}

inline int32_t load_int32(const void* from) {
  int32_t value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// Sums of one panel for outputs [n, n + count) of a row; the first panel sets them, corrected. They may wrap around.
inline void add_to_row(const Integer& p, int64_t m, int64_t n, int64_t count, const int32_t* sums, bool is_first) {
  int32_t* y = p.y + m * p.N + n;
  const uint32_t correction = p.corrections ? static_cast<uint32_t>(p.corrections[m]) : 0;
  for (int64_t i = 0; i < count; ++i)
    y[i] = static_cast<int32_t>(static_cast<uint32_t>(sums[i]) +
                                (is_first ? 0 - correction : static_cast<uint32_t>(y[i])));
}

// Outputs [begin, end) by panels: codes that are interleaved so that lanes are outputs and every lane holds `kPer`
// inputs. `Panels` has `kStrip`, `kPer`, `Element`; `pack(p, k, last, n, columns, to)` for `kPer` inputs from k on,
// zeros from `last` on; and `multiply<rows>(p, panel, k, steps, m, n, columns)`.
template <class Panels>
void columns(const Integer& p, int64_t begin, int64_t end) {
  constexpr int64_t kPer = Panels::kPer, kStrip = Panels::kStrip, kBytes = 128 * 1024, kAhead = 16;
  alignas(64) typename Panels::Element panels[kBytes / sizeof(typename Panels::Element)];
  // Few rows: panels in the first cache. Many: panels and a block of the inputs in the second.
  const int64_t depth = p.M <= 16 ? 64 : 512, whole = kBytes / sizeof(panels[0]) / depth;
  const int64_t tile = least(whole, 512), row_block = 96;
  for (int64_t n0 = begin; n0 < end; n0 += tile)
    for (int64_t k0 = 0; k0 < p.K; k0 += depth) {
      const int64_t last = least(k0 + depth, p.K), stop = least(n0 + tile, end), steps = (last - k0 + kPer - 1) / kPer;
      // Rows of codes are read from one strip to the next: they may lie a page apart.
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t n = n0; n < stop; n += kStrip) {
          const int64_t at = k0 + k * kPer;
          // Past the end of the array this reads nothing.
          if (!p.out_major && (n - n0) % 64 == 0)
            for (int64_t h = 0; h < kPer; ++h) __builtin_prefetch(p.codes + (at + kAhead + h) * p.N + n, 0, 2);
          Panels::pack(p, at, last, n, least(kStrip, stop - n), panels + (n - n0) * depth + k * kPer * kStrip);
        }
      for (int64_t m0 = 0; m0 < p.M; m0 += row_block)
        for (int64_t n = n0; n < stop; n += kStrip) {
          const auto* panel = panels + (n - n0) * depth;
          const int64_t width = least(kStrip, stop - n), m1 = least(m0 + row_block, p.M);
          int64_t m = m0;
          for (; m + 6 <= m1; m += 6) Panels::template multiply<6>(p, panel, k0, steps, m, n, width);
          for (; m + 2 <= m1; m += 2) Panels::template multiply<2>(p, panel, k0, steps, m, n, width);
          for (; m < m1; ++m) Panels::template multiply<1>(p, panel, k0, steps, m, n, width);
        }
    }
}

}  // namespace
}  // namespace jaxcompress
