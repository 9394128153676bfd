// Binding of the Hopper kernels of doc_attention_backward, which pgolf/ops/doc_attention.py makes an operator
// of. On the CPU that file computes with torch's own operators.
#include "kernels/doc_attention.h"

#include <tuple>

#include "ops/checks.h"

namespace pgolf {

#ifdef PGOLF_WITH_CUDA
namespace {

// As the copy engine reads it: no row begins before the end of the one before it, as with expanded tensors.
Rows rows_apart(const Tensor& tensor) {
  const Rows rows = rows_in_place(tensor);
  const int64_t width = tensor.size(1) * tensor.size(2);
  return rows.stride >= width ? rows : Rows{prepared(tensor), width};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& y, const Tensor& lse,
                                            const Tensor& cu_seqlens, double scale) {
  const char* op = "doc_attention_backward";
  PGOLF_CHECK_VALUE(q.dim() == 3 && k.dim() == 3, op, ": q must be (T, H, K) and k (T, G, K), got ",
                    q.sizes(), " and ", k.sizes());
  PGOLF_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op,
                    ": cu_seqlens must be (S + 1,), got ", cu_seqlens.sizes());
  const int64_t tokens = q.size(0), heads = q.size(1), groups = k.size(1), segments = cu_seqlens.size(0) - 1;
  const DocAttentionShape shape{.tokens = tokens,
                                .heads = static_cast<int>(heads),
                                .groups = static_cast<int>(groups),
                                .segments = static_cast<int>(segments),
                                .scale = static_cast<float>(scale)};
  PGOLF_CHECK_VALUE(q.size(2) == kDocWidth && doc_attention_backward_supports(shape), op,
                    ": needs a Hopper GPU, K = ", kDocWidth, " and H a multiple of G, got H = ", heads,
                    ", G = ", groups, " and K = ", q.size(2));
  const DeviceGuard guard(q);
  const int64_t of_k[] = {tokens, groups, kDocWidth}, of_lse[] = {heads, tokens};
  check_tensor(op, "q", q, q.sizes(), kBFloat16, q);
  check_tensor(op, "k", k, of_k, kBFloat16, q);
  check_tensor(op, "v", v, of_k, kBFloat16, q);
  check_tensor(op, "grad", grad, q.sizes(), kBFloat16, q);
  check_tensor(op, "y", y, q.sizes(), kBFloat16, q);
  check_tensor(op, "lse", lse, of_lse, kFloat, q);
  check_tensor(op, "cu_seqlens", cu_seqlens, cu_seqlens.sizes(), ScalarType::Int, q);

  const Rows queries = rows_apart(q), keys = rows_apart(k), values = rows_apart(v);
  const Rows upstream = rows_apart(grad);
  const Tensor out = prepared(y), sums = torch::stable::contiguous(lse);
  const Tensor starts = torch::stable::contiguous(cu_seqlens);
  const Tensor dq = torch::stable::new_empty(q, {tokens, heads, kDocWidth}, kFloat);
  const Tensor dk = torch::stable::new_empty(q, {tokens, groups, kDocWidth});
  const Tensor dv = torch::stable::new_empty(q, {tokens, groups, kDocWidth});
  const Tensor delta = torch::stable::new_empty(q, {heads, tokens}, kFloat);
  const Tensor plan =
      torch::stable::new_empty(cu_seqlens, {4 * (doc_attention_max_tiles(shape, kDocKeys) + 1)});
  doc_attention_backward_sm90({.q = const_pointer<bf16>(queries.tensor),
                               .k = const_pointer<bf16>(keys.tensor),
                               .v = const_pointer<bf16>(values.tensor),
                               .grad = const_pointer<bf16>(upstream.tensor),
                               .q_stride = queries.stride,
                               .k_stride = keys.stride,
                               .v_stride = values.stride,
                               .grad_stride = upstream.stride,
                               .y = const_pointer<bf16>(out),
                               .lse = const_pointer<float>(sums),
                               .documents = const_pointer<int32_t>(starts),
                               .delta = mutable_pointer<float>(delta),
                               .plan = mutable_pointer<DocTile>(plan),
                               .dq = mutable_pointer<float>(dq),
                               .dk = mutable_pointer<bf16>(dk),
                               .dv = mutable_pointer<bf16>(dv)},
                              shape, current_stream());
  return {dq, dk, dv};
}

}  // namespace
#endif
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "doc_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor "
      "cu_seqlens, float scale) -> (Tensor dq, Tensor dk, Tensor dv)");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) { m.impl("doc_attention_backward", TORCH_BOX(&pgolf::backward)); }
#endif
