// Block-wide reductions in a fixed order, hence deterministic.
#pragma once

#include <cuda_runtime.h>

namespace pgolf {

inline constexpr int kWarp = 32;

// Combines the values of all threads of a block with `merge(a, b)`; the result is valid in thread 0 alone.
// `staged` is shared memory for Threads / 32 values. Callable once per use of `staged`.
template <int Threads, typename Value, typename Merge, typename Shuffle>
__device__ __forceinline__ Value block_reduce(Value value, Value* staged, const Merge& merge,
                                              const Shuffle& shuffle_down) {
  static_assert(Threads % kWarp == 0 && Threads / kWarp <= kWarp, "whole warps, and one warp finishes");
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value = merge(value, shuffle_down(value, offset));
  if (threadIdx.x % kWarp == 0) staged[threadIdx.x / kWarp] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < Threads / kWarp; ++warp) value = merge(value, staged[warp]);
  }
  return value;
}

template <int Threads>
__device__ __forceinline__ float block_sum(float value, float* staged) {
  return block_reduce<Threads>(
      value, staged, [](float a, float b) { return a + b; },
      [](float v, int offset) { return __shfl_down_sync(0xffffffffu, v, offset); });
}

}  // namespace pgolf
