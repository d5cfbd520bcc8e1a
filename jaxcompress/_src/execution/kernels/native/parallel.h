// Work in chunks, spread over the threads of a pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#include "run.h"

namespace jaxcompress {

// Calls `work(chunk)` for every chunk. The calling thread takes chunks too, so this ends even if no other thread of the
// pool is free.
template <class Work>
void parallel(Pool& pool, int64_t chunks, bool is_small, const Work& work) {
  const int64_t threads = is_small ? 1 : std::min<int64_t>(pool.threads(), chunks);
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    int64_t chunks;
    const Work* work;  // of the caller, who waits for all chunks; late threads get none and do not touch it
    void take() {
      for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) {
        (*work)(chunk);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  if (threads <= 1) {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) work(chunk);
    return;
  }
  auto shared = std::make_shared<Shared>();
  shared->chunks = chunks;
  shared->work = &work;
  for (int64_t t = 1; t < threads; ++t) {
    const auto task = [](void* data) {
      std::unique_ptr<std::shared_ptr<Shared>> held(static_cast<std::shared_ptr<Shared>*>(data));
      (*held)->take();
    };
    pool.schedule(task, new std::shared_ptr<Shared>(shared));
  }
  shared->take();
  for (int spins = 0; shared->done.load(std::memory_order_acquire) < chunks; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

}  // namespace jaxcompress
