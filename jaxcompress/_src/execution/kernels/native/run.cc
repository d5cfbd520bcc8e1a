#include "run.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

namespace jaxcompress {
namespace {

std::atomic<int> limit{2};

int level_of_processor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512vnni");
  return avx512 ? 2 : 1;
#else
  return 0;
#endif
}

constexpr int64_t kSmall = 128 * 1024;  // multiplications that take less time than waking a thread

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

const WeightOnlyKernel& kernel_for(const WeightOnly& p) {
  const int64_t group_size = p.K / p.groups, per_byte = p.kind == Codes::kInt8 || p.kind == Codes::kUint8 ? 1 : 2;
  const auto fits = [&](const WeightOnlyKernel& kernel) {
    return p.out_major ? p.groups == 1 || group_size % (kernel.width * per_byte) == 0 : p.N >= kernel.width;
  };
#if defined(__x86_64__)
  if (instruction_level() >= 2 && fits(kAvx512)) return kAvx512;
  if (instruction_level() >= 1 && fits(kAvx2)) return kAvx2;
#endif
  return fits(kPortable) ? kPortable : kScalar;
}

// In-major, blocks are rows of bytes of which a group is a multiple: 16, or 8 where rows are a page or a half apart, so
// that the lines of more of them would evict one another from the first cache.
int64_t block_of(const WeightOnly& p) {
  const int64_t group_size = p.K / p.groups, per_byte = p.kind == Codes::kNibbles || p.kind == Codes::kTable ? 2 : 1;
  if (p.out_major) return group_size;
  int64_t rows = p.N % 1024 ? 16 : 8;
  while (p.groups > 1 && group_size % (rows * per_byte)) rows /= 2;
  return rows * per_byte;
}

std::vector<float> block_sums(const WeightOnly& p) {
  const int64_t blocks = (p.K + p.block - 1) / p.block;
  std::vector<float> sums(p.M * blocks);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t b = 0; b < blocks; ++b) {
      const float *x = p.x + m * p.K + b * p.block, *end = p.x + std::min(m * p.K + (b + 1) * p.block, (m + 1) * p.K);
      float lanes[8] = {};
      for (; x + 8 <= end; x += 8)
        for (int i = 0; i < 8; ++i) lanes[i] += x[i];
      for (int i = 0; x < end; ++x, ++i) lanes[i] += *x;
      for (const float lane : lanes) sums[m * blocks + b] += lane;
    }
  return sums;
}

// x padded with zeros to a multiple of `step`; if `splits`, the even inputs of each step before the odd ones.
std::vector<float> padded_inputs(const WeightOnly& p, int64_t step, bool splits) {
  const int64_t pitch = round_up(p.K, step);
  std::vector<float> padded(p.M * pitch);
  for (int64_t m = 0; m < p.M; ++m) {
    const float* from = p.x + m * p.K;
    float* to = padded.data() + m * pitch;
    if (!splits) {
      std::copy_n(from, p.K, to);
      continue;
    }
    for (int64_t k = 0; k < p.K; k += step) {
      const int64_t half = step / 2, pairs = std::min(half, (p.K - k) / 2);
      for (int64_t i = 0; i < pairs; ++i) {
        to[k + i] = from[k + 2 * i];
        to[k + half + i] = from[k + 2 * i + 1];
      }
      if (pairs < half && (p.K - k) % 2) to[k + pairs] = from[p.K - 1];
    }
  }
  return padded;
}

// With so few rows the kernels of floats, which pack no panels, were measured to be as fast or faster. Their sums are
// exact too, since a block holds 32 inputs, or a group of those that are not cut.
int64_t rows_of_floats(const Grouped& p) {
  if (p.out_major) return p.is_packed ? 3 : 8;
  return instruction_level() == 1 ? (p.is_packed ? 2 : 6) : 1;
}

void run_as_floats(const Grouped& p, Pool& pool) {
  std::vector<float> x(p.x, p.x + p.M * p.K);
  if (p.input_zeros)
    for (int64_t i = 0; i < p.M * p.K; ++i) x[i] -= p.input_zeros[i / p.K];
  WeightOnly wide{p.M, p.K, p.N, p.groups, p.out_major, p.is_signed};
  wide.kind = p.is_packed ? Codes::kNibbles : p.is_signed ? Codes::kInt8 : Codes::kUint8;
  for (int i = 0; i < 16; ++i) wide.table[i] = static_cast<float>(p.is_signed ? (i ^ 8) - 8 : i);
  wide.x = x.data();
  wide.codes = p.codes;
  wide.scale = p.scale;
  wide.zero = p.zero;
  wide.y = p.y;
  run(wide, pool);
}

