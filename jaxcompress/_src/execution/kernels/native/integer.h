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

}  // namespace
}  // namespace jaxcompress
