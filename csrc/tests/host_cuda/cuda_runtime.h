// As much of CUDA as runs a kernel of plain loads, stores, barriers and shuffles on the host, so that the
// sanitizers see its indices without a GPU: a thread of the block is a thread of the system, and the blocks
// of a grid run one after another. What is __shared__ is static, so one launch at a time.
#pragma once

#include <array>
#include <barrier>
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
  std::array<float, 32> value;
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

inline float __shfl_xor_sync(unsigned int, float value, int mask) {
  pgolf::test::Warp& warp = pgolf::test::current_block->warps[threadIdx.x / 32];
  const unsigned int lane = threadIdx.x % 32;
  warp.value[lane] = value;
  warp.barrier.arrive_and_wait();
  const float other = warp.value[lane ^ static_cast<unsigned int>(mask)];
  warp.barrier.arrive_and_wait();
  return other;
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
void launch(unsigned int blocks, unsigned int threads, const Kernel& kernel) {
  gridDim = {blocks};
  Block block(threads);
  std::vector<std::thread> workers;
  for (unsigned int thread = 0; thread < threads; ++thread) {
    workers.emplace_back([&, thread] {
      current_block = &block;
      threadIdx = {thread};
      for (unsigned int number = 0; number < blocks; ++number) {
        blockIdx = {number};
        kernel();
        __syncthreads();
      }
    });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace pgolf::test
