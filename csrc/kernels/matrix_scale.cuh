// How newton_schulz scales a matrix on CUDA: by a power of two, exactly, that brings its norm to [16, 32), so
// that neither huge nor tiny matrices overflow; the rest of 1 / (norm + eps) is a factor near 1/32 to 1/16.
#pragma once

#include <cuda_runtime.h>

#include "kernels/common.h"

namespace pgolf {

constexpr int kNormExponent = 5;  // scaled norms lie in [2^4, 2^5)

// Sums of squares of x, 2^-64 x and 2^64 x: one of them neither overflows nor underflows.
struct Squares {
  float sum = 0.0f, low = 0.0f, high = 0.0f;

  __device__ __forceinline__ void add(float x) {
    constexpr float kDown = 0x1p-64f, kUp = 0x1p64f;
    sum = fmaf(x, x, sum);
    low = fmaf(x * kDown, x * kDown, low);
    high = fmaf(x * kUp, x * kUp, high);
  }
};

struct Scale {
  int exponent;  // x 2^exponent has a norm in [16, 32)
  float sigma;   // 1 / ((norm + eps) 2^exponent)
};

__device__ inline Scale scale_of(float sum, float low, float high, float eps) {
  float root = sqrtf(sum);
  int shift = 0;
  if (!(sum < 1e37f)) {
    root = sqrtf(low);
    shift = 64;
  } else if (sum < 1e-30f) {
    root = sqrtf(high);
    shift = -64;
  }
  if (root == 0.0f) return {0, 0.0f};
  if (!(root < 3e38f)) return {0, __int_as_float(0x7fffffff)};  // infinities and NaN become NaN everywhere
  int exponent;
  const float mantissa = frexpf(root, &exponent);
  exponent = kNormExponent - exponent - shift;
  return {exponent, 1.0f / (ldexpf(mantissa, kNormExponent) + ldexpf(eps, exponent))};
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// x times 2^exponent in two steps, each of which float32 can hold.
struct PowerOfTwo {
  float first, rest;
  __device__ __forceinline__ explicit PowerOfTwo(int exponent) {
    const int near = min(max(exponent, -126), 127);
    first = power_of_two(near);
    rest = power_of_two(min(max(exponent - near, -126), 127));
  }
  __device__ __forceinline__ float operator()(float x) const { return x * first * rest; }
};

}  // namespace pgolf
