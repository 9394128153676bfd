// As much of CUDA as runs a kernel of plain loads, stores, barriers and shuffles on the host, so that the
// sanitizers see its indices without a GPU: a thread of the block is a thread of the system, and the blocks
// of a grid run one after another. What is __shared__ is static, so one launch at a time. kernels/ptx.cuh
// next to this file has the instructions of a warp.
#pragma once

#include <algorithm>
#include <array>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace pgolf::test {

inline int multiprocessors = 1;

struct Warp {
  std::barrier<> barrier{32};
  std::array<uint32_t, 32> value;
  std::array<std::array<uint32_t, 6>, 32> words;  // of each lane
};

struct Block {
  Block(unsigned int threads, size_t bytes) : barrier(threads), warps(threads / 32), shared(bytes) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;  // dynamic
};

inline thread_local Block* current_block = nullptr;

}  // namespace pgolf::test

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = pgolf::test::multiprocessors, cudaSuccess;
}

inline void __syncthreads() { pgolf::test::current_block->barrier.arrive_and_wait(); }

namespace pgolf::test {

// The value of another lane.
template <typename T>
T shuffle(T value, unsigned int source) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  Warp& warp = current_block->warps[threadIdx.x / 32];
  warp.value[threadIdx.x % 32] = std::bit_cast<uint32_t>(value);
  warp.barrier.arrive_and_wait();
  const T other = std::bit_cast<T>(warp.value[source % 32]);
  warp.barrier.arrive_and_wait();
  return other;
}

}  // namespace pgolf::test

inline uint32_t __shfl_sync(unsigned int, uint32_t value, int source) {
  return pgolf::test::shuffle(value, static_cast<unsigned int>(source));
}
inline float __shfl_xor_sync(unsigned int, float value, int mask) {
  return pgolf::test::shuffle(value, (threadIdx.x % 32) ^ static_cast<unsigned int>(mask));
}
inline float __shfl_down_sync(unsigned int, float value, int offset) {
  const unsigned int source = threadIdx.x % 32 + static_cast<unsigned int>(offset);
  return pgolf::test::shuffle(value, source < 32 ? source : threadIdx.x % 32);
}

template <typename T>
T __ldcs(const T* source) {
  return *source;
}
template <typename T>
void __stcs(T* target, T value) {
  *target = value;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __int_as_float(int bits) { return pgolf::bits_to_float(static_cast<uint32_t>(bits)); }
using std::max;
using std::min;

namespace pgolf::test {

// Calls kernel() in every thread of every block; `shared` is the bytes of dynamic shared memory.
template <typename Kernel>
void launch(dim3 grid, unsigned int threads, const Kernel& kernel, size_t shared = 0) {
  gridDim = grid;
  Block block(threads, shared);
  std::vector<std::thread> workers;
  for (unsigned int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      current_block = &block;
      threadIdx = {thread};
      for (unsigned int number = 0; number < grid.x * grid.y; ++number) {
        blockIdx = {number % grid.x, number / grid.x, 0};
        kernel();
        __syncthreads();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

template <typename Kernel>
void launch(unsigned int blocks, unsigned int threads, const Kernel& kernel) {
  launch(dim3{blocks}, threads, kernel);
}

}  // namespace pgolf::test

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  pgolf::test::launch(
      config->gridDim, config->blockDim.x, [&] { kernel(arguments...); }, config->dynamicSmemBytes);
  return cudaSuccess;
}