// Inputs of a panel: whole groups, unless they are larger than panels. With few rows, panels stay in the first cache.
int64_t depth_of(const Grouped& p) {
  const int64_t most = p.M <= 16 ? kGroupedDepth / 4 : kGroupedDepth, group_size = p.K / p.groups;
  return p.groups == 1 || group_size > kGroupedDepth ? most : std::max<int64_t>(1, most / group_size) * group_size;
}

// Inputs of each group, cut where panels end.
std::vector<Segment> segments_of(const Grouped& p) {
  const int64_t padded = round_up(p.K, 8), group_size = p.groups == 1 ? padded : p.K / p.groups;
  std::vector<Segment> segments;
  for (int64_t k = 0; k < padded;) {
    const int64_t group = k / group_size;
    const int64_t end = std::min({(group + 1) * group_size, k / p.depth * p.depth + p.depth, padded});
    segments.push_back({k, end, group});
    k = end;
  }
  return segments;
}

// Eight bytes, the even ones before the odd ones.
uint64_t split_pairs(uint64_t block) {
  const auto even = [](uint64_t bytes) {
    bytes &= 0x00ff00ff00ff00ff;
    bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffff;
    return (bytes | bytes >> 16) & 0xffffffff;
  };
  return even(block) | even(block >> 8) << 32;
}

// The values of stored codes and inputs, where a weight is widened before it is multiplied.
float value_at(const WeightOnly& p, int64_t k, int64_t n) {
  const bool is_nibbles = p.kind == Codes::kNibbles || p.kind == Codes::kTable;
  const int64_t rows = is_nibbles ? (p.K + 1) / 2 : p.K, row = is_nibbles ? k / 2 : k;
  const uint8_t byte = p.codes[p.out_major ? n * rows + row : row * p.N + n];
  if (is_nibbles) return p.table[k % 2 ? byte >> 4 : byte & 15];
  return p.kind == Codes::kInt8 ? static_cast<float>(static_cast<int8_t>(byte)) : byte;
}

float value_at(const Grouped& p, int64_t k, int64_t n) {
  const int64_t rows = p.is_packed ? (p.K + 1) / 2 : p.K, row = p.is_packed ? k / 2 : k;
  const uint8_t byte = p.codes[p.out_major ? n * rows + row : row * p.N + n];
  if (!p.is_packed) return p.is_signed ? static_cast<float>(static_cast<int8_t>(byte)) : byte;
  const int nibble = k % 2 ? byte >> 4 : byte & 15;
  return static_cast<float>(p.is_signed ? (nibble ^ 8) - 8 : nibble);
}

float input_at(const WeightOnly& p, int64_t m, int64_t k) { return p.x[m * p.K + k]; }

float input_at(const Grouped& p, int64_t m, int64_t k) {
  return static_cast<float>(p.x[m * p.K + k] - (p.input_zeros ? p.input_zeros[m] : 0));
}

bool are_finite(const float* y, int64_t count) {
  float lanes[8] = {}, total = 0;  // 0, unless a difference is NaN
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) lanes[j] += y[i + j] - y[i + j];
  for (; i < count; ++i) total += y[i] - y[i];
  for (const float lane : lanes) total += lane;
  return total == 0;
}

bool has_nan(const WeightOnly& p, int64_t m) {
  return std::any_of(p.x + m * p.K, p.x + (m + 1) * p.K, [](float x) { return std::isnan(x); });
}

bool has_nan(const Grouped&, int64_t) { return false; }

