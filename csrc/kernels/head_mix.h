// Exclusive self-attention and the gate of each head's output y, and the way back.
//
//   m = max(v . v, 1e-24)      a = (y . v) / m      out = gate (y - a v)
//   gate = outer sigmoid(inner z), or 1             w = gate (p . v) / m
//   dy = gate p - w v      dz = gate' (p . y - a (p . v))      delta = dy . y, of dy as it is stored
//   dv = sum over the heads of the group of  -a gate p - w y + 2 a w v, without the last term where m = 1e-24
//
// y, z and p, the gradient of out, are those of a head of a token, v that of its group. Float32 inside,
// outputs are rounded once. Deterministic: every sum has a fixed order. The way back of attention needs
// delta: the gradient of its scores, P (dP - delta), has rows that add up to zero, but only if delta is of
// the very dy that dP is of.
#pragma once

#include "kernels/common.h"

namespace pgolf {

inline constexpr float kSmallestSquare = 1e-24f;

struct HeadMixShape {
  int64_t tokens;
  int heads;
  int groups;
  int width;  // of a head
};

// 64 or 128 columns per head, and 1, 2 or 4 heads per group.
inline bool head_mix_supports(const HeadMixShape& shape) {
  if (shape.groups <= 0 || shape.heads % shape.groups != 0) return false;
  const int ratio = shape.heads / shape.groups;
  return (shape.width == 64 || shape.width == 128) && (ratio == 1 || ratio == 2 || ratio == 4);
}

struct HeadMixGate {
  const void* z;   // (tokens, stride) row-major, of which `heads` columns count; null: no gate
  int64_t stride;  // elements from a token to the next one
  bool is_bf16;    // of z, and of its gradient; otherwise float32
  float inner, outer;
};

struct HeadMixForward {
  const bf16* y;     // (tokens, heads, width) row-major, 16-byte aligned
  const bf16* v;     // (tokens, groups, width), 16-byte aligned rows
  int64_t v_stride;  // elements from a token of v to the next one, a multiple of 8
  HeadMixGate gate;
  bf16* out;  // (tokens, heads, width) row-major, 16-byte aligned out
};

void head_mix_cuda(const HeadMixForward& args, const HeadMixShape& shape, CUstream_st* stream);

struct HeadMixBackward {
  const bf16* grad;  // (tokens, heads, width) row-major, 16-byte aligned
  const bf16* y;     // as forward
  const bf16* v;     // as forward
  int64_t v_stride;
  HeadMixGate gate;
  bf16* dy;      // (tokens, heads, width) row-major, 16-byte aligned out
  bf16* dv;      // (tokens, groups, width) row-major, 16-byte aligned out
  void* dz;      // (tokens, heads) row-major out, type of z; null without a gate
  float* delta;  // (heads, tokens) row-major out
};

void head_mix_backward_cuda(const HeadMixBackward& args, const HeadMixShape& shape, CUstream_st* stream);

}  // namespace pgolf
