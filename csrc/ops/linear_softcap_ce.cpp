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
  Tensor hidden;  // (rows, width)
  Tensor weight;  // (vocab, width), dtype of hidden
  Tensor target;  // (rows,)
  SoftcapCeShape shape;
};

// ---- products and elementwise operators of torch. Those that write into a tensor that is given: autocast
// has no rule for them, so that of the caller cannot change their dtypes.

Tensor transposed(const Tensor& matrix) { return torch::stable::transpose(matrix, 0, 1); }

void mm_out(const Tensor& out, const Tensor& left, const Tensor& right) {
  call_operator<Tensor>("aten::mm", "out", left, right, out);
}

// sum (float32) (+)= left right, accumulated in float32. Adding goes through an operator that Python
// registers (pgolf/ops/linear_softcap_ce.py): torch's own takes two numbers that the stable ABI does not
// convert.
void float_product(const Tensor& sum, const Tensor& left, const Tensor& right, bool first) {
  if (!first) {
    call_operator_void("pgolf::_add_product_", sum, left, right);
  } else if (left.is_cuda() && left.scalar_type() != kFloat) {
    call_operator<Tensor>("aten::mm", "dtype_out", left, right, kFloat, sum);
  } else {
    mm_out(sum, torch::stable::to(left, kFloat), torch::stable::to(right, kFloat));
  }
}

void multiply_(const Tensor& tensor, const Tensor& factor) {
  call_operator<Tensor>("aten::mul_", "Tensor", tensor, factor);
}

// A tensor of no dimensions on the CPU, which the operators take with tensors of every device.
template <typename T>
Tensor number(T value, ScalarType type) {
  const Tensor out = torch::stable::empty({}, type);
  *mutable_pointer<T>(out) = value;
  return out;
}

// "aten::eq" or "aten::ne" of a tensor and a number of its type.
template <typename T>
Tensor compare(const char* name, const Tensor& tensor, T value) {
  return call_operator<Tensor>(name, "Tensor", tensor, number(value, tensor.scalar_type()));
}

void check_matrices(const char* op, const Tensor& hidden, const Tensor& weight) {
  PGOLF_CHECK_VALUE(hidden.dim() == 2 && hidden.size(1) > 0, op,
                    ": hidden must be (rows, width) with width > 0, got ", hidden.sizes());
  PGOLF_CHECK_VALUE(weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == hidden.size(1), op,
                    ": weight must be (vocab, width)=(vocab > 0, ", hidden.size(1), "), got ",
                    weight.sizes());
  const ScalarType type = hidden.scalar_type();
  PGOLF_CHECK_TYPE(type == kFloat || type == kBFloat16 || type == kHalf, op,
                   ": hidden must be float32, bfloat16 or float16, got ", type);
  PGOLF_CHECK_TYPE(weight.scalar_type() == type || weight.scalar_type() == kFloat, op,
                   ": weight must be float32 or ", type, " as hidden is, got ", weight.scalar_type());
  PGOLF_CHECK_VALUE(weight.device() == hidden.device(), op, ": weight must be on ", hidden.device(),
                    " as hidden is, got ", weight.device());
}

Problem make_problem(const Tensor& hidden, const Tensor& weight, const Tensor& target,
                     const SoftcapCeOptions& options, bool check_targets) {
  const char* op = "linear_softcap_ce";
  check_matrices(op, hidden, weight);
  check_target_tensor(op, "hidden", hidden, target);
  const Tensor cast = torch::stable::to(weight, hidden.scalar_type());
  Problem problem{torch::stable::contiguous(hidden), torch::stable::contiguous(cast),
                  torch::stable::contiguous(target), options.shape(op, hidden.size(0), weight.size(0))};
  check_target_values(op, problem.target, problem.shape, check_targets);
  return problem;
}

Tensor empty_rows(const Tensor& like, int64_t rows) { return torch::stable::new_empty(like, {rows}, kFloat); }

#ifdef PGOLF_WITH_CUDA
LinearSoftcapCeShape hopper_shape(const Problem& problem) {
  const SoftcapCeShape& shape = problem.shape;
  return {.rows = shape.rows,
          .vocab = shape.vocab,
          .width = problem.hidden.size(1),
          .cap = shape.cap,
          .ignore_index = shape.ignore_index,
          .z_loss = shape.z_loss};
}

bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }
#endif

// Whether the Hopper kernels take the problem. Rows of a factor are 16-byte aligned for every eighth vocab.
bool use_hopper([[maybe_unused]] const Problem& problem, [[maybe_unused]] bool wants_factor) {
#ifdef PGOLF_WITH_CUDA
  return problem.hidden.is_cuda() && problem.hidden.scalar_type() == kBFloat16 && problem.shape.rows > 0 &&
         !std::isinf(problem.shape.cap) && (!wants_factor || problem.shape.vocab % 8 == 0) &&
         aligned(problem.hidden) && aligned(problem.weight) &&
         linear_softcap_ce_sm90_supports(hopper_shape(problem));
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
  return {rows_of(problem.hidden, begin, count), problem.weight, rows_of(problem.target, begin, count),
          shape};
}

// Calls body(chunk, begin, logits) with `logits` (chunk rows, vocab) for the chunk to use: a part of `kept`,
// or the same memory every time if that is undefined.
template <typename Body>
void for_chunks(const Problem& problem, int64_t rows_each, const Tensor& kept, const Body& body) {
  Tensor buffer;
  for (int64_t begin = 0; begin < problem.shape.rows; begin += rows_each) {
    const Problem chunk = slice(problem, begin, std::min(rows_each, problem.shape.rows - begin));
    if (!kept.defined() && !buffer.defined()) {
      buffer = torch::stable::new_empty(problem.hidden, {chunk.shape.rows, chunk.shape.vocab});
    }
    body(chunk, begin,
         kept.defined() ? rows_of(kept, begin, chunk.shape.rows) : rows_of(buffer, 0, chunk.shape.rows));
  }
}

void write_logits(const Problem& chunk, Tensor& logits) {
  mm_out(logits, chunk.hidden, transposed(chunk.weight));
}

// Writes the chunk's loss and overwrites `logits` by their gradient for grad_loss, one number or (rows,).
void write_factor(const Problem& chunk, const Tensor& grad_loss, Tensor& loss, Tensor& logits) {
  write_logits(chunk, logits);
  Tensor lse = empty_rows(loss, chunk.shape.rows);
  softcap_ce_gradient(logits, chunk.target, grad_loss, loss, lse, logits, chunk.shape);
}

