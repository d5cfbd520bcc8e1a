// Expansion for any processor.
#include "expand_rows.h"

namespace jaxcompress {
namespace {

struct PlainLanes {
  static constexpr int kWidth = 8, kBytes = 8;
  struct V {
    uint32_t lane[kWidth];
  };
  template <class Word>
  static V expand(unsigned mask, const Word* from) {
    V v;
    int next = 0;
    for (int i = 0; i < kWidth; ++i) {
      Word word;
      std::memcpy(&word, from + next, sizeof(word));
      const int is_kept = mask >> i & 1;
      v.lane[i] = is_kept ? word : 0;
      next += is_kept;
    }
    return v;
  }
  static void store(uint32_t* to, V v) { std::memcpy(to, v.lane, sizeof(v.lane)); }
  static void store(uint16_t* to, V v) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint16_t>(v.lane[i]);
  }
  static V masked(unsigned mask, V v) {
    for (int i = 0; i < kWidth; ++i) v.lane[i] = mask >> i & 1 ? v.lane[i] : 0;
    return v;
  }
  static V scaled(V v, const float* scale) {
    float floats[kWidth];
    std::memcpy(floats, v.lane, sizeof(floats));
    for (int i = 0; i < kWidth; ++i) floats[i] *= scale[i];
    std::memcpy(v.lane, floats, sizeof(floats));
    return v;
  }
  static V shifted(V v, const float* zero) {
    float floats[kWidth];
    std::memcpy(floats, v.lane, sizeof(floats));
    for (int i = 0; i < kWidth; ++i) floats[i] -= zero[i];
    std::memcpy(v.lane, floats, sizeof(floats));
    return v;
  }
  static void nibbles(const uint8_t* from, const float* table, float* to) {
    for (int i = 0; i < kBytes; ++i) {
      to[2 * i] = table[from[i] & 15];
      to[2 * i + 1] = table[from[i] >> 4];
    }
  }
  template <bool is_signed>
  static void bytes(const uint8_t* from, float* to) {
    for (int i = 0; i < kBytes; ++i)
      to[i] = is_signed ? static_cast<float>(static_cast<int8_t>(from[i])) : static_cast<float>(from[i]);
  }
};

}  // namespace

const ExpandRows kPortableExpand = expand_rows<PlainLanes>;

}  // namespace jaxcompress