// Those of outputs [begin, end) that are not finite once more, as the sums of x (value − zero) scale. Kernels take scales
// and zero points out of the sums, where inf − inf and 0 inf are NaN although no product may be. Whatever is not finite
// among the operands has made y so, too: only y need be looked at.
template <class Problem>
void mend_infinite(const Problem& p, int64_t begin, int64_t end) {
  constexpr int64_t kCount = 64;
  const int64_t group_size = p.K / p.groups;
  for (int64_t m = 0; m < p.M; ++m) {
    float* y = p.y + m * p.N;
    // A row with NaN is NaN, as it should be.
    if (are_finite(y + begin, end - begin) || has_nan(p, m)) continue;
    for (int64_t n0 = begin; n0 < end; n0 += kCount) {
      const int64_t count = least(kCount, end - n0);
      if (are_finite(y + n0, count)) continue;
      float totals[kCount] = {}, scales[kCount], zeros[kCount] = {};
      for (int64_t k = 0; k < p.K; ++k) {
        for (int64_t i = 0; k % group_size == 0 && i < count; ++i) {
          scales[i] = parameter_at(p.scale, k / group_size, n0 + i);
          if (p.zero.data) zeros[i] = parameter_at(p.zero, k / group_size, n0 + i);
        }
        const float x = input_at(p, m, k);
        for (int64_t i = 0; i < count; ++i) totals[i] += x * ((value_at(p, k, n0 + i) - zeros[i]) * scales[i]);
      }
      for (int64_t i = 0; i < count; ++i)
        if (!std::isfinite(y[n0 + i])) y[n0 + i] = totals[i];
    }
  }
}

int32_t sum_of_bytes(uint64_t block) {
  constexpr uint64_t kMask = 0x00ff00ff00ff00ff;
  block ^= 0x8080808080808080;  // 128 more, so that they are unsigned
  return static_cast<int32_t>(((block & kMask) + (block >> 8 & kMask)) * 0x0001000100010001 >> 48) - 8 * 128;
}

}  // namespace

int instruction_level() {
  static const int processor = level_of_processor();
  return std::min(processor, limit.load(std::memory_order_relaxed));
}

void limit_instructions(int level) { limit.store(level, std::memory_order_relaxed); }

void run(WeightOnly& p, Pool& pool) {
  if (p.M == 0 || p.N == 0) return;
  if (p.K == 0) return void(std::fill_n(p.y, p.M * p.N, 0.0f));
  const WeightOnlyKernel& kernel = kernel_for(p);
  const bool is_nibbles = p.kind == Codes::kNibbles || p.kind == Codes::kTable;
  std::vector<float> inputs, sums;
  const int64_t step = !p.out_major ? (is_nibbles ? 2 : 1) : kernel.width * (is_nibbles ? 2 : 1);
  p.inputs = p.x;
  p.inputs_pitch = p.K;
  if (p.K % step || (p.out_major && is_nibbles && step > 1)) {
    inputs = padded_inputs(p, step, p.out_major && is_nibbles);
    p.inputs = inputs.data();
    p.inputs_pitch = round_up(p.K, step);
  }
  p.block = block_of(p);
  p.offset = p.kind == Codes::kNibbles && p.is_signed ? static_cast<float>(kernel.offset) : 0.0f;
  p.sums = nullptr;
  if (p.zero.data || p.offset != 0) {
    sums = block_sums(p);
    p.sums = sums.data();
  }
  const int64_t threads = std::max(1, pool.threads()), shares = p.M == 1 && !p.out_major ? threads : 2 * threads;
  const int64_t most = p.M == 1 ? kLongTileOutputs : kTileOutputs;
  const int64_t size = p.out_major ? std::clamp<int64_t>(round_up(p.N / shares, 4), 4, 64)
                                   : std::clamp<int64_t>(round_up(p.N / shares, 64), 64, most);
  const auto work = p.out_major ? kernel.out_major : kernel.in_major;
  parallel(pool, (p.N + size - 1) / size, p.M * p.K * p.N < kSmall, [&](int64_t chunk) {
    const int64_t begin = chunk * size, end = std::min(begin + size, p.N);
    work(p, begin, end);
    mend_infinite(p, begin, end);
  });
}

