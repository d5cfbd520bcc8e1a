// The kernels of each translation unit.
#pragma once

#include "problem.h"

namespace jaxcompress {

extern const WeightOnlyKernel kScalar, kPortable;
extern const IntegerKernel kPortableInteger;
extern const GroupedKernel kPortableGrouped;
#if defined(__x86_64__)
extern const WeightOnlyKernel kAvx2, kAvx512;
extern const IntegerKernel kAvx2Integer, kVnniInteger;
extern const GroupedKernel kAvx2Grouped, kVnniGrouped;
#endif

}  // namespace jaxcompress
