// Kernels for AVX-512 with VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "grouped.h"
#include "integer.h"
#include "kernels.h"
#include "weight_only.h"

namespace jaxcompress {
namespace {

struct Avx512 {
  static constexpr int kWidth = 16, kSums = 16, kMostRows = 4;
  using V = __m512;
  static V load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static V set1(float value) { return _mm512_set1_ps(value); }
  static V first_lane(float value) { return _mm512_zextps128_ps512(_mm_set_ss(value)); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V v) { return _mm512_reduce_add_ps(v); }
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T1); }

  template <Codes kind>
  struct Decoder {
    __m512 table;
    explicit Decoder(const WeightOnly& p) : table(_mm512_loadu_ps(p.table)) {}
    V bytes(const uint8_t* p) const {
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
      return _mm512_cvtepi32_ps(kind == Codes::kInt8 ? _mm512_cvtepi8_epi32(b) : _mm512_cvtepu8_epi32(b));
    }
    // The permutation indexes by the lowest 4 bits: nothing need be masked.
    void nibbles(const uint8_t* p, V& low, V& high) const {
      const __m512i v = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      low = _mm512_permutexvar_ps(v, table);
      high = _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4), table);
    }
  };
};

// ---- int8: dpbusd multiplies unsigned by signed bytes. Codes are the unsigned ones (signed codes + 128, which adds
// 128 times the sum of the inputs).

// As the intrinsic, for which GCC copies and spills the sums of a loop.
inline void add_products(__m512i& sums, __m512i codes, __m512i inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(inputs));
}

// Four rows of 64 codes as 64 quadruples, in order.
inline void interleave(const uint8_t* from, int64_t pitch, __m512i flip, __m512i (&to)[4]) {
  __m512i r[4];
  JAXCOMPRESS_UNROLL
  for (int i = 0; i < 4; ++i) r[i] = _mm512_xor_si512(flip, _mm512_loadu_si512(from + i * pitch));
  const __m512i a = _mm512_unpacklo_epi8(r[0], r[1]), b = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi8(r[2], r[3]), d = _mm512_unpackhi_epi8(r[2], r[3]);
  // In each of these, lane l (of 128 bits) belongs to outputs 16 l + 4 i, ..., 16 l + 4 i + 3.
  const __m512i q0 = _mm512_unpacklo_epi16(a, c), q1 = _mm512_unpackhi_epi16(a, c);
  const __m512i q2 = _mm512_unpacklo_epi16(b, d), q3 = _mm512_unpackhi_epi16(b, d);
  const __m512i s0 = _mm512_shuffle_i32x4(q0, q1, 0x44), s1 = _mm512_shuffle_i32x4(q2, q3, 0x44);
  const __m512i s2 = _mm512_shuffle_i32x4(q0, q1, 0xee), s3 = _mm512_shuffle_i32x4(q2, q3, 0xee);
  to[0] = _mm512_shuffle_i32x4(s0, s1, 0x88);
  to[1] = _mm512_shuffle_i32x4(s0, s1, 0xdd);
  to[2] = _mm512_shuffle_i32x4(s2, s3, 0x88);
  to[3] = _mm512_shuffle_i32x4(s2, s3, 0xdd);
}

// Sums for 64 outputs of kRows rows, which begin at `begin` of each row. A function of its own, small enough for GCC to
// keep the sums in registers.
template <int kRows>
__attribute__((noinline)) void multiply_quadruples(const uint8_t* panel, int64_t steps, const int8_t* inputs,
                                                   int64_t pitch, const int32_t* begin, int64_t begin_pitch,
                                                   int32_t (*lanes)[64]) {
  __m512i sums[kRows][4];
  const int8_t* x[kRows];
  each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
    const __m512i first = _mm512_set1_epi32(begin[i * begin_pitch]);
    each<4>([&](auto j) JAXCOMPRESS_INLINE { sums[i][j] = first; });
    x[i] = inputs + i * pitch;
  });
  for (int64_t k = 0; k < steps; ++k) {
    __m512i w[4];
    each<4>([&](auto j) JAXCOMPRESS_INLINE { w[j] = _mm512_loadu_si512(panel + 256 * k + 64 * j); });
    each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
      const __m512i v = _mm512_set1_epi32(load_int32(x[i] + 4 * k));
      each<4>([&](auto j) JAXCOMPRESS_INLINE { add_products(sums[i][j], w[j], v); });
    });
  }
  each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
    each<4>([&](auto j) JAXCOMPRESS_INLINE { _mm512_storeu_si512(lanes[i] + 16 * j, sums[i][j]); });
  });
}

struct PanelsOfQuadruples {
  static constexpr int kStrip = 64, kPer = 4;
  using Element = uint8_t;

