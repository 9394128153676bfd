// AdamW over many tensors, and what comes before it in a step: the norm of the gradients and the clip.
//
// square_sums:  sum of the squares of each tensor, in a fixed order: deterministic.
// clip_scale:   norm = sqrt(sum of sums);  s = min(1, clip / (norm + 1e-6)), 1 without a clip, NaN where the
//               norm is not finite;  t <- t + 1 unless that is so;  c1 = 1 / (1 - beta1^t), c2 likewise.
// adam_step:    g = s grad;  m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
//               p <- p (1 - lr wd) - lr c1 m / (sqrt(c2 v) + eps);  average <- lerp(average, p, weight);
//               grad <- 0. Then EMA-Nesterov (ahead.h). Where s is not finite only the gradient is zeroed,
//               and EMA-Nesterov does what it does then.
//
// clip_scale writes s to the tensor of hyper.h; adam_step reads s and the weight of the average there.
#pragma once

#include "kernels/ahead.h"
#include "kernels/common.h"
#include "kernels/hyper.h"

namespace pgolf {

// Places in the state of clip_scale, (kClipState,) float32: the norm, steps taken, steps skipped.
enum ClipState : int { kClipNorm, kClipSteps, kClipSkipped, kClipState };

inline constexpr float kClipEps = 1e-6f;

struct SquareSum {
  const void* data;  // (count,) T
  int64_t count;
};

// One tensor of adam_step; all (count,), in place.
struct AdamTarget {
  float* param;
  float* grad;
  float* mean;
  float* square;
  float* average;  // or null
  int64_t count;
};

// The same for all tensors of a call. Pointers are device memory for the CUDA form.
struct AdamRule {
  const float* lr;           // (1,)
  const float* hyper;        // (kHyperCount,): grad_scale and average_weight
  const float* corrections;  // (2,): c1, c2
  float weight_decay, beta1, beta2, eps;
  float rest1, rest2;  // 1 - beta, rounded once
};

struct ClipRule {
  double clip;  // 0: none
  double beta1, beta2;
};

// T is float or bf16; out is (count,).
template <typename T>
void square_sums_cpu(const SquareSum* tensors, int count, float* out, int threads);

// A counter for each tensor and its partial sums: `workspace` holds square_sums_workspace(tensors, count)
// bytes, the first 4 * count of them zero.
int64_t square_sums_workspace(const SquareSum* tensors, int count);
template <typename T>
void square_sums_cuda(const SquareSum* tensors, int count, float* out, void* workspace, CUstream_st* stream);

void clip_scale_cpu(const float* sums, int count, float* state, float* hyper, float* corrections,
                    ClipRule rule);
void clip_scale_cuda(const float* sums, int count, float* state, float* hyper, float* corrections,
                     ClipRule rule, CUstream_st* stream);

// Target is AdamTarget, or Ahead<AdamTarget> with EMA-Nesterov.
template <typename Target>
void adam_step_cpu(const Target* targets, int count, AdamRule rule, int threads);
template <typename Target>
void adam_step_cuda(const Target* targets, int count, AdamRule rule, CUstream_st* stream);

}  // namespace pgolf
