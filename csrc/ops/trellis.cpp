// Operators of kernels/trellis.h for torch.
#include "kernels/trellis.h"

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "ops/checks.h"

namespace pgolf {
namespace {

at::Tensor round(const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "trellis_round: x must be float32, got ", x.scalar_type());
  TORCH_CHECK_VALUE(x.dim() >= 1, "trellis_round: x must be (..., n), got a scalar");
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  if (in.numel() == 0) return out;
  const int64_t n = in.size(-1), rows = in.numel() / n;
#ifdef PGOLF_WITH_CUDA
  if (in.is_cuda()) {
    const c10::cuda::CUDAGuard guard(in.device());
    trellis_round_cuda(const_pointer<float>(in), mutable_pointer<float>(out), rows, n,
                       c10::cuda::getCurrentCUDAStream().stream());
    return out;
  }
#endif
  trellis_round_cpu(const_pointer<float>(in), mutable_pointer<float>(out), rows, n, at::get_num_threads());
  return out;
}

at::Tensor values(const at::Tensor& codes) {
  TORCH_CHECK_TYPE(codes.scalar_type() == at::kChar, "trellis_values: codes must be int8, got ",
                   codes.scalar_type());
  TORCH_CHECK_VALUE(codes.dim() >= 2, "trellis_values: codes must be (..., n, columns), got ", codes.sizes());
  const at::Tensor in = codes.contiguous();
  at::Tensor out = at::empty_like(in, in.options().dtype(at::kFloat));
  if (in.numel() == 0) return out;
  const int64_t rows = in.size(-2), columns = in.size(-1), count = in.numel() / (rows * columns);
#ifdef PGOLF_WITH_CUDA
  if (in.is_cuda()) {
    const c10::cuda::CUDAGuard guard(in.device());
    trellis_values_cuda(const_pointer<int8_t>(in), mutable_pointer<float>(out), count, rows, columns,
                        c10::cuda::getCurrentCUDAStream().stream());
    return out;
  }
#endif
  trellis_values_cpu(const_pointer<int8_t>(in), mutable_pointer<float>(out), count, rows, columns,
                     at::get_num_threads());
  return out;
}

}  // namespace
}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("trellis_round(Tensor x) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("trellis_values(Tensor codes) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("trellis_round", &pgolf::round);
  m.impl("trellis_values", &pgolf::values);
}

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("trellis_round", &pgolf::round);
  m.impl("trellis_values", &pgolf::values);
}
#endif
