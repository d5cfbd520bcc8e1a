// Chooses kernels by what the processor has, prepares their inputs, and spreads them over threads.
#pragma once

#include "expand.h"
#include "problem.h"

namespace jaxcompress {

class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  virtual void schedule(void (*task)(void*), void* data) = 0;
};

// 0: portable, 1: AVX2 and FMA, 2: AVX-512 with VNNI. Of the processor, or the lower limit.
int instruction_level();
void limit_instructions(int level);

void run(WeightOnly& problem, Pool& pool);
void run(Integer& problem, Pool& pool);
void run(Grouped& problem, Pool& pool);
void run(const Expand& problem, Pool& pool);
void run(SparseProduct& problem, Pool& pool);

}  // namespace jaxcompress
