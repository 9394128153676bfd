// Cross-entropy of tanh-capped logits from hidden states, per row, in nats; the logits are never stored.
//
//   x = hidden weight^T   t = tanh(x / cap)   z = cap t   lse = logsumexp(z)
//   loss = lse - z[target] + z_loss lse^2
//
// Because |z| <= cap, exp(z - cap) needs no row maximum. The product's epilogue stores the factor
//   F = exp(z - cap) (1 - t^2)            bf16, in place of the logits
// and with S = sum exp(z - cap), w = 1 + 2 z_loss lse, scale = w / S and v = grad_loss scale per row, the
// gradients are products of stored matrices, once F of the target is replaced by
// S ((p - 1) + (w - 1) / w) (1 - t^2):
//   grad_hidden = v (F weight)            v scales rows
//   grad_weight = F^T (v hidden)
//
// Order of calls: forward, loss; then, when grad_loss is known, factor, the two products, scale_rows, or
// hidden (which does all of these except for grad_weight) and the other product; none of these changes F.
// Deterministic. Rows whose target is ignore_index: loss, scale, F and v are 0. NaN in a row makes its loss
// NaN. Targets outside [0, vocab): loss, scale and v are NaN.
#pragma once

#include "kernels/common.h"

namespace pgolf {

struct LinearSoftcapCeShape {
  int64_t rows;
  int64_t vocab;
  int64_t width;
  float cap;  // > 0
  int64_t ignore_index;
  float z_loss;  // >= 0
};

struct LinearSoftcapCeForward {
  const bf16* hidden;     // (rows, width) row-major, 16-byte aligned
  const bf16* weight;     // (vocab, width) row-major, 16-byte aligned
  const int64_t* target;  // (rows,)
  bf16* factor;           // (rows, factor_ld) out, 16-byte aligned; null: forward only, never written
  int64_t factor_ld;      // elements, >= vocab, a multiple of 8; columns past vocab become 0
  float* partial_sums;    // (rows, tiles) out: sums of exp(z - cap) over all columns but the target
  float* target_logit;    // (rows,) out: x[target], before the cap; 0 where ignored
};

// Whether the current device and this shape can run the Hopper kernel: compute capability 9.0, width a
// multiple of 8, 1e-6 <= cap <= 40 (exp(-2 cap) must be a normal float32).
bool linear_softcap_ce_sm90_supports(const LinearSoftcapCeShape& shape);

// Partial sums per row.
int64_t linear_softcap_ce_sm90_tiles(const LinearSoftcapCeShape& shape);

void linear_softcap_ce_forward_sm90(const LinearSoftcapCeForward& args, const LinearSoftcapCeShape& shape,
                                    CUstream_st* stream);

// Sums the partial sums in a fixed order and replaces the target's F. Any GPU.
void linear_softcap_ce_loss_cuda(const float* partial_sums,  // (rows, tiles)
                                 int64_t tiles,
                                 const float* target_logit,  // (rows,)
                                 const int64_t* target,      // (rows,)
                                 bf16* factor,       // (rows, factor_ld) in and out, or null: no gradient
                                 int64_t factor_ld,  // elements
                                 float* loss,        // (rows,) out
                                 float* scale,       // (rows,) out
                                 const LinearSoftcapCeShape& shape, CUstream_st* stream);

struct LinearSoftcapCeFactor {
  const float* grad_loss;  // (rows,) with grad_stride
  int64_t grad_stride;     // elements; 0: the same for all rows
  const float* scale;      // (rows,) from loss; where it is 0, v is 0 whatever grad_loss is
  const bf16* hidden;      // (rows, width) row-major
  float* row_scale;        // (rows,) out: v
  bf16* scaled_hidden;     // (rows, width) row-major out: v hidden; null: not wanted
};

void linear_softcap_ce_factor_cuda(const LinearSoftcapCeFactor& args, int64_t rows, int64_t width,
                                   CUstream_st* stream);

struct LinearSoftcapCeHidden {
  const float* grad_loss;  // (rows,) with grad_stride
  int64_t grad_stride;     // elements; 0: the same for all rows
  const float* scale;      // (rows,) from loss
  const bf16* factor;      // (rows, factor_ld) row-major, 16-byte aligned
  int64_t factor_ld;       // elements, a multiple of 8
  const bf16* weight;      // (vocab, width) row-major, 16-byte aligned
  const bf16* hidden;      // (rows, width) row-major, 16-byte aligned
  bf16* product;           // (rows, width) row-major out, 16-byte aligned: v (factor weight)
  bf16* scaled_hidden;     // (rows, width) row-major out, 16-byte aligned: v hidden; null: not wanted
};

// Whether the current device and the shape's rows, vocab and width suit the Hopper kernel below: compute
// capability 9.0, vocab and width multiples of 8, and enough rows that its tiles fill the device.
bool linear_softcap_ce_hidden_sm90_supports(const LinearSoftcapCeShape& shape);

// Both of what the backward pass scales by v, in one kernel.
void linear_softcap_ce_hidden_sm90(const LinearSoftcapCeHidden& args, const LinearSoftcapCeShape& shape,
                                   CUstream_st* stream);

// product[row] *= row_scale[row].
void linear_softcap_ce_scale_rows_cuda(bf16* product,           // (rows, width) row-major, in and out
                                       const float* row_scale,  // (rows,)
                                       int64_t rows, int64_t width, CUstream_st* stream);

}  // namespace pgolf
