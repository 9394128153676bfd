// RMS norm of each head of q and k, gain of the query heads, rotary position embedding, and the way back.
//
//   r = (mean x^2 + eps)^-1/2      q = gain R(r x)      k = R(r x)
//   h = R^T g      dx = gain r (h - r^2 / width (h . x) x)      dgain = sum_t r (h . x)
//
// x is a head of a token in the product of q, k and v, g the gradient of its output, R the rotation of its
// first `dims` columns: (x1, x2) -> (x1 cos + x2 sin, x2 cos - x1 sin) for its halves. The way back also
// writes v's columns, the sum of up to two gradients. Float32 inside, outputs are rounded once. The gradient
// of q may be float32, as an attention that adds it up in memory leaves it; it is not rounded then.
// Deterministic: every sum has a fixed order, which depends on the shape alone.
#pragma once

#include "kernels/common.h"

namespace pgolf {

inline constexpr int kRopeValueGrads = 2;  // most gradients of v
// Blocks that share the tokens of a backward pass, two for each multiprocessor of an H100. Not the number of
// the GPU at hand, so that a result does not depend on it.
inline constexpr int kRopePartials = 264;

struct QkNormRopeShape {
  int64_t tokens;
  int heads;   // of q
  int groups;  // heads of k, and of v
  int width;   // of a head
  int dims;    // rotated columns of a head
};

// 64 or 128 columns per head, an even number of them rotated, and 1, 2 or 4 heads per group.
inline bool qk_norm_rope_supports(const QkNormRopeShape& shape) {
  if (shape.groups <= 0 || shape.heads % shape.groups != 0) return false;
  const int ratio = shape.heads / shape.groups;
  return (shape.width == 64 || shape.width == 128) && (ratio == 1 || ratio == 2 || ratio == 4) &&
         0 <= shape.dims && shape.dims <= shape.width && shape.dims % 2 == 0;
}

// What both directions read.
struct QkNormRopeInput {
  const bf16* qkv;    // (tokens, heads + 2 groups, width), 16-byte aligned rows
  int64_t stride;     // elements from a token of qkv to the next one, a multiple of 8
  const void* gain;   // (heads,)
  bool gain_is_bf16;  // otherwise float32
  const float* cos;   // (tokens, dims / 2) row-major, 16-byte aligned
  const float* sin;   // (tokens, dims / 2) row-major, 16-byte aligned
  float eps;
};

struct QkNormRopeForward {
  QkNormRopeInput in;
  bf16* q;  // (tokens, heads, width) row-major, 16-byte aligned out
  bf16* k;  // (tokens, groups, width) row-major, 16-byte aligned out
};

void qk_norm_rope_cuda(const QkNormRopeForward& args, const QkNormRopeShape& shape, CUstream_st* stream);

struct QkNormRopeBackward {
  QkNormRopeInput in;
  const void* dq;                   // (tokens, heads, width) row-major, 16-byte aligned
  bool dq_is_bf16;                  // otherwise float32
  const bf16* dk;                   // (tokens, groups, width) row-major, 16-byte aligned
  const bf16* dv[kRopeValueGrads];  // (tokens, groups, width) row-major, 16-byte aligned each; null: zeros
  bf16* dqkv;                       // (tokens, heads + 2 groups, width) row-major, 16-byte aligned out
  float* partials;                  // (kRopePartials, heads) scratch: dgain of each block's tokens
  float* dgain;                     // (heads,) out
};

void qk_norm_rope_backward_cuda(const QkNormRopeBackward& args, const QkNormRopeShape& shape,
                                CUstream_st* stream);

}  // namespace pgolf