  static void pack(const Integer& p, int64_t k, int64_t last, int64_t n, int64_t columns, uint8_t* to) {
    const uint8_t flip = p.is_signed ? 0x80 : 0;
    if (!p.out_major && columns == kStrip && k + 4 <= last) {
      __m512i quadruples[4];
      interleave(p.codes + k * p.N + n, p.N, _mm512_set1_epi8(static_cast<char>(flip)), quadruples);
      JAXCOMPRESS_UNROLL
      for (int j = 0; j < 4; ++j) _mm512_storeu_si512(to + 64 * j, quadruples[j]);
    } else if (p.out_major && k + 4 <= last) {
      const uint32_t flips = flip * 0x01010101u;
      for (int64_t i = 0; i < columns; ++i) {
        const uint32_t quadruple = static_cast<uint32_t>(load_int32(p.codes + (n + i) * p.K + k)) ^ flips;
        std::memcpy(to + 4 * i, &quadruple, 4);
      }
      std::memset(to + 4 * columns, 0, 4 * (kStrip - columns));
    } else {
      for (int64_t i = 0; i < kStrip; ++i)
        for (int64_t h = 0; h < 4; ++h)
          to[4 * i + h] =
              i < columns && k + h < last ? static_cast<uint8_t>(code_at(p, k + h, n + i)) ^ flip : uint8_t{0};
    }
  }

  template <int kRows>
  static void multiply(const Integer& p, const uint8_t* panel, int64_t k0, int64_t steps, int64_t m, int64_t n,
                       int64_t columns) {
    const int32_t zero = 0;
    int32_t lanes[kRows][kStrip];
    const int8_t* x = static_cast<const int8_t*>(p.inputs) + m * p.inputs_pitch + k0;
    multiply_quadruples<kRows>(panel, steps, x, p.inputs_pitch, &zero, 0, lanes);
    for (int i = 0; i < kRows; ++i) add_to_row(p, m + i, n, columns, lanes[i], k0 == 0);
  }
};

// As `_mm512_reduce_add_epi32`, which adds the last lanes as numbers that may not wrap around.
inline int32_t sum_of_lanes(__m512i v) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  __m128i a = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  a = _mm_add_epi32(a, _mm_shuffle_epi32(a, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(a, _mm_shuffle_epi32(a, 0xb1)));
}

template <int kRows, int kOutputs>
void dots(const Integer& p, int64_t m, int64_t n) {
  __m512i sums[kRows][kOutputs];
  each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
    each<kOutputs>([&](auto j) JAXCOMPRESS_INLINE { sums[i][j] = _mm512_setzero_si512(); });
  });
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(p.is_signed ? 0x80 : 0));
  for (int64_t k = 0; k < p.K; k += 64) {
    const __mmask64 mask = p.K - k >= 64 ? ~__mmask64{0} : (__mmask64{1} << (p.K - k)) - 1;
    __m512i x[kRows];
    each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
      x[i] = _mm512_loadu_si512(static_cast<const int8_t*>(p.inputs) + (m + i) * p.inputs_pitch + k);
    });
    each<kOutputs>([&](auto j) JAXCOMPRESS_INLINE {
      const __m512i w = _mm512_xor_si512(flip, _mm512_maskz_loadu_epi8(mask, p.codes + (n + j) * p.K + k));
      each<kRows>([&](auto i) JAXCOMPRESS_INLINE { add_products(sums[i][j], w, x[i]); });
    });
  }
  each<kRows>([&](auto i) JAXCOMPRESS_INLINE {
    each<kOutputs>([&](auto j) JAXCOMPRESS_INLINE {
      const int32_t sum = sum_of_lanes(sums[i][j]);
      add_to_row(p, m + i, n + j, 1, &sum, true);
    });
  });
}

void dot_rows(const Integer& p, int64_t begin, int64_t end) {
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    int64_t m = 0;
    for (; m + 4 <= p.M; m += 4) dots<4, 4>(p, m, n);
    for (; m < p.M; ++m) dots<1, 4>(p, m, n);
  }
  for (; n < end; ++n)
    for (int64_t m = 0; m < p.M; ++m) dots<1, 1>(p, m, n);
}

struct GroupedPanels {
  static constexpr int kStrip = 64, kRows = 6, kMostPlanes = 1;

  static int64_t planes(const Grouped&) { return 1; }