void run(Integer& p, Pool& pool) {
  if (p.M == 0 || p.N == 0) return;
  if (p.K == 0) return void(std::fill_n(p.y, p.M * p.N, 0));
  const IntegerKernel* kernel = &kPortableInteger;
#if defined(__x86_64__)
  if (instruction_level() >= 2)
    kernel = &kVnniInteger;
  else if (instruction_level() >= 1)
    kernel = &kAvx2Integer;
#endif
  const int64_t pitch = round_up(p.K, kernel->input_multiple);
  std::vector<int16_t> wide;
  std::vector<int8_t> padded;
  std::vector<int32_t> corrections;
  p.inputs = p.x;
  p.inputs_pitch = pitch;
  if (kernel->input_bytes == 2) {
    wide.resize(p.M * pitch);
    for (int64_t m = 0; m < p.M; ++m) std::copy_n(p.x + m * p.K, p.K, wide.data() + m * pitch);
    p.inputs = wide.data();
  } else if (pitch != p.K) {
    padded.resize(p.M * pitch);
    for (int64_t m = 0; m < p.M; ++m) std::copy_n(p.x + m * p.K, p.K, padded.data() + m * pitch);
    p.inputs = padded.data();
  }
  p.corrections = nullptr;
  if (kernel->shifts_codes && p.is_signed) {
    corrections.resize(p.M);
    for (int64_t m = 0; m < p.M; ++m) {
      uint32_t sum = 0;
      for (int64_t k = 0; k < p.K; ++k) sum += static_cast<uint32_t>(p.x[m * p.K + k]);
      corrections[m] = static_cast<int32_t>(128u * sum);
    }
    p.corrections = corrections.data();
  }
  const int64_t threads = std::max(1, pool.threads()), strip = kernel->strip;
  const bool is_row = p.M == 1 && !p.out_major && kernel->row;
  const auto work = is_row                                          ? kernel->row
                    : p.out_major && p.M <= 16 && kernel->dot_rows ? kernel->dot_rows
                                                                    : kernel->columns;
  const int64_t size = is_row ? std::clamp<int64_t>(round_up(p.N / threads, 64), 64, kLongTileOutputs)
                              : std::clamp<int64_t>(round_up(p.N / (2 * threads), strip), strip, 8 * strip);
  parallel(pool, (p.N + size - 1) / size, p.M * p.K * p.N < kSmall,
           [&](int64_t chunk) { work(p, chunk * size, std::min((chunk + 1) * size, p.N)); });
}

void run(Grouped& p, Pool& pool) {
  if (p.M == 0 || p.N == 0) return;
  if (p.K == 0) return void(std::fill_n(p.y, p.M * p.N, 0.0f));
  if (p.M <= rows_of_floats(p)) return run_as_floats(p, pool);
  const GroupedKernel* kernel = &kPortableGrouped;
#if defined(__x86_64__)
  if (instruction_level() >= 2)
    kernel = &kVnniGrouped;
  else if (instruction_level() >= 1)
    kernel = &kAvx2Grouped;
#endif
  p.depth = depth_of(p);
  const std::vector<Segment> segments = segments_of(p);
  const int64_t pitch = round_up(p.K, 8), count = static_cast<int64_t>(segments.size());
  const int32_t offset = !p.is_signed ? 0 : p.is_packed ? 8 : 128;
  const int64_t rows = p.M + (p.input_zeros ? 1 : 0);
  const std::vector<int8_t> ones(rows == p.M ? 0 : p.K, 1);
  std::vector<int8_t> inputs(rows * pitch);
  std::vector<float> sums(rows * count);
  std::vector<int32_t> corrections(rows * count);
  for (int64_t m = 0; m < rows; ++m) {
    const int8_t* x = m == p.M ? ones.data() : p.x + m * p.K;
    const int32_t zero = m < p.M && p.input_zeros ? p.input_zeros[m] : 0;
    for (int64_t s = 0; s < count; ++s) {
      int32_t sum = 0;
      for (int64_t k = segments[s].begin; k < segments[s].end; k += 8) {
        uint64_t block = 0;
        std::memcpy(&block, x + k, std::min<int64_t>(8, p.K - k));
        sum += sum_of_bytes(block);
        if (p.is_packed) block = split_pairs(block);
        std::memcpy(inputs.data() + m * pitch + k, &block, 8);
      }
      const int64_t size = std::min(segments[s].end, p.K) - segments[s].begin;
      sums[m * count + s] = static_cast<float>(sum - zero * size);
      corrections[m * count + s] = -offset * sum;
    }
  }
  p.inputs = inputs.data();
  p.inputs_pitch = pitch;
  p.segments = segments.data();
  p.segment_count = count;
  p.sums = sums.data();
  p.corrections = corrections.data();
  const int64_t shares = 2 * std::max(1, pool.threads()), strip = kernel->strip;
  const int64_t size = std::clamp<int64_t>(round_up(p.N / shares, std::max<int64_t>(strip, 64)), 64, grouped_tile(p));
  parallel(pool, (p.N + size - 1) / size, p.M * p.K * p.N < kSmall, [&](int64_t chunk) {
    const int64_t begin = chunk * size, end = std::min(begin + size, p.N);
    kernel->columns(p, begin, end);
    mend_infinite(p, begin, end);
  });
}

}  // namespace jaxcompress
