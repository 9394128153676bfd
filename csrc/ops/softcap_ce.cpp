// Binding of softcap_ce: schemas, checks, allocation, dispatch. Maths: kernels/softcap_ce.h; autograd:
// Python.
#include "ops/softcap_ce.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

namespace pgolf {
namespace {

using OptionalCap = std::optional<double>;

SoftcapCeShape check_inputs(const at::Tensor& logits, const at::Tensor& target,
                            const SoftcapCeOptions& options) {
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0,
                    "softcap_ce: logits must be (rows, vocab) with vocab > 0, got ", logits.sizes());
  check_target_tensor("softcap_ce", "logits", logits, target);
  return options.shape("softcap_ce", logits.size(0), logits.size(1));
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

std::tuple<at::Tensor, at::Tensor> run_forward(const at::Tensor& logits, const at::Tensor& target,
                                               OptionalCap cap, int64_t ignore_index, double z_loss,
                                               bool check_targets) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  const c10::OptionalDeviceGuard guard(logits.device());
  const at::Tensor y = target.contiguous();
  check_target_values("softcap_ce", y, shape, check_targets);
  at::Tensor loss = empty_rows(logits);
  at::Tensor lse = empty_rows(logits);
  softcap_ce_forward(logits.contiguous(), y, loss, lse, shape);
  return {loss, lse};
}

at::Tensor run_backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                        const at::Tensor& loss, const at::Tensor& lse, OptionalCap cap, int64_t ignore_index,
                        double z_loss) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  const c10::OptionalDeviceGuard guard(logits.device());
  const at::Tensor x = logits.contiguous();
  const at::Tensor y = target.contiguous();
  check_target_values("softcap_ce", y, shape, false);
  at::Tensor grad = at::empty_like(x);
  softcap_ce_backward(checked_rows(grad_loss, x, "grad_loss"), x, y, checked_rows(loss, x, "loss"),
                      checked_rows(lse, x, "lse"), grad, shape);
  return grad;
}

// Loss of each row, and the gradient written into `grad`, which may be `x`.
at::Tensor run_gradient(const at::Tensor& x, const at::Tensor& target, const at::Tensor& grad_loss,
                        at::Tensor& grad, const SoftcapCeShape& shape, bool check_targets) {
  TORCH_CHECK_VALUE(
      grad_loss.numel() == 1 && grad_loss.scalar_type() == at::kFloat && grad_loss.device() == x.device(),
      "softcap_ce_gradient: grad_loss must be one float32 on ", x.device(), ", got ", grad_loss.sizes(), " ",
      grad_loss.scalar_type(), " on ", grad_loss.device());
  const c10::OptionalDeviceGuard guard(x.device());
  const at::Tensor y = target.contiguous();
  check_target_values("softcap_ce", y, shape, check_targets);
  at::Tensor loss = empty_rows(x);
  at::Tensor lse = empty_rows(x);
  softcap_ce_gradient(x, y, grad_loss.contiguous(), loss, lse, grad, shape);
  return loss;
}

std::tuple<at::Tensor, at::Tensor> gradient(const at::Tensor& logits, const at::Tensor& target,
                                            const at::Tensor& grad_loss, OptionalCap cap,
                                            int64_t ignore_index, double z_loss, bool check_targets) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  const at::Tensor x = logits.contiguous();
  at::Tensor grad = at::empty_like(x);
  return {run_gradient(x, target, grad_loss, grad, shape, check_targets), grad};
}

at::Tensor gradient_(at::Tensor& logits, const at::Tensor& target, const at::Tensor& grad_loss,
                     OptionalCap cap, int64_t ignore_index, double z_loss, bool check_targets) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  TORCH_CHECK_VALUE(logits.is_contiguous(),
                    "softcap_ce: logits must be contiguous to be overwritten by their gradient; call "
                    ".contiguous() or leave inplace off; got strides ",
                    logits.strides());
  return run_gradient(logits, target, grad_loss, logits, shape, check_targets);
}

void rescale_(at::Tensor& grad, const at::Tensor& factor) {
  TORCH_CHECK_VALUE(grad.dim() == 2 && grad.is_contiguous(),
                    "softcap_ce_rescale_: grad must be contiguous (rows, vocab), got ", grad.sizes());
  TORCH_CHECK_VALUE(
      factor.numel() == 1 && factor.scalar_type() == at::kFloat && factor.device() == grad.device(),
      "softcap_ce_rescale_: factor must be one float32 on ", grad.device(), ", got ", factor.sizes(), " ",
      factor.scalar_type(), " on ", factor.device());
#ifdef PGOLF_WITH_CUDA
  if (grad.is_cuda()) {
    const c10::OptionalDeviceGuard guard(grad.device());
    dispatch_float("softcap_ce_rescale_", grad.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      softcap_ce_rescale_cuda(mutable_pointer<T>(grad), const_pointer<float>(factor), 0, grad.size(0),
                              grad.size(1), c10::cuda::getCurrentCUDAStream().stream());
    });
    return;
  }