  static void pack(const Grouped& p, int64_t block, int64_t n, int64_t columns, uint8_t* to, int64_t) {
    const int64_t bytes = p.is_packed ? 4 : 8, begin = block * bytes, rows = p.is_packed ? (p.K + 1) / 2 : p.K;
    if (begin + bytes > rows || columns < kStrip) return pack_block(p, block, n, columns, kStrip, to);
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(!p.is_signed ? 0 : p.is_packed ? 0x88 : 0x80));
    if (!p.out_major) {
      const uint8_t* from = p.codes + begin * p.N + n;
      __m512i quadruples[4];
      interleave(from, p.N, flip, quadruples);
      if (p.is_packed) return store_nibbles(quadruples, to);
      store(quadruples, to);
      interleave(from + 4 * p.N, p.N, flip, quadruples);
      store(quadruples, to + 256);
    } else {
      const uint8_t* from = p.codes + n * rows + begin;
      __m512i quadruples[4];
      gather(from, rows, flip, quadruples);
      if (p.is_packed) return store_nibbles(quadruples, to);
      store(quadruples, to);
      gather(from + 4, rows, flip, quadruples);
      store(quadruples, to + 256);
    }
  }

  static void gather(const uint8_t* from, int64_t pitch, __m512i flip, __m512i (&to)[4]) {
    alignas(64) uint8_t whole[4 * kStrip];
    gather_quadruples<kStrip>(from, pitch, whole);
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < 4; ++j) to[j] = _mm512_xor_si512(flip, _mm512_load_si512(whole + 64 * j));
  }

  static void store(const __m512i (&quadruples)[4], uint8_t* to) {
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < 4; ++j) _mm512_storeu_si512(to + 64 * j, quadruples[j]);
  }

  static void store_nibbles(const __m512i (&quadruples)[4], uint8_t* to) {
    const __m512i mask = _mm512_set1_epi8(15);
    JAXCOMPRESS_UNROLL
    for (int j = 0; j < 4; ++j) {
      _mm512_storeu_si512(to + 64 * j, _mm512_and_si512(mask, quadruples[j]));
      _mm512_storeu_si512(to + 256 + 64 * j, _mm512_and_si512(mask, _mm512_srli_epi16(quadruples[j], 4)));
    }
  }

  template <int kCount>
  JAXCOMPRESS_INLINE static inline const uint8_t* whole_sums(const GroupedStrip& s, int64_t segment, const uint8_t* panel, int64_t m,
                                   int32_t (*lanes)[kStrip]) {
    const Grouped& p = s.p;
    const int64_t begin = p.segments[segment].begin, steps = (p.segments[segment].end - begin) / 4;
    multiply_quadruples<kCount>(panel, steps, p.inputs + m * p.inputs_pitch + begin, p.inputs_pitch,
                                p.corrections + m * p.segment_count + segment, p.segment_count, lanes);
    return panel + steps * 4 * kStrip;
  }

  template <int kCount>
  static void multiply(const GroupedStrip& s, int64_t m, float* const* totals) {
    const Grouped& p = s.p;
    const uint8_t* panel = s.panel;
    for (int64_t segment = s.first; segment < s.last; ++segment) {
      const int64_t at = m * p.segment_count + segment, row = (segment - s.first) * s.pitch;
      alignas(64) int32_t lanes[kCount][kStrip];
      panel = whole_sums<kCount>(s, segment, panel, m, lanes);
      const bool begins = s.is_first && segment == s.first;
      for (int j = 0; j < kStrip; j += 16) {
        const __m512 scale = _mm512_loadu_ps(s.scales[row] + j);
        const __m512 zero = s.zeros ? _mm512_loadu_ps(s.zeros[row] + j) : _mm512_setzero_ps();
        JAXCOMPRESS_UNROLL
        for (int i = 0; i < kCount; ++i) {
          __m512 value = _mm512_cvtepi32_ps(_mm512_load_si512(lanes[i] + j));
          if (s.code_sums)
            value = _mm512_fnmadd_ps(_mm512_loadu_ps(s.code_sums + row * kStrip + j),
                                    _mm512_set1_ps(p.input_zeros[m + i]), value);
          value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(p.sums[at + i * p.segment_count]), value);
          const __m512 before = begins ? _mm512_setzero_ps() : _mm512_loadu_ps(totals[i] + j);
          _mm512_storeu_ps(totals[i] + j, _mm512_fmadd_ps(value, scale, before));
        }
      }
    }
  }
};

}  // namespace

const WeightOnlyKernel kAvx512 = {16, 0, in_major<Avx512>, out_major<Avx512>};
const IntegerKernel kVnniInteger = {1, 64, true, PanelsOfQuadruples::kStrip, columns<PanelsOfQuadruples>, dot_rows, nullptr};
const GroupedKernel kVnniGrouped = {GroupedPanels::kStrip, grouped<GroupedPanels>};

}  // namespace jaxcompress
#endif
