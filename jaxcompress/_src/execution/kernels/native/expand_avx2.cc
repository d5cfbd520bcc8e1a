// Expansion for AVX2: for each byte of a mask, the permutation that puts values where they belong.
#if defined(__x86_64__)
#include <immintrin.h>

#include "sparse_product.h"

namespace jaxcompress {
namespace {

// For each mask, the place among the kept lanes of each lane, or -1.
struct Permutations {
  alignas(8) int8_t places[256][8];
  constexpr Permutations() : places() {
    for (int mask = 0; mask < 256; ++mask)
      for (int lane = 0, next = 0; lane < 8; ++lane)
        places[mask][lane] = static_cast<int8_t>(mask >> lane & 1 ? next++ : -1);
  }
};

constexpr Permutations kPermutations;

struct Avx2Lanes {
  static constexpr int kWidth = 8, kBytes = 16, kVectors = 2;
  using V = __m256i;
  static __m256i places(unsigned mask) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPermutations.places[mask])));
  }
  // The permutation reads the lowest 3 bits of each place, and its sign says that nothing goes there.
  static V permuted(unsigned mask, __m256i words) {
    const __m256i at = places(mask);
    return _mm256_andnot_si256(_mm256_srai_epi32(at, 31), _mm256_permutevar8x32_epi32(words, at));
  }
  static V expand(unsigned mask, const uint32_t* from) {
    return permuted(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static V expand(unsigned mask, const uint16_t* from) {
    return permuted(mask, _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  template <bool is_signed>
  static V expand(unsigned mask, CodeBytes<is_signed> from) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from.from));
    const __m256i codes = permuted(mask, is_signed ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
    return _mm256_castps_si256(_mm256_cvtepi32_ps(codes));
  }
  static V expand(unsigned mask, Nibbles from) {
    const __m256i shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28), to = places(mask);
    const __m256i codes = _mm256_permutevar8x32_epi32(
        _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(from.eight(0))), shifts), to);
    const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from.table), codes);
    const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from.table + 8), codes);
    const __m256 v = _mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(codes, 28)));
    return _mm256_andnot_si256(_mm256_srai_epi32(to, 31), _mm256_castps_si256(v));
  }
  static void store(uint32_t* to, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), v); }
  static void store(uint16_t* to, V v) {
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves);
  }
  static V masked(unsigned mask, V v) { return _mm256_andnot_si256(_mm256_srai_epi32(places(mask), 31), v); }
  static V scaled(V v, const float* scale) {
    return _mm256_castps_si256(_mm256_mul_ps(_mm256_castsi256_ps(v), _mm256_loadu_ps(scale)));
  }
  static V shifted(V v, const float* zero) {
    return _mm256_castps_si256(_mm256_sub_ps(_mm256_castsi256_ps(v), _mm256_loadu_ps(zero)));
  }
  static void nibbles(const uint8_t* from, const float* table, float* to) {
    const __m256 first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8);
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    // A byte each, the low nibble first.
    const __m256i codes =
        _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    alignas(32) uint8_t bytes[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), codes);
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < 4; ++i) {
      const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + 8 * i)));
      _mm256_storeu_ps(to + 8 * i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, at),
                                                    _mm256_permutevar8x32_ps(second, at),
                                                    _mm256_castsi256_ps(_mm256_slli_epi32(at, 28))));
    }
  }
  template <bool is_signed>
  static void bytes(const uint8_t* from, float* to) {
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
      _mm256_storeu_ps(to + 8 * i, _mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b)));
    }
  }

  static V none() { return _mm256_setzero_si256(); }
  static V all() { return _mm256_set1_epi32(-1); }
  static V words(const uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static V words(const uint16_t* from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static V wide(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  template <bool is_signed>
  static V codes(const uint8_t* from) {
    const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_castps_si256(_mm256_cvtepi32_ps(is_signed ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b)));
  }
  static V nibble_codes(const uint8_t* from, int shift, const float* table) {
    // The permutation reads the lowest 3 bits, the sign says which half of the table is meant.
    const __m256i at = _mm256_srl_epi32(wide(from), _mm_cvtsi32_si128(shift));
    const __m256 first = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), at);
    const __m256 second = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), at);
    return _mm256_castps_si256(_mm256_blendv_ps(first, second, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28))));
  }
  static V fields(const uint8_t* from, int shift, int low) {
    return _mm256_and_si256(_mm256_srl_epi32(wide(from), _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(low));
  }
  static V where_equal(V place, uint32_t at, V value, V other) {
    return _mm256_blendv_epi8(other, value, _mm256_cmpeq_epi32(place, _mm256_set1_epi32(static_cast<int>(at))));
  }
  static V lookup(V place, const float* table) {
    return _mm256_castps_si256(_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), place));
  }
  static V both(V a, V b) { return _mm256_and_si256(a, b); }
  static V load(const float* from) { return _mm256_castps_si256(_mm256_loadu_ps(from)); }
  static void save(float* to, V v) { _mm256_storeu_ps(to, _mm256_castsi256_ps(v)); }
  static V spread(float value) { return _mm256_castps_si256(_mm256_set1_ps(value)); }
  static V multiply_add(V a, V b, V c) {
    return _mm256_castps_si256(
        _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(c)));
  }
  static float total(V v) {
    const __m256 f = _mm256_castsi256_ps(v);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(f), _mm256_extractf128_ps(f, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }
};

}  // namespace

const ExpandKernel kAvx2Expand = {expand_rows<Avx2Lanes>, sparse_product<Avx2Lanes>};

}  // namespace jaxcompress
#endif
