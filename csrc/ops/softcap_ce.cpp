// Binding of softcap_ce: schema, checks, allocation, dispatch. Maths: kernels/softcap_ce.h; autograd: Python.
#include "kernels/softcap_ce.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "ops/checks.h"

namespace pgolf {
namespace {

SoftcapCeShape check_inputs(const at::Tensor& logits, const at::Tensor& target, double cap,
                            int64_t ignore_index) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0,
                    "softcap_ce: logits must be (rows, vocab) with vocab > 0, got ", logits.sizes());
  TORCH_CHECK_VALUE(target.dim() == 1 && target.size(0) == logits.size(0),
                    "softcap_ce: target must be (rows,)=(", logits.size(0), ",), got ", target.sizes());
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong, "softcap_ce: target must be int64, got ",
                   target.scalar_type());
  TORCH_CHECK_VALUE(target.device() == logits.device(), "softcap_ce: target must be on ", logits.device(),
                    " as logits is, got ", target.device());
  TORCH_CHECK_VALUE(cap > 0 && cap <= std::numeric_limits<float>::max(),
                    "softcap_ce: cap must be finite and > 0, got ", cap);
  return {logits.size(0), logits.size(1), static_cast<float>(cap), ignore_index};
}

void check_targets(const at::Tensor& target, const SoftcapCeShape& shape) {
  const int64_t* data = const_pointer<int64_t>(target);
  const int64_t bad = softcap_ce_first_bad_row(data, shape);
  TORCH_CHECK_VALUE(bad < 0, "softcap_ce: target must be in [0, vocab=", shape.vocab,
                    ") or ignore_index=", shape.ignore_index, ", got ", data[bad], " at row ", bad);
}

// Float32 statistics of each row: loss and lse, or checks that those given fit.
at::Tensor empty_rows(const at::Tensor& logits) {
  return at::empty({logits.size(0)}, logits.options().dtype(at::kFloat));
}

at::Tensor checked_rows(const at::Tensor& rows, const at::Tensor& logits, const char* name) {
  TORCH_CHECK_VALUE(rows.dim() == 1 && rows.size(0) == logits.size(0) && rows.scalar_type() == at::kFloat &&
                        rows.device() == logits.device(),
                    "softcap_ce_backward: ", name, " must be (rows,)=(", logits.size(0), ",) float32 on ",
                    logits.device(), ", got ", rows.sizes(), " ", rows.scalar_type(), " on ", rows.device());
  return rows.contiguous();
}

std::tuple<at::Tensor, at::Tensor> forward_cpu(const at::Tensor& logits, const at::Tensor& target, double cap,
                                               int64_t ignore_index) {
  const SoftcapCeShape shape = check_inputs(logits, target, cap, ignore_index);
  const at::Tensor x = logits.contiguous();
  const at::Tensor y = target.contiguous();
  check_targets(y, shape);
  at::Tensor loss = empty_rows(x);
  at::Tensor lse = empty_rows(x);
  dispatch_float("softcap_ce", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    softcap_ce_forward_cpu(const_pointer<T>(x), const_pointer<int64_t>(y), mutable_pointer<float>(loss),
                           mutable_pointer<float>(lse), shape, at::get_num_threads());
  });
  return {loss, lse};
}

at::Tensor backward_cpu(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                        const at::Tensor& loss, const at::Tensor& lse, double cap, int64_t ignore_index) {
  const SoftcapCeShape shape = check_inputs(logits, target, cap, ignore_index);
  const at::Tensor x = logits.contiguous();
  const at::Tensor y = target.contiguous();
  check_targets(y, shape);
  const at::Tensor g = checked_rows(grad_loss, x, "grad_loss");
  const at::Tensor l = checked_rows(loss, x, "loss");
  const at::Tensor s = checked_rows(lse, x, "lse");
  at::Tensor grad = at::empty_like(x);
  dispatch_float("softcap_ce_backward", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    softcap_ce_backward_cpu(const_pointer<float>(g), const_pointer<T>(x), const_pointer<int64_t>(y),
                            const_pointer<float>(l), const_pointer<float>(s), mutable_pointer<T>(grad), shape,
                            at::get_num_threads());
  });
  return grad;
}

#ifdef PGOLF_WITH_CUDA
std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& logits, const at::Tensor& target,
                                                double cap, int64_t ignore_index) {
  const SoftcapCeShape shape = check_inputs(logits, target, cap, ignore_index);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor x = logits.contiguous();
  const at::Tensor y = target.contiguous();
  at::Tensor loss = empty_rows(x);
  at::Tensor lse = empty_rows(x);
  dispatch_float("softcap_ce", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    softcap_ce_forward_cuda(const_pointer<T>(x), const_pointer<int64_t>(y), mutable_pointer<float>(loss),
                            mutable_pointer<float>(lse), shape, c10::cuda::getCurrentCUDAStream().stream());
  });
  return {loss, lse};
}

at::Tensor backward_cuda(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                         const at::Tensor& loss, const at::Tensor& lse, double cap, int64_t ignore_index) {
  const SoftcapCeShape shape = check_inputs(logits, target, cap, ignore_index);
  const c10::cuda::CUDAGuard guard(logits.device());
  const at::Tensor x = logits.contiguous();
  const at::Tensor y = target.contiguous();
  const at::Tensor g = checked_rows(grad_loss, x, "grad_loss");
  const at::Tensor l = checked_rows(loss, x, "loss");
  const at::Tensor s = checked_rows(lse, x, "lse");
  at::Tensor grad = at::empty_like(x);
  dispatch_float("softcap_ce_backward", x.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    softcap_ce_backward_cuda(const_pointer<float>(g), const_pointer<T>(x), const_pointer<int64_t>(y),
                             const_pointer<float>(l), const_pointer<float>(s), mutable_pointer<T>(grad),
                             shape, c10::cuda::getCurrentCUDAStream().stream());
  });
  return grad;
}
#endif

}  // namespace
}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("softcap_ce(Tensor logits, Tensor target, float cap, int ignore_index) -> (Tensor loss, Tensor lse)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "softcap_ce_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor loss, Tensor lse, float "
      "cap, "
      "int ignore_index) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("softcap_ce", &pgolf::forward_cpu);
  m.impl("softcap_ce_backward", &pgolf::backward_cpu);
}

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("softcap_ce", &pgolf::forward_cuda);
  m.impl("softcap_ce_backward", &pgolf::backward_cuda);
}
#endif
