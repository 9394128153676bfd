// ahead.h for CUDA kernels: eight elements of a tensor at a time.
#pragma once

#include "kernels/ahead.h"
#include "kernels/vector8.cuh"

namespace pgolf {

// p = p + shift velocity
__device__ __forceinline__ void shift8(float (&p)[kVector], const float (&velocity)[kVector],
                                       const float* hyper) {
  const float shift = hyper[kHyperShift];
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) p[i] = fmaf(shift, velocity[i], p[i]);
}

// `p` holds x.
__device__ __forceinline__ void move_ahead8(float (&p)[kVector], float (&base)[kVector],
                                            float (&velocity)[kVector], const float* hyper) {
  float moved[kVector];
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) {
    moved[i] = p[i] - base[i];
    base[i] = p[i];
  }
  lerp8(velocity, moved, hyper[kHyperVelocityWeight]);
  shift8(p, velocity, hyper);
}

template <typename Target>
bool aligned_ahead(const Target& t) {
  if constexpr (kAhead<Target>) return aligned16(t.base) && aligned16(t.velocity);
  return true;
}

}  // namespace pgolf
