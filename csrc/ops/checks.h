// What every binding shares: types of torch's stable ABI, checks, dtype dispatch, the CUDA stream.
//
// Only torch/csrc/stable, torch/headeronly and the C shims may be included here and in the bindings: with
// TORCH_TARGET_VERSION set, ATen and c10 are an #error. That is what lets one binary run on every torch from
// 2.11 (CONTRIBUTING.md, "One binary for every PyTorch").
#pragma once

#include <pybind11/detail/common.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <ostream>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels/common.h"
#include "kernels/newton_schulz.h"

namespace pgolf {

using torch::headeronly::ScalarType;
using torch::stable::Device;
using torch::stable::Tensor;
using TensorList = torch::headeronly::HeaderOnlyArrayRef<Tensor>;
using Doubles = torch::headeronly::HeaderOnlyArrayRef<double>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

inline constexpr auto kFloat = ScalarType::Float;
inline constexpr auto kBFloat16 = ScalarType::BFloat16;
inline constexpr auto kHalf = ScalarType::Half;
inline constexpr auto kLong = ScalarType::Long;
inline constexpr auto kByte = ScalarType::Byte;
inline constexpr auto kChar = ScalarType::Char;

// ---- checks. torch gives these two exceptions of pybind11 to Python as what they are called; its own checks
// of the stable ABI know RuntimeError alone, and torch 2.15 makes one of std::invalid_argument too.

inline std::ostream& operator<<(std::ostream& out, Sizes sizes) {
  out << '[';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  return out << ']';
}

inline std::ostream& operator<<(std::ostream& out, const Device& device) {
  if (device.is_cpu()) return out << "cpu";
  return out << (device.is_cuda() ? "cuda:" : "device:") << device.index();
}

template <typename... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts), ...);
  return std::move(out).str();
}

#define PGOLF_CHECK_AS_(Error, condition, ...) \
  do {                                         \
    if (!(condition)) [[unlikely]]             \
      throw Error(::pgolf::text(__VA_ARGS__)); \
  } while (false)
#define PGOLF_CHECK(condition, ...) PGOLF_CHECK_AS_(std::runtime_error, condition, __VA_ARGS__)
#define PGOLF_CHECK_VALUE(condition, ...) PGOLF_CHECK_AS_(::pybind11::value_error, condition, __VA_ARGS__)
#define PGOLF_CHECK_TYPE(condition, ...) PGOLF_CHECK_AS_(::pybind11::type_error, condition, __VA_ARGS__)

// Calls body(T{}) with the kernel type of a float tensor; TypeError otherwise.
template <typename Body>
auto dispatch_float(const char* op, ScalarType type, const Body& body) {
  switch (type) {
    case kFloat:
      return body(float{});
    case kBFloat16:
      return body(bf16{});
    case kHalf:
      return body(f16{});
    default:
      throw pybind11::type_error(text(op, ": dtype must be float32, bfloat16 or float16, got ", type));
  }
}

// An operator's `algorithm` is a number: the stable ABI of torch 2.11 to 2.13 leaks a string at every call.
inline NsAlgorithm check_algorithm(const char* op, int64_t number) {
  PGOLF_CHECK_VALUE(number >= 0 && number <= 2, op,
                    ": algorithm must be 0 (auto), 1 (standard) or 2 (gram), got ", number);
  return static_cast<NsAlgorithm>(number);
}

// ---- tensors

// Sizes have operator== in torch 2.13 and newer only.
inline bool same(Sizes a, Sizes b) { return a.equals(b); }

template <typename T>
const T* const_pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// As kernels with 16-byte loads read it: rows without gaps, at a multiple of 16 bytes.
inline Tensor prepared(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  return reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0 ? dense : torch::stable::clone(dense);
}

// A tensor whose rows, the parts of its first dim, have no gaps and are at multiples of 16 bytes.
struct Rows {
  Tensor tensor;
  int64_t stride;  // elements from a row to the next one
};

// Rows of two-byte elements, read where they are if they can be, as those of columns of a wider matrix; else
// of a copy.
inline Rows rows_in_place(const Tensor& tensor) {
  int64_t size = 1;
  bool dense = true;
  for (int64_t dim = tensor.dim() - 1; dim > 0; --dim) {
    dense = dense && tensor.stride(dim) == size;
    size *= tensor.size(dim);
  }
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  if (dense && aligned && tensor.stride(0) % 8 == 0) return {tensor, tensor.stride(0)};
  return {prepared(tensor), size};
}

// That a tensor is as the operator needs it, on the device of its first one.
inline void check_tensor(const char* op, const char* name, const Tensor& tensor, Sizes sizes, ScalarType type,
                         const Tensor& first) {
  PGOLF_CHECK_VALUE(same(tensor.sizes(), sizes), op, ": ", name, " must be ", sizes, ", got ",
                    tensor.sizes());
  PGOLF_CHECK_TYPE(tensor.scalar_type() == type, op, ": ", name, " must be ", type, ", got ",
                   tensor.scalar_type());
  PGOLF_CHECK_VALUE(tensor.device() == first.device(), op, ": ", name, " must be on ", first.device(),
                    " as the first tensor is, got ", tensor.device());
}

// That a tensor has float32 or bfloat16 numbers; returns whether it has the latter.
inline bool check_is_bf16(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  PGOLF_CHECK_TYPE(type == kFloat || type == kBFloat16, op, ": ", name, " must be float32 or bfloat16, got ",
                   type);
  return type == kBFloat16;
}

inline int num_threads() { return static_cast<int>(torch::stable::get_num_threads()); }

// Calls an operator by name, all arguments in the order of its schema: what the stable ABI has no function
// for. It converts no Scalar, so only overloads that take tensors can be called.
template <typename Return, typename... Args>
Return call_operator(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Return>(stack[0]);
}

// The same of an operator that returns nothing.
template <typename... Args>
void call_operator_void(const char* name, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
}

// Rows [begin, begin + count), as a view. The copy of the handle is for torch, which takes no constant one.
inline Tensor rows_of(Tensor tensor, int64_t begin, int64_t count) {
  return torch::stable::narrow(tensor, 0, begin, count);
}

// ---- devices

// Makes the device of `on` the current one while it lives; nothing for a tensor on the CPU.
struct DeviceGuard {
  explicit DeviceGuard(const Tensor& on) {
    if (on.is_cuda()) guard.emplace(on.get_device_index());
  }
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

}  // namespace pgolf

#ifdef PGOLF_WITH_CUDA
// Weak: torch's CPU builds have no such function, and the library must load there all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace pgolf {

inline CUstream_st* current_stream() {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(torch::stable::accelerator::getCurrentDeviceIndex(), &stream));
  return static_cast<CUstream_st*>(stream);
}

}  // namespace pgolf
#endif
