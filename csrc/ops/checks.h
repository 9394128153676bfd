// What every binding shares: checks, dtype dispatch, and the CUDA stream. Narrow ATen includes only.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "kernels/common.h"

#ifdef PGOLF_WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace pgolf {

// Calls body(T{}) with the kernel type of a float tensor; TypeError otherwise.
template <typename Body>
auto dispatch_float(const char* op, at::ScalarType type, const Body& body) {
  switch (type) {
    case at::kFloat:
      return body(float{});
    case at::kBFloat16:
      return body(bf16{});
    case at::kHalf:
      return body(f16{});
    default:
      TORCH_CHECK_TYPE(false, op, ": dtype must be float32, bfloat16 or float16, got ", type);
  }
}

template <typename T>
const T* const_pointer(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_pointer(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace pgolf
