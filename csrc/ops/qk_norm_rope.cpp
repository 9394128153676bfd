// Bindings of the CUDA kernels of qk_norm_rope, which pgolf/ops/qk_norm_rope.py makes an operator of. On the
// CPU that file computes with torch's own operators.
#include "kernels/qk_norm_rope.h"

#include <tuple>
#include <vector>

#include "ops/checks.h"

namespace pgolf {

#ifdef PGOLF_WITH_CUDA
namespace {

// Of float32, as the model's norm has it for every dtype.
constexpr float kEps = 1.1920929e-7f;

// Half of the rotated columns.
int64_t half_of(const Tensor& table) { return table.dim() == 0 ? 0 : table.size(table.dim() - 1); }

QkNormRopeShape make_shape(const char* op, const Tensor& qkv, const Tensor& gain, const Tensor& cos,
                           int64_t head_dim) {
  PGOLF_CHECK_VALUE(qkv.dim() == 2 && gain.dim() == 1 && head_dim > 0, op,
                    ": qkv must be (T, (H + 2G) K), gain (H,) and head_dim positive, got ", qkv.sizes(), ", ",
                    gain.sizes(), " and ", head_dim);
  const int64_t heads = gain.size(0), groups = (qkv.size(1) / head_dim - heads) / 2;
  const QkNormRopeShape shape{.tokens = qkv.size(0),
                              .heads = static_cast<int>(heads),
                              .groups = static_cast<int>(groups),
                              .width = static_cast<int>(head_dim),
                              .dims = static_cast<int>(2 * half_of(cos))};
  PGOLF_CHECK_VALUE(
      qk_norm_rope_supports(shape) && (heads + 2 * groups) * head_dim == qkv.size(1), op,
      ": needs (H + 2G) K columns, K 64 or 128, H / G 1, 2 or 4, and R up to K, got H = ", heads,
      ", G = ", groups, ", K = ", head_dim, " and R = ", shape.dims, " for ", qkv.size(1), " columns");
  check_tensor(op, "qkv", qkv, qkv.sizes(), kBFloat16, qkv);
  check_tensor(op, "gain", gain, gain.sizes(), gain.scalar_type(), qkv);
  return shape;
}

Tensor check_table(const char* op, const char* name, const Tensor& table, const QkNormRopeShape& shape,
                   const Tensor& qkv) {
  const int64_t half = shape.dims / 2, flat[] = {shape.tokens, half}, deep[] = {shape.tokens, 1, half};
  PGOLF_CHECK_VALUE(same(table.sizes(), flat) || same(table.sizes(), deep), op, ": ", name, " must be (",
                    shape.tokens, ", R/2) or (", shape.tokens, ", 1, R/2) with R = ", shape.dims, ", got ",
                    table.sizes());
  check_tensor(op, name, table, table.sizes(), kFloat, qkv);
  return prepared(table);
}

// The input as the kernels read it, alive until they are queued.
struct Input {
  Rows qkv;
  Tensor gain, cos, sin;
  QkNormRopeInput args;
};

Input make_input(const char* op, const QkNormRopeShape& shape, const Tensor& qkv, const Tensor& gain,
                 const Tensor& cos, const Tensor& sin) {
  const bool gain_is_bf16 = check_is_bf16(op, "gain", gain);
  Input in{.qkv = rows_in_place(qkv),
           .gain = torch::stable::contiguous(gain),
           .cos = check_table(op, "cos", cos, shape, qkv),
           .sin = check_table(op, "sin", sin, shape, qkv),
           .args = {}};
  in.args = {.qkv = const_pointer<bf16>(in.qkv.tensor),
             .stride = in.qkv.stride,
             .gain = in.gain.const_data_ptr(),
             .gain_is_bf16 = gain_is_bf16,
             .cos = const_pointer<float>(in.cos),
             .sin = const_pointer<float>(in.sin),
             .eps = kEps};
  return in;
}

std::tuple<Tensor, Tensor> forward(const Tensor& qkv, const Tensor& gain, const Tensor& cos,
                                   const Tensor& sin, int64_t head_dim) {
  const char* op = "qk_norm_rope";
  const QkNormRopeShape shape = make_shape(op, qkv, gain, cos, head_dim);
  const DeviceGuard guard(qkv);
  const Input in = make_input(op, shape, qkv, gain, cos, sin);
  const Tensor q = torch::stable::new_empty(qkv, {shape.tokens, shape.heads, head_dim});
  const Tensor k = torch::stable::new_empty(qkv, {shape.tokens, shape.groups, head_dim});
  qk_norm_rope_cuda({.in = in.args, .q = mutable_pointer<bf16>(q), .k = mutable_pointer<bf16>(k)}, shape,
                    current_stream());
  return {q, k};
}

std::tuple<Tensor, Tensor> backward(const Tensor& dq, const Tensor& dk, TensorList dv, const Tensor& qkv,
                                    const Tensor& gain, const Tensor& cos, const Tensor& sin,
                                    int64_t head_dim) {
  const char* op = "qk_norm_rope_backward";
  const QkNormRopeShape shape = make_shape(op, qkv, gain, cos, head_dim);
  const DeviceGuard guard(qkv);
  const Input in = make_input(op, shape, qkv, gain, cos, sin);
  const int64_t of_q[] = {shape.tokens, shape.heads, head_dim};
  const int64_t of_k[] = {shape.tokens, shape.groups, head_dim};
  PGOLF_CHECK_VALUE(dv.size() <= kRopeValueGrads, op, ": dv must be at most ", kRopeValueGrads,
                    " tensors, got ", dv.size());
  check_tensor(op, "dq", dq, of_q, dq.scalar_type(), qkv);
  const bool dq_is_bf16 = check_is_bf16(op, "dq", dq);
  check_tensor(op, "dk", dk, of_k, kBFloat16, qkv);
  std::vector<Tensor> grads{prepared(dq), prepared(dk)};
  for (const Tensor& grad : dv) {
    check_tensor(op, "dv", grad, of_k, kBFloat16, qkv);
    grads.push_back(prepared(grad));
  }
  const Tensor dqkv = torch::stable::new_empty(qkv, {shape.tokens, qkv.size(1)});
  const Tensor dgain = torch::stable::new_empty(qkv, {shape.heads}, kFloat);
  const Tensor partials = torch::stable::new_empty(qkv, {kRopePartials, shape.heads}, kFloat);
  QkNormRopeBackward args{.in = in.args,
                          .dq = grads[0].const_data_ptr(),
                          .dq_is_bf16 = dq_is_bf16,
                          .dk = const_pointer<bf16>(grads[1]),
                          .dv = {},
                          .dqkv = mutable_pointer<bf16>(dqkv),
                          .partials = mutable_pointer<float>(partials),
                          .dgain = mutable_pointer<float>(dgain)};
  for (size_t i = 2; i < grads.size(); ++i) args.dv[i - 2] = const_pointer<bf16>(grads[i]);
  qk_norm_rope_backward_cuda(args, shape, current_stream());
  return {dqkv, dgain};
}

}  // namespace
#endif
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "qk_norm_rope(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int head_dim) -> (Tensor q, Tensor k)");
  m.def(
      "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor[] dv, Tensor qkv, Tensor gain, Tensor cos, Tensor "
      "sin, int head_dim) -> (Tensor dqkv, Tensor dgain)");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("qk_norm_rope", TORCH_BOX(&pgolf::forward));
  m.impl("qk_norm_rope_backward", TORCH_BOX(&pgolf::backward));
}
#endif
