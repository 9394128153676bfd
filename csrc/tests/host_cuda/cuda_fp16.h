// float16 on the host, see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common.h"

using __half = pgolf::f16;

inline float __half2float(__half value) { return pgolf::to_float(value); }
inline __half __float2half_rn(float value) { return pgolf::from_float<pgolf::f16>(value); }
