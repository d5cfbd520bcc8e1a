// Kernels for AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

#include "grouped.h"
#include "integer.h"
#include "kernels.h"
#include "weight_only.h"

namespace jaxcompress {
namespace {

struct Avx2 {
  static constexpr int kWidth = 8, kSums = 8, kMostRows = 4;
  using V = __m256;
  static V load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static V set1(float value) { return _mm256_set1_ps(value); }
  static V first_lane(float value) { return _mm256_zextps128_ps256(_mm_set_ss(value)); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(V v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_shuffle_ps(a, a, 1)));
  }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

  template <Codes kind>
  struct Decoder {
    // The two halves of a table of 16, which a permutation indexes by 3 bits.
    __m256 first, second;
    __m128i flip;
    explicit Decoder(const WeightOnly& p)
        : first(_mm256_loadu_ps(p.table)),
          second(_mm256_loadu_ps(p.table + 8)),
          flip(_mm_set1_epi8(static_cast<char>(p.is_signed ? 0x88 : 0))) {}
    V bytes(const uint8_t* p) const {
      const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      return _mm256_cvtepi32_ps(kind == Codes::kInt8 ? _mm256_cvtepi8_epi32(b) : _mm256_cvtepu8_epi32(b));
    }
    // Of signed nibbles this is the code plus 8.
    void nibbles(const uint8_t* p, V& low, V& high) const {
      __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      if constexpr (kind == Codes::kTable) {
        const __m256i v = _mm256_cvtepu8_epi32(b);
        low = look_up(v, _mm256_slli_epi32(v, 28));
        high = look_up(_mm256_srli_epi32(v, 4), _mm256_slli_epi32(v, 24));
      } else {
        const __m256i v = _mm256_cvtepu8_epi32(_mm_xor_si128(b, flip));
        low = _mm256_cvtepi32_ps(_mm256_and_si256(v, _mm256_set1_epi32(15)));
        high = _mm256_cvtepi32_ps(_mm256_srli_epi32(v, 4));
      }
    }
    V look_up(__m256i index, __m256i half_in_sign) const {
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index),
                              _mm256_castsi256_ps(half_in_sign));
    }
  };
};

// ---- int8: pairs of int16, because products of bytes saturate (and |-128| is no int8).

struct PanelsOfPairs {
  static constexpr int kStrip = 16, kPer = 2;
  using Element = int16_t;

  static void pack(const Integer& p, int64_t k, int64_t last, int64_t n, int64_t columns, int16_t* to) {
    if (!p.out_major && columns == kStrip && k + 2 <= last) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.codes + k * p.N + n));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p.codes + (k + 1) * p.N + n));
      const __m256i wide_a = p.is_signed ? _mm256_cvtepi8_epi16(a) : _mm256_cvtepu8_epi16(a);
      const __m256i wide_b = p.is_signed ? _mm256_cvtepi8_epi16(b) : _mm256_cvtepu8_epi16(b);
      const __m256i low = _mm256_unpacklo_epi16(wide_a, wide_b), high = _mm256_unpackhi_epi16(wide_a, wide_b);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(low, high, 0x20));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 16), _mm256_permute2x128_si256(low, high, 0x31));
    } else {
      for (int64_t i = 0; i < kStrip; ++i)
        for (int64_t h = 0; h < 2; ++h)
          to[2 * i + h] = i < columns && k + h < last ? static_cast<int16_t>(code_at(p, k + h, n + i)) : int16_t{0};
    }
  }

  template <int kRows>
  static void multiply(const Integer& p, const int16_t* panel, int64_t k0, int64_t steps, int64_t m, int64_t n,
                       int64_t columns) {
    __m256i sums[kRows][2];
    const int16_t* x[kRows];
    each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
      sums[i][0] = sums[i][1] = _mm256_setzero_si256();
      x[i] = static_cast<const int16_t*>(p.inputs) + (m + i) * p.inputs_pitch + k0;
    });
    for (int64_t k = 0; k < steps; ++k) {
      const auto* w = reinterpret_cast<const __m256i*>(panel + k * 2 * kStrip);
      const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
      each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
        const __m256i v = _mm256_set1_epi32(load_int32(x[i] + 2 * k));
        sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(w0, v));
        sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(w1, v));
      });
    }
    each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
      int32_t lanes[kStrip];
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums[i][0]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes + 8), sums[i][1]);
      add_to_row(p, m + i, n, columns, lanes, k0 == 0);
    });
  }
};

