// Bridge types to CUDA types, and 16-byte vectors of them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/common.h"

namespace pgolf {

// The CUDA type with the same bits.
template <typename T>
struct DeviceType;
template <>
struct DeviceType<float> {
  using type = float;
};
template <>
struct DeviceType<bf16> {
  using type = __nv_bfloat16;
};
template <>
struct DeviceType<f16> {
  using type = __half;
};

__device__ __forceinline__ float load_float(float v) { return v; }
__device__ __forceinline__ float load_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float load_float(__half v) { return __half2float(v); }

template <typename D>
__device__ __forceinline__ D store_float(float v);
template <>
__device__ __forceinline__ float store_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __nv_bfloat16 store_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __forceinline__ __half store_float<__half>(float v) {
  return __float2half_rn(v);
}

// 16 bytes of elements, moved by one instruction.
template <typename D>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / static_cast<int>(sizeof(D));
  D value[kCount];
};

}  // namespace pgolf
