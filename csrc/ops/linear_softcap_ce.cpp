// Binding of linear_softcap_ce: cross-entropy of capped logits = hidden weight^T, from hidden states.
//
// The generic path runs on any device: a matrix product writes the logits, softcap_ce works on them in place,
// and two more products make the gradients. On the Hopper path (kernels/linear_softcap_ce.h) the first
// product writes exp(z - cap) (1 - tanh^2) and its sums instead of logits, so nothing is read between the
// products. In both, `factor` is the gradient of the logits except for one number per row, `scale`, which
// multiplies the upstream gradient:
//   v_i = grad_loss_i scale_i      grad_hidden = v (factor weight)      grad_weight = factor^T (v hidden)
// Nothing here waits for the device.
#include "kernels/linear_softcap_ce.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "ops/softcap_ce.h"

namespace pgolf {
namespace {

using OptionalCap = std::optional<double>;

// How many bytes of logits exist at a time where they are not kept. On the CPU 8 MiB: starting the threads of
// a chunk costs less than its work. On a GPU 256 MiB: all three products run near their full speed. Chunks of
// fewer than 2048 rows would spend more time on adding to grad_weight in memory than on its product.
constexpr int64_t kCpuChunkBytes = int64_t{8} << 20;
constexpr int64_t kCpuMinRows = 64;
constexpr int64_t kGpuChunkBytes = int64_t{256} << 20;
constexpr int64_t kGpuMinRows = 2048;
constexpr int64_t kRowAlignment = 128;

// Inputs as the kernels want them.
struct Problem {
  at::Tensor hidden;  // (rows, width)
  at::Tensor weight;  // (vocab, width), dtype of hidden
  at::Tensor target;  // (rows,)
  SoftcapCeShape shape;
};

// The autocast and autograd keys of the caller must not reach the products inside.
struct OperatorScope {
  explicit OperatorScope(const at::Tensor& on) : device(on.device()) {}
  c10::OptionalDeviceGuard device;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::autocast_dispatch_keyset};
};

void check_matrices(const char* op, const at::Tensor& hidden, const at::Tensor& weight) {
  TORCH_CHECK_VALUE(hidden.dim() == 2 && hidden.size(1) > 0, op,
                    ": hidden must be (rows, width) with width > 0, got ", hidden.sizes());
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == hidden.size(1), op,
                    ": weight must be (vocab, width)=(vocab > 0, ", hidden.size(1), "), got ",
                    weight.sizes());
  const at::ScalarType type = hidden.scalar_type();
  TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, op,
                   ": hidden must be float32, bfloat16 or float16, got ", type);
  TORCH_CHECK_TYPE(weight.scalar_type() == type || weight.scalar_type() == at::kFloat, op,
                   ": weight must be float32 or ", type, " as hidden is, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(weight.device() == hidden.device(), op, ": weight must be on ", hidden.device(),
                    " as hidden is, got ", weight.device());
}

Problem make_problem(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& target,
                     const SoftcapCeOptions& options, bool check_targets) {
  const char* op = "linear_softcap_ce";
  check_matrices(op, hidden, weight);
  check_target_tensor(op, "hidden", hidden, target);
  Problem problem{hidden.contiguous(), weight.to(hidden.scalar_type()).contiguous(), target.contiguous(),
                  options.shape(op, hidden.size(0), weight.size(0))};
  check_target_values(op, problem.target, problem.shape, check_targets);
  return problem;
}

at::Tensor empty_rows(const at::Tensor& like, int64_t rows) {
  return at::empty({rows}, like.options().dtype(at::kFloat));
}

#ifdef PGOLF_WITH_CUDA
CUstream_st* current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

LinearSoftcapCeShape hopper_shape(const Problem& problem) {
  const SoftcapCeShape& shape = problem.shape;
  return {.rows = shape.rows,
          .vocab = shape.vocab,
          .width = problem.hidden.size(1),
          .cap = shape.cap,
          .ignore_index = shape.ignore_index,
          .z_loss = shape.z_loss};
}

bool aligned(const at::Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}
#endif

