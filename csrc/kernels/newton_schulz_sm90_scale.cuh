// How newton_schulz_sm90 scales: every matrix times a power of two that brings its norm to [16, 32).
#pragma once

#include <cuda_runtime.h>

#include "kernels/ptx_sm90.cuh"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace ns90 {

constexpr int kNormExponent = 5;  // scaled norms lie in [2^4, 2^5)
constexpr int kParts = 8;         // blocks of a cluster, which share a matrix

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
    root = sqrtf(low), shift = 64;
  } else if (sum < 1e-30f) {
    root = sqrtf(high), shift = -64;
  }
  if (root == 0.0f) return {0, 0.0f};
  if (!(root < 3e38f)) return {0, __int_as_float(0x7fffffff)};  // infinities and NaN become NaN everywhere
  int exponent;
  const float mantissa = frexpf(root, &exponent);
  exponent = kNormExponent - exponent - shift;
  return {exponent, 1.0f / (ldexpf(mantissa, kNormExponent) + ldexpf(eps, exponent))};
}

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// The scale of the matrix that the blocks of this cluster share, from the squares of each one's part; the
// same in all threads. `partials` has 3 * kParts places for the matrix.
template <int Threads>
__device__ __forceinline__ Scale cluster_scale(const Squares& squares, float* partials, int part, float eps) {
  __shared__ float staged[3][Threads / kWarp];
  __shared__ Scale scale;
  const float sum = block_sum<Threads>(squares.sum, staged[0]);
  const float low = block_sum<Threads>(squares.low, staged[1]);
  const float high = block_sum<Threads>(squares.high, staged[2]);
  if (threadIdx.x == 0) {
    partials[3 * part] = sum, partials[3 * part + 1] = low, partials[3 * part + 2] = high;
  }
  cluster_sync();
  if (threadIdx.x == 0) {
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (int i = 0; i < 3 * kParts; ++i) sums[i % 3] += __ldcg(partials + i);
    scale = scale_of(sums[0], sums[1], sums[2], eps);
  }
  __syncthreads();
  return scale;
}

// x times 2^exponent in two steps, each of which float32 can hold.
struct PowerOfTwo {
  float first, rest;
  __device__ __forceinline__ explicit PowerOfTwo(int exponent) {
    const int near = min(max(exponent, -126), 127);
    first = power_of_two(near), rest = power_of_two(min(max(exponent - near, -126), 127));
  }
  __device__ __forceinline__ float operator()(float x) const { return x * first * rest; }
};

}  // namespace ns90
}  // namespace pgolf