template <int kRows>
void dots(const Integer& p, int64_t m, int64_t n) {
  __m256i sums[kRows];
  for (auto& sum : sums) sum = _mm256_setzero_si256();
  const uint8_t* codes = p.codes + n * p.K;
  for (int64_t k = 0; k < p.K; k += 16) {
    uint8_t tail[16] = {};
    const uint8_t* from = codes + k;
    if (k + 16 > p.K) from = static_cast<const uint8_t*>(std::memcpy(tail, from, p.K - k));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    const __m256i w = p.is_signed ? _mm256_cvtepi8_epi16(b) : _mm256_cvtepu8_epi16(b);
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const auto* x = static_cast<const int16_t*>(p.inputs) + (m + i) * p.inputs_pitch + k;
      sums[i] =
          _mm256_add_epi32(sums[i], _mm256_madd_epi16(w, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))));
    }
  }
  JAXCOMPRESS_UNROLL
  for (int i = 0; i < kRows; ++i) {
    __m128i a = _mm_add_epi32(_mm256_castsi256_si128(sums[i]), _mm256_extracti128_si256(sums[i], 1));
    a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
    p.y[(m + i) * p.N + n] = _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
  }
}

void dot_rows(const Integer& p, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    int64_t m = 0;
    for (; m + 4 <= p.M; m += 4) dots<4>(p, m, n);
    for (; m < p.M; ++m) dots<1>(p, m, n);
  }
}

// One row by codes as they lie, of a block of inputs at a time; y holds the sums so far.
void row_in_major(const Integer& p, int64_t begin, int64_t end) {
  constexpr int64_t kStrip = 16;
  const int64_t block = p.N % 1024 ? 16 : 8;  // rows that are a page apart evict one another
  const int16_t* x = static_cast<const int16_t*>(p.inputs);
  const int64_t whole = begin + (end - begin) / kStrip * kStrip;
  std::memset(p.y + begin, 0, (end - begin) * sizeof(int32_t));
  for (int64_t k0 = 0; k0 < p.K; k0 += block) {
    const int64_t last = least(k0 + block, p.K), pairs = last - (last - k0) % 2;
    for (int64_t n = begin; n < whole; n += kStrip) {
      __m256i low = _mm256_setzero_si256(), high = low;
      const auto add = [&](int64_t k, int64_t rows) {
        const uint8_t* from = p.codes + k * p.N + n;
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        const __m128i b =
            rows == 2 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + p.N)) : _mm_setzero_si128();
        const __m256i wide_a = p.is_signed ? _mm256_cvtepi8_epi16(a) : _mm256_cvtepu8_epi16(a);
        const __m256i wide_b = p.is_signed ? _mm256_cvtepi8_epi16(b) : _mm256_cvtepu8_epi16(b);
        const __m256i v = _mm256_set1_epi32(load_int32(x + k));  // rows of inputs are padded
        low = _mm256_add_epi32(low, _mm256_madd_epi16(_mm256_unpacklo_epi16(wide_a, wide_b), v));
        high = _mm256_add_epi32(high, _mm256_madd_epi16(_mm256_unpackhi_epi16(wide_a, wide_b), v));
      };
      // The rows of the next block, which lie in other pages. Past the end of the array this reads nothing.
      if ((n - begin) % 64 == 0)
        for (int64_t h = 0; h < block; ++h) __builtin_prefetch(p.codes + (k0 + block + h) * p.N + n, 0, 2);
      for (int64_t k = k0; k < pairs; k += 2) add(k, 2);
      if (pairs < last) add(pairs, 1);
      __m256i* y = reinterpret_cast<__m256i*>(p.y + n);
      const __m256i first = _mm256_permute2x128_si256(low, high, 0x20),
                    second = _mm256_permute2x128_si256(low, high, 0x31);
      _mm256_storeu_si256(y, _mm256_add_epi32(_mm256_loadu_si256(y), first));
      _mm256_storeu_si256(y + 1, _mm256_add_epi32(_mm256_loadu_si256(y + 1), second));
    }
    for (int64_t n = whole; n < end; ++n) {
      uint32_t sum = static_cast<uint32_t>(p.y[n]);
      for (int64_t k = k0; k < last; ++k) sum += static_cast<uint32_t>(x[k] * code_at(p, k, n));
      p.y[n] = static_cast<int32_t>(sum);
    }
  }
}