// Whether the Hopper kernels take the problem. Rows of a factor are 16-byte aligned for every eighth vocab.
bool use_hopper([[maybe_unused]] const Problem& problem, [[maybe_unused]] bool wants_factor) {
#ifdef PGOLF_WITH_CUDA
  return problem.hidden.is_cuda() && problem.hidden.scalar_type() == at::kBFloat16 &&
         problem.shape.rows > 0 && !std::isinf(problem.shape.cap) &&
         (!wants_factor || problem.shape.vocab % 8 == 0) && aligned(problem.hidden) &&
         aligned(problem.weight) && linear_softcap_ce_sm90_supports(hopper_shape(problem));
#else
  return false;
#endif
}

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Rows of a chunk, all chunks of about the same size.
int64_t chunk_rows(const Problem& problem) {
  const bool cpu = problem.hidden.is_cpu();
  const int64_t row_bytes = problem.shape.vocab * problem.hidden.element_size();
  const int64_t fitting = (cpu ? kCpuChunkBytes : kGpuChunkBytes) / row_bytes;
  const int64_t most = std::max(fitting, cpu ? kCpuMinRows : kGpuMinRows);
  const int64_t rows = problem.shape.rows;
  const int64_t chunks = std::max<int64_t>((rows + most - 1) / most, 1);
  const int64_t even = (rows + chunks - 1) / chunks;
  return std::clamp<int64_t>(cpu ? even : round_up(even, kRowAlignment), 1, std::max<int64_t>(rows, 1));
}

// Rows [begin, begin + count) of the problem.
Problem slice(const Problem& problem, int64_t begin, int64_t count) {
  SoftcapCeShape shape = problem.shape;
  shape.rows = count;
  return {problem.hidden.narrow(0, begin, count), problem.weight, problem.target.narrow(0, begin, count),
          shape};
}

// Calls body(chunk, begin, logits) with `logits` (chunk rows, vocab) for the chunk to use: a part of `kept`,
// or the same memory every time if that is undefined.
template <typename Body>
void for_chunks(const Problem& problem, int64_t rows_each, const at::Tensor& kept, const Body& body) {
  at::Tensor buffer;
  for (int64_t begin = 0; begin < problem.shape.rows; begin += rows_each) {
    const Problem chunk = slice(problem, begin, std::min(rows_each, problem.shape.rows - begin));
    if (!kept.defined() && !buffer.defined()) {
      buffer = at::empty({chunk.shape.rows, chunk.shape.vocab}, problem.hidden.options());
    }
    body(chunk, begin,
         kept.defined() ? kept.narrow(0, begin, chunk.shape.rows) : buffer.narrow(0, 0, chunk.shape.rows));
  }
}

void write_logits(const Problem& chunk, at::Tensor& logits) {
  at::mm_out(logits, chunk.hidden, chunk.weight.t());
}

// Writes the chunk's loss and overwrites `logits` by their gradient for grad_loss, one number or (rows,).
void write_factor(const Problem& chunk, const at::Tensor& grad_loss, at::Tensor& loss, at::Tensor& logits) {
  write_logits(chunk, logits);
  at::Tensor lse = empty_rows(loss, chunk.shape.rows);
  softcap_ce_gradient(logits, chunk.target, grad_loss, loss, lse, logits, chunk.shape);
}

#ifdef PGOLF_WITH_CUDA
// Writes loss and scale and, where `factor` is defined, the factor without its scale.
void write_hopper(const Problem& chunk, at::Tensor& loss, at::Tensor& scale, const at::Tensor& factor) {
  const LinearSoftcapCeShape shape = hopper_shape(chunk);
  const int64_t tiles = linear_softcap_ce_sm90_tiles(shape);
  const at::Tensor sums = at::empty({shape.rows, tiles}, loss.options());
  const at::Tensor target_logit = empty_rows(loss, shape.rows);
  bf16* stored = factor.defined() ? mutable_pointer<bf16>(factor) : nullptr;
  const int64_t stride = factor.defined() ? shape.vocab : round_up(shape.vocab, 8);
  linear_softcap_ce_forward_sm90({.hidden = const_pointer<bf16>(chunk.hidden),
                                  .weight = const_pointer<bf16>(chunk.weight),
                                  .target = const_pointer<int64_t>(chunk.target),
                                  .factor = stored,
                                  .factor_ld = stride,
                                  .partial_sums = mutable_pointer<float>(sums),
                                  .target_logit = mutable_pointer<float>(target_logit)},
                                 shape, current_stream());
  linear_softcap_ce_loss_cuda(const_pointer<float>(sums), tiles, const_pointer<float>(target_logit),
                              const_pointer<int64_t>(chunk.target), stored, stride,
                              mutable_pointer<float>(loss), mutable_pointer<float>(scale), shape,
                              current_stream());
}
#endif

