// What a kernel is asked to do. Letters: M rows of inputs, K inputs, N outputs, G groups along K.
#pragma once

#include <cstdint>
#include <cstring>

// Loops over registers, which must not stay loops; -O3 unrolls them too, but takes twice as long over the rest.
#define JAXCOMPRESS_UNROLL _Pragma("GCC unroll 16")
#define JAXCOMPRESS_INLINE __attribute__((always_inline))

namespace jaxcompress {
namespace {

template <int kIndex>
struct Index {
  constexpr operator int() const { return kIndex; }
};

// f(Index<0>), ..., f(Index<kCount - 1>). Unlike a loop that is unrolled, this comes before arrays are split: GCC keeps
// those that loops index in memory.
template <int kCount, class F>
JAXCOMPRESS_INLINE inline void each(const F& f) {
  if constexpr (kCount > 0) {
    each<kCount - 1>(f);
    f(Index<kCount - 1>{});
  }
}

}  // namespace

enum class Codes { kInt8, kUint8, kNibbles, kTable };  // one byte each, or two to a byte (the low nibble first)
enum class Type { kFloat32, kBfloat16, kUint8 };

// Scales or zero points: one for each (group, output); a stride of 0 repeats.
struct Parameters {
  const void* data = nullptr;  // null: there are none
  Type type = Type::kFloat32;
  int64_t group_stride = 0, output_stride = 0;
};

// y[m, n] = Σ_g scale[g, n] (Σ_{k in g} x[m, k] value(codes[k, n]) − zero[g, n] Σ_{k in g} x[m, k]).
struct WeightOnly {
  int64_t M, K, N, groups;
  bool out_major;  // codes are [N, K], otherwise [K, N]; nibbles are packed along K
  bool is_signed;  // of nibbles
  Codes kind;
  const float* x;  // [M, K]
  const uint8_t* codes;
  Parameters scale, zero;
  float table[16];  // what the 16 nibbles stand for
  float* y;         // [M, N]

  // Set by `run`.
  const float* inputs;  // x as the kernel reads it: padded with zeros and, for out-major nibbles, in another order
  int64_t inputs_pitch;
  int64_t block;      // inputs that share a scale and are summed at a time
  const float* sums;  // [M, blocks] of x, if there is anything to subtract
  float offset;       // what the kernel's nibbles exceed the codes by
};

// y[m, n] = Σ_k x[m, k] codes[k, n] in int32, which wraps around.
struct Integer {
  int64_t M, K, N;
  bool out_major, is_signed;  // of codes; x is signed
  const int8_t* x;            // [M, K]
  const uint8_t* codes;
  int32_t* y;  // [M, N]

  // Set by `run`.
  const void* inputs;  // x of `input_bytes` each, rows padded with zeros
  int64_t inputs_pitch;
  const int32_t* corrections;  // [M]: what the kernel's sums exceed y by, or null
};

// Inputs [begin, end) of one group that are summed as whole numbers; multiples of 8, in the padded row.
struct Segment {
  int64_t begin, end, group;
};

// y[m, n] = Σ_g scale[g, n] Σ_{k in g} (x[m, k] − input_zeros[m]) (codes[k, n] − zero[g, n]), for int8 x.
struct Grouped {
  int64_t M, K, N, groups;
  bool out_major, is_signed, is_packed;  // of codes: two to a byte along K
  const int8_t* x;                       // [M, K]
  const int8_t* input_zeros;             // [M], or null: there are none
  const uint8_t* codes;
  Parameters scale, zero;
  float* y;  // [M, N]

  // Set by `run`.
  const int8_t* inputs;  // x in the order of the panels, rows padded with zeros; with input zeros, then a row of ones
  int64_t inputs_pitch;
  int64_t depth;  // inputs of a panel; segments end there
  const Segment* segments;
  int64_t segment_count;
  const float* sums;           // [M, segments] of x − input_zeros
  const int32_t* corrections;  // [rows of inputs, segments]: where sums begin: signed codes are read as unsigned ones
};

// Kernels work on outputs [begin, end).
struct WeightOnlyKernel {
  int width;   // lanes of a vector
  int offset;  // what signed nibbles are read as: the code plus this
  void (*in_major)(const WeightOnly&, int64_t begin, int64_t end);
  void (*out_major)(const WeightOnly&, int64_t begin, int64_t end);
};

struct IntegerKernel {
  int input_bytes;     // 1 or 2
  int input_multiple;  // of inputs in a padded row
  bool shifts_codes;   // signed codes are read as code + 128
  int strip;           // outputs of a panel
  void (*columns)(const Integer&, int64_t begin, int64_t end);
  void (*dot_rows)(const Integer&, int64_t begin, int64_t end);  // out-major and few rows, or null
  void (*row)(const Integer&, int64_t begin, int64_t end);       // in-major and one row, or null
};

struct GroupedKernel {
  int strip;  // outputs of a panel
  void (*columns)(const Grouped&, int64_t begin, int64_t end);
};

// Internal linkage: a function that several translation units define for different
// instructions may be linked from any of them, so kernels use none of the standard library's.
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

inline float parameter_at(const Parameters& p, int64_t group, int64_t output) {
  const int64_t i = group * p.group_stride + output * p.output_stride;
  if (p.type == Type::kFloat32) return static_cast<const float*>(p.data)[i];
  if (p.type == Type::kUint8) return static_cast<const uint8_t*>(p.data)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p.data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

}  // namespace

constexpr int kTileOutputs = 512, kTileRows = 16, kMaxWidth = 16;

// Of one row: whole pages of codes are read in order, which the processor sees coming.
constexpr int kLongTileOutputs = 4096;

constexpr int kGroupedDepth = 256, kGroupedBytes = 64 * 1024;  // at most, of a panel of whole numbers

// Outputs of the panels that one thread packs at a time.
inline int64_t grouped_tile(const Grouped& p) {
  const int64_t fitting = kGroupedBytes / p.depth / 64 * 64;
  return fitting < kTileOutputs ? fitting : kTileOutputs;
}

}  // namespace jaxcompress