// ---- int8 by groups: products of int8 and nibbles, of which 8 pairs fit int16. Bytes are two planes of nibbles.

struct GroupedPanels {
  static constexpr int kStrip = 16, kRows = 4, kMostPlanes = 2;

  static int64_t planes(const Grouped& p) { return p.is_packed ? 1 : 2; }

  static void pack(const Grouped& p, int64_t block, int64_t n, int64_t columns, uint8_t* to, int64_t plane) {
    const int64_t bytes = p.is_packed ? 4 : 8, begin = block * bytes, rows = p.is_packed ? (p.K + 1) / 2 : p.K;
    alignas(32) uint8_t whole[8 * kStrip];
    if (begin + bytes > rows || columns < kStrip) {
      if (p.is_packed) return pack_block(p, block, n, columns, kStrip, to);
      pack_block(p, block, n, columns, kStrip, whole);
    } else {
      const __m128i flip = _mm_set1_epi8(static_cast<char>(!p.is_signed ? 0 : p.is_packed ? 0x88 : 0x80));
      const int64_t pitch = p.out_major ? rows : p.N;
      const uint8_t* from = p.codes + (p.out_major ? n * rows + begin : begin * p.N + n);
      const auto quadruples = p.out_major ? gather : interleave;
      quadruples(from, pitch, flip, whole);
      if (p.is_packed) return split(whole, to, to + 4 * kStrip);
      quadruples(from + (p.out_major ? 4 : 4 * p.N), pitch, flip, whole + 4 * kStrip);
    }
    split(whole, to, to + plane);
    split(whole + 4 * kStrip, to + 4 * kStrip, to + plane + 4 * kStrip);
  }