#endif
  if (factor.item<float>() != 1.0f) grad.mul_(factor.reshape({}));
}

// Calls cuda(arguments.., stream) or cpu(arguments.., threads): where `on` is.
template <typename Cuda, typename Cpu, typename... Arguments>
void call_kernel([[maybe_unused]] const at::Tensor& on, [[maybe_unused]] const Cuda& cuda, const Cpu& cpu,
                 const Arguments&... arguments) {
#ifdef PGOLF_WITH_CUDA
  if (on.is_cuda()) {
    cuda(arguments..., c10::cuda::getCurrentCUDAStream().stream());
    return;
  }
#endif
  cpu(arguments..., at::get_num_threads());
}

}  // namespace

void softcap_ce_forward(const at::Tensor& logits, const at::Tensor& target, at::Tensor& loss, at::Tensor& lse,
                        const SoftcapCeShape& shape) {
  dispatch_float("softcap_ce", logits.scalar_type(), [&](auto tag) {
    call_kernel(
        logits, [](const auto&... a) { softcap_ce_forward_cuda(a...); },
        [](const auto&... a) { softcap_ce_forward_cpu(a...); }, const_pointer<decltype(tag)>(logits),
        const_pointer<int64_t>(target), mutable_pointer<float>(loss), mutable_pointer<float>(lse), shape);
  });
}

void softcap_ce_backward(const at::Tensor& grad_loss, const at::Tensor& logits, const at::Tensor& target,
                         const at::Tensor& loss, const at::Tensor& lse, at::Tensor& grad,
                         const SoftcapCeShape& shape) {
  dispatch_float("softcap_ce_backward", logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    call_kernel(
        logits, [](const auto&... a) { softcap_ce_backward_cuda(a...); },
        [](const auto&... a) { softcap_ce_backward_cpu(a...); }, const_pointer<float>(grad_loss),
        const_pointer<T>(logits), const_pointer<int64_t>(target), const_pointer<float>(loss),
        const_pointer<float>(lse), mutable_pointer<T>(grad), shape);
  });
}

void softcap_ce_gradient(const at::Tensor& logits, const at::Tensor& target, const at::Tensor& grad_loss,
                         at::Tensor& loss, at::Tensor& lse, at::Tensor& grad, const SoftcapCeShape& shape) {
  const int64_t stride = grad_loss.dim() == 1 && grad_loss.size(0) == shape.rows ? 1 : 0;
  dispatch_float("softcap_ce", logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    call_kernel(
        logits, [](const auto&... a) { softcap_ce_gradient_cuda(a...); },
        [](const auto&... a) { softcap_ce_gradient_cpu(a...); }, const_pointer<T>(logits),
        const_pointer<int64_t>(target), const_pointer<float>(grad_loss), stride, mutable_pointer<float>(loss),
        mutable_pointer<float>(lse), mutable_pointer<T>(grad), shape);
  });
}

}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "softcap_ce(Tensor logits, Tensor target, float? cap, int ignore_index, float z_loss, bool "
      "check_targets) -> (Tensor loss, Tensor lse)",
      tags);
  m.def(
      "softcap_ce_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor loss, Tensor lse, float? "
      "cap, int ignore_index, float z_loss) -> Tensor",
      tags);
  m.def(
      "softcap_ce_gradient(Tensor logits, Tensor target, Tensor grad_loss, float? cap, int ignore_index, "
      "float z_loss, bool check_targets) -> (Tensor loss, Tensor grad)",
      tags);
  m.def(
      "softcap_ce_gradient_(Tensor(a!) logits, Tensor target, Tensor grad_loss, float? cap, int "
      "ignore_index, float z_loss, bool check_targets) -> Tensor",
      tags);
  m.def("softcap_ce_rescale_(Tensor(a!) grad, Tensor factor) -> ()", tags);
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("softcap_ce", &pgolf::run_forward);
  m.impl("softcap_ce_backward", &pgolf::run_backward);
  m.impl("softcap_ce_gradient", &pgolf::gradient);
  m.impl("softcap_ce_gradient_", &pgolf::gradient_);
  m.impl("softcap_ce_rescale_", &pgolf::rescale_);
}

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("softcap_ce", &pgolf::run_forward);
  m.impl("softcap_ce_backward", &pgolf::run_backward);
  m.impl("softcap_ce_gradient", &pgolf::gradient);
  m.impl("softcap_ce_gradient_", &pgolf::gradient_);
  m.impl("softcap_ce_rescale_", &pgolf::rescale_);
}
#endif
