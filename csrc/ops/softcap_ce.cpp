// Binding of softcap_ce: schemas, checks, allocation, dispatch. Maths: kernels/softcap_ce.h; autograd:
// Python.
#include "ops/softcap_ce.h"

#include <tuple>
#include <vector>

namespace pgolf {
namespace {

using OptionalCap = std::optional<double>;

SoftcapCeShape check_inputs(const Tensor& logits, const Tensor& target, const SoftcapCeOptions& options) {
  PGOLF_CHECK_VALUE(logits.dim() == 2 && logits.size(1) > 0,
                    "softcap_ce: logits must be (rows, vocab) with vocab > 0, got ", logits.sizes());
  check_target_tensor("softcap_ce", "logits", logits, target);
  return options.shape("softcap_ce", logits.size(0), logits.size(1));
}

// Float32 statistics of each row: loss and lse, or checks that those given fit.
Tensor empty_rows(const Tensor& logits) { return torch::stable::new_empty(logits, {logits.size(0)}, kFloat); }

Tensor checked_rows(const Tensor& rows, const Tensor& logits, const char* name) {
  PGOLF_CHECK_VALUE(rows.dim() == 1 && rows.size(0) == logits.size(0) && rows.scalar_type() == kFloat &&
                        rows.device() == logits.device(),
                    "softcap_ce_backward: ", name, " must be (rows,)=(", logits.size(0), ",) float32 on ",
                    logits.device(), ", got ", rows.sizes(), " ", rows.scalar_type(), " on ", rows.device());
  return torch::stable::contiguous(rows);
}

std::tuple<Tensor, Tensor> run_forward(const Tensor& logits, const Tensor& target, OptionalCap cap,
                                       int64_t ignore_index, double z_loss, bool check_targets) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  const DeviceGuard guard(logits);
  const Tensor y = torch::stable::contiguous(target);
  check_target_values("softcap_ce", y, shape, check_targets);
  Tensor loss = empty_rows(logits);
  Tensor lse = empty_rows(logits);
  softcap_ce_forward(torch::stable::contiguous(logits), y, loss, lse, shape);
  return {loss, lse};
}

Tensor run_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target, const Tensor& loss,
                    const Tensor& lse, OptionalCap cap, int64_t ignore_index, double z_loss) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  const DeviceGuard guard(logits);
  const Tensor x = torch::stable::contiguous(logits);
  const Tensor y = torch::stable::contiguous(target);
  check_target_values("softcap_ce", y, shape, false);
  Tensor grad = torch::stable::empty_like(x);
  softcap_ce_backward(checked_rows(grad_loss, x, "grad_loss"), x, y, checked_rows(loss, x, "loss"),
                      checked_rows(lse, x, "lse"), grad, shape);
  return grad;
}

// Loss of each row, and the gradient written into `grad`, which may be `x`.
Tensor run_gradient(const Tensor& x, const Tensor& target, const Tensor& grad_loss, Tensor& grad,
                    const SoftcapCeShape& shape, bool check_targets) {
  PGOLF_CHECK_VALUE(
      grad_loss.numel() == 1 && grad_loss.scalar_type() == kFloat && grad_loss.device() == x.device(),
      "softcap_ce_gradient: grad_loss must be one float32 on ", x.device(), ", got ", grad_loss.sizes(), " ",
      grad_loss.scalar_type(), " on ", grad_loss.device());
  const DeviceGuard guard(x);
  const Tensor y = torch::stable::contiguous(target);
  check_target_values("softcap_ce", y, shape, check_targets);
  Tensor loss = empty_rows(x);
  Tensor lse = empty_rows(x);
  softcap_ce_gradient(x, y, torch::stable::contiguous(grad_loss), loss, lse, grad, shape);
  return loss;
}

std::tuple<Tensor, Tensor> gradient(const Tensor& logits, const Tensor& target, const Tensor& grad_loss,
                                    OptionalCap cap, int64_t ignore_index, double z_loss,
                                    bool check_targets) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  const Tensor x = torch::stable::contiguous(logits);
  Tensor grad = torch::stable::empty_like(x);
  return {run_gradient(x, target, grad_loss, grad, shape, check_targets), grad};
}

Tensor gradient_(Tensor& logits, const Tensor& target, const Tensor& grad_loss, OptionalCap cap,
                 int64_t ignore_index, double z_loss, bool check_targets) {
  const SoftcapCeShape shape = check_inputs(logits, target, {cap, ignore_index, z_loss});
  PGOLF_CHECK_VALUE(logits.is_contiguous(),
                    "softcap_ce: logits must be contiguous to be overwritten by their gradient; call "
                    ".contiguous() or leave inplace off; got strides ",
                    logits.strides());
  return run_gradient(logits, target, grad_loss, logits, shape, check_targets);
}

