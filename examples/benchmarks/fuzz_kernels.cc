// Random problems for the kernels, without Python or JAX: what `sanitize_kernels.py` builds with sanitizers.
//
// Every buffer is a heap block of exactly the bytes it needs, so that a read or write past its end is found. Threads
// come from a pool of std::threads, with several problems running at once. Results are compared with plain loops in
// double.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "run.h"

using namespace jaxcompress;

namespace {

class Threads : public Pool {
 public:
  explicit Threads(int count) {
    for (int i = 0; i < count; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Threads() override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      is_closed_ = true;
    }
    changed_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int threads() const override { return static_cast<int>(workers_.size()); }
  void schedule(void (*task)(void*), void* data) override {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_.emplace_back(task, data);
    }
    changed_.notify_one();
  }

 private:
  void work() {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      changed_.wait(lock, [this] { return is_closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      const auto [task, data] = tasks_.front();
      tasks_.pop_front();
      lock.unlock();
      task(data);
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::pair<void (*)(void*), void*>> tasks_;
  bool is_closed_ = false;
  std::vector<std::thread> workers_;
};

struct Random {
  std::mt19937 engine;
  int64_t below(int64_t n) { return std::uniform_int_distribution<int64_t>(0, n - 1)(engine); }
  float real() { return std::normal_distribution<float>()(engine); }
};

template <class T>
std::unique_ptr<T[]> block(int64_t count) {
  return std::unique_ptr<T[]>(new T[count]);
}

float of_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// What the sum of finite and other terms may be.
bool agrees(float y, double sum, double size) {
  if (std::isnan(sum)) return std::isnan(y);
  if (std::isinf(sum)) return y == static_cast<float>(sum);
  return std::abs(y - sum) <= 1e-6 * size + 1e-30;
}

constexpr float kSpecial[] = {INFINITY, -INFINITY, NAN};

// Scales or zero points of [groups | 1, N | 1], as stored, with their values in `values` [groups, N].
std::unique_ptr<char[]> draw_parameters(Random& random, const WeightOnly& p, int64_t groups, Parameters& to,
                                        std::vector<double>& values, bool is_special) {
  const int64_t along_n = random.below(3) ? p.N : 1;
  to.type = static_cast<Type>(random.below(3));
  const int64_t bytes = to.type == Type::kFloat32 ? 4 : to.type == Type::kBfloat16 ? 2 : 1;
  auto data = block<char>(groups * along_n * bytes);
  to.data = data.get();
  to.group_stride = groups == 1 ? 0 : p.out_major ? 1 : along_n;
  to.output_stride = along_n == 1 ? 0 : p.out_major ? groups : 1;
  values.assign(p.groups * p.N, 0);
  for (int64_t g = 0; g < groups; ++g)
    for (int64_t n = 0; n < along_n; ++n) {
      const int64_t at = p.out_major ? n * groups + g : g * along_n + n;
      const uint8_t small = static_cast<uint8_t>(random.below(256));
      const float value = is_special && random.below(20) == 0 ? kSpecial[random.below(3)] : random.real();
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (bytes == 4) std::memcpy(data.get() + 4 * at, &value, 4);
      if (bytes == 2) std::memcpy(data.get() + 2 * at, &half, 2);
      if (bytes == 1) data[at] = static_cast<char>(small);
      const double stored = bytes == 4 ? value : bytes == 2 ? of_bfloat16(half) : small;
      for (int64_t i = 0; i < p.groups; ++i)
        for (int64_t j = 0; j < p.N; ++j)
          if ((groups == 1 || i == g) && (along_n == 1 || j == n)) values[i * p.N + j] = stored;
    }
  return data;
}

// Sometimes nothing to multiply, or so many outputs that they fill several tiles, in rows that are pages apart.
template <class Problem>
void draw_odd_size(Random& random, Problem& p) {
  const int64_t sort = random.below(40);
  if (sort == 0) p.M = 0;
  if (sort == 1) p.N = 0;
  if (sort == 2) p.K = 0;
  if (sort < 5 && sort > 2) {
    p.M = 1 + random.below(3);
    p.N = sort == 3 ? 1024 * (1 + random.below(5)) : 4000 + random.below(500);
    p.K = std::min<int64_t>(p.K, 64);
  }
}

bool weight_only(Random& random, Pool& pool) {
  WeightOnly p{};
  p.M = 1 + random.below(20);
  p.N = 1 + (random.below(4) ? random.below(100) : random.below(700));
  p.groups = random.below(2) ? 1 : 1 + random.below(5);
  p.K = p.groups == 1 ? 1 + random.below(300) : p.groups * 8 * (1 + random.below(9));
  if (p.groups == 1) draw_odd_size(random, p);
  p.out_major = random.below(2);
  p.kind = static_cast<Codes>(random.below(4));
  const bool is_nibbles = p.kind == Codes::kNibbles || p.kind == Codes::kTable;
  p.is_signed = p.kind == Codes::kInt8 || (p.kind == Codes::kNibbles && random.below(2));
  for (int i = 0; i < 16; ++i)
    p.table[i] = p.kind == Codes::kTable ? random.real() : static_cast<float>(p.is_signed ? (i ^ 8) - 8 : i);
  const int64_t rows = is_nibbles ? (p.K + 1) / 2 : p.K;
  auto codes = block<uint8_t>(rows * p.N);
  for (int64_t i = 0; i < rows * p.N; ++i) codes[i] = static_cast<uint8_t>(random.below(256));
  auto x = block<float>(p.M * p.K);
  for (int64_t i = 0; i < p.M * p.K; ++i) x[i] = random.real();
  // Few enough for rows and outputs that stay finite beside others.
  const bool is_special = random.below(3) == 0;
  for (int64_t i = is_special && p.M * p.K ? random.below(4) : 0; i > 0; --i) x[random.below(p.M * p.K)] = kSpecial[random.below(3)];
  auto y = block<float>(p.M * p.N);
  std::vector<double> scales, zeros(p.groups * p.N);
  const auto scale = draw_parameters(random, p, random.below(3) ? p.groups : 1, p.scale, scales, is_special);
  std::unique_ptr<char[]> zero;
  if (random.below(2)) zero = draw_parameters(random, p, random.below(3) ? p.groups : 1, p.zero, zeros, is_special);
  p.x = x.get();
  p.codes = codes.get();
  p.y = y.get();
  run(p, pool);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        const int64_t row = is_nibbles ? k / 2 : k;
        const uint8_t byte = codes[p.out_major ? n * rows + row : row * p.N + n];
        const double code = is_nibbles               ? p.table[k % 2 ? byte >> 4 : byte & 15]
                            : p.kind == Codes::kInt8 ? static_cast<double>(static_cast<int8_t>(byte))
                                                     : byte;
        const int64_t at = k / (p.K / p.groups) * p.N + n;
        sum += x[m * p.K + k] * ((code - zeros[at]) * scales[at]);
        size += std::abs(x[m * p.K + k] * scales[at]) * (std::abs(code) + std::abs(zeros[at]) + 8);
      }
      if (!agrees(y[m * p.N + n], sum, size)) {
        std::printf("wrong: M %ld K %ld N %ld groups %ld kind %d out_major %d: %g, not %g\n", long(p.M), long(p.K),
                    long(p.N), long(p.groups), int(p.kind), p.out_major, y[m * p.N + n], sum);
        return false;
      }
    }
  return true;
}

bool grouped(Random& random, Pool& pool) {
  WeightOnly w{};  // what parameters are drawn for
  w.M = 1 + random.below(40);
  w.N = 1 + random.below(random.below(4) ? 100 : 700);
  w.groups = random.below(2) ? 1 : 1 + random.below(5);
  w.K = w.groups == 1 ? 1 + random.below(700) : w.groups * 8 * (1 + random.below(random.below(3) ? 9 : 70));
  w.out_major = random.below(2);
  if (w.groups == 1) draw_odd_size(random, w);
  Grouped p{w.M, w.K, w.N, w.groups, w.out_major, random.below(2) == 1, random.below(2) == 1};
  const int64_t rows = p.is_packed ? (p.K + 1) / 2 : p.K;
  auto codes = block<uint8_t>(rows * p.N);
  const bool is_extreme = random.below(4) == 0;  // what saturates
  const int extreme = static_cast<int>(random.below(256));
  for (int64_t i = 0; i < rows * p.N; ++i) codes[i] = static_cast<uint8_t>(is_extreme ? extreme : random.below(256));
  auto x = block<int8_t>(p.M * p.K);
  for (int64_t i = 0; i < p.M * p.K; ++i)
    x[i] = static_cast<int8_t>(is_extreme ? (extreme % 2 ? -128 : 127) : random.below(256) - 128);
  auto input_zeros = block<int8_t>(p.M);
  for (int64_t m = 0; m < p.M; ++m) input_zeros[m] = static_cast<int8_t>(is_extreme ? 127 : random.below(256) - 128);
  if (random.below(2)) p.input_zeros = input_zeros.get();
  auto y = block<float>(p.M * p.N);
  const bool is_special = random.below(4) == 0;
  std::vector<double> scales, zeros(p.groups * p.N);
  const auto scale = draw_parameters(random, w, random.below(3) ? p.groups : 1, p.scale, scales, is_special);
  std::unique_ptr<char[]> zero;
  if (random.below(2)) zero = draw_parameters(random, w, random.below(3) ? p.groups : 1, p.zero, zeros, is_special);
  p.x = x.get();
  p.codes = codes.get();
  p.y = y.get();
  run(p, pool);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      double total = 0, size = 0;
      for (int64_t g = 0; g < p.groups; ++g) {
        int64_t sum = 0, inputs = 0, terms = 0, magnitude = 0;
        double others = 0;  // terms that are not finite, one by one
        const double scale = scales[g * p.N + n], zero = zeros[g * p.N + n];
        const int64_t input_zero = p.input_zeros ? p.input_zeros[m] : 0;
        for (int64_t k = g * (p.K / p.groups); k < (g + 1) * (p.K / p.groups); ++k) {
          const int64_t row = p.is_packed ? k / 2 : k;
          const uint8_t byte = codes[p.out_major ? n * rows + row : row * p.N + n];
          const int nibble = k % 2 ? byte >> 4 : byte & 15;
          const int64_t code = p.is_packed   ? (p.is_signed ? (nibble ^ 8) - 8 : nibble)
                               : p.is_signed ? static_cast<int8_t>(byte)
                                             : byte;
          const int64_t input = x[m * p.K + k] - input_zero;
          sum += input * code;
          inputs += input;
          terms += std::abs(input * code);
          magnitude += std::abs(input);
          others += input * ((code - zero) * scale);
        }
        if (!std::isfinite(scale) || !std::isfinite(zero)) {
          total += others;
          continue;
        }
        total += scale * (sum - zero * inputs);
        // Whole sums of groups are exact, unless those are cut, or rows are few enough for floats.
        const bool is_cut = p.M <= 8 || p.groups == 1 || p.K / p.groups > kGroupedDepth;
        // One lane that adds the same number hundreds of times rounds the same way each time.
        size += std::abs(scale) * (is_cut && is_extreme ? 10 : 1) *
                (is_cut ? terms + std::abs(zero) * magnitude : std::abs(sum) + std::abs(zero * inputs));
      }
      if (!agrees(y[m * p.N + n], total, size)) {
        std::printf("wrong: int8 M %ld K %ld N %ld groups %ld", long(p.M), long(p.K), long(p.N), long(p.groups));
        std::printf(" packed %d signed %d out_major %d input zeros %d: %g, not %g\n", p.is_packed, p.is_signed,
                    p.out_major, p.input_zeros != nullptr, y[m * p.N + n], total);
        return false;
      }
    }
  return true;
}

bool integer(Random& random, Pool& pool) {
  Integer p{};
  p.M = random.below(4) ? 1 + random.below(40) : 1;
  p.N = 1 + random.below(200);
  p.K = 1 + (random.below(4) ? random.below(300) : random.below(1500));
  draw_odd_size(random, p);
  p.out_major = random.below(2);
  p.is_signed = random.below(2);
  const bool wraps = random.below(50) == 0;  // sums beyond int32
  if (wraps) {
    p.M = 1 + random.below(8);
    p.N = 1 + random.below(20);
    p.K = 70000 + random.below(100);
    p.is_signed = false;
  }
  auto codes = block<uint8_t>(p.K * p.N);
  auto x = block<int8_t>(p.M * p.K);
  auto y = block<int32_t>(p.M * p.N);
  for (int64_t i = 0; i < p.K * p.N; ++i) codes[i] = static_cast<uint8_t>(wraps ? 255 : random.below(256));
  for (int64_t i = 0; i < p.M * p.K; ++i)
    x[i] = static_cast<int8_t>(!wraps && random.below(4) ? random.below(256) - 128 : -128);
  p.x = x.get();
  p.codes = codes.get();
  p.y = y.get();
  run(p, pool);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t n = 0; n < p.N; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < p.K; ++k) {
        const uint8_t code = codes[p.out_major ? n * p.K + k : k * p.N + n];
        sum += int64_t{x[m * p.K + k]} * (p.is_signed ? static_cast<int8_t>(code) : code);
      }
      if (y[m * p.N + n] != static_cast<int32_t>(static_cast<uint64_t>(sum))) {
        std::printf("wrong: M %ld K %ld N %ld out_major %d\n", long(p.M), long(p.K), long(p.N), p.out_major);
        return false;
      }
    }
  return true;
}

