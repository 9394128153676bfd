// Binding of the Hopper kernel of qkv_rope, which pgolf/ops/qkv_rope.py makes an operator of. On the CPU that
// file computes with torch's own operators.
#include "kernels/qkv_rope.h"

#include <tuple>

#include "ops/checks.h"

namespace pgolf {

#ifdef PGOLF_WITH_CUDA
namespace {

// Of float32, as the model's norm has it for every dtype.
constexpr float kEps = 1.1920929e-7f;

Tensor check_table(const char* name, const Tensor& table, const QkvRopeShape& shape, const Tensor& n) {
  const int64_t half = shape.dims / 2, flat[] = {shape.tokens, half}, deep[] = {shape.tokens, 1, half};
  PGOLF_CHECK_VALUE(same(table.sizes(), flat) || same(table.sizes(), deep), "qkv_rope: ", name, " must be (",
                    shape.tokens, ", R/2) or (", shape.tokens, ", 1, R/2) with R = ", shape.dims, ", got ",
                    table.sizes());
  check_tensor("qkv_rope", name, table, table.sizes(), kFloat, n);
  return prepared(table);
}

QkvRopeShape make_shape(const Tensor& n, const Tensor& weight, const Tensor& gain, const Tensor& cos,
                        int64_t head_dim) {
  const char* op = "qkv_rope";
  PGOLF_CHECK_VALUE(n.dim() == 2 && weight.dim() == 2 && gain.dim() == 1 && head_dim > 0, op,
                    ": n must be (T, D), weight ((H + 2G) K, D), gain (H,) and head_dim positive, got ",
                    n.sizes(), ", ", weight.sizes(), ", ", gain.sizes(), " and ", head_dim);
  const int64_t columns = weight.size(0), heads = gain.size(0), groups = (columns / head_dim - heads) / 2;
  const int64_t half = cos.dim() == 0 ? 0 : cos.size(cos.dim() - 1);
  const QkvRopeShape shape{.tokens = n.size(0),
                           .depth = n.size(1),
                           .heads = static_cast<int>(heads),
                           .groups = static_cast<int>(groups),
                           .width = static_cast<int>(head_dim),
                           .dims = static_cast<int>(2 * half)};
  PGOLF_CHECK_VALUE(qkv_rope_sm90_supports(shape) && (heads + 2 * groups) * head_dim == columns, op,
                    ": needs a Hopper GPU, D a multiple of 8 and at most 512, K = 64, even H and G with H + "
                    "2G at least 8, and R 0 or 16, got D = ",
                    shape.depth, ", K = ", head_dim, ", H = ", heads, ", G = ", groups,
                    " and R = ", shape.dims, " for ", columns, " rows of weight");
  const int64_t weight_sizes[] = {columns, shape.depth};
  check_tensor(op, "n", n, n.sizes(), kBFloat16, n);
  check_tensor(op, "weight", weight, weight_sizes, kBFloat16, n);
  check_tensor(op, "gain", gain, gain.sizes(), gain.scalar_type(), n);
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> product(const Tensor& n, const Tensor& weight, const Tensor& gain,
                                           const Tensor& cos, const Tensor& sin, int64_t head_dim) {
  const DeviceGuard guard(n);
  const QkvRopeShape shape = make_shape(n, weight, gain, cos, head_dim);
  const bool gain_is_bf16 = check_is_bf16("qkv_rope", "gain", gain);
  // Alive until the kernel is queued.
  const Tensor rows = prepared(n), matrix = prepared(weight), factor = prepared(gain);
  const Tensor cosines = check_table("cos", cos, shape, n), sines = check_table("sin", sin, shape, n);
  const Tensor qkv = torch::stable::new_empty(n, {shape.tokens, weight.size(0)});
  const Tensor q = torch::stable::new_empty(n, {shape.tokens, shape.heads, head_dim});
  const Tensor k = torch::stable::new_empty(n, {shape.tokens, shape.groups, head_dim});
  qkv_rope_sm90({.n = const_pointer<bf16>(rows),
                 .weight = const_pointer<bf16>(matrix),
                 .gain = factor.const_data_ptr(),
                 .gain_is_bf16 = gain_is_bf16,
                 .cos = const_pointer<float>(cosines),
                 .sin = const_pointer<float>(sines),
                 .eps = kEps,
                 .qkv = mutable_pointer<bf16>(qkv),
                 .q = mutable_pointer<bf16>(q),
                 .k = mutable_pointer<bf16>(k)},
                shape, current_stream());
  return {qkv, q, k};
}

}  // namespace
#endif
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "qkv_rope(Tensor n, Tensor weight, Tensor gain, Tensor cos, Tensor sin, int head_dim) -> (Tensor qkv, "
      "Tensor q, Tensor k)");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) { m.impl("qkv_rope", TORCH_BOX(&pgolf::product)); }
#endif
