// What the kernels share that work on the heads of tokens: a warp holds 256 columns of a token, which are
// four heads of 64 or two of 128 columns, and each lane eight of them, one 16-byte vector. So the same lanes
// of any two such stripes have the same place in their heads, and a sum over a head is one over 8 or 16
// lanes.
#pragma once

#include "kernels/vector8.cuh"

namespace pgolf {

inline constexpr int kHeadWarps = 8;  // of a block, each of which holds a stripe of another token
inline constexpr int kHeadThreads = kHeadWarps * 32;
inline constexpr int kStripe = 32 * kVector;

using HeadDevice = DeviceType<bf16>::type;
using HeadRaw = Raw8<HeadDevice>;

// Stripes, or groups of `stripes` of them, that hold `columns`.
PGOLF_HOST_DEVICE inline unsigned int stripe_count(int64_t columns, int stripes) {
  return static_cast<unsigned int>((columns + stripes * kStripe - 1) / (stripes * kStripe));
}

// A grid of no more blocks than are resident together, so that all of them end at about the same time;
// `parts` blocks share a token.
template <typename Kernel>
dim3 head_grid(Kernel* kernel, int64_t tokens, unsigned int parts) {
  int resident = 0;
  PGOLF_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kHeadThreads, 0));
  const int64_t rounds = (tokens + kHeadWarps - 1) / kHeadWarps;
  const int64_t most = std::max(int64_t{resident} * multiprocessor_count() / parts, int64_t{1});
  return {static_cast<unsigned int>(std::min(rounds, most)), parts};
}

// The sum over a head's lanes, the same in all of them. All lanes of the warp call it.
template <int Width>
__device__ __forceinline__ float head_sum(float value) {
  PGOLF_UNROLL
  for (int lanes = Width / kVector / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  return value;
}

// Eight elements, or zeros where `wanted` is false.
__device__ __forceinline__ void load_if(HeadRaw& raw, const bf16* source, bool wanted) {
  raw = {};
  if (wanted) raw.load(reinterpret_cast<const HeadDevice*>(source));
}

__device__ __forceinline__ void store_if(bf16* target, float (&value)[kVector], bool wanted) {
  if (wanted) store8<false>(reinterpret_cast<HeadDevice*>(target), value, kVector, true);
}

// Element `at` of float32 or bfloat16 numbers.
__device__ __forceinline__ float load_either(const void* source, bool is_bf16, int64_t at) {
  return is_bf16 ? load_float(static_cast<const HeadDevice*>(source)[at])
                 : static_cast<const float*>(source)[at];
}

__device__ __forceinline__ void store_either(void* target, bool is_bf16, int64_t at, float value) {
  if (is_bf16) {
    static_cast<HeadDevice*>(target)[at] = store_float<HeadDevice>(value);
  } else {
    static_cast<float*>(target)[at] = value;
  }
}

}  // namespace pgolf
