// Operators of kernels/trellis.h for torch.
#include "kernels/trellis.h"

#include "ops/checks.h"

namespace pgolf {
namespace {

Tensor round(const Tensor& x) {
  PGOLF_CHECK_TYPE(x.scalar_type() == kFloat, "trellis_round: x must be float32, got ", x.scalar_type());
  PGOLF_CHECK_VALUE(x.dim() >= 1, "trellis_round: x must be (..., n), got a scalar");
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(in);
  if (in.numel() == 0) return out;
  const int64_t n = in.size(-1), rows = in.numel() / n;
#ifdef PGOLF_WITH_CUDA
  if (in.is_cuda()) {
    const DeviceGuard guard(in);
    trellis_round_cuda(const_pointer<float>(in), mutable_pointer<float>(out), rows, n, current_stream());
    return out;
  }
#endif
  trellis_round_cpu(const_pointer<float>(in), mutable_pointer<float>(out), rows, n, num_threads());
  return out;
}

Tensor values(const Tensor& codes) {
  PGOLF_CHECK_TYPE(codes.scalar_type() == kChar, "trellis_values: codes must be int8, got ",
                   codes.scalar_type());
  PGOLF_CHECK_VALUE(codes.dim() >= 2, "trellis_values: codes must be (..., n, columns), got ", codes.sizes());
  const Tensor in = torch::stable::contiguous(codes);
  Tensor out = torch::stable::new_empty(in, in.sizes(), kFloat);
  if (in.numel() == 0) return out;
  const int64_t rows = in.size(-2), columns = in.size(-1), count = in.numel() / (rows * columns);
#ifdef PGOLF_WITH_CUDA
  if (in.is_cuda()) {
    const DeviceGuard guard(in);
    trellis_values_cuda(const_pointer<int8_t>(in), mutable_pointer<float>(out), count, rows, columns,
                        current_stream());
    return out;
  }
#endif
  trellis_values_cpu(const_pointer<int8_t>(in), mutable_pointer<float>(out), count, rows, columns,
                     num_threads());
  return out;
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("trellis_round(Tensor x) -> Tensor");
  m.def("trellis_values(Tensor codes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("trellis_round", TORCH_BOX(&pgolf::round));
  m.impl("trellis_values", TORCH_BOX(&pgolf::values));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("trellis_round", TORCH_BOX(&pgolf::round));
  m.impl("trellis_values", TORCH_BOX(&pgolf::values));
}
#endif
