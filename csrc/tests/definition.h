// What the kernels compute, one element at a time.
#pragma once

#include "check.h"

namespace bitwright::test {

// clamp(rint(x / scale) + zero, qmin, qmax) - zero; NaN is the lowest code.
int32_t centred(float x, float scale, float zero, const Range8& range);

// The symmetric scale of a row from its largest magnitude.
float dynamic_scale(const float* x, int64_t count, const Range8& range);

}  // namespace bitwright::test
