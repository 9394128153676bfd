// The scale of a matrix whose parts a cluster of blocks holds.
#pragma once

#include "kernels/matrix_scale.cuh"
#include "kernels/newton_schulz_sm90.h"
#include "kernels/ptx_sm90.cuh"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace ns90 {

constexpr int kParts = kNsParts;  // blocks of a cluster, which share a matrix

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
    partials[3 * part] = sum;
    partials[3 * part + 1] = low;
    partials[3 * part + 2] = high;
  }
  // Release and acquire at the scope of the cluster: the other blocks' partial sums are visible after it.
  cluster_sync();
  if (threadIdx.x == 0) {
    // Past the L1, which may hold what was there before.
    float sums[3] = {0.0f, 0.0f, 0.0f};
    for (int i = 0; i < 3 * kParts; ++i) sums[i % 3] += __ldcg(partials + i);
    scale = scale_of(sums[0], sums[1], sums[2], eps);
  }
  __syncthreads();
  return scale;
}

}  // namespace ns90
}  // namespace pgolf
