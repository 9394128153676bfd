// What the kernels of muon_direction share: the momentum of eight elements, and the direction that follows.
#pragma once

#include "kernels/reduce.cuh"
#include "kernels/vector8.cuh"

namespace pgolf {

inline constexpr int kSpan = kWarp * kVector;  // elements of a row that a warp handles at once
inline constexpr unsigned kAllLanes = 0xffffffffu;

// u of eight gradients g and momenta m; stores the new momentum unless m holds it already.
template <bool First, typename M>
__device__ __forceinline__ void direction8(float (&u)[kVector], const float (&g)[kVector],
                                           float (&m)[kVector], M* momentum, int64_t valid, bool aligned,
                                           float mu, float scale, bool nesterov) {
  if constexpr (First) {
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) m[i] = fmaf(mu, m[i], g[i] * scale);
    store8<true>(momentum, m, valid, aligned);
  }
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) u[i] = nesterov ? fmaf(mu, m[i], g[i] * scale) : m[i];
}

// The same of what is in memory.
template <bool First, typename G, typename M>
__device__ __forceinline__ void load_direction8(float (&u)[kVector], const G* grad, M* momentum,
                                                int64_t valid, bool aligned, float mu, float scale,
                                                bool nesterov) {
  float g[kVector], m[kVector];
  load8(g, grad, valid, aligned);
  load8(m, momentum, valid, aligned);
  direction8<First>(u, g, m, momentum, valid, aligned, mu, scale, nesterov);
}

}  // namespace pgolf