// From one row's value to the next; 0 where all have one.
[[maybe_unused]] int64_t row_stride(const at::Tensor& grad_loss) {
  return grad_loss.dim() == 0 ? 0 : grad_loss.stride(0);
}

// Returns v (rows,), what multiplies the rows of the factor, for grad_loss, one number or (rows,), and writes
// v hidden where `scaled` is defined. Rows without a gradient (scale 0) stay without, whatever grad_loss is.
at::Tensor row_scale(const at::Tensor& grad_loss, const at::Tensor& scale, const at::Tensor& hidden,
                     at::Tensor& scaled) {
#ifdef PGOLF_WITH_CUDA
  if (hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16) {
    at::Tensor v = empty_rows(scale, scale.size(0));
    linear_softcap_ce_factor_cuda(
        {.grad_loss = const_pointer<float>(grad_loss),
         .grad_stride = row_stride(grad_loss),
         .scale = const_pointer<float>(scale),
         .hidden = const_pointer<bf16>(hidden),
         .row_scale = mutable_pointer<float>(v),
         .scaled_hidden = scaled.defined() ? mutable_pointer<bf16>(scaled) : nullptr},
        hidden.size(0), hidden.size(1), current_stream());
    return v;
  }
#endif
  at::Tensor v = grad_loss.mul(scale).masked_fill_(scale.eq(0), 0.0);
  if (scaled.defined()) at::mul_out(scaled, hidden, v.unsqueeze(1));
  return v;
}

// product = v product, row by row.
void scale_rows(const at::Tensor& product, const at::Tensor& v) {
#ifdef PGOLF_WITH_CUDA
  if (product.is_cuda() && product.scalar_type() == at::kBFloat16) {
    linear_softcap_ce_scale_rows_cuda(mutable_pointer<bf16>(product), const_pointer<float>(v),
                                      product.size(0), product.size(1), current_stream());
    return;
  }
#endif
  product.mul_(v.unsqueeze(1));
}

// Writes v (factor weight) to `product` where that is defined, and v hidden to `scaled` where that is.
void hidden_product(const at::Tensor& grad_loss, const at::Tensor& scale, const at::Tensor& factor,
                    const at::Tensor& weight, const at::Tensor& hidden, const at::Tensor& product,
                    at::Tensor& scaled) {
#ifdef PGOLF_WITH_CUDA
  // The kernel below needs no cap, ignored target or z-loss: those are in factor and scale.
  const LinearSoftcapCeShape shape{.rows = hidden.size(0),
                                   .vocab = weight.size(0),
                                   .width = hidden.size(1),
                                   .cap = 0.0f,
                                   .ignore_index = 0,
                                   .z_loss = 0.0f};
  if (product.defined() && hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16 &&
      factor.is_contiguous() && aligned(factor) && aligned(weight) && aligned(hidden) && aligned(product) &&
      linear_softcap_ce_hidden_sm90_supports(shape)) {
    const at::Tensor w = weight.contiguous();
    linear_softcap_ce_hidden_sm90(
        {.grad_loss = const_pointer<float>(grad_loss),
         .grad_stride = row_stride(grad_loss),
         .scale = const_pointer<float>(scale),
         .factor = const_pointer<bf16>(factor),
         .factor_ld = factor.size(1),
         .weight = const_pointer<bf16>(w),
         .hidden = const_pointer<bf16>(hidden),
         .product = mutable_pointer<bf16>(product),
         .scaled_hidden = scaled.defined() ? mutable_pointer<bf16>(scaled) : nullptr},
        shape, current_stream());
    return;
  }
#endif
  const at::Tensor v = row_scale(grad_loss, scale, hidden, scaled);
  if (!product.defined()) return;
  at::Tensor out = product;
  at::mm_out(out, factor, weight);
  scale_rows(out, v);
}

