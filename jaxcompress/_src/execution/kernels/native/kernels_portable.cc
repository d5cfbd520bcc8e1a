// Kernels for any processor, in vectors that the compiler maps to what there is.
#include "grouped.h"
#include "integer.h"
#include "kernels.h"
#include "weight_only.h"

namespace jaxcompress {
namespace {

template <int kLanes>
struct Plain {
  static constexpr int kWidth = kLanes, kSums = 4, kMostRows = kLanes == 1 ? 1 : 2;
  struct V {
    float lane[kLanes];
  };
  static V load(const float* p) {
    V v;
    std::memcpy(v.lane, p, sizeof(v.lane));
    return v;
  }
  static void store(float* p, V v) { std::memcpy(p, v.lane, sizeof(v.lane)); }
  static V set1(float value) {
    V v;
    for (float& lane : v.lane) lane = value;
    return v;
  }
  static V first_lane(float value) {
    V v = set1(0);
    v.lane[0] = value;
    return v;
  }
  static V fma(V a, V b, V c) {
    for (int i = 0; i < kLanes; ++i) c.lane[i] += a.lane[i] * b.lane[i];
    return c;
  }
  static float sum(V v) {
    float total = 0;
    for (float lane : v.lane) total += lane;
    return total;
  }
  static void prefetch(const uint8_t*) {}

  template <Codes kind>
  struct Decoder {
    float table[16];
    explicit Decoder(const WeightOnly& p) {
      for (int i = 0; i < 16; ++i)
        table[i] = kind == Codes::kTable ? p.table[i] : static_cast<float>(p.is_signed ? (i ^ 8) - 8 : i);
    }
    V bytes(const uint8_t* p) const {
      V v;
      for (int i = 0; i < kLanes; ++i)
        v.lane[i] = kind == Codes::kInt8 ? static_cast<float>(static_cast<int8_t>(p[i])) : static_cast<float>(p[i]);
      return v;
    }
    void nibbles(const uint8_t* p, V& low, V& high) const {
      for (int i = 0; i < kLanes; ++i) {
        low.lane[i] = table[p[i] & 15];
        high.lane[i] = table[p[i] >> 4];
      }
    }
  };
};

void columns_one_by_one(const Integer& p, int64_t begin, int64_t end) {
  const int16_t* inputs = static_cast<const int16_t*>(p.inputs);
  for (int64_t m = 0; m < p.M; ++m) {
    const int16_t* x = inputs + m * p.inputs_pitch;
    for (int64_t n = begin; n < end; n += 64) {
      const int64_t count = least(64, end - n);
      // Unsigned, because sums may wrap around.
      uint32_t sums[64] = {};
      for (int64_t k = 0; k < p.K; ++k)
        for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<uint32_t>(x[k] * code_at(p, k, n + i));
      for (int64_t i = 0; i < count; ++i) p.y[m * p.N + n + i] = static_cast<int32_t>(sums[i]);
    }
  }
}

struct PlainPanels {
  static constexpr int kStrip = 16, kRows = 1, kMostPlanes = 1;

  static int64_t planes(const Grouped&) { return 1; }
  static void pack(const Grouped& p, int64_t block, int64_t n, int64_t columns, uint8_t* to, int64_t) {
    pack_block(p, block, n, columns, kStrip, to);
  }

  template <int>
  static const uint8_t* whole_sums(const GroupedStrip& s, int64_t segment, const uint8_t* panel, int64_t m,
                                   int32_t (*lanes)[kStrip]) {
    const Grouped& p = s.p;
    for (int32_t& lane : lanes[0]) lane = p.corrections[m * p.segment_count + segment];
    const int8_t* x = p.inputs + m * p.inputs_pitch;
    for (int64_t k = p.segments[segment].begin; k < p.segments[segment].end; k += 4, panel += 4 * kStrip)
      for (int i = 0; i < kStrip; ++i)
        for (int h = 0; h < 4; ++h) lanes[0][i] += x[k + h] * panel[4 * i + h];
    return panel;
  }

  template <int>
  static void multiply(const GroupedStrip& s, int64_t m, float* const* totals) {
    const Grouped& p = s.p;
    const uint8_t* panel = s.panel;
    for (int64_t segment = s.first; segment < s.last; ++segment) {
      const int64_t at = m * p.segment_count + segment, row = (segment - s.first) * s.pitch;
      int32_t lanes[1][kStrip];
      panel = whole_sums<1>(s, segment, panel, m, lanes);
      for (int i = 0; i < kStrip; ++i) {
        float value = static_cast<float>(lanes[0][i]);
        if (s.code_sums) value -= s.code_sums[row * kStrip + i] * p.input_zeros[m];
        if (s.zeros) value -= s.zeros[row][i] * p.sums[at];
        const float total = s.is_first && segment == s.first ? 0 : totals[0][i];
        totals[0][i] = total + value * s.scales[row][i];
      }
    }
  }
};

}  // namespace

const WeightOnlyKernel kPortable = {4, 0, in_major<Plain<4>>, out_major<Plain<4>>};
const WeightOnlyKernel kScalar = {1, 0, in_major<Plain<1>>, out_major<Plain<1>>};
const IntegerKernel kPortableInteger = {2, 1, false, 64, columns_one_by_one, nullptr, nullptr};
const GroupedKernel kPortableGrouped = {PlainPanels::kStrip, grouped<PlainPanels>};

}  // namespace jaxcompress
