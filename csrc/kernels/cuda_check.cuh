// Launch checks, and sizes that every launcher needs. CUDA and standard headers only.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace pgolf {

inline void check_cuda(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA error at ") + file + ":" + std::to_string(line) + ": " +
                           cudaGetErrorString(error));
}

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), __FILE__, __LINE__);
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), __FILE__, __LINE__);
  return value;
}

inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Blocks for `count` items, refused where it exceeds what one grid dimension holds.
inline unsigned int grid_blocks(long long count, long long per_block, const char* op) {
  const long long blocks = (count + per_block - 1) / per_block;
  if (blocks > 0x7fffffffLL) throw std::runtime_error(std::string(op) + ": input too large for one launch");
  return static_cast<unsigned int>(blocks);
}

}  // namespace pgolf

#define PGOLF_CUDA_CHECK(call) ::pgolf::check_cuda((call), __FILE__, __LINE__)
#define PGOLF_LAUNCH_CHECK() PGOLF_CUDA_CHECK(cudaGetLastError())

namespace pgolf {

struct Grid {
  unsigned int blocks, threads;  // threads of a block
  size_t shared = 0;             // bytes of dynamic shared memory of a block
};

// kernel<<<...>>>(arguments...) and its check, in plain C++: tests run such kernels on the host
// (csrc/tests/host_cuda).
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid.blocks);
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared;
  config.stream = stream;
  PGOLF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

struct ClusterGrid {
  int64_t clusters;  // of work; each takes more where the device has room for fewer
  int blocks;        // of a cluster
  int threads;       // of a block
  int shared;        // bytes of dynamic shared memory of a block, which leave room for no second one
};

// The same for persistent blocks in clusters, one block per multiprocessor.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), const ClusterGrid& grid, cudaStream_t stream,
                     const Arguments&... arguments) {
  const int64_t most = multiprocessor_count() / grid.blocks;
  PGOLF_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared));
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned int>(grid.blocks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(static_cast<unsigned int>((grid.clusters < most ? grid.clusters : most) * grid.blocks));
  config.blockDim = dim3(static_cast<unsigned int>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  PGOLF_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace pgolf
