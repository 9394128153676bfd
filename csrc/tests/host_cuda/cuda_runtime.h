// As much of CUDA as runs kernels on the host, so that their logic is tested, and the sanitizers see their
// indices, without a GPU. A thread is a fiber (fibers.h); the blocks of a cluster run together, the clusters
// of a grid one after another. What is __shared__ is static: one launch at a time, and no clusters.
// kernels/ptx.cuh and kernels/ptx_sm90.cuh next to this file have the instructions of PTX.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "fibers.h"
#include "kernels/common.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned int numAttrs;
};
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace pgolf::test {

inline int multiprocessors = 1;
inline uint32_t launch_seed = 0;      // of launches that name none
inline bool blocks_together = false;  // all blocks of a launch run at the same time, as one cluster

// Threads that wait for each other; `what` is the same for all.
struct Meeting {
  std::string_view what;
  uint32_t arrived = 0, generation = 0;
  std::vector<Fiber*> waiting;
};

struct Warp {
  uint32_t lanes = 0;
  Meeting meeting;
  std::array<std::array<uint32_t, 6>, 32> words[2];  // of each lane, of this exchange and the one before
};

// Dynamic shared memory: aligned as a block's first byte is on the device, filled with NaN, and not a byte
// more than asked for, so that AddressSanitizer sees what lies beyond.
class SharedBytes {
 public:
  explicit SharedBytes(size_t count) : count_(count) {
    data_ = static_cast<unsigned char*>(::operator new(count, std::align_val_t{1024}));
    std::memset(data_, 0xff, count);
  }
  ~SharedBytes() { ::operator delete(data_, std::align_val_t{1024}); }
  SharedBytes(const SharedBytes&) = delete;
  SharedBytes& operator=(const SharedBytes&) = delete;
  unsigned char* data() const { return data_; }
  size_t size() const { return count_; }

 private:
  unsigned char* data_;
  size_t count_;
};

struct Cluster;

struct Block {
  Block(Cluster& its, uint32_t its_rank, dim3 its_index, unsigned int threads, size_t bytes)
      : cluster(its),
        rank(its_rank),
        index(its_index),
        live(threads),
        warps((threads + 31) / 32),
        shared(bytes) {
    for (uint32_t i = 0; i < warps.size(); ++i) warps[i].lanes = std::min(32u, threads - i * 32);
  }
  Cluster& cluster;
  uint32_t rank;
  dim3 index;
  uint32_t live;  // threads that have not ended
  std::vector<Warp> warps;
  SharedBytes shared;
  Meeting syncthreads;
  std::shared_ptr<void> hopper;                          // of kernels/ptx_sm90.cuh
  std::function<std::string(const Wait&)> explain = {};  // what a wait of it lacks
  std::function<void()> at_end = {};
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  Meeting meeting;
};

inline Scheduler& scheduler() { return *Scheduler::active; }
inline Fiber& this_thread() { return scheduler().current(); }
inline Block& this_block() { return *this_thread().block; }
inline Warp& this_warp() { return this_block().warps[threadIdx.x / 32]; }

// Ends the launch.
[[noreturn]] inline void fail(const std::string& what) {
  throw std::runtime_error("block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) +
                           ": " + what);
}

// Waits until `all` threads are at the same meeting.
inline void meet(Meeting& meeting, std::string_view what, uint32_t all, const char* wait) {
  if (meeting.arrived == 0) meeting.what = what;
  if (meeting.what != what)
    fail("is at " + std::string(what) + ", others of its warp or block are at " + std::string(meeting.what));
  if (++meeting.arrived == all) {
    meeting.arrived = 0;
    ++meeting.generation;
    scheduler().wake(meeting.waiting);
    return;
  }
  const uint32_t generation = meeting.generation;
  while (meeting.generation == generation) scheduler().sleep(meeting.waiting, {wait});
}

// The words of all lanes of the calling thread's warp, while body() runs.
template <size_t Count, typename Body>
void exchange(std::string_view what, const std::array<uint32_t, Count>& mine, const Body& body) {
  Warp& warp = this_warp();
  auto& words = warp.words[warp.meeting.generation % 2];
  std::copy(mine.begin(), mine.end(), words[threadIdx.x % 32].begin());
  meet(warp.meeting, what, warp.lanes, "a collective of the warp");
  body(words);
}

// The value of another lane.
template <typename T>
T shuffle(std::string_view what, uint32_t mask, T value, unsigned int source) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  if (mask != 0xffffffffu) fail("a collective of a part of a warp, which is not modelled");
  T other{};
  exchange<1>(what, {std::bit_cast<uint32_t>(value)},
              [&](const auto& words) { other = std::bit_cast<T>(words[source % 32][0]); });
  return other;
}

}  // namespace pgolf::test

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? pgolf::test::multiprocessors : 9;
  return cudaSuccess;
}

