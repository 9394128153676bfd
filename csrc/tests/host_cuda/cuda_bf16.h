// bfloat16 on the host, see cuda_runtime.h.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common.h"

using __nv_bfloat16 = pgolf::bf16;

inline float __bfloat162float(__nv_bfloat16 value) { return pgolf::to_float(value); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return pgolf::from_float<pgolf::bf16>(value); }

struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
