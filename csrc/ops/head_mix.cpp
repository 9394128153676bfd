// Bindings of the CUDA kernels of head_mix, which pgolf/ops/head_mix.py makes an operator of. On the CPU that
// file computes with torch's own operators.
#include "kernels/head_mix.h"

#include <tuple>

#include "ops/checks.h"

namespace pgolf {

#ifdef PGOLF_WITH_CUDA
namespace {

HeadMixShape make_shape(const char* op, const Tensor& y, const Tensor& v) {
  PGOLF_CHECK_VALUE(y.dim() == 3 && v.dim() == 3, op, ": y must be (T, H, K) and v (T, G, K), got ",
                    y.sizes(), " and ", v.sizes());
  const int64_t sizes[] = {y.size(0), v.size(1), y.size(2)};
  const HeadMixShape shape{.tokens = y.size(0),
                           .heads = static_cast<int>(y.size(1)),
                           .groups = static_cast<int>(v.size(1)),
                           .width = static_cast<int>(y.size(2))};
  PGOLF_CHECK_VALUE(head_mix_supports(shape), op,
                    ": needs K 64 or 128, and H / G 1, 2 or 4, got H = ", shape.heads, ", G = ", shape.groups,
                    " and K = ", shape.width);
  check_tensor(op, "y", y, y.sizes(), kBFloat16, y);
  check_tensor(op, "v", v, sizes, kBFloat16, y);
  return shape;
}

// z as the kernels read it, alive until they are queued, and the gate.
struct Gate {
  std::optional<Tensor> z;
  HeadMixGate args{};
};

Gate make_gate(const char* op, const std::optional<Tensor>& z, double scale, int64_t kind, const Tensor& y) {
  PGOLF_CHECK_VALUE(kind >= 0 && kind <= 2, op, ": kind must be 0, 1 or 2, got ", kind);
  PGOLF_CHECK_VALUE(z.has_value() == (kind != 0), op,
                    ": z must be given with kind 1 and 2, and only then, got kind ", kind);
  if (!z) return {};
  const int64_t sizes[] = {y.size(0), y.size(1)};
  check_tensor(op, "z", *z, sizes, z->scalar_type(), y);
  const bool is_bf16 = check_is_bf16(op, "z", *z);
  Gate gate{.z = z->stride(1) == 1 ? *z : torch::stable::contiguous(*z)};
  gate.args = {.z = gate.z->const_data_ptr(),
               .stride = gate.z->stride(0),
               .is_bf16 = is_bf16,
               .inner = kind == 1 ? static_cast<float>(scale) : 1.0f,
               .outer = kind == 1 ? 1.0f : 2.0f};
  return gate;
}

Tensor forward(const Tensor& y, const Tensor& v, const std::optional<Tensor>& z, double scale, int64_t kind) {
  const char* op = "head_mix";
  const HeadMixShape shape = make_shape(op, y, v);
  const DeviceGuard guard(y);
  const Gate gate = make_gate(op, z, scale, kind, y);
  const Tensor dense = prepared(y);
  const Rows values = rows_in_place(v);
  const Tensor out = torch::stable::new_empty(y, {shape.tokens, shape.heads, shape.width});
  head_mix_cuda({.y = const_pointer<bf16>(dense),
                 .v = const_pointer<bf16>(values.tensor),
                 .v_stride = values.stride,
                 .gate = gate.args,
                 .out = mutable_pointer<bf16>(out)},
                shape, current_stream());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& y, const Tensor& v,
                                                    const std::optional<Tensor>& z, double scale,
                                                    int64_t kind) {
  const char* op = "head_mix_backward";
  const HeadMixShape shape = make_shape(op, y, v);
  const DeviceGuard guard(y);
  const Gate gate = make_gate(op, z, scale, kind, y);
  check_tensor(op, "grad", grad, y.sizes(), kBFloat16, y);
  const Tensor dense = prepared(y), upstream = prepared(grad);
  const Rows values = rows_in_place(v);
  const Tensor dy = torch::stable::new_empty(y, {shape.tokens, shape.heads, shape.width});
  const Tensor dv = torch::stable::new_empty(y, {shape.tokens, shape.groups, shape.width});
  const Tensor dz = gate.z ? torch::stable::new_empty(*gate.z, {shape.tokens, shape.heads})
                           : torch::stable::new_empty(y, {0});
  const Tensor delta = torch::stable::new_empty(y, {shape.heads, shape.tokens}, kFloat);
  head_mix_backward_cuda({.grad = const_pointer<bf16>(upstream),
                          .y = const_pointer<bf16>(dense),
                          .v = const_pointer<bf16>(values.tensor),
                          .v_stride = values.stride,
                          .gate = gate.args,
                          .dy = mutable_pointer<bf16>(dy),
                          .dv = mutable_pointer<bf16>(dv),
                          .dz = gate.z ? dz.mutable_data_ptr() : nullptr,
                          .delta = mutable_pointer<float>(delta)},
                         shape, current_stream());
  return {dy, dv, dz, delta};
}

}  // namespace
#endif
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("head_mix(Tensor y, Tensor v, Tensor? z, float scale, int kind) -> Tensor");
  m.def(
      "head_mix_backward(Tensor grad, Tensor y, Tensor v, Tensor? z, float scale, int kind) -> (Tensor dy, "
      "Tensor dv, Tensor dz, Tensor delta)");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("head_mix", TORCH_BOX(&pgolf::forward));
  m.impl("head_mix_backward", TORCH_BOX(&pgolf::backward));
}
#endif
