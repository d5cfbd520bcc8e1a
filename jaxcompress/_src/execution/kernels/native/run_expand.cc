#include <algorithm>
#include <memory>

#include "expand.h"
#include "parallel.h"

namespace jaxcompress {

void run(const Expand& p, Pool& pool) {
  const int64_t rows = p.entries * p.rows;
  if (rows == 0 || p.columns == 0) return;
  ExpandRows kernel = kPortableExpand;
#if defined(__x86_64__)
  if (instruction_level() >= 2)
    kernel = kAvx512Expand;
  else if (instruction_level() >= 1)
    kernel = kAvx2Expand;
#endif
  // So many weights take less time than waking a thread, and are what one takes at a time.
  constexpr int64_t kFew = 32 * 1024;
  const int64_t size = std::clamp<int64_t>(kFew / p.columns, 1, rows);
  parallel(pool, (rows + size - 1) / size, rows * p.columns <= 2 * kFew, [&](int64_t chunk) {
    const std::unique_ptr<float[]> scratch(new float[expand_scratch(p)]);
    kernel(p, chunk * size, std::min((chunk + 1) * size, rows), scratch.get());
  });
}

}  // namespace jaxcompress