// Blocks of rows and columns, the last ones perhaps smaller, with their values.
std::unique_ptr<float[]> draw_blocks(Random& random, const Expand& p, Blocks& to) {
  const auto draw = [&](int64_t size, int64_t& blocks, int64_t& block_size) {
    block_size = random.below(3) ? 1 + random.below(size) : random.below(2) ? 1 : size;
    blocks = (size + block_size - 1) / block_size;
  };
  draw(p.rows, to.row_blocks, to.row_size);
  draw(p.columns, to.column_blocks, to.column_size);
  const int64_t count = p.entries * to.row_blocks * to.column_blocks;
  auto data = block<float>(count);
  for (int64_t i = 0; i < count; ++i) data[i] = random.real();
  to.data = data.get();
  return data;
}

float in_blocks(const Blocks& blocks, int64_t entry, int64_t row, int64_t column) {
  return blocks.data[(entry * blocks.row_blocks + row / blocks.row_size) * blocks.column_blocks +
                     column / blocks.column_size];
}

// N:M weights of one entry or several, written out; and products of all layouts, of one entry.
bool expand_places(Random& random, Pool& pool, bool multiplies) {
  Expand p{};
  p.shards = 1;
  p.layout = random.below(2) ? Layout::kAlongRows : Layout::kAcrossRows;
  if (multiplies && random.below(3) == 0) p.layout = Layout::kMask;
  const bool is_across = p.layout == Layout::kAcrossRows, has_mask = p.layout == Layout::kMask;
  p.entries = multiplies ? 1 : 1 + random.below(3);
  p.rows = 1 + random.below(70);
  p.columns = 1 + (random.below(4) ? random.below(100) : random.below(1500));
  const int64_t runs[] = {1, 2, 4, 8, 16, 3, 5, 40, 256};
  p.run = runs[random.below(9)];
  p.kept = 1 + random.below(p.run);
  if (random.below(3) == 0) p.run = 4, p.kept = 2;
  p.place_bits = p.run <= 2 ? 1 : p.run <= 4 ? 2 : p.run <= 16 ? 4 : 8;
  if (random.below(4) == 0) p.place_bits = 8;
  const Stored kinds[] = {Stored::kWords, Stored::kInt8, Stored::kUint8, Stored::kNibbles, Stored::kHalves};
  p.stored = kinds[random.below(multiplies ? 4 : 5)];
  const bool is_nibbles = p.stored == Stored::kNibbles, is_halves = p.stored == Stored::kHalves;
  const int64_t width = p.stored == Stored::kWords ? 4 : is_halves ? 2 : 1;
  const int64_t along = is_across ? p.rows : p.columns, across = is_across ? p.columns : p.rows;
  const int64_t stored = (along + p.run - 1) / p.run * p.kept;
  std::vector<int64_t> at(p.entries * p.rows * p.columns, -1);  // which value an entry has, along its row or column
  std::unique_ptr<uint8_t[]> bits;
  std::unique_ptr<int32_t[]> starts;
  p.count = stored;
  if (has_mask) {
    const int64_t bytes = (p.columns + 7) / 8;
    bits = block<uint8_t>(p.rows * bytes);
    starts = block<int32_t>(p.rows);
    p.count = 0;
    for (int64_t r = 0; r < p.rows; ++r) {
      starts[r] = static_cast<int32_t>(p.count);
      for (int64_t i = 0; i < bytes; ++i) bits[r * bytes + i] = static_cast<uint8_t>(random.below(256));
      for (int64_t c = 0; c < p.columns; ++c)
        if (bits[r * bytes + c / 8] >> (c % 8) & 1) at[r * p.columns + c] = p.count++;
    }
    p.count = std::max<int64_t>(p.count, 1);
  } else {
    const int64_t per_byte = 8 / p.place_bits;
    p.place_bytes = (stored + per_byte - 1) / per_byte;
    bits = block<uint8_t>(p.entries * p.place_bytes * across);
    std::fill_n(bits.get(), p.entries * p.place_bytes * across, uint8_t{0});
    std::vector<int> places(p.run);
    for (int64_t e = 0; e < p.entries; ++e)
      for (int64_t other = 0; other < across; ++other)
        for (int64_t slot = 0; slot < stored; ++slot) {
          if (slot % p.kept == 0) {
            for (int64_t i = 0; i < p.run; ++i) places[i] = static_cast<int>(i);
            std::shuffle(places.begin(), places.end(), random.engine);
            std::sort(places.begin(), places.begin() + p.kept);
          }
          const int place = places[slot % p.kept];
          const int64_t byte = is_across ? (e * p.place_bytes + slot / per_byte) * across + other
                                         : (e * across + other) * p.place_bytes + slot / per_byte;
          bits[byte] |= static_cast<uint8_t>(place << (slot % per_byte * p.place_bits));
          const int64_t to = slot / p.kept * p.run + place;
          if (to < along) at[(e * p.rows + (is_across ? to : other)) * p.columns + (is_across ? other : to)] = slot;
        }
  }
  const int64_t pitch = is_nibbles ? (p.count + 1) / 2 : p.count;  // along a row or column
  const int64_t lines = has_mask ? 1 : p.entries * across;
  auto values = block<uint8_t>(lines * pitch * width);
  for (int64_t i = 0; i < lines * pitch; ++i) {
    const float value = random.real();
    if (width == 4)
      std::memcpy(values.get() + 4 * i, &value, 4);
    else
      for (int64_t j = 0; j < width; ++j) values[i * width + j] = static_cast<uint8_t>(random.below(256));
  }
  for (float& value : p.table) value = random.real();
  std::unique_ptr<float[]> scale, zero;
  if (!is_halves && (p.stored != Stored::kWords || random.below(2))) scale = draw_blocks(random, p, p.scale);
  if (scale && random.below(2)) zero = draw_blocks(random, p, p.zero);
  p.values = values.get();
  p.bits = bits.get();
  p.starts = starts.get();
  const auto expected = [&](int64_t e, int64_t r, int64_t c, uint8_t* to) {
    const int64_t slot = at[(e * p.rows + r) * p.columns + c];
    std::memset(to, 0, 4);
    const int64_t line = is_across ? 0 : has_mask ? 0 : e * p.rows + r;
    const int64_t step = is_nibbles ? slot / 2 : slot;
    const int64_t from = is_across ? (e * pitch + step) * p.columns + c : line * pitch + step;
    if (slot >= 0 && width > 1) std::memcpy(to, values.get() + from * width, width);
    if (!scale) return;
    float value = 0;
    if (width == 4) std::memcpy(&value, to, 4);
    if (slot >= 0 && width == 1) {
      const uint8_t byte = values[from];
      value = is_nibbles ? p.table[slot % 2 ? byte >> 4 : byte & 15] : p.stored == Stored::kInt8 ? static_cast<int8_t>(byte) : byte;
    }
    if (zero) value -= in_blocks(p.zero, e, r, c);
    value *= in_blocks(p.scale, e, r, c);
    if (zero && slot < 0) value = 0;
    std::memcpy(to, &value, 4);
  };
  const auto failed = [&](const char* what, int64_t r, int64_t c) {
    std::printf("wrong: %s layout %d %ld:%ld entries %ld rows %ld columns %ld stored %d scale %d zero %d at %ld %ld\n",
                what, int(p.layout), long(p.kept), long(p.run), long(p.entries), long(p.rows), long(p.columns),
                int(p.stored), int(scale != nullptr), int(zero != nullptr), long(r), long(c));
    return false;
  };
  uint8_t item[4];
  if (!multiplies) {
    const int64_t size = is_halves ? 2 : 4;
    auto out = block<uint8_t>(p.entries * p.rows * p.columns * size);
    p.out = out.get();
    run(p, pool);
    for (int64_t e = 0; e < p.entries; ++e)
      for (int64_t r = 0; r < p.rows; ++r)
        for (int64_t c = 0; c < p.columns; ++c) {
          expected(e, r, c, item);
          if (std::memcmp(out.get() + ((e * p.rows + r) * p.columns + c) * size, item, size) != 0)
            return failed("places", e * p.rows + r, c);
        }
    return true;
  }
  SparseProduct product{};
  product.weights = p;
  product.M = 1 + random.below(random.below(4) ? 5 : 20);
  product.sums_columns = random.below(2);
  const int64_t inputs = product.sums_columns ? p.columns : p.rows, outputs = p.rows + p.columns - inputs;
  auto x = block<float>(product.M * inputs);
  auto y = block<float>(product.M * outputs);
  for (int64_t i = 0; i < product.M * inputs; ++i) x[i] = random.real();
  if (random.below(4) == 0) x[random.below(product.M * inputs)] = HUGE_VALF;
  product.x = x.get();
  product.y = y.get();
  run(product, pool);
  for (int64_t m = 0; m < product.M; ++m)
    for (int64_t n = 0; n < outputs; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < inputs; ++k) {
        float weight;
        expected(0, product.sums_columns ? n : k, product.sums_columns ? k : n, item);
        std::memcpy(&weight, item, 4);
        sum += double{x[m * inputs + k]} * weight;
        size += std::abs(double{x[m * inputs + k]} * weight);
      }
      const double actual = y[m * outputs + n];
      const bool is_same = std::isfinite(sum) ? std::abs(actual - sum) <= 1e-5 * size + 1e-30
                                              : std::isnan(sum) ? std::isnan(actual) : actual == sum;
      if (!is_same) return failed("product", m, n);
    }
  return true;
}