  // Four rows of 16 codes as 16 quadruples.
  static void interleave(const uint8_t* from, int64_t pitch, __m128i flip, uint8_t* to) {
    __m128i r[4];
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < 4; ++i)
      r[i] = _mm_xor_si128(flip, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * pitch)));
    const __m128i a = _mm_unpacklo_epi8(r[0], r[1]), b = _mm_unpackhi_epi8(r[0], r[1]);
    const __m128i c = _mm_unpacklo_epi8(r[2], r[3]), d = _mm_unpackhi_epi8(r[2], r[3]);
    __m128i* out = reinterpret_cast<__m128i*>(to);
    _mm_storeu_si128(out, _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(a, c));
    _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(b, d));
    _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(b, d));
  }

  static void gather(const uint8_t* from, int64_t pitch, __m128i flip, uint8_t* to) {
    gather_quadruples<kStrip>(from, pitch, to);
    auto* out = reinterpret_cast<__m128i*>(to);
    JAXCOMPRESS_UNROLL
    for (int i = 0; i < 4; ++i) _mm_storeu_si128(out + i, _mm_xor_si128(flip, _mm_loadu_si128(out + i)));
  }

  // Low and high nibbles of 16 quadruples.
  static void split(const uint8_t* whole, uint8_t* low, uint8_t* high) {
    const __m256i mask = _mm256_set1_epi8(15);
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < 2; ++j) {
      const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(whole + 32 * j));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + 32 * j), _mm256_and_si256(mask, b));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + 32 * j), _mm256_and_si256(mask, _mm256_srli_epi16(b, 4)));
    }
  }

  // Sums for the outputs of kRows rows, which begin at `begin` of each row. A function of its own, small enough for GCC
  // to keep the sums in registers.
  template <int kCount>
  __attribute__((noinline)) static void multiply_quadruples(const uint8_t* first, int64_t planes, int64_t plane,
                                                            int64_t steps, const int8_t* inputs, int64_t pitch,
                                                            const int32_t* begin, int64_t begin_pitch,
                                                            int32_t (*lanes)[kStrip]) {
    __m256i sums[kCount][2];
    const int8_t* x[kCount];
    each<kCount>([&](auto i) JAXCOMPRESS_INLINE {
      sums[i][0] = sums[i][1] = _mm256_set1_epi32(begin[i * begin_pitch]);
      x[i] = inputs + i * pitch;
    });
    for (int64_t high = 0; high < planes; ++high) {
      const uint8_t* panel = first + high * plane;
      const __m256i weight = _mm256_set1_epi16(high ? 16 : 1);
      for (int64_t k = 0; k < steps;) {
        __m256i pairs[kCount][2];
        each<kCount>([&](auto i) JAXCOMPRESS_INLINE { pairs[i][0] = pairs[i][1] = _mm256_setzero_si256(); });
        for (const int64_t stop = least(k + 8, steps); k < stop; ++k) {
          const auto* w = reinterpret_cast<const __m256i*>(panel + 4 * kStrip * k);
          const __m256i w0 = _mm256_loadu_si256(w), w1 = _mm256_loadu_si256(w + 1);
          each<kCount>([&](auto i) JAXCOMPRESS_INLINE {
            const __m256i v = _mm256_set1_epi32(load_int32(x[i] + 4 * k));
            pairs[i][0] = _mm256_add_epi16(pairs[i][0], _mm256_maddubs_epi16(w0, v));
            pairs[i][1] = _mm256_add_epi16(pairs[i][1], _mm256_maddubs_epi16(w1, v));
          });
        }
        each<kCount>([&](auto i) JAXCOMPRESS_INLINE {
          each<2>([&](auto j) JAXCOMPRESS_INLINE {
            sums[i][j] = _mm256_add_epi32(sums[i][j], _mm256_madd_epi16(pairs[i][j], weight));
          });
        });
      }
    }
    each<kCount>([&](auto i) JAXCOMPRESS_INLINE {
      each<2>([&](auto j) JAXCOMPRESS_INLINE {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes[i] + 8 * j), sums[i][j]);
      });
    });
  }

  template <int kCount>
  JAXCOMPRESS_INLINE static inline const uint8_t* whole_sums(const GroupedStrip& s, int64_t segment, const uint8_t* panel, int64_t m,
                                   int32_t (*lanes)[kStrip]) {
    const Grouped& p = s.p;
    const int64_t begin = p.segments[segment].begin, steps = (p.segments[segment].end - begin) / 4;
    multiply_quadruples<kCount>(panel, planes(p), s.plane, steps, p.inputs + m * p.inputs_pitch + begin,
                                p.inputs_pitch, p.corrections + m * p.segment_count + segment, p.segment_count, lanes);
    return panel + steps * 4 * kStrip;
  }

  template <int kCount>
  static void multiply(const GroupedStrip& s, int64_t m, float* const* totals) {
    const Grouped& p = s.p;
    const uint8_t* panel = s.panel;
    for (int64_t segment = s.first; segment < s.last; ++segment) {
      const int64_t at = m * p.segment_count + segment, row = (segment - s.first) * s.pitch;
      alignas(32) int32_t lanes[kCount][kStrip];
      panel = whole_sums<kCount>(s, segment, panel, m, lanes);
      const bool begins = s.is_first && segment == s.first;
      for (int j = 0; j < kStrip; j += 8) {
        const __m256 scale = _mm256_loadu_ps(s.scales[row] + j);
        const __m256 zero = s.zeros ? _mm256_loadu_ps(s.zeros[row] + j) : _mm256_setzero_ps();
        JAXCOMPRESS_UNROLL
        for (int i = 0; i < kCount; ++i) {
          __m256 value = _mm256_cvtepi32_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(lanes[i] + j)));
          if (s.code_sums)
            value = _mm256_fnmadd_ps(_mm256_loadu_ps(s.code_sums + row * kStrip + j),
                                    _mm256_set1_ps(p.input_zeros[m + i]), value);
          value = _mm256_fnmadd_ps(zero, _mm256_set1_ps(p.sums[at + i * p.segment_count]), value);
          const __m256 before = begins ? _mm256_setzero_ps() : _mm256_loadu_ps(totals[i] + j);
          _mm256_storeu_ps(totals[i] + j, _mm256_fmadd_ps(value, scale, before));
        }
      }
    }
  }
};

}  // namespace

const WeightOnlyKernel kAvx2 = {8, 8, in_major<Avx2>, out_major<Avx2>};
const IntegerKernel kAvx2Integer = {2, 16, false, PanelsOfPairs::kStrip, columns<PanelsOfPairs>, dot_rows, row_in_major};
const GroupedKernel kAvx2Grouped = {GroupedPanels::kStrip, grouped<GroupedPanels>};

}  // namespace jaxcompress
#endif
