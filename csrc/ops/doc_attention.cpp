// Bindings of the Hopper kernels of doc_attention, which pgolf/ops/doc_attention.py makes an operator of. On
// the CPU that file computes with torch's own operators.
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

// What both directions read, alive until the kernels are queued.
struct Inputs {
  DocAttentionShape shape;
  Rows q, k, v;
  Tensor documents;
};

Inputs make_inputs(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& cu_seqlens, double scale) {
  PGOLF_CHECK_VALUE(q.dim() == 3 && k.dim() == 3, op, ": q must be (T, H, K) and k (T, G, K), got ",
                    q.sizes(), " and ", k.sizes());
  PGOLF_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0, op,
                    ": cu_seqlens must be (S + 1,), got ", cu_seqlens.sizes());
  PGOLF_CHECK_VALUE(scale > 0.0, op, ": scale must be positive, got ", scale);
  const int64_t heads = q.size(1), groups = k.size(1), of_k[] = {q.size(0), groups, kDocWidth};
  const DocAttentionShape shape{.tokens = q.size(0),
                                .heads = static_cast<int>(heads),
                                .groups = static_cast<int>(groups),
                                .segments = static_cast<int>(cu_seqlens.size(0) - 1),
                                .scale = static_cast<float>(scale)};
  PGOLF_CHECK_VALUE(q.size(2) == kDocWidth && doc_attention_supports(shape), op,
                    ": needs a Hopper GPU, K = ", kDocWidth, " and H / G 1, 2 or 4, got H = ", heads,
                    ", G = ", groups, " and K = ", q.size(2));
  check_tensor(op, "q", q, q.sizes(), kBFloat16, q);
  check_tensor(op, "k", k, of_k, kBFloat16, q);
  check_tensor(op, "v", v, of_k, kBFloat16, q);
  check_tensor(op, "cu_seqlens", cu_seqlens, cu_seqlens.sizes(), ScalarType::Int, q);
  PGOLF_CHECK_VALUE(shape.segments > 0 || shape.tokens == 0, op,
                    ": cu_seqlens must begin with 0 and end with T = ", shape.tokens, ", got one number");
  return {shape, rows_apart(q), rows_apart(k), rows_apart(v), torch::stable::contiguous(cu_seqlens)};
}

// Scratch for the list of tiles of `size` tokens.
Tensor make_plan(const Inputs& in, int size) {
  const int64_t tiles = doc_attention_max_tiles(in.shape, size) + 1,
                words = sizeof(DocTile) / sizeof(int32_t);
  return torch::stable::new_empty(in.documents, {tiles * words});
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& cu_seqlens, double scale) {
  const DeviceGuard guard(q);
  const Inputs in = make_inputs("doc_attention", q, k, v, cu_seqlens, scale);
  const DocAttentionShape& shape = in.shape;
  const Tensor y = torch::stable::new_empty(q, {shape.tokens, shape.heads, kDocWidth});
  const Tensor lse = torch::stable::new_empty(q, {shape.heads, shape.tokens}, kFloat);
  const Tensor plan = make_plan(in, doc_attention_queries(shape.heads / shape.groups));
  doc_attention_sm90({.q = const_pointer<bf16>(in.q.tensor),
                      .k = const_pointer<bf16>(in.k.tensor),
                      .v = const_pointer<bf16>(in.v.tensor),
                      .q_stride = in.q.stride,
                      .k_stride = in.k.stride,
                      .v_stride = in.v.stride,
                      .documents = const_pointer<int32_t>(in.documents),
                      .plan = mutable_pointer<DocTile>(plan),
                      .y = mutable_pointer<bf16>(y),
                      .lse = mutable_pointer<float>(lse)},
                     shape, current_stream());
  return {y, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const Tensor& y, const Tensor& lse,
                                            const Tensor& cu_seqlens, double scale,
                                            const std::optional<Tensor>& delta) {
  const char* op = "doc_attention_backward";
  const DeviceGuard guard(q);
  const Inputs in = make_inputs(op, q, k, v, cu_seqlens, scale);
  const DocAttentionShape& shape = in.shape;
  const int64_t per_query[] = {shape.heads, shape.tokens};
  check_tensor(op, "grad", grad, q.sizes(), kBFloat16, q);
  check_tensor(op, "y", y, q.sizes(), kBFloat16, q);
  check_tensor(op, "lse", lse, per_query, kFloat, q);
  if (delta) check_tensor(op, "delta", *delta, per_query, kFloat, q);

  const Rows upstream = rows_apart(grad);
  const Tensor out = prepared(y), sums = torch::stable::contiguous(lse), plan = make_plan(in, kDocKeys);
  const Tensor along = delta ? torch::stable::contiguous(*delta)
                             : torch::stable::new_empty(q, {shape.heads, shape.tokens}, kFloat);
  const Tensor filled = torch::stable::new_empty(in.documents, {doc_attention_flags(shape)});
  const Tensor dq = torch::stable::new_empty(q, {shape.tokens, shape.heads, kDocWidth}, kFloat);
  const Tensor dk = torch::stable::new_empty(q, {shape.tokens, shape.groups, kDocWidth});
  const Tensor dv = torch::stable::new_empty(q, {shape.tokens, shape.groups, kDocWidth});
  doc_attention_backward_sm90({.q = const_pointer<bf16>(in.q.tensor),
                               .k = const_pointer<bf16>(in.k.tensor),
                               .v = const_pointer<bf16>(in.v.tensor),
                               .grad = const_pointer<bf16>(upstream.tensor),
                               .q_stride = in.q.stride,
                               .k_stride = in.k.stride,
                               .v_stride = in.v.stride,
                               .grad_stride = upstream.stride,
                               .y = delta ? nullptr : const_pointer<bf16>(out),
                               .lse = const_pointer<float>(sums),
                               .documents = const_pointer<int32_t>(in.documents),
                               .delta = mutable_pointer<float>(along),
                               .plan = mutable_pointer<DocTile>(plan),
                               .filled = mutable_pointer<uint32_t>(filled),
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
      "doc_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> (Tensor y, Tensor "
      "lse)");
  m.def(
      "doc_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor "
      "cu_seqlens, float scale, Tensor? delta) -> (Tensor dq, Tensor dk, Tensor dv)");
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("doc_attention", TORCH_BOX(&pgolf::forward));
  m.impl("doc_attention_backward", TORCH_BOX(&pgolf::backward));
}
#endif
