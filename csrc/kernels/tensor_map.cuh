// Tensor maps of the copy engine (Hopper and newer), host side.
#pragma once

#include <cuda.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda_check.cuh"

namespace pgolf {

// A tensor and the box of it that one copy moves; dimension 0 is contiguous.
struct TensorShape {
  cuuint32_t rank;
  cuuint64_t sizes[5];
  cuuint64_t strides[4];  // bytes, of dimensions 1 and on
  cuuint32_t box[5];      // 128 bytes in dimension 0: the width of the swizzle
};

// Of 2-byte elements: a row-major matrix, rows `ld` elements apart, and boxes of 64 columns.
inline TensorShape matrix_map(int64_t rows, int64_t columns, int64_t ld, int box_rows) {
  return {.rank = 2,
          .sizes = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)},
          .strides = {static_cast<cuuint64_t>(ld) * 2},
          .box = {64, static_cast<cuuint32_t>(box_rows)}};
}

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*,
                                 CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                 CUtensorMapFloatOOBfill);

// The driver's function, found at run time so that nothing links with libcuda.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    PGOLF_CUDA_CHECK(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                      cudaEnableDefault, &status));
    if (status != cudaDriverEntryPointSuccess || found == nullptr) {
      throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled; update it to 12.0 or newer");
    }
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

// Gives this thread a context, which it lacks until its first call of the runtime that needs one; a
// backward pass may start with a tensor map.
inline void bind_context() {
  thread_local const bool bound = [] {
    int device = 0;
    PGOLF_CUDA_CHECK(cudaGetDevice(&device));
    PGOLF_CUDA_CHECK(cudaSetDevice(device));
    return true;
  }();
  static_cast<void>(bound);
}

// The map of a tensor at `first`, with 128-byte swizzle; what a box has outside the tensor reads as zero.
inline CUtensorMap tensor_map(CUtensorMapDataType type, const void* first, const TensorShape& shape) {
  CUtensorMap map;
  const cuuint32_t ones[5] = {1, 1, 1, 1, 1};
  bind_context();
  const CUresult result =
      encode_tiled()(&map, type, shape.rank, const_cast<void*>(first), shape.sizes, shape.strides, shape.box,
                     ones, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                     CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

}  // namespace pgolf