bool expand(Random& random, Pool& pool) {
  Expand p{};
  p.entries = 1 + random.below(3);
  p.shards = 1 + random.below(4);
  p.rows = p.shards * (1 + random.below(20));
  p.columns = 1 + (random.below(4) ? random.below(100) : random.below(3000));
  p.stored = static_cast<Stored>(random.below(5));
  const bool is_nibbles = p.stored == Stored::kNibbles, is_halves = p.stored == Stored::kHalves;
  const int64_t bytes = (p.columns + 7) / 8, rows = p.entries * p.rows, per_shard = p.rows / p.shards;
  const int64_t density = random.below(5);  // of 4; nothing and everything too
  auto bits = block<uint8_t>(rows * bytes);
  for (int64_t i = 0; i < rows * bytes; ++i) {
    bits[i] = 0;
    for (int j = 0; j < 8; ++j) bits[i] |= static_cast<uint8_t>((random.below(4) < density) << j);
  }
  const auto bit = [&](int64_t r, int64_t c) { return bits[r * bytes + c / 8] >> (c % 8) & 1; };
  auto starts = block<int32_t>(rows);
  p.count = 1;
  for (int64_t r = 0, at = 0; r < rows; ++r) {
    if (r % per_shard == 0) at = 0;
    starts[r] = static_cast<int32_t>(at);
    for (int64_t c = 0; c < p.columns; ++c) at += bit(r, c);
    p.count = std::max(p.count, at);
  }
  // Starts that point anywhere read no other memory.
  if (random.below(5) == 0)
    for (int64_t r = 0; r < rows; ++r) starts[r] = static_cast<int32_t>(random.engine());
  const int64_t width = p.stored == Stored::kWords ? 4 : is_halves ? 2 : 1;
  const int64_t pitch = is_nibbles ? (p.count + 1) / 2 : width * p.count;
  auto values = block<uint8_t>(p.entries * p.shards * pitch);
  for (int64_t i = 0; i < p.entries * p.shards * pitch; ++i) values[i] = static_cast<uint8_t>(random.below(256));
  for (float& value : p.table) value = random.real();
  std::unique_ptr<float[]> scale, zero;
  const bool has_scale = !is_halves && (p.stored != Stored::kWords || random.below(2));
  if (has_scale) scale = draw_blocks(random, p, p.scale);
  if (has_scale && random.below(2)) zero = draw_blocks(random, p, p.zero);
  const int64_t item = is_halves ? 2 : 4;
  auto out = block<uint8_t>(rows * p.columns * item);
  p.values = values.get();
  p.bits = bits.get();
  p.starts = starts.get();
  p.out = out.get();
  run(p, pool);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t entry = r / p.rows, row = r % p.rows;
    const uint8_t* from = values.get() + (entry * p.shards + row / per_shard) * pitch;
    for (int64_t c = 0, next = starts[r]; c < p.columns; ++c) {
      const int64_t place = std::min(std::max<int64_t>(next, 0), p.count - 1);
      const bool is_kept = bit(r, c);
      next += is_kept;
      uint8_t expected[4] = {};
      if (is_kept && width > 1) std::memcpy(expected, from + width * place, width);
      if (has_scale) {
        float value = 0;
        const uint8_t byte = from[is_nibbles ? place / 2 : place];
        if (p.stored == Stored::kWords) std::memcpy(&value, expected, 4);
        if (is_kept && is_nibbles) value = p.table[place % 2 ? byte >> 4 : byte & 15];
        if (is_kept && p.stored == Stored::kInt8) value = static_cast<int8_t>(byte);
        if (is_kept && p.stored == Stored::kUint8) value = byte;
        if (zero) value -= in_blocks(p.zero, entry, row, c);
        value *= in_blocks(p.scale, entry, row, c);
        if (zero && !is_kept) value = 0;
        std::memcpy(expected, &value, 4);
      }
      const uint8_t* actual = out.get() + (r * p.columns + c) * item;
      float numbers[2];
      std::memcpy(&numbers[0], actual, item == 4 ? 4 : 0);
      std::memcpy(&numbers[1], expected, 4);
      // Not a number stays so, whatever arithmetic makes of its bits.
      const bool is_nan = has_scale && numbers[0] != numbers[0] && numbers[1] != numbers[1];
      if (!is_nan && std::memcmp(actual, expected, item) != 0) {
        std::printf("wrong: expand entries %ld rows %ld columns %ld shards %ld stored %d scale %d zero %d at %ld %ld\n",
                    long(p.entries), long(p.rows), long(p.columns), long(p.shards), int(p.stored), int(has_scale),
                    int(zero != nullptr), long(r), long(c));
        return false;
      }
    }
  }
  return true;
}

}  // namespace

// fuzz COUNT SEED: so many problems of each sort, for each instruction set that the processor has.
int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int problems = std::atoi(arguments[1]), seed = std::atoi(arguments[2]);
  const int best = instruction_level();
  std::atomic<int> wrong{0};
  for (int level = 0; level <= best; ++level) {
    limit_instructions(level);
    Threads pool(3);
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 2; ++caller)
      callers.emplace_back([&, caller] {
        Random random{std::mt19937(1000 * seed + 10 * level + caller)};
        Random of_expansions{std::mt19937(1000 * seed + 10 * level + caller + 500)};
        for (int i = 0; i < problems; ++i)
          if (!weight_only(random, pool) || !integer(random, pool) || !grouped(random, pool) ||
              !expand(of_expansions, pool) || !expand_places(of_expansions, pool, false) ||
              !expand_places(of_expansions, pool, true))
            ++wrong;
      });
    for (auto& caller : callers) caller.join();
    std::printf("level %d: %d problems, %d wrong so far\n", level, 12 * problems, wrong.load());
  }
  return wrong != 0;
}
