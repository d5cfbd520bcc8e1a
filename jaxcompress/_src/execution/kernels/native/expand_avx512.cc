// Expansion for AVX-512, which has an instruction for it.
#if defined(__x86_64__)
#include <immintrin.h>

#include "expand_rows.h"

namespace jaxcompress {
namespace {

struct Avx512Lanes {
  static constexpr int kWidth = 16, kBytes = 16;
  using V = __m512i;
  static V expand(unsigned mask, const uint32_t* from) {
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_loadu_si512(from));
  }
  static V expand(unsigned mask, const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_maskz_expand_epi32(static_cast<__mmask16>(mask), _mm512_cvtepu16_epi32(halves));
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
};

}  // namespace

const ExpandRows kAvx512Expand = expand_rows<Avx512Lanes>;

}  // namespace jaxcompress
#endif
