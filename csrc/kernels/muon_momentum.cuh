// What the kernels of muon_step share: eight elements at a time, and the momentum of each.
#pragma once

#include "kernels/convert.cuh"
#include "kernels/reduce.cuh"

namespace pgolf {

inline constexpr int kVector = 8;              // elements a thread handles at once
inline constexpr int kSpan = kWarp * kVector;  // elements of a row that a warp handles at once
inline constexpr unsigned kAllLanes = 0xffffffffu;

// Eight elements, zeros past `valid`. Aligned: all eight are valid and 16-byte aligned.
template <typename T>
__device__ __forceinline__ void load8(float (&value)[kVector], const T* source, int64_t valid, bool aligned) {
  constexpr int kCount = Pack<T>::kCount;
  if (aligned) {
    PGOLF_UNROLL
    for (int i = 0; i < kVector; i += kCount) {
      const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(source + i));
      Pack<T> pack;
      memcpy(&pack, &bits, sizeof(pack));
      PGOLF_UNROLL
      for (int l = 0; l < kCount; ++l) value[i + l] = load_float(pack.value[l]);
    }
    return;
  }
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) value[i] = i < valid ? load_float(source[i]) : 0.0f;
}

// Rounds `value` to T and stores it; `value` becomes what was stored. Streamed: evicted from L2 first.
template <bool Streamed, typename T>
__device__ __forceinline__ void store8(T* target, float (&value)[kVector], int64_t valid, bool aligned) {
  constexpr int kCount = Pack<T>::kCount;
  PGOLF_UNROLL
  for (int i = 0; i < kVector; i += kCount) {
    Pack<T> pack;
    PGOLF_UNROLL
    for (int l = 0; l < kCount; ++l) {
      pack.value[l] = store_float<T>(value[i + l]);
      value[i + l] = load_float(pack.value[l]);
    }
    if (aligned) {
      uint4 bits;
      memcpy(&bits, &pack, sizeof(bits));
      if constexpr (Streamed) {
        __stcs(reinterpret_cast<uint4*>(target + i), bits);
      } else {
        *reinterpret_cast<uint4*>(target + i) = bits;
      }
    } else {
      PGOLF_UNROLL
      for (int l = 0; l < kCount; ++l) {
        if (i + l < valid) target[i + l] = pack.value[l];
      }
    }
  }
}

// u of the eight elements at `column`; writes the new momentum unless it is there already.
template <bool First, typename G, typename M>
__device__ __forceinline__ void momentum8(float (&u)[kVector], const G* grad, M* momentum, int64_t valid,
                                          bool aligned, float mu, float scale, bool nesterov) {
  float g[kVector], m[kVector];
  load8(g, grad, valid, aligned);
  load8(m, momentum, valid, aligned);
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) {
    g[i] *= scale;
    if constexpr (First) m[i] = fmaf(mu, m[i], g[i]);
  }
  if constexpr (First) store8<true>(momentum, m, valid, aligned);
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) u[i] = nesterov ? fmaf(mu, m[i], g[i]) : m[i];
}

}  // namespace pgolf
