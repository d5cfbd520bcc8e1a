// Expansion for AVX-512, which has an instruction for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "sparse_product.h"

namespace jaxcompress {
namespace {

struct Avx512Lanes {
  static constexpr int kWidth = 16, kBytes = 16, kVectors = 4;
  using V = __m512i;
  static V expand(unsigned mask, const uint32_t* from) {
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(from));
  }
  static V expand(unsigned mask, const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_cvtepu16_epi32(halves));
  }
  template <bool is_signed>
  static V expand(unsigned mask, CodeBytes<is_signed> from) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from.from));
    const __m512i codes = is_signed ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b);
    return _mm512_castps_si512(
        _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), codes)));
  }
  static V expand(unsigned mask, Nibbles from) {
    const __m512i shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28);
    const __m512i both_halves = _mm512_mask_set1_epi32(_mm512_set1_epi32(static_cast<int>(from.eight(0))), 0xff00,
                                                       static_cast<int>(from.eight(8)));
    const __mmask16 kept = static_cast<__mmask16>(mask);
    const __m512i codes = _mm512_maskz_expand_epi32(kept, _mm512_srlv_epi32(both_halves, shifts));
    return _mm512_castps_si512(_mm512_maskz_permutexvar_ps(kept, codes, _mm512_loadu_ps(from.table)));
  }
  static void store(uint32_t* to, V v) { _mm512_storeu_si512(to, v); }
  static void store(uint16_t* to, V v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(v));
  }
  static V masked(unsigned mask, V v) { return _mm512_maskz_mov_epi32(static_cast<__mmask16>(mask), v); }
  static V scaled(V v, const float* scale) {
    return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(v), _mm512_loadu_ps(scale)));
  }
  static V shifted(V v, const float* zero) {
    return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(v), _mm512_loadu_ps(zero)));
  }
  static void nibbles(const uint8_t* from, const float* table, float* to) {
    const __m512 values = _mm512_loadu_ps(table);
    const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    // A byte each, the low nibble first; the permutation indexes by the lowest 4 bits.
    const __m256i codes = _mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4));
    const __m512i low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
    const __m512i high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(codes, 1));
    _mm512_storeu_ps(to, _mm512_permutexvar_ps(low, values));
    _mm512_storeu_ps(to + 16, _mm512_permutexvar_ps(high, values));
  }
  template <bool is_signed>
  static void bytes(const uint8_t* from, float* to) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    _mm512_storeu_ps(to, _mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b)));
  }

  static V none() { return _mm512_setzero_si512(); }
  static V all() { return _mm512_set1_epi32(-1); }
  static V words(const uint32_t* from) { return _mm512_loadu_si512(from); }
  static V words(const uint16_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static V wide(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  template <bool is_signed>
  static V codes(const uint8_t* from) {
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm512_castps_si512(_mm512_cvtepi32_ps(is_signed ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b)));
  }
  static V nibble_codes(const uint8_t* from, int shift, const float* table) {
    const __m512i at = _mm512_srl_epi32(wide(from), _mm_cvtsi32_si128(shift));
    return _mm512_castps_si512(_mm512_permutexvar_ps(at, _mm512_loadu_ps(table)));
  }
  static V fields(const uint8_t* from, int shift, int low) {
    return _mm512_and_si512(_mm512_srl_epi32(wide(from), _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(low));
  }
  static V where_equal(V place, uint32_t at, V value, V other) {
    return _mm512_mask_mov_epi32(other, _mm512_cmpeq_epi32_mask(place, _mm512_set1_epi32(static_cast<int>(at))), value);
  }
  static V lookup(V place, const float* table) {
    return _mm512_castps_si512(_mm512_permutexvar_ps(place, _mm512_loadu_ps(table)));
  }
  static V both(V a, V b) { return _mm512_and_si512(a, b); }
  static V load(const float* from) { return _mm512_castps_si512(_mm512_loadu_ps(from)); }
  static void save(float* to, V v) { _mm512_storeu_ps(to, _mm512_castsi512_ps(v)); }
  static V spread(float value) { return _mm512_castps_si512(_mm512_set1_ps(value)); }
  static V multiply_add(V a, V b, V c) {
    return _mm512_castps_si512(
        _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), _mm512_castsi512_ps(c)));
  }
  static float total(V v) { return _mm512_reduce_add_ps(_mm512_castsi512_ps(v)); }
};

}  // namespace

const ExpandKernel kAvx512Expand = {expand_rows<Avx512Lanes>, sparse_product<Avx512Lanes>};

}  // namespace jaxcompress
#endif