// sum (+)= factor^T hidden, with float32 `sum` and accumulation.
void add_weight_product(at::Tensor& sum, const at::Tensor& factor, const at::Tensor& hidden, bool first) {
  const int beta = first ? 0 : 1;
  const at::Tensor left = factor.t();
  if (hidden.scalar_type() == at::kFloat) {
    at::addmm_out(sum, sum, left, hidden, beta);
  } else if (hidden.is_cuda()) {
    at::addmm_out(sum, sum, left, hidden, at::kFloat, beta);
  } else {
    at::addmm_out(sum, sum, left.to(at::kFloat), hidden.to(at::kFloat), beta);
  }
}

// factor^T hidden, accumulated in float32, in `dtype`. Large products are written in it at once: then the
// library has no reason to split their k and to add parts that were rounded, and a float32 copy would cost
// a pass over memory.
at::Tensor weight_product(const at::Tensor& factor, const at::Tensor& hidden, at::ScalarType dtype) {
  constexpr int64_t kLarge = int64_t{1} << 24;  // elements: 512 tiles of 256 x 128
  const int64_t vocab = factor.size(1), width = hidden.size(1);
  if (dtype == hidden.scalar_type() && hidden.is_cuda() && vocab * width >= kLarge) {
    return at::mm(factor.t(), hidden);
  }
  at::Tensor sum = at::empty({vocab, width}, hidden.options().dtype(at::kFloat));
  add_weight_product(sum, factor, hidden, true);
  return sum.to(dtype);
}

// Per-row losses; no logits are kept.
at::Tensor loss_only(const Problem& problem) {
  at::Tensor loss = empty_rows(problem.hidden, problem.shape.rows);
#ifdef PGOLF_WITH_CUDA
  if (use_hopper(problem, false)) {
    at::Tensor scale = empty_rows(loss, problem.shape.rows);
    write_hopper(problem, loss, scale, {});
    return loss;
  }
#endif
  at::Tensor lse = empty_rows(loss, problem.shape.rows);
  for_chunks(problem, chunk_rows(problem), {}, [&](const Problem& chunk, int64_t begin, at::Tensor logits) {
    write_logits(chunk, logits);
    at::Tensor part = loss.narrow(0, begin, chunk.shape.rows);
    at::Tensor part_lse = lse.narrow(0, begin, chunk.shape.rows);
    softcap_ce_forward(logits, chunk.target, part, part_lse, chunk.shape);
  });
  return loss;
}

struct Kept {
  at::Tensor loss;    // (rows,)
  at::Tensor factor;  // (rows, vocab)
  at::Tensor scale;   // (rows,)
};

Kept loss_and_factor(const Problem& problem) {
  const int64_t rows = problem.shape.rows;
  at::Tensor loss = empty_rows(problem.hidden, rows);
  const at::Tensor factor = at::empty({rows, problem.shape.vocab}, problem.hidden.options());
#ifdef PGOLF_WITH_CUDA
  if (use_hopper(problem, true)) {
    at::Tensor scale = empty_rows(loss, rows);
    write_hopper(problem, loss, scale, factor);
    return {loss, factor, scale};
  }
#endif
  const at::Tensor one = at::ones({}, loss.options());
  // On the CPU in chunks all the same: the loss then finds most of the logits in the cache.
  const int64_t rows_each = factor.is_cpu() ? chunk_rows(problem) : std::max<int64_t>(rows, 1);
  for_chunks(problem, rows_each, factor, [&](const Problem& chunk, int64_t begin, at::Tensor logits) {
    at::Tensor part = loss.narrow(0, begin, chunk.shape.rows);
    write_factor(chunk, one, part, logits);
  });
  return {loss, factor, problem.target.ne(problem.shape.ignore_index).to(at::kFloat)};
}