#ifdef PGOLF_WITH_CUDA
// Writes loss and scale and, where `factor` is defined, the factor without its scale.
void write_hopper(const Problem& chunk, Tensor& loss, Tensor& scale, const Tensor& factor) {
  const LinearSoftcapCeShape shape = hopper_shape(chunk);
  const int64_t tiles = linear_softcap_ce_sm90_tiles(shape);
  const Tensor sums = torch::stable::new_empty(loss, {shape.rows, tiles});
  const Tensor target_logit = empty_rows(loss, shape.rows);
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
[[maybe_unused]] int64_t row_stride(const Tensor& grad_loss) {
  return grad_loss.dim() == 0 ? 0 : grad_loss.stride(0);
}

// Returns v (rows,), what multiplies the rows of the factor, for grad_loss, one number or (rows,), and writes
// v hidden where `scaled` is defined. Rows without a gradient (scale 0) stay without, whatever grad_loss is.
Tensor row_scale(const Tensor& grad_loss, const Tensor& scale, const Tensor& hidden, Tensor& scaled) {
#ifdef PGOLF_WITH_CUDA
  if (hidden.is_cuda() && hidden.scalar_type() == kBFloat16) {
    Tensor v = empty_rows(scale, scale.size(0));
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
  Tensor v = call_operator<Tensor>("aten::mul", "Tensor", grad_loss, scale);
  call_operator<Tensor>("aten::masked_fill_", "Tensor", v, compare("aten::eq", scale, 0.0f),
                        number(0.0f, kFloat));
  if (scaled.defined()) {
    call_operator<Tensor>("aten::mul", "out", hidden, torch::stable::unsqueeze(v, 1), scaled);
  }
  return v;
}

// product = v product, row by row.
void scale_rows(const Tensor& product, const Tensor& v) {
#ifdef PGOLF_WITH_CUDA
  if (product.is_cuda() && product.scalar_type() == kBFloat16) {
    linear_softcap_ce_scale_rows_cuda(mutable_pointer<bf16>(product), const_pointer<float>(v),
                                      product.size(0), product.size(1), current_stream());
    return;
  }
#endif
  multiply_(product, torch::stable::unsqueeze(v, 1));
}

// Writes v (factor weight) to `product` where that is defined, and v hidden to `scaled` where that is.
void hidden_product(const Tensor& grad_loss, const Tensor& scale, const Tensor& factor, const Tensor& weight,
                    const Tensor& hidden, const Tensor& product, Tensor& scaled) {
#ifdef PGOLF_WITH_CUDA
  // The kernel below needs no cap, ignored target or z-loss: those are in factor and scale.
  const LinearSoftcapCeShape shape{.rows = hidden.size(0),
                                   .vocab = weight.size(0),
                                   .width = hidden.size(1),
                                   .cap = 0.0f,
                                   .ignore_index = 0,
                                   .z_loss = 0.0f};
  if (product.defined() && hidden.is_cuda() && hidden.scalar_type() == kBFloat16 && factor.is_contiguous() &&
      aligned(factor) && aligned(weight) && aligned(hidden) && aligned(product) &&
      linear_softcap_ce_hidden_sm90_supports(shape)) {
    const Tensor w = torch::stable::contiguous(weight);
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
  const Tensor v = row_scale(grad_loss, scale, hidden, scaled);
  if (!product.defined()) return;
  Tensor out = product;
  mm_out(out, factor, weight);
  scale_rows(out, v);
}

// factor^T hidden, accumulated in float32, in `dtype`. Large products are written in it at once: then the
// library has no reason to split their k and to add parts that were rounded, and a float32 copy would cost
// a pass over memory.
Tensor weight_product(const Tensor& factor, const Tensor& hidden, ScalarType dtype) {
  constexpr int64_t kLarge = int64_t{1} << 24;  // elements: 512 tiles of 256 x 128
  const int64_t vocab = factor.size(1), width = hidden.size(1);
  if (dtype == hidden.scalar_type() && hidden.is_cuda() && vocab * width >= kLarge) {
    Tensor product = torch::stable::new_empty(hidden, {vocab, width});
    mm_out(product, transposed(factor), hidden);
    return product;
  }
  Tensor sum = torch::stable::new_empty(hidden, {vocab, width}, kFloat);
  float_product(sum, transposed(factor), hidden, true);
  return torch::stable::to(sum, dtype);
}

// Per-row losses; no logits are kept.
Tensor loss_only(const Problem& problem) {
  Tensor loss = empty_rows(problem.hidden, problem.shape.rows);
#ifdef PGOLF_WITH_CUDA
  if (use_hopper(problem, false)) {
    Tensor scale = empty_rows(loss, problem.shape.rows);
    write_hopper(problem, loss, scale, {});
    return loss;
  }
#endif
  Tensor lse = empty_rows(loss, problem.shape.rows);
  for_chunks(problem, chunk_rows(problem), {}, [&](const Problem& chunk, int64_t begin, Tensor logits) {
    write_logits(chunk, logits);
    Tensor part = rows_of(loss, begin, chunk.shape.rows);
    Tensor part_lse = rows_of(lse, begin, chunk.shape.rows);
    softcap_ce_forward(logits, chunk.target, part, part_lse, chunk.shape);
  });
  return loss;
}

struct Kept {
  Tensor loss;    // (rows,)
  Tensor factor;  // (rows, vocab)
  Tensor scale;   // (rows,)
};

Kept loss_and_factor(const Problem& problem) {
  const int64_t rows = problem.shape.rows;
  Tensor loss = empty_rows(problem.hidden, rows);
  const Tensor factor = torch::stable::new_empty(problem.hidden, {rows, problem.shape.vocab});
#ifdef PGOLF_WITH_CUDA
  if (use_hopper(problem, true)) {
    Tensor scale = empty_rows(loss, rows);
    write_hopper(problem, loss, scale, factor);
    return {loss, factor, scale};
  }
#endif
  const Tensor one = torch::stable::fill_(torch::stable::new_empty(loss, {}), 1.0);
  // On the CPU in chunks all the same: the loss then finds most of the logits in the cache.
  const int64_t rows_each = factor.is_cpu() ? chunk_rows(problem) : std::max<int64_t>(rows, 1);
  for_chunks(problem, rows_each, factor, [&](const Problem& chunk, int64_t begin, Tensor logits) {
    Tensor part = rows_of(loss, begin, chunk.shape.rows);
    write_factor(chunk, one, part, logits);
  });
  return {loss, factor,
          torch::stable::to(compare("aten::ne", problem.target, problem.shape.ignore_index), kFloat)};
}

// Where a sweep over chunks puts its gradients; undefined where not wanted.
struct Gradients {
  Tensor loss;         // (rows,)
  Tensor grad_hidden;  // (rows, width)
  Tensor grad_weight;  // (vocab, width) float32
};

void add_chunk(const Problem& chunk, int64_t begin, const Tensor& grad_loss, Tensor& factor, Gradients& out,
               [[maybe_unused]] bool hopper) {
  const int64_t count = chunk.shape.rows;
  Tensor loss = rows_of(out.loss, begin, count);
  Tensor scaled = chunk.hidden;
  Tensor part = out.grad_hidden.defined() ? rows_of(out.grad_hidden, begin, count) : Tensor();
  if (!hopper) {
    write_factor(chunk, grad_loss, loss, factor);
    if (part.defined()) mm_out(part, factor, chunk.weight);
  }
#ifdef PGOLF_WITH_CUDA
  if (hopper) {
    Tensor scale = empty_rows(loss, count);
    write_hopper(chunk, loss, scale, factor);
    scaled = out.grad_weight.defined() ? torch::stable::empty_like(chunk.hidden) : Tensor();
    hidden_product(grad_loss, scale, factor, chunk.weight, chunk.hidden, part, scaled);
  }
#endif
  if (out.grad_weight.defined()) float_product(out.grad_weight, transposed(factor), scaled, begin == 0);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& hidden, const Tensor& weight,
                                                   const Tensor& target, OptionalCap cap,
                                                   int64_t ignore_index, double z_loss, bool keep,
                                                   bool check_targets) {
  const DeviceGuard guard(hidden);
  const Problem problem = make_problem(hidden, weight, target, {cap, ignore_index, z_loss}, check_targets);
  const Tensor none = torch::stable::new_empty(hidden, {0});
  if (!keep) return {loss_only(problem), none, empty_rows(hidden, 0), torch::stable::new_empty(hidden, {0})};
  Kept kept = loss_and_factor(problem);
  const bool cast = weight.scalar_type() != hidden.scalar_type();
  return {kept.loss, kept.factor, kept.scale, cast ? problem.weight : none};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_loss, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& factor, const Tensor& scale, ScalarType weight_dtype,
                                    bool need_hidden, bool need_weight) {
  const char* op = "linear_softcap_ce_backward";
  check_matrices(op, hidden, weight);
  PGOLF_CHECK_TYPE(weight.scalar_type() == hidden.scalar_type(), op, ": weight must be ",
                   hidden.scalar_type(), " as hidden is, got ", weight.scalar_type());
  PGOLF_CHECK_VALUE(factor.dim() == 2 && factor.size(0) == hidden.size(0) &&
                        factor.size(1) == weight.size(0) && factor.scalar_type() == hidden.scalar_type(),
                    op, ": factor must be (rows, vocab)=(", hidden.size(0), ", ", weight.size(0), ") ",
                    hidden.scalar_type(), ", got ", factor.sizes(), " ", factor.scalar_type());
  PGOLF_CHECK_VALUE(
      same(grad_loss.sizes(), scale.sizes()) && scale.dim() == 1 && scale.size(0) == hidden.size(0), op,
      ": grad_loss and scale must be (rows,)=(", hidden.size(0), ",), got ", grad_loss.sizes(), " and ",
      scale.sizes());
  PGOLF_CHECK_TYPE(grad_loss.scalar_type() == kFloat && scale.scalar_type() == kFloat, op,
                   ": grad_loss and scale must be float32, got ", grad_loss.scalar_type(), " and ",
                   scale.scalar_type());
  for (const Tensor& other : {grad_loss, factor, scale}) {
    PGOLF_CHECK_VALUE(other.device() == hidden.device(), op, ": grad_loss, factor and scale must be on ",
                      hidden.device(), " as hidden is, got ", other.device());
  }
  const DeviceGuard guard(hidden);
  const Tensor x = torch::stable::contiguous(hidden);
  Tensor scaled = need_weight ? torch::stable::empty_like(x) : Tensor();
  const Tensor grad_hidden = need_hidden ? torch::stable::empty_like(x) : Tensor();
  hidden_product(grad_loss, scale, factor, weight, x, grad_hidden, scaled);
  return {need_hidden ? grad_hidden : torch::stable::new_empty(x, {0}),
          need_weight ? weight_product(factor, scaled, weight_dtype)
                      : torch::stable::new_empty(x, {0}, weight_dtype)};
}

// sum_i grad_loss_i loss_i and its gradients, in one sweep over chunks; grad_weight stays float32.
std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& grad_loss, const Tensor& hidden,
                                             const Tensor& weight, const Tensor& target, OptionalCap cap,
                                             int64_t ignore_index, double z_loss, bool need_hidden,
                                             bool need_weight, bool check_targets) {
  const DeviceGuard guard(hidden);
  const Problem problem = make_problem(hidden, weight, target, {cap, ignore_index, z_loss}, check_targets);
  const int64_t rows = problem.shape.rows;
  PGOLF_CHECK_VALUE(grad_loss.scalar_type() == kFloat && grad_loss.device() == hidden.device() &&
                        (grad_loss.dim() == 0 || (grad_loss.dim() == 1 && grad_loss.size(0) == rows)),
                    "linear_softcap_ce_gradients: grad_loss must be one float32 or (rows,)=(", rows, ",) on ",
                    hidden.device(), ", got ", grad_loss.sizes(), " ", grad_loss.scalar_type(), " on ",
                    grad_loss.device());
  const Tensor upstream = torch::stable::contiguous(grad_loss);
  Gradients out{empty_rows(hidden, rows), {}, {}};
  if (need_hidden) out.grad_hidden = torch::stable::empty_like(problem.hidden);
  if (need_weight) out.grad_weight = torch::stable::new_empty(hidden, problem.weight.sizes(), kFloat);
  if (need_weight && rows == 0) torch::stable::zero_(out.grad_weight);
  const bool hopper = use_hopper(problem, true);
  for_chunks(problem, chunk_rows(problem), {}, [&](const Problem& chunk, int64_t begin, Tensor factor) {
    const Tensor g = upstream.dim() == 0 ? upstream : rows_of(upstream, begin, chunk.shape.rows);
    add_chunk(chunk, begin, g, factor, out, hopper);
  });
  return {torch::stable::sum(call_operator<Tensor>("aten::mul", "Tensor", out.loss, upstream)),
          need_hidden ? out.grad_hidden : torch::stable::new_empty(hidden, {0}),
          need_weight ? out.grad_weight : torch::stable::new_empty(hidden, {0}, kFloat)};
}

}  // namespace
}  // namespace pgolf

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "linear_softcap_ce(Tensor hidden, Tensor weight, Tensor target, float? cap, int ignore_index, float "
      "z_loss, bool keep, bool check_targets) -> (Tensor loss, Tensor factor, Tensor scale, Tensor "
      "weight_cast)");
  m.def(
      "linear_softcap_ce_backward(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor factor, Tensor "
      "scale, ScalarType weight_dtype, bool need_hidden, bool need_weight) -> (Tensor grad_hidden, Tensor "
      "grad_weight)");
  m.def(
      "linear_softcap_ce_gradients(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor target, float? "
      "cap, int ignore_index, float z_loss, bool need_hidden, bool need_weight, bool check_targets) -> "
      "(Tensor loss, Tensor grad_hidden, Tensor grad_weight)");
}

STABLE_TORCH_LIBRARY_IMPL(pgolf, CPU, m) {
  m.impl("linear_softcap_ce", TORCH_BOX(&pgolf::forward));
  m.impl("linear_softcap_ce_backward", TORCH_BOX(&pgolf::backward));
  m.impl("linear_softcap_ce_gradients", TORCH_BOX(&pgolf::gradients));
}

#ifdef PGOLF_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pgolf, CUDA, m) {
  m.impl("linear_softcap_ce", TORCH_BOX(&pgolf::forward));
  m.impl("linear_softcap_ce_backward", TORCH_BOX(&pgolf::backward));
  m.impl("linear_softcap_ce_gradients", TORCH_BOX(&pgolf::gradients));
}
#endif
