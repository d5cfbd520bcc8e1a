// A vector of any number of lanes, for any processor.
#pragma once

#include "problem.h"

namespace jaxcompress {
namespace {

// Codes of 8 or 4 bits that are read one after another; vectors may read `kMargin` codes from each place on.
template <bool is_signed>
struct CodeBytes {
  static constexpr int kMargin = 16;
  const uint8_t* from;
  void operator+=(int64_t count) { from += count; }
};

struct Nibbles {
  static constexpr int kMargin = 32;
  uint64_t at;  // twice the address of the byte, and 1 for the high nibble: one register
  const float* table;
  Nibbles(const uint8_t* from, int64_t place, const float* table)
      : at(2 * reinterpret_cast<uintptr_t>(from) + static_cast<uint64_t>(place)), table(table) {}
  void operator+=(int64_t count) { at += static_cast<uint64_t>(count); }
  // The 8 nibbles from the one `skipped` places on, the first one lowest.
  uint32_t eight(int skipped) const {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const uint8_t*>(at / 2) + skipped / 2, 8);
    return static_cast<uint32_t>(word >> (at % 2 * 4));
  }
};

template <int kLanes>
struct PlainLanes {
  static constexpr int kWidth = kLanes, kBytes = 8, kVectors = 2;
  struct V {
    uint32_t lane[kWidth];
  };
  template <class F>
  static V by_lane(const F& f) {
    V v;
    for (int i = 0; i < kWidth; ++i) v.lane[i] = f(i);
    return v;
  }
  static uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
  }
  static float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
  }
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
  template <bool is_signed>
  static V expand(unsigned mask, CodeBytes<is_signed> from) {
    int next = 0;
    return by_lane([&](int i) { return mask >> i & 1 ? bits_of(code<is_signed>(from.from[next++])) : 0; });
  }
  static V expand(unsigned mask, Nibbles from) {
    uint32_t left = from.eight(0);
    return by_lane([&](int i) {
      if ((mask >> i & 1) == 0) return uint32_t{0};
      const uint32_t bits = bits_of(from.table[left & 15]);
      left >>= 4;
      return bits;
    });
  }
  static void store(uint32_t* to, V v) { std::memcpy(to, v.lane, sizeof(v.lane)); }
  static void store(uint16_t* to, V v) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint16_t>(v.lane[i]);
  }
  static V masked(unsigned mask, V v) {
    return by_lane([&](int i) { return mask >> i & 1 ? v.lane[i] : 0; });
  }
  static V scaled(V v, const float* scale) {
    return by_lane([&](int i) { return bits_of(float_of(v.lane[i]) * scale[i]); });
  }
  static V shifted(V v, const float* zero) {
    return by_lane([&](int i) { return bits_of(float_of(v.lane[i]) - zero[i]); });
  }
  static void nibbles(const uint8_t* from, const float* table, float* to) {
    for (int i = 0; i < kBytes; ++i) {
      to[2 * i] = table[from[i] & 15];
      to[2 * i + 1] = table[from[i] >> 4];
    }
  }
  template <bool is_signed>
  static float code(uint8_t byte) {
    return is_signed ? static_cast<float>(static_cast<int8_t>(byte)) : static_cast<float>(byte);
  }
  template <bool is_signed>
  static void bytes(const uint8_t* from, float* to) {
    for (int i = 0; i < kBytes; ++i) to[i] = code<is_signed>(from[i]);
  }

  static V none() {
    return by_lane([](int) { return 0; });
  }
  static V all() {
    return by_lane([](int) { return ~0u; });
  }
  template <class Word>
  static V words(const Word* from) {
    return by_lane([&](int i) {
      Word word;
      std::memcpy(&word, from + i, sizeof(word));
      return static_cast<uint32_t>(word);
    });
  }
  template <bool is_signed>
  static V codes(const uint8_t* from) {
    return by_lane([&](int i) { return bits_of(code<is_signed>(from[i])); });
  }
  static V nibble_codes(const uint8_t* from, int shift, const float* table) {
    return by_lane([&](int i) { return bits_of(table[from[i] >> shift & 15]); });
  }
  static V fields(const uint8_t* from, int shift, int low) {
    return by_lane([&](int i) { return static_cast<uint32_t>(from[i] >> shift & low); });
  }
  static V where_equal(V place, uint32_t at, V value, V other) {
    return by_lane([&](int i) { return place.lane[i] == at ? value.lane[i] : other.lane[i]; });
  }
  // Entries of a table of as many floats as there are lanes.
  static V lookup(V place, const float* table) {
    return by_lane([&](int i) { return bits_of(table[place.lane[i] & (kWidth - 1)]); });
  }
  static V both(V a, V b) {
    return by_lane([&](int i) { return a.lane[i] & b.lane[i]; });
  }
  static V load(const float* from) {
    V v;
    std::memcpy(v.lane, from, sizeof(v.lane));
    return v;
  }
  static void save(float* to, V v) { std::memcpy(to, v.lane, sizeof(v.lane)); }
  static V spread(float value) {
    return by_lane([&](int) { return bits_of(value); });
  }
  static V multiply_add(V a, V b, V c) {
    return by_lane([&](int i) { return bits_of(float_of(a.lane[i]) * float_of(b.lane[i]) + float_of(c.lane[i])); });
  }
  static float total(V v) {
    float sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += float_of(v.lane[i]);
    return sum;
  }
};

}  // namespace
}  // namespace jaxcompress