// Where a sweep over chunks puts its gradients; undefined where not wanted.
struct Gradients {
  at::Tensor loss;         // (rows,)
  at::Tensor grad_hidden;  // (rows, width)
  at::Tensor grad_weight;  // (vocab, width) float32
};

void add_chunk(const Problem& chunk, int64_t begin, const at::Tensor& grad_loss, at::Tensor& factor,
               Gradients& out, [[maybe_unused]] bool hopper) {
  const int64_t count = chunk.shape.rows;
  at::Tensor loss = out.loss.narrow(0, begin, count);
  at::Tensor scaled = chunk.hidden;
  at::Tensor part = out.grad_hidden.defined() ? out.grad_hidden.narrow(0, begin, count) : at::Tensor();
  if (!hopper) {
    write_factor(chunk, grad_loss, loss, factor);
    if (part.defined()) at::mm_out(part, factor, chunk.weight);
  }
#ifdef PGOLF_WITH_CUDA
  if (hopper) {
    at::Tensor scale = empty_rows(loss, count);
    write_hopper(chunk, loss, scale, factor);
    scaled = out.grad_weight.defined() ? at::empty_like(chunk.hidden) : at::Tensor();
    hidden_product(grad_loss, scale, factor, chunk.weight, chunk.hidden, part, scaled);
  }
#endif
  if (out.grad_weight.defined()) add_weight_product(out.grad_weight, factor, scaled, begin == 0);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& hidden,
                                                                   const at::Tensor& weight,
                                                                   const at::Tensor& target, OptionalCap cap,
                                                                   int64_t ignore_index, double z_loss,
                                                                   bool keep, bool check_targets) {
  const OperatorScope scope(hidden);
  const Problem problem = make_problem(hidden, weight, target, {cap, ignore_index, z_loss}, check_targets);
  const auto options = problem.hidden.options();
  const at::Tensor none = at::empty({0}, options);
  if (!keep) return {loss_only(problem), none, empty_rows(hidden, 0), at::empty({0}, options)};
  Kept kept = loss_and_factor(problem);
  const bool cast = weight.scalar_type() != hidden.scalar_type();
  return {kept.loss, kept.factor, kept.scale, cast ? problem.weight : none};
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_loss, const at::Tensor& hidden,
                                            const at::Tensor& weight, const at::Tensor& factor,
                                            const at::Tensor& scale, at::ScalarType weight_dtype,
                                            bool need_hidden, bool need_weight) {
  const char* op = "linear_softcap_ce_backward";
  check_matrices(op, hidden, weight);
  TORCH_CHECK_TYPE(weight.scalar_type() == hidden.scalar_type(), op, ": weight must be ",
                   hidden.scalar_type(), " as hidden is, got ", weight.scalar_type());
  TORCH_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == hidden.size(0) &&
                        factor.size(1) == weight.size(0) && factor.scalar_type() == hidden.scalar_type(),
                    op, ": factor must be (rows, vocab)=(", hidden.size(0), ", ", weight.size(0), ") ",
                    hidden.scalar_type(), ", got ", factor.sizes(), " ", factor.scalar_type());
  TORCH_CHECK_VALUE(grad_loss.sizes() == scale.sizes() && scale.dim() == 1 && scale.size(0) == hidden.size(0),
                    op, ": grad_loss and scale must be (rows,)=(", hidden.size(0), ",), got ",
                    grad_loss.sizes(), " and ", scale.sizes());
  TORCH_CHECK_TYPE(grad_loss.scalar_type() == at::kFloat && scale.scalar_type() == at::kFloat, op,
                   ": grad_loss and scale must be float32, got ", grad_loss.scalar_type(), " and ",
                   scale.scalar_type());
  for (const at::Tensor& other : {grad_loss, factor, scale}) {
    TORCH_CHECK_VALUE(other.device() == hidden.device(), op, ": grad_loss, factor and scale must be on ",
                      hidden.device(), " as hidden is, got ", other.device());
  }
  const OperatorScope scope(hidden);
  const at::Tensor x = hidden.contiguous();
  at::Tensor scaled = need_weight ? at::empty_like(x) : at::Tensor();
  const at::Tensor grad_hidden = need_hidden ? at::empty_like(x) : at::Tensor();
  hidden_product(grad_loss, scale, factor, weight, x, grad_hidden, scaled);
  return {need_hidden ? grad_hidden : at::empty({0}, x.options()),
          need_weight ? weight_product(factor, scaled, weight_dtype)
                      : at::empty({0}, x.options().dtype(weight_dtype))};
}

