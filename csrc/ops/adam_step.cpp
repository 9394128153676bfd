// Binding of square_sums, clip_scale and adam_step: schema, checks, scratch memory, dispatch. Maths:
// kernels/adam_step.h.
#include "kernels/adam_step.h"

#include <vector>

#include "ops/checks.h"

namespace pgolf {
namespace {

void check_vector(const Tensor& tensor, const char* op, const char* what, int64_t length,
                  const Device& device) {
  PGOLF_CHECK_TYPE(tensor.scalar_type() == kFloat, op, ": ", what, " must be float32, got ",
                   tensor.scalar_type());
  PGOLF_CHECK_VALUE(tensor.numel() == length && tensor.is_contiguous() && tensor.device() == device, op, ": ",
                    what, " must have ", length, " contiguous elements on ", device, ", got ", tensor.sizes(),
                    " on ", tensor.device());
}

void check_betas(const char* op, double beta1, double beta2) {
  for (double beta : {beta1, beta2})
    PGOLF_CHECK_VALUE(beta >= 0 && beta < 1, op, ": betas must be in [0, 1), got ", beta);
}

// The tensors are all float32 or all bfloat16. There is at least one: by it the dispatcher chose the device.
template <typename Sum>
Tensor square_sums(TensorList tensors, const Sum& sum) {
  const ScalarType type = tensors[0].scalar_type();
  PGOLF_CHECK_TYPE(type == kFloat || type == kBFloat16,
                   "square_sums: tensors must be float32 or bfloat16, got ", type);
  std::vector<SquareSum> list;
  for (const Tensor& tensor : tensors) {
    PGOLF_CHECK_TYPE(tensor.scalar_type() == type, "square_sums: tensors must have one dtype, got ", type,
                     " and ", tensor.scalar_type());
    PGOLF_CHECK_VALUE(tensor.is_contiguous() && tensor.device() == tensors[0].device(),
                      "square_sums: tensors must be contiguous on one device, got strides ", tensor.strides(),
                      " on ", tensor.device());
    list.push_back({tensor.const_data_ptr(), tensor.numel()});
  }
  const Tensor out = torch::stable::new_empty(tensors[0], {static_cast<int64_t>(list.size())}, kFloat);
  if (type == kFloat) {
    sum(float{}, list, out);
  } else {
    sum(bf16{}, list, out);
  }
  return out;
}

Tensor square_sums_on_cpu(TensorList tensors) {
  return square_sums(tensors, [](auto tag, const std::vector<SquareSum>& list, const Tensor& out) {
    square_sums_cpu<decltype(tag)>(list.data(), static_cast<int>(list.size()), mutable_pointer<float>(out),
                                   num_threads());
  });
}

ClipRule check_clip(const Tensor& sums, const Tensor& state, const Tensor& hyper, const Tensor& corrections,
                    double clip, double beta1, double beta2) {
  check_vector(sums, "clip_scale", "sums", sums.numel(), sums.device());
  check_vector(state, "clip_scale", "state", kClipState, sums.device());
  check_vector(hyper, "clip_scale", "hyper", kHyperCount, sums.device());
  check_vector(corrections, "clip_scale", "corrections", 2, sums.device());
  PGOLF_CHECK_VALUE(clip >= 0, "clip_scale: clip must be >= 0 (0: none), got ", clip);
  check_betas("clip_scale", beta1, beta2);
  return {.clip = clip, .beta1 = beta1, .beta2 = beta2};
}

void clip_scale_on_cpu(const Tensor& sums, const Tensor& state, const Tensor& hyper,
                       const Tensor& corrections, double clip, double beta1, double beta2) {
  const ClipRule rule = check_clip(sums, state, hyper, corrections, clip, beta1, beta2);
  clip_scale_cpu(const_pointer<float>(sums), static_cast<int>(sums.numel()), mutable_pointer<float>(state),
                 mutable_pointer<float>(hyper), mutable_pointer<float>(corrections), rule);
}

// Where tensor `i` of a list lies, which must be like the parameter.
float* place(TensorList list, const char* what, TensorList params, size_t i, const Device& device) {
  PGOLF_CHECK_VALUE(list.size() == params.size(), "adam_step: expected ", params.size(), " ", what,
                    ", one per parameter, got ", list.size());
  PGOLF_CHECK_VALUE(same(list[i].sizes(), params[i].sizes()), "adam_step: ", what, " ", i,
                    " must have shape ", params[i].sizes(), ", got ", list[i].sizes());
  check_vector(list[i], "adam_step", what, params[i].numel(), device);
  return mutable_pointer<float>(list[i]);
}

std::vector<AdamTarget> check_adam(TensorList params, TensorList grads, TensorList means, TensorList squares,
                                   TensorList averages, const Device& device) {
  std::vector<AdamTarget> targets;
  for (size_t i = 0; i < params.size(); ++i) {
    const auto take = [&](TensorList list, const char* what) { return place(list, what, params, i, device); };
    targets.push_back({.param = take(params, "params"),
                       .grad = take(grads, "grads"),
                       .mean = take(means, "means"),
                       .square = take(squares, "squares"),
                       .average = averages.empty() ? nullptr : take(averages, "averages"),
                       .count = params[i].numel()});
  }
  return targets;
}

// The same with EMA-Nesterov.
std::vector<Ahead<AdamTarget>> check_ahead(const std::vector<AdamTarget>& targets, TensorList params,
                                           TensorList bases, TensorList velocities, const Device& device) {
  std::vector<Ahead<AdamTarget>> ahead;
  for (size_t i = 0; i < targets.size(); ++i) {
    ahead.push_back({targets[i], place(bases, "bases", params, i, device),
                     place(velocities, "velocities", params, i, device)});
  }
  return ahead;
}

AdamRule make_rule(const Tensor& lr, const Tensor& hyper, const Tensor& corrections, double weight_decay,
                   double beta1, double beta2, double eps) {
  check_vector(lr, "adam_step", "lr", 1, lr.device());
  check_vector(hyper, "adam_step", "hyper", kHyperCount, lr.device());
  check_vector(corrections, "adam_step", "corrections", 2, lr.device());
  check_betas("adam_step", beta1, beta2);
  PGOLF_CHECK_VALUE(eps >= 0 && weight_decay >= 0, "adam_step: eps and weight_decay must be >= 0, got ", eps,
                    " and ", weight_decay);
  return {.lr = const_pointer<float>(lr),
          .hyper = const_pointer<float>(hyper),
          .corrections = const_pointer<float>(corrections),
          .weight_decay = static_cast<float>(weight_decay),
          .beta1 = static_cast<float>(beta1),
          .beta2 = static_cast<float>(beta2),
          .eps = static_cast<float>(eps),
          .rest1 = static_cast<float>(1 - beta1),
          .rest2 = static_cast<float>(1 - beta2)};
}

// Target is AdamTarget or Ahead<AdamTarget>.
template <typename Target>
void run_adam(const std::vector<Target>& targets, const AdamRule& rule, const Tensor& lr) {
  const int count = static_cast<int>(targets.size());
#ifdef PGOLF_WITH_CUDA
  if (lr.is_cuda()) {
    const DeviceGuard guard(lr);
    adam_step_cuda(targets.data(), count, rule, current_stream());
    return;
  }
#endif
  adam_step_cpu(targets.data(), count, rule, num_threads());
}

void adam_step(TensorList params, TensorList grads, TensorList means, TensorList squares, TensorList averages,
               TensorList bases, TensorList velocities, const Tensor& lr, const Tensor& hyper,
               const Tensor& corrections, double weight_decay, double beta1, double beta2, double eps) {
  const AdamRule rule = make_rule(lr, hyper, corrections, weight_decay, beta1, beta2, eps);
  const auto targets = check_adam(params, grads, means, squares, averages, lr.device());
  if (bases.empty() && velocities.empty()) {
    run_adam(targets, rule, lr);
  } else {
    run_adam(check_ahead(targets, params, bases, velocities, lr.device()), rule, lr);
  }
}

#ifdef PGOLF_WITH_CUDA
Tensor square_sums_on_cuda(TensorList tensors) {
  return square_sums(tensors, [](auto tag, const std::vector<SquareSum>& list, const Tensor& out) {
    const DeviceGuard guard(out);
    const int count = static_cast<int>(list.size());
    const Tensor workspace =
        torch::stable::new_zeros(out, {square_sums_workspace(list.data(), count)}, kByte);
    square_sums_cuda<decltype(tag)>(list.data(), count, mutable_pointer<float>(out),
                                    workspace.mutable_data_ptr(), current_stream());
  });
}

void clip_scale_on_cuda(const Tensor& sums, const Tensor& state, const Tensor& hyper,
                        const Tensor& corrections, double clip, double beta1, double beta2) {
  const ClipRule rule = check_clip(sums, state, hyper, corrections, clip, beta1, beta2);
  const DeviceGuard guard(sums);
  clip_scale_cuda(const_pointer<float>(sums), static_cast<int>(sums.numel()), mutable_pointer<float>(state),
                  mutable_pointer<float>(hyper), mutable_pointer<float>(corrections), rule, current_stream());
}
#endif

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("square_sums(Tensor[] tensors) -> Tensor");
  m.def(
      "clip_scale(Tensor sums, Tensor(a!) state, Tensor(b!) hyper, Tensor(c!) corrections, float clip, "
      "float beta1, float beta2) -> ()");
  m.def(
      "adam_step(Tensor(a!)[] params, Tensor(b!)[] grads, Tensor(c!)[] means, Tensor(d!)[] squares, "
      "Tensor(e!)[] averages, Tensor(f!)[] bases, Tensor(g!)[] velocities, Tensor lr, Tensor hyper, "
      "Tensor corrections, float weight_decay, float beta1, float beta2, float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("square_sums", TORCH_BOX(&pgolf::square_sums_on_cpu));
  m.impl("clip_scale", TORCH_BOX(&pgolf::clip_scale_on_cpu));
  m.impl("adam_step", TORCH_BOX(&pgolf::adam_step));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("square_sums", TORCH_BOX(&pgolf::square_sums_on_cuda));
  m.impl("clip_scale", TORCH_BOX(&pgolf::clip_scale_on_cuda));
  m.impl("adam_step", TORCH_BOX(&pgolf::adam_step));
}
#endif
