// Bindings of the Hopper kernels of norm_mlp, which pgolf/ops/norm_mlp.py makes one operator of: three steps
// that exist on CUDA alone. Elsewhere that file computes with torch's own operators.
#include "kernels/norm_mlp.h"

#include <optional>
#include <tuple>

#include "ops/checks.h"

namespace pgolf {

#ifdef PGOLF_WITH_CUDA
namespace {

constexpr auto kInt = ScalarType::Int;
// Of float32, as the model's norm has it for every dtype.
constexpr float kEps = 1.1920929e-7f;

// Of rows (rows, width) and a matrix (hidden, width).
NormMlpShape make_shape(const char* op, const Tensor& rows, const Tensor& matrix, double slope) {
  PGOLF_CHECK_VALUE(rows.dim() == 2 && matrix.dim() == 2, op, ": the first two must be matrices, got ",
                    rows.sizes(), " and ", matrix.sizes());
  const NormMlpShape shape{.rows = rows.size(0),
                           .width = rows.size(1),
                           .hidden = matrix.size(0),
                           .slope = static_cast<float>(slope)};
  PGOLF_CHECK_VALUE(
      norm_mlp_sm90_supports(shape), op,
      ": needs a Hopper GPU, a width that is a multiple of 8 and at most 512, a hidden width that is "
      "a multiple of 128 and at least 512, and a slope in [0, 1], got width ",
      shape.width, ", hidden width ", shape.hidden, " and slope ", shape.slope);
  check_tensor(op, "the first", rows, rows.sizes(), kBFloat16, rows);
  const int64_t sizes[] = {shape.hidden, shape.width};
  check_tensor(op, "the second", matrix, sizes, kBFloat16, rows);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> up(const Tensor& x, const Tensor& up, double slope) {
  const DeviceGuard guard(x);
  const NormMlpShape shape = make_shape("norm_mlp_up", x, up, slope);
  const Tensor rows = prepared(x), matrix = prepared(up);
  Tensor act = torch::stable::new_empty(x, {shape.rows, shape.hidden});
  Tensor signs = torch::stable::new_empty(x, {norm_mlp_sign_words(shape)}, kInt);
  Tensor rho = torch::stable::new_empty(x, {shape.rows}, kFloat);
  norm_mlp_up_sm90({.x = const_pointer<bf16>(rows),
                    .up = const_pointer<bf16>(matrix),
                    .eps = kEps,
                    .rho = mutable_pointer<float>(rho),
                    .act = mutable_pointer<bf16>(act),
                    .signs = mutable_pointer<uint32_t>(signs)},
                   shape, current_stream());
  return {act, signs, rho};
}

std::tuple<Tensor, Tensor> dact(const Tensor& grad, const Tensor& down_t, const Tensor& act,
                                const Tensor& signs, const Tensor& rho, double slope) {
  const char* op = "norm_mlp_dact";
  const DeviceGuard guard(grad);
  const NormMlpShape shape = make_shape(op, grad, down_t, slope);
  const int64_t act_sizes[] = {shape.rows, shape.hidden}, sign_sizes[] = {norm_mlp_sign_words(shape)};
  const int64_t rho_sizes[] = {shape.rows};
  check_tensor(op, "act", act, act_sizes, kBFloat16, grad);
  check_tensor(op, "signs", signs, sign_sizes, kInt, grad);
  check_tensor(op, "rho", rho, rho_sizes, kFloat, grad);
  const Tensor rows = prepared(grad), matrix = prepared(down_t), a = prepared(act), bits = prepared(signs),
               factor = prepared(rho);
  Tensor e = torch::stable::new_empty(grad, {shape.rows, shape.hidden});
  Tensor partials = torch::stable::new_empty(grad, {shape.hidden / 128, shape.rows}, kFloat);
  norm_mlp_dact_sm90({.grad = const_pointer<bf16>(rows),
                      .down = const_pointer<bf16>(matrix),
                      .act = const_pointer<bf16>(a),
                      .signs = const_pointer<uint32_t>(bits),
                      .rho = const_pointer<float>(factor),
                      .e = mutable_pointer<bf16>(e),
                      .partials = mutable_pointer<float>(partials)},
                     shape, current_stream());
  return {e, partials};
}

Tensor sum(const Tensor& a, const Tensor& b, std::optional<Tensor> residual, std::optional<Tensor> x,
           std::optional<Tensor> rho, std::optional<Tensor> partials) {
  const char* op = "norm_mlp_sum";
  const DeviceGuard guard(a);
  PGOLF_CHECK_VALUE(a.dim() == 2 && b.dim() == 2, op, ": a and b must be matrices, got ", a.sizes(), " and ",
                    b.sizes());
  PGOLF_CHECK_VALUE(x.has_value() == rho.has_value() && x.has_value() == partials.has_value(), op,
                    ": x, rho and partials are given together or not at all");
  const NormMlpShape shape{.rows = a.size(0), .width = b.size(1), .hidden = b.size(0), .slope = 0.0f};
  PGOLF_CHECK_VALUE(norm_mlp_sm90_supports(shape), op, ": no kernel for b of ", b.sizes(), " on this GPU");
  const int64_t a_sizes[] = {shape.rows, shape.hidden}, sizes[] = {shape.rows, shape.width};
  const int64_t rho_sizes[] = {shape.rows}, partial_sizes[] = {shape.hidden / 128, shape.rows};
  check_tensor(op, "a", a, a_sizes, kBFloat16, a);
  check_tensor(op, "b", b, b.sizes(), kBFloat16, a);
  if (residual) check_tensor(op, "residual", *residual, sizes, kBFloat16, a);
  if (x) {
    check_tensor(op, "x", *x, sizes, kBFloat16, a);
    check_tensor(op, "rho", *rho, rho_sizes, kFloat, a);
    check_tensor(op, "partials", *partials, partial_sizes, kFloat, a);
  }
  // Alive until the kernels are queued.
  const Tensor left = prepared(a), right = prepared(b);
  if (residual) residual = prepared(*residual);
  if (x) x = prepared(*x), rho = prepared(*rho), partials = prepared(*partials);
  const Tensor rate = torch::stable::new_empty(a, {x ? shape.rows : 0}, kFloat);
  Tensor out = torch::stable::new_empty(a, {shape.rows, shape.width});
  norm_mlp_sum_sm90({.a = const_pointer<bf16>(left),
                     .b = const_pointer<bf16>(right),
                     .residual = residual ? const_pointer<bf16>(*residual) : nullptr,
                     .x = x ? const_pointer<bf16>(*x) : nullptr,
                     .rho = rho ? const_pointer<float>(*rho) : nullptr,
                     .partials = partials ? const_pointer<float>(*partials) : nullptr,
                     .rate = mutable_pointer<float>(rate),
                     .out = mutable_pointer<bf16>(out)},
                    shape, current_stream());
  return out;
}

}  // namespace
#endif
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("norm_mlp_up(Tensor x, Tensor up, float slope) -> (Tensor act, Tensor signs, Tensor rho)");
  m.def(
      "norm_mlp_dact(Tensor grad, Tensor down_t, Tensor act, Tensor signs, Tensor rho, float slope) -> "
      "(Tensor "
      "e, Tensor partials)");
  m.def(
      "norm_mlp_sum(Tensor a, Tensor b, Tensor? residual, Tensor? x, Tensor? rho, Tensor? partials) -> "
      "Tensor");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("norm_mlp_up", TORCH_BOX(&pgolf::up));
  m.impl("norm_mlp_dact", TORCH_BOX(&pgolf::dact));
  m.impl("norm_mlp_sum", TORCH_BOX(&pgolf::sum));
}
#endif
