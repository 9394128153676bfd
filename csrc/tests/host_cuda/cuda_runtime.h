// As much of CUDA as runs a kernel of plain loads, stores, barriers and shuffles on the host, so that the
// sanitizers see its indices without a GPU: a thread of the block is a thread of the system, and the blocks
// of a grid run one after another. What is __shared__ is static, so one launch at a time.
#pragma once

#include <array>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
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

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 1, cudaSuccess; }

namespace pgolf::test {

struct Warp {
  std::barrier<> barrier{32};
  std::array<uint32_t, 32> value;
};

struct Block {
  explicit Block(unsigned int threads) : barrier(threads), warps(threads / 32) {}
  std::barrier<> barrier;
  std::vector<Warp> warps;
};

inline thread_local Block* current_block = nullptr;

}  // namespace pgolf::test

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 gridDim;

inline void __syncthreads() { pgolf::test::current_block->barrier.arrive_and_wait(); }

inline uint32_t __shfl_sync(unsigned int, uint32_t value, int source) {
  pgolf::test::Warp& warp = pgolf::test::current_block->warps[threadIdx.x / 32];
  warp.value[threadIdx.x % 32] = value;
  warp.barrier.arrive_and_wait();
  const uint32_t other = warp.value[static_cast<unsigned int>(source) % 32];
  warp.barrier.arrive_and_wait();
  return other;
}

inline float __shfl_xor_sync(unsigned int lanes, float value, int mask) {
  const int source = static_cast<int>(threadIdx.x % 32) ^ mask;
  return std::bit_cast<float>(__shfl_sync(lanes, std::bit_cast<uint32_t>(value), source));
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

namespace pgolf::test {

// Calls kernel() in every thread of every block.
template <typename Kernel>
void launch(dim3 grid, unsigned int threads, const Kernel& kernel) {
  gridDim = grid;
  Block block(threads);
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