void rescale_(Tensor& grad, const Tensor& factor) {
  PGOLF_CHECK_VALUE(grad.dim() == 2 && grad.is_contiguous(),
                    "softcap_ce_rescale_: grad must be contiguous (rows, vocab), got ", grad.sizes());
  PGOLF_CHECK_VALUE(factor.numel() == 1 && factor.scalar_type() == kFloat && factor.device() == grad.device(),
                    "softcap_ce_rescale_: factor must be one float32 on ", grad.device(), ", got ",
                    factor.sizes(), " ", factor.scalar_type(), " on ", factor.device());
#ifdef PGOLF_WITH_CUDA
  if (grad.is_cuda()) {
    const DeviceGuard guard(grad);
    dispatch_float("softcap_ce_rescale_", grad.scalar_type(), [&](auto tag) {
      using T = decltype(tag);
      softcap_ce_rescale_cuda(mutable_pointer<T>(grad), const_pointer<float>(factor), 0, grad.size(0),
                              grad.size(1), current_stream());
    });
    return;
  }
#endif
  if (*const_pointer<float>(factor) != 1.0f) {
    call_operator<Tensor>("aten::mul_", "Tensor", grad, torch::stable::reshape(factor, {}));
  }
}

// Calls cuda(arguments.., stream) or cpu(arguments.., threads): where `on` is.
template <typename Cuda, typename Cpu, typename... Arguments>
void call_kernel([[maybe_unused]] const Tensor& on, [[maybe_unused]] const Cuda& cuda, const Cpu& cpu,
                 const Arguments&... arguments) {
#ifdef PGOLF_WITH_CUDA
  if (on.is_cuda()) {
    cuda(arguments..., current_stream());
    return;
  }
#endif
  cpu(arguments..., num_threads());
}

}  // namespace

void softcap_ce_forward(const Tensor& logits, const Tensor& target, Tensor& loss, Tensor& lse,
                        const SoftcapCeShape& shape) {
  dispatch_float("softcap_ce", logits.scalar_type(), [&](auto tag) {
    call_kernel(
        logits, [](const auto&... a) { softcap_ce_forward_cuda(a...); },
        [](const auto&... a) { softcap_ce_forward_cpu(a...); }, const_pointer<decltype(tag)>(logits),
        const_pointer<int64_t>(target), mutable_pointer<float>(loss), mutable_pointer<float>(lse), shape);
  });
}

void softcap_ce_backward(const Tensor& grad_loss, const Tensor& logits, const Tensor& target,
                         const Tensor& loss, const Tensor& lse, Tensor& grad, const SoftcapCeShape& shape) {
  dispatch_float("softcap_ce_backward", logits.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    call_kernel(
        logits, [](const auto&... a) { softcap_ce_backward_cuda(a...); },
        [](const auto&... a) { softcap_ce_backward_cpu(a...); }, const_pointer<float>(grad_loss),
        const_pointer<T>(logits), const_pointer<int64_t>(target), const_pointer<float>(loss),
        const_pointer<float>(lse), mutable_pointer<T>(grad), shape);
  });
}

void softcap_ce_gradient(const Tensor& logits, const Tensor& target, const Tensor& grad_loss, Tensor& loss,
                         Tensor& lse, Tensor& grad, const SoftcapCeShape& shape) {
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

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "softcap_ce(Tensor logits, Tensor target, float? cap, int ignore_index, float z_loss, bool "
      "check_targets) -> (Tensor loss, Tensor lse)");
  m.def(
      "softcap_ce_backward(Tensor grad_loss, Tensor logits, Tensor target, Tensor loss, Tensor lse, float? "
      "cap, int ignore_index, float z_loss) -> Tensor");
  m.def(
      "softcap_ce_gradient(Tensor logits, Tensor target, Tensor grad_loss, float? cap, int ignore_index, "
      "float z_loss, bool check_targets) -> (Tensor loss, Tensor grad)");
  m.def(
      "softcap_ce_gradient_(Tensor(a!) logits, Tensor target, Tensor grad_loss, float? cap, int "
      "ignore_index, float z_loss, bool check_targets) -> Tensor");
  m.def("softcap_ce_rescale_(Tensor(a!) grad, Tensor factor) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("softcap_ce", TORCH_BOX(&pgolf::run_forward));
  m.impl("softcap_ce_backward", TORCH_BOX(&pgolf::run_backward));
  m.impl("softcap_ce_gradient", TORCH_BOX(&pgolf::gradient));
  m.impl("softcap_ce_gradient_", TORCH_BOX(&pgolf::gradient_));
  m.impl("softcap_ce_rescale_", TORCH_BOX(&pgolf::rescale_));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("softcap_ce", TORCH_BOX(&pgolf::run_forward));
  m.impl("softcap_ce_backward", TORCH_BOX(&pgolf::run_backward));
  m.impl("softcap_ce_gradient", TORCH_BOX(&pgolf::gradient));
  m.impl("softcap_ce_gradient_", TORCH_BOX(&pgolf::gradient_));
  m.impl("softcap_ce_rescale_", TORCH_BOX(&pgolf::rescale_));
}
#endif