// sum_i grad_loss_i loss_i and its gradients, in one sweep over chunks; grad_weight stays float32.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients(const at::Tensor& grad_loss,
                                                         const at::Tensor& hidden, const at::Tensor& weight,
                                                         const at::Tensor& target, OptionalCap cap,
                                                         int64_t ignore_index, double z_loss,
                                                         bool need_hidden, bool need_weight,
                                                         bool check_targets) {
  const OperatorScope scope(hidden);
  const Problem problem = make_problem(hidden, weight, target, {cap, ignore_index, z_loss}, check_targets);
  const int64_t rows = problem.shape.rows;
  TORCH_CHECK_VALUE(grad_loss.scalar_type() == at::kFloat && grad_loss.device() == hidden.device() &&
                        (grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == rows)),
                    "linear_softcap_ce_gradients: grad_loss must be one float32 or (rows,)=(", rows, ",) on ",
                    hidden.device(), ", got ", grad_loss.sizes(), " ", grad_loss.scalar_type(), " on ",
                    grad_loss.device());
  const at::Tensor upstream = grad_loss.contiguous();
  const auto float_options = problem.hidden.options().dtype(at::kFloat);
  Gradients out{empty_rows(hidden, rows), {}, {}};
  if (need_hidden) out.grad_hidden = at::empty_like(problem.hidden);
  if (need_weight) out.grad_weight = at::empty(problem.weight.sizes(), float_options);
  if (need_weight && rows == 0) out.grad_weight.zero_();
  const bool hopper = use_hopper(problem, true);
  for_chunks(problem, chunk_rows(problem), {}, [&](const Problem& chunk, int64_t begin, at::Tensor factor) {
    const at::Tensor g = upstream.dim() == 0 ? upstream : upstream.narrow(0, begin, chunk.shape.rows);
    add_chunk(chunk, begin, g, factor, out, hopper);
  });
  return {out.loss.mul(upstream).sum(), need_hidden ? out.grad_hidden : at::empty({0}, hidden.options()),
          need_weight ? out.grad_weight : at::empty({0}, float_options)};
}

}  // namespace
}  // namespace pgolf

TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "linear_softcap_ce(Tensor hidden, Tensor weight, Tensor target, float? cap, int ignore_index, float "
      "z_loss, bool keep, bool check_targets) -> (Tensor loss, Tensor factor, Tensor scale, Tensor "
      "weight_cast)",
      tags);
  m.def(
      "linear_softcap_ce_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor factor, Tensor "
      "scale, ScalarType weight_dtype, bool need_hidden, bool need_weight) -> (Tensor grad_hidden, Tensor "
      "grad_weight)",
      tags);
  m.def(
      "linear_softcap_ce_gradients(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor target, float? "
      "cap, int ignore_index, float z_loss, bool need_hidden, bool need_weight, bool check_targets) -> "
      "(Tensor loss, Tensor grad_hidden, Tensor grad_weight)",
      tags);
}

TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("linear_softcap_ce", &pgolf::forward);
  m.impl("linear_softcap_ce_backward", &pgolf::backward);
  m.impl("linear_softcap_ce_gradients", &pgolf::gradients);
}

#ifdef PGOLF_WITH_CUDA
TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("linear_softcap_ce", &pgolf::forward);
  m.impl("linear_softcap_ce_backward", &pgolf::backward);
  m.impl("linear_softcap_ce_gradients", &pgolf::gradients);
}
#endif
