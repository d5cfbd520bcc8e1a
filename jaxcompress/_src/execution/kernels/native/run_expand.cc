#include <algorithm>
#include <memory>
#include <vector>

#include "expand.h"
#include "parallel.h"

namespace jaxcompress {
namespace {

const ExpandKernel& kernel() {
#if defined(__x86_64__)
  if (instruction_level() >= 2) return kAvx512Expand;
  if (instruction_level() >= 1) return kAvx2Expand;
#endif
  return kPortableExpand;
}

// So many weights take less time than waking a thread, and are what one takes at a time.
constexpr int64_t kFew = 32 * 1024;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

void run(const Expand& p, Pool& pool) {
  const int64_t rows = p.entries * p.rows;
  if (rows == 0 || p.columns == 0) return;
  const auto work = kernel().rows;
  // By places across rows, whole runs of an entry.
  const bool is_across = p.layout == Layout::kAcrossRows;
  int64_t size = std::clamp<int64_t>(kFew / p.columns, 1, is_across ? p.rows : rows);
  if (is_across) size = round_up(size, p.run);
  const int64_t per_entry = is_across ? (p.rows + size - 1) / size : 0;
  const int64_t chunks = is_across ? p.entries * per_entry : (rows + size - 1) / size;
  parallel(pool, chunks, rows * p.columns <= 2 * kFew, [&](int64_t chunk) {
    const std::unique_ptr<float[]> scratch(new float[expand_scratch(p)]);
    const int64_t first = is_across ? chunk / per_entry * p.rows : 0, last = is_across ? first + p.rows : rows;
    const int64_t begin = first + (is_across ? chunk % per_entry : chunk) * size;
    work(p, begin, std::min(begin + size, last), scratch.get());
  });
}

void run(SparseProduct& p, Pool& pool) {
  const Expand& weights = p.weights;
  const int64_t outputs = p.sums_columns ? weights.rows : weights.columns;
  if (p.M == 0 || outputs == 0) return;
  if (weights.rows == 0 || weights.columns == 0) return void(std::fill_n(p.y, p.M * outputs, 0.0f));
  std::vector<float> inputs;
  p.inputs_pitch = p.sums_columns ? weights.columns : weights.rows;
  if (p.sums_columns && weights.columns % kMaxWidth) {
    p.inputs_pitch = round_up(weights.columns, kMaxWidth);
    inputs.resize(p.M * p.inputs_pitch);
    for (int64_t m = 0; m < p.M; ++m)
      std::copy_n(p.x + m * weights.columns, weights.columns, inputs.data() + m * p.inputs_pitch);
    p.x = inputs.data();
  }
  const auto work = kernel().product;
  const bool is_small = weights.rows * weights.columns <= 2 * kFew;
  const int64_t shares = is_small ? 1 : 4 * std::max(1, pool.threads());
  const int64_t size = round_up((weights.rows + shares - 1) / shares, tile_of(weights).rows);
  const int64_t chunks = (weights.rows + size - 1) / size;
  const int64_t pitch = sums_pitch(p), floats = p.sums_columns ? 0 : p.M * pitch;
  const std::unique_ptr<float[]> sums(new float[chunks * floats]);
  parallel(pool, chunks, is_small, [&](int64_t chunk) {
    const std::unique_ptr<float[]> scratch(new float[product_scratch(weights) + picked_scratch(p)]);
    work(p, chunk * size, std::min((chunk + 1) * size, weights.rows), sums.get() + chunk * floats, scratch.get());
  });
  if (p.sums_columns) return;
  for (int64_t m = 0; m < p.M; ++m) {
    float* const y = p.y + m * outputs;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float* from = sums.get() + chunk * floats + m * pitch;
      for (int64_t n = 0; n < outputs; ++n) y[n] = chunk ? y[n] + from[n] : from[n];
    }
  }
}

}  // namespace jaxcompress