inline void __syncthreads() {
  pgolf::test::Block& block = pgolf::test::this_block();
  pgolf::test::meet(block.syncthreads, "__syncthreads", block.live, "__syncthreads");
}
inline void __syncwarp() {
  pgolf::test::exchange<0>("__syncwarp", {}, [](const auto&) {});
}
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source) {
  return pgolf::test::shuffle("__shfl_sync", mask, value, static_cast<unsigned int>(source));
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes) {
  return pgolf::test::shuffle("__shfl_xor_sync", mask, value,
                              (threadIdx.x % 32) ^ static_cast<unsigned int>(lanes));
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int offset) {
  const unsigned int source = threadIdx.x % 32 + static_cast<unsigned int>(offset);
  return pgolf::test::shuffle("__shfl_down_sync", mask, value, source < 32 ? source : threadIdx.x % 32);
}
inline uint32_t __ballot_sync(uint32_t mask, int predicate) {
  if (mask != 0xffffffffu) pgolf::test::fail("a vote of a part of a warp, which is not modelled");
  uint32_t votes = 0;
  pgolf::test::exchange<1>("vote", {predicate != 0 ? 1u : 0u}, [&](const auto& words) {
    for (uint32_t lane = 0; lane < 32; ++lane) votes |= words[lane][0] << lane;
  });
  return votes;
}
inline int __any_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(uint32_t mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

template <typename T>
T __ldcs(const T* source) {
  return *source;
}
template <typename T>
T __ldg(const T* source) {
  return *source;
}
template <typename T>
T __ldcg(const T* source) {
  return *source;
}
template <typename T>
void __stcs(T* target, T value) {
  *target = value;
}
template <typename T>
T atomicAdd(T* target, T value) {
  const T before = *target;
  *target = before + value;
  pgolf::test::scheduler().perhaps_give_way();
  return before;
}
inline void __threadfence() {}
// a + b, rounded down. Exact in double precision but for numbers far apart, whose rest is then what is left.
inline float __fadd_rd(float a, float b) {
  const double sum = static_cast<double>(a) + b, rest = (a - (sum - b)) + (b - (sum - (sum - b)));
  const auto near = static_cast<float>(sum);
  return near > sum || (near == sum && rest < 0.0) ? std::nextafter(near, -INFINITY) : near;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
// The upper word of (high, low) shifted left.
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return shift % 32 == 0 ? high : high << shift % 32 | low >> (32 - shift % 32);
}
using std::max;
using std::min;

namespace pgolf::test {

struct Launch {
  dim3 grid;
  unsigned int threads;  // of a block
  size_t shared = 0;     // bytes of dynamic shared memory of a block
  uint32_t seed = 0;
  unsigned int cluster = 1;  // blocks of a cluster, along x
};

inline std::string name_of(const Fiber& fiber) {
  const Block& block = *fiber.block;
  const Wait& wait = fiber.wait;
  const std::string explained = block.explain ? block.explain(wait) : "";
  return "block " + std::to_string(block.index.x) + ", threads " +
         std::to_string(fiber.thread.x / 128 * 128) + " and on, wait for " +
         (explained.empty() ? std::string(wait.what) : explained);
}

inline void enter(Fiber& fiber) {
  Block& block = *fiber.block;
  if (fiber.finished) {
    if (--block.live == 0 && block.at_end) block.at_end();
    Meeting& meeting = block.syncthreads;
    if (block.live > 0 && meeting.arrived == block.live) {
      meeting.arrived = 0;
      ++meeting.generation;
      scheduler().wake(meeting.waiting);
    }
    return;
  }
  threadIdx = fiber.thread;
  blockIdx = block.index;
}

// Calls kernel() in every thread of every block.
template <typename Kernel>
void launch(const Launch& at, const Kernel& kernel) {
  gridDim = at.grid;
  blockDim = {at.threads, 1, 1};
  const unsigned int blocks = at.grid.x * at.grid.y * at.grid.z;
  if (at.cluster == 0 || at.grid.x % at.cluster != 0)
    throw std::runtime_error("a grid is a multiple of its clusters");
  if (at.threads == 0 || at.threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  if (at.shared > 232448) throw std::runtime_error("a block has at most 232448 bytes of shared memory");
  const unsigned int together = blocks_together ? blocks : at.cluster;
  for (unsigned int first = 0; first < blocks; first += together) {
    Cluster cluster;
    Scheduler scheduler(at.seed + first, kernel, enter, name_of);
    for (unsigned int rank = 0; rank < together; ++rank) {
      const unsigned int number = first + rank;
      const dim3 index{number % at.grid.x, number / at.grid.x % at.grid.y, number / at.grid.x / at.grid.y};
      cluster.blocks.push_back(std::make_unique<Block>(cluster, rank, index, at.threads, at.shared));
      uint32_t priority = 0;
      for (unsigned int thread = 0; thread < at.threads; ++thread) {
        if (thread % 32 == 0) priority = scheduler.random();
        scheduler.add(cluster.blocks.back().get(), {thread, 0, 0}, priority);
      }
    }
    scheduler.run();
  }
}

template <typename Kernel>
void launch(dim3 grid, unsigned int threads, const Kernel& kernel, size_t shared = 0) {
  launch({.grid = grid, .threads = threads, .shared = shared, .seed = launch_seed}, kernel);
}

template <typename Kernel>
void launch(unsigned int blocks, unsigned int threads, const Kernel& kernel) {
  launch(dim3{blocks}, threads, kernel);
}

}  // namespace pgolf::test

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  unsigned int cluster = 1;
  for (unsigned int i = 0; i < config->numAttrs; ++i) cluster = config->attrs[i].val.clusterDim.x;
  pgolf::test::launch({.grid = config->gridDim,
                       .threads = config->blockDim.x,
                       .shared = config->dynamicSmemBytes,
                       .seed = pgolf::test::launch_seed,
                       .cluster = cluster},
                      [&] { kernel(arguments...); });
  return cudaSuccess;
}
