// Cross-entropy of tanh-capped logits, per row, in nats.
//
//   z = cap * tanh(logits / cap)        lse = logsumexp(z)        loss = lse - z[target] + z_loss * lse^2
//   grad_logits = grad_loss * ((1 + 2 z_loss lse) * exp(z - lse) - onehot(target)) * (1 - tanh^2)
//
// An infinite cap means plain cross-entropy: z = logits.
// Accumulation is float32 in a fixed order: results are deterministic. Neither factor of the gradient
// cancels: 1 - tanh^2 is 4 s (1 - s) with s = sigmoid(2 logits / cap), and the target's p - 1 is
// expm1(-loss), where loss is log1p(sum of the others / the target's term) once the target dominates. Rows
// whose target is ignore_index get loss 0, lse 0 and gradient 0. NaN in a row makes its loss NaN. Targets
// outside [0, vocab): the CPU binding refuses them, the CUDA kernel makes the row NaN.
#pragma once

#include "kernels/common.h"

namespace pgolf {

struct SoftcapCeShape {
  int64_t rows;
  int64_t vocab;
  float cap;  // > 0; infinity: no cap
  int64_t ignore_index;
  float z_loss = 0.0f;  // >= 0; weight of lse^2 in the loss
};

// First row whose target is neither ignore_index nor in [0, vocab), or -1.
int64_t softcap_ce_first_bad_row(const int64_t* target, const SoftcapCeShape& shape);

// T is float, bf16 or f16.
template <typename T>
void softcap_ce_forward_cpu(const T* logits,        // (rows, vocab) row-major
                            const int64_t* target,  // (rows,)
                            float* loss,            // (rows,) out
                            float* lse,             // (rows,) out
                            const SoftcapCeShape& shape, int threads);

template <typename T>
void softcap_ce_backward_cpu(const float* grad_loss,  // (rows,)
                             const T* logits,         // (rows, vocab) row-major
                             const int64_t* target,   // (rows,)
                             const float* loss,       // (rows,) from forward
                             const float* lse,        // (rows,) from forward
                             T* grad_logits,          // (rows, vocab) row-major, out
                             const SoftcapCeShape& shape, int threads);

// Loss and gradient at once, the gradient for an upstream gradient that is known before. `grad_logits` may be
// `logits`, which then are lost.
template <typename T>
void softcap_ce_gradient_cpu(const T* logits,         // (rows, vocab) row-major
                             const int64_t* target,   // (rows,)
                             const float* grad_loss,  // (rows,), or one value where grad_stride is 0
                             int64_t grad_stride,     // 1, or 0: the same for all rows
                             float* loss,             // (rows,) out
                             float* lse,              // (rows,) out
                             T* grad_logits,          // (rows, vocab) row-major, out
                             const SoftcapCeShape& shape, int threads);

// The same on device pointers. Any alignment is correct; rows whose logits and gradient are 16-byte aligned
// are fast.
template <typename T>
void softcap_ce_forward_cuda(const T* logits, const int64_t* target, float* loss, float* lse,
                             const SoftcapCeShape& shape, CUstream_st* stream);

template <typename T>
void softcap_ce_backward_cuda(const float* grad_loss, const T* logits, const int64_t* target,
                              const float* loss, const float* lse, T* grad_logits,
                              const SoftcapCeShape& shape, CUstream_st* stream);

// One read of the logits, one write of the gradient.
template <typename T>
void softcap_ce_gradient_cuda(const T* logits, const int64_t* target, const float* grad_loss,
                              int64_t grad_stride, float* loss, float* lse, T* grad_logits,
                              const SoftcapCeShape& shape, CUstream_st* stream);

// grad_logits[row] *= factor[row] where the factor is not exactly 1: nothing else is read or written, and the
// host learns nothing, so that a backward pass whose upstream gradient is 1 costs microseconds.
template <typename T>
void softcap_ce_rescale_cuda(T* grad_logits,         // (rows, vocab) row-major, in and out
                             const float* factor,    // (rows,), or one value where factor_stride is 0
                             int64_t factor_stride,  // 1, or 0
                             int64_t rows, int64_t vocab, CUstream_st* stream);

}  // namespace pgolf
