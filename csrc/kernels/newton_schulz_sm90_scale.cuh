// The two kernels of newton_schulz_sm90 that bring every matrix to a norm in [16, 32), in float16.
#pragma once

#include "kernels/convert.cuh"
#include "kernels/newton_schulz_sm90_plan.h"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace ns90 {

constexpr int kNormExponent = 5;  // scaled norms lie in [2^4, 2^5)

struct CastBank {
  const void* in;
  __half* x;
  NsType type;
  int64_t count;  // elements per matrix, a multiple of 8
  int chunks;     // per matrix
  int first_block, first_matrix;
};

struct CastPlan {
  CastBank banks[kMaxBanks];
  int bank_count;
  float* partials;  // three per block
  float* sigma;
  uint32_t* clear;  // counters of the products
  int clear_count;
  bool normalize;
  float eps;
};

__device__ __forceinline__ const CastBank& bank_of(const CastPlan& plan, int block) {
  int i = 0;
  while (i + 1 < plan.bank_count && block >= plan.banks[i + 1].first_block) ++i;
  return plan.banks[i];
}

__device__ __forceinline__ void load8(float (&value)[8], const void* in, NsType type, int64_t at) {
  if (type == NsType::kFloat32) {
    const float4 lo = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(in) + at));
    const float4 hi = __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(in) + at) + 1);
    value[0] = lo.x, value[1] = lo.y, value[2] = lo.z, value[3] = lo.w;
    value[4] = hi.x, value[5] = hi.y, value[6] = hi.z, value[7] = hi.w;
    return;
  }
  const uint4 raw = __ldg(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(in) + at));
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  PGOLF_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (type == NsType::kBfloat16) {
      value[2 * i] = __uint_as_float(words[i] << 16);
      value[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    } else {
      const float2 pair = __half22float2(*reinterpret_cast<const __half2*>(&words[i]));
      value[2 * i] = pair.x, value[2 * i + 1] = pair.y;
    }
  }
}

constexpr float kDown = 0x1p-64f, kUp = 0x1p64f;

// Sums of squares of x, 2^-64 x and 2^64 x: one of them neither overflows nor underflows.
__global__ void __launch_bounds__(kCastThreads) squares_kernel(const __grid_constant__ CastPlan plan) {
  __shared__ float staged[3][kCastThreads / kWarp];
  const int block = static_cast<int>(blockIdx.x);
  if (block == 0) {
    for (int i = threadIdx.x; i < plan.clear_count; i += kCastThreads) plan.clear[i] = 0;
  }
  const CastBank& bank = bank_of(plan, block);
  const int local = block - bank.first_block;
  const int matrix = local / bank.chunks;
  const int64_t begin = static_cast<int64_t>(local - matrix * bank.chunks) * kChunk;
  float sum = 0.0f, low = 0.0f, high = 0.0f;
  PGOLF_UNROLL
  for (int i = 0; i < kChunk / (kCastThreads * 8); ++i) {
    const int64_t at = begin + (i * kCastThreads + static_cast<int>(threadIdx.x)) * 8;
    if (at >= bank.count) break;
    float value[8];
    load8(value, bank.in, bank.type, matrix * bank.count + at);
    PGOLF_UNROLL
    for (int l = 0; l < 8; ++l) {
      sum = fmaf(value[l], value[l], sum);
      low = fmaf(value[l] * kDown, value[l] * kDown, low);
      high = fmaf(value[l] * kUp, value[l] * kUp, high);
    }
  }
  sum = block_sum<kCastThreads>(sum, staged[0]);
  low = block_sum<kCastThreads>(low, staged[1]);
  high = block_sum<kCastThreads>(high, staged[2]);
  if (threadIdx.x == 0) {
    plan.partials[3 * block] = sum;
    plan.partials[3 * block + 1] = low;
    plan.partials[3 * block + 2] = high;
  }
}

struct Scale {
  int exponent;  // x 2^exponent has a norm in [16, 32)
  float sigma;   // 1 / ((norm + eps) 2^exponent)
};

__device__ Scale scale_of(float sum, float low, float high, float eps) {
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

__global__ void __launch_bounds__(kCastThreads) cast_kernel(const __grid_constant__ CastPlan plan) {
  __shared__ float staged[3][kCastThreads / kWarp];
  __shared__ Scale shared_scale;
  const int block = static_cast<int>(blockIdx.x);
  const CastBank& bank = bank_of(plan, block);
  const int local = block - bank.first_block;
  const int matrix = local / bank.chunks;
  const int chunk = local - matrix * bank.chunks;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  if (plan.normalize) {
    const float* partials = plan.partials + 3 * static_cast<int64_t>(block - chunk);
    for (int i = threadIdx.x; i < bank.chunks; i += kCastThreads) {
      PGOLF_UNROLL
      for (int l = 0; l < 3; ++l) sums[l] += partials[3 * i + l];
    }
    PGOLF_UNROLL
    for (int l = 0; l < 3; ++l) sums[l] = block_sum<kCastThreads>(sums[l], staged[l]);
  } else if (block == 0) {
    for (int i = threadIdx.x; i < plan.clear_count; i += kCastThreads) plan.clear[i] = 0;
  }
  if (threadIdx.x == 0) {
    shared_scale = plan.normalize ? scale_of(sums[0], sums[1], sums[2], plan.eps)
                                  : Scale{kNormExponent, power_of_two(-kNormExponent)};
    if (chunk == 0) plan.sigma[bank.first_matrix + matrix] = shared_scale.sigma;
  }
  __syncthreads();
  const int exponent = shared_scale.exponent;
  const int first = min(max(exponent, -126), 127);
  const float scale = power_of_two(first), rest = power_of_two(min(max(exponent - first, -126), 127));
  PGOLF_UNROLL
  for (int i = 0; i < kChunk / (kCastThreads * 8); ++i) {
    const int64_t at =
        static_cast<int64_t>(chunk) * kChunk + (i * kCastThreads + static_cast<int>(threadIdx.x)) * 8;
    if (at >= bank.count) break;
    float value[8];
    load8(value, bank.in, bank.type, matrix * bank.count + at);
    Pack<__half> pack;
    PGOLF_UNROLL
    for (int l = 0; l < 8; ++l) pack.value[l] = __float2half_rn(value[l] * scale * rest);
    *reinterpret_cast<Pack<__half>*>(bank.x + matrix * bank.count + at) = pack;
  }
}

}  // namespace ns90
}  // namespace pgolf
