// Binding of muon_step and muon_apply: schema, checks, scratch memory, dispatch. Maths, and which kernels are
// launched: kernels/muon_step.h around kernels/newton_schulz.h.
#include "kernels/muon_step.h"

#include <cmath>
#include <vector>

#include "ops/checks.h"

namespace pgolf {
namespace {

ScalarType first_type(TensorList list) { return list.empty() ? kFloat : list[0].scalar_type(); }

// Calls body(T{}) for float32 and bfloat16; TypeError otherwise.
template <typename Body>
void dispatch_state(const char* what, ScalarType type, const Body& body) {
  PGOLF_CHECK_TYPE(type == kFloat || type == kBFloat16, "muon_step: ", what,
                   " must be float32 or bfloat16, got ", type);
  if (type == kFloat) return body(float{});
  body(bf16{});
}

// Calls body(G{}, M{}, X{}) with the types of the three lists.
template <typename Body>
void dispatch_states(TensorList grads, TensorList momenta, TensorList updates, const Body& body) {
  dispatch_state("grads", first_type(grads), [&](auto g) {
    dispatch_state("momenta", first_type(momenta), [&](auto m) {
      dispatch_state("updates", first_type(updates), [&](auto x) { body(g, m, x); });
    });
  });
}

void check_hyper(const Tensor& hyper) {
  PGOLF_CHECK_TYPE(hyper.scalar_type() == kFloat, "muon_step: hyper must be float32, got ",
                   hyper.scalar_type());
  PGOLF_CHECK_VALUE(hyper.dim() == 1 && hyper.size(0) == kHyperCount && hyper.is_contiguous(),
                    "muon_step: hyper must be (", int{kHyperCount}, ",) contiguous, got ", hyper.sizes());
}

// `tensor` of list `what` at `index` must have the shape of `model`; check_list sees to the rest.
void check_like(const Tensor& tensor, const Tensor& model, const char* what, size_t index) {
  PGOLF_CHECK_VALUE(same(tensor.sizes(), model.sizes()), "muon_step: ", what, " ", index, " must have shape ",
                    model.sizes(), ", got ", tensor.sizes());
}

void check_list(TensorList list, const char* what, ScalarType type, const Tensor& hyper) {
  for (size_t i = 0; i < list.size(); ++i) {
    PGOLF_CHECK_TYPE(list[i].scalar_type() == type, "muon_step: ", what, " ", i, " must be ", type, ", got ",
                     list[i].scalar_type());
    PGOLF_CHECK_VALUE(list[i].device() == hyper.device(), "muon_step: ", what, " ", i, " must be on ",
                      hyper.device(), " like the hyper, got ", list[i].device());
    PGOLF_CHECK_VALUE(list[i].is_contiguous(), "muon_step: ", what, " ", i,
                      " must be contiguous, got strides ", list[i].strides(),
                      "; it is read and written in place");
  }
}

void check_counts(size_t got, size_t want, const char* what) {
  PGOLF_CHECK_VALUE(got == want, "muon_step: expected ", want, " ", what, ", one per tensor, got ", got);
}

// What muon_apply works on; `averages` may be empty.
std::vector<MuonTarget> check_targets(TensorList params, TensorList updates, TensorList averages,
                                      const Tensor& hyper, Doubles lr_scales) {
  check_hyper(hyper);
  check_counts(updates.size(), params.size(), "updates");
  check_counts(lr_scales.size(), params.size(), "lr_scales");
  if (!averages.empty()) check_counts(averages.size(), params.size(), "averages");
  check_list(params, "param", kFloat, hyper);
  check_list(updates, "update", first_type(updates), hyper);
  check_list(averages, "average", kFloat, hyper);
  std::vector<MuonTarget> targets;
  for (size_t i = 0; i < params.size(); ++i) {
    check_like(updates[i], params[i], "update", i);
    MuonTarget target{.param = mutable_pointer<float>(params[i]),
                      .update = updates[i].const_data_ptr(),
                      .average = nullptr,
                      .count = params[i].numel(),
                      .lr_scale = static_cast<float>(lr_scales[i])};
    if (!averages.empty()) {
      check_like(averages[i], params[i], "average", i);
      target.average = mutable_pointer<float>(averages[i]);
    }
    targets.push_back(target);
  }
  return targets;
}

// The same with EMA-Nesterov.
std::vector<Ahead<MuonTarget>> check_ahead(const std::vector<MuonTarget>& targets, TensorList params,
                                           TensorList bases, TensorList velocities, const Tensor& hyper) {
  check_counts(bases.size(), params.size(), "bases");
  check_counts(velocities.size(), params.size(), "velocities");
  check_list(bases, "base", kFloat, hyper);
  check_list(velocities, "velocity", kFloat, hyper);
  std::vector<Ahead<MuonTarget>> ahead;
  for (size_t i = 0; i < targets.size(); ++i) {
    check_like(bases[i], params[i], "base", i);
    check_like(velocities[i], params[i], "velocity", i);
    ahead.push_back({targets[i], mutable_pointer<float>(bases[i]), mutable_pointer<float>(velocities[i])});
  }
  return ahead;
}

// The iteration without the shape of a bank.
NewtonSchulzShape check_iteration(Doubles coefficients, double eps) {
  const auto count = static_cast<int64_t>(coefficients.size());
  PGOLF_CHECK_VALUE(count % 3 == 0 && count >= 3 && count <= 3 * kNewtonSchulzMaxSteps,
                    "muon_step: coefficients must be 1 to ", kNewtonSchulzMaxSteps,
                    " triples (a, b, c), got ", count, " numbers");
  PGOLF_CHECK_VALUE(eps >= 0, "muon_step: eps must be >= 0, got ", eps);
  NewtonSchulzShape shape{};
  shape.steps = static_cast<int>(count / 3);
  shape.eps = static_cast<float>(eps);
  for (int64_t i = 0; i < count; ++i) {
    const double value = coefficients[static_cast<size_t>(i)];
    PGOLF_CHECK_VALUE(std::isfinite(value), "muon_step: coefficients must be finite, got ", value,
                      " in triple ", i / 3);
    shape.coefficients[i / 3][i % 3] = static_cast<float>(value);
  }
  return shape;
}

// The banks that have elements.
std::vector<MuonBank> check_banks(TensorList grads, TensorList momenta, TensorList updates,
                                  const Tensor& hyper) {
  check_counts(momenta.size(), grads.size(), "momenta");
  check_counts(updates.size(), grads.size(), "updates");
  check_list(grads, "grad", first_type(grads), hyper);
  check_list(momenta, "momentum", first_type(momenta), hyper);
  check_list(updates, "update", first_type(updates), hyper);
  std::vector<MuonBank> banks;
  for (size_t i = 0; i < grads.size(); ++i) {
    PGOLF_CHECK_VALUE(grads[i].dim() == 3, "muon_step: grad ", i,
                      " must be a bank (matrices, rows, cols), got ", grads[i].sizes());
    check_like(momenta[i], grads[i], "momentum", i);
    check_like(updates[i], grads[i], "update", i);
    if (grads[i].numel() == 0) continue;
    banks.push_back({.grad = grads[i].const_data_ptr(),
                     .momentum = momenta[i].mutable_data_ptr(),
                     .update = updates[i].mutable_data_ptr(),
                     .matrices = grads[i].size(0),
                     .rows = grads[i].size(1),
                     .cols = grads[i].size(2)});
  }
  return banks;
}

Tensor scratch_bytes(int64_t bytes, const Tensor& like) {
  return torch::stable::new_empty(like, {bytes}, kByte);
}

template <typename G, typename M, typename X>
void run_cpu(const MuonStep& step, const Tensor& hyper) {
  PGOLF_CHECK(step.algorithm != NsAlgorithm::kGram,
              "muon_step: algorithm 'gram' needs a Hopper GPU, got CPU tensors; use 'auto'");
  const Tensor workspace = scratch_bytes(muon_step_workspace_cpu<X>(step), hyper);
  muon_step_cpu<G, M, X>(step, workspace.mutable_data_ptr(), num_threads());
}

#ifdef PGOLF_WITH_CUDA
template <typename G, typename M, typename X>
void run_cuda(const MuonStep& step, const Tensor& hyper) {
  const MuonPlan plan = muon_step_plan_cuda<X>(step);
  PGOLF_CHECK(step.algorithm != NsAlgorithm::kGram || plan.kernels != MuonKernels::kPortable,
              "muon_step: algorithm 'gram' needs a Hopper GPU and banks with sides that are multiples of 8; "
              "use 'auto'");
  const Tensor workspace = scratch_bytes(plan.workspace, hyper);
  muon_step_cuda<G, M, X>(step, plan, workspace.mutable_data_ptr(), current_stream());
}
#endif

// Target is MuonTarget or Ahead<MuonTarget>.
template <typename Target>
void run_apply(const std::vector<Target>& targets, ScalarType updates, const Tensor& hyper, bool cautious) {
  const int count = static_cast<int>(targets.size());
  const DeviceGuard guard(hyper);
  dispatch_state("updates", updates, [&](auto tag) {
    using X = decltype(tag);
#ifdef PGOLF_WITH_CUDA
    if (hyper.is_cuda()) {
      muon_apply_cuda<X>(targets.data(), count, const_pointer<float>(hyper), cautious, current_stream());
      return;
    }
#endif
    muon_apply_cpu<X>(targets.data(), count, const_pointer<float>(hyper), cautious, num_threads());
  });
}

void apply(TensorList params, TensorList updates, TensorList averages, TensorList bases,
           TensorList velocities, const Tensor& hyper, Doubles lr_scales, bool cautious) {
  const std::vector<MuonTarget> targets = check_targets(params, updates, averages, hyper, lr_scales);
  if (bases.empty() && velocities.empty()) {
    run_apply(targets, first_type(updates), hyper, cautious);
  } else {
    run_apply(check_ahead(targets, params, bases, velocities, hyper), first_type(updates), hyper, cautious);
  }
}

void step(TensorList params, TensorList grads, TensorList momenta, TensorList updates, TensorList averages,
          TensorList bases, TensorList velocities, const Tensor& hyper, Doubles lr_scales,
          Doubles coefficients, double eps, bool nesterov, bool lerp, bool row_normalize, bool cautious,
          int64_t algorithm) {
  check_hyper(hyper);
  const NsAlgorithm chosen = check_algorithm("muon_step", algorithm);
  const std::vector<MuonBank> banks = check_banks(grads, momenta, updates, hyper);
  const MuonStep step{.banks = banks.data(),
                      .count = static_cast<int>(banks.size()),
                      .hyper = const_pointer<float>(hyper),
                      .options = {.nesterov = nesterov, .lerp = lerp, .row_normalize = row_normalize},
                      .algorithm = chosen,
                      .iteration = check_iteration(coefficients, eps)};
  if (!params.empty()) {
    const auto targets = check_targets(params, updates, averages, hyper, lr_scales);
    if (!bases.empty() || !velocities.empty()) check_ahead(targets, params, bases, velocities, hyper);
  }
  const DeviceGuard guard(hyper);
  dispatch_states(grads, momenta, updates, [&](auto g, auto m, auto x) {
    using G = decltype(g);
    using M = decltype(m);
    using X = decltype(x);
#ifdef PGOLF_WITH_CUDA
    if (hyper.is_cuda()) return run_cuda<G, M, X>(step, hyper);
#endif
    run_cpu<G, M, X>(step, hyper);
  });
  if (!params.empty()) apply(params, updates, averages, bases, velocities, hyper, lr_scales, cautious);
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "muon_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] updates, "
      "Tensor(d!)[] averages, Tensor(e!)[] bases, Tensor(f!)[] velocities, Tensor hyper, float[] lr_scales, "
      "float[] coefficients, float eps, bool nesterov, bool lerp, bool row_normalize, bool cautious, "
      "int algorithm) -> ()");
  m.def(
      "muon_apply(Tensor(a!)[] params, Tensor[] updates, Tensor(b!)[] averages, Tensor(c!)[] bases, "
      "Tensor(d!)[] velocities, Tensor hyper, float[] lr_scales, bool cautious) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("muon_step", TORCH_BOX(&pgolf::step));
  m.impl("muon_apply", TORCH_BOX(&pgolf::apply));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("muon_step", TORCH_BOX(&pgolf::step));
  m.impl("muon_apply", TORCH_BOX(&pgolf::apply));
}
#endif
