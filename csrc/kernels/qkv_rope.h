// The product of q, k and v on Hopper, and q and k made from it in the same pass: qk_norm_rope.h has the
// formula, of which x is a head of a token in
//
//   qkv = n weight^T
//
// q and k are computed from the product as it is written, rounded, and in the order of qk_norm_rope's kernel:
// they have the bits that qk_norm_rope makes of qkv. Deterministic.
#pragma once

#include "kernels/common.h"

namespace pgolf {

struct QkvRopeShape {
  int64_t tokens;
  int64_t depth;  // columns of n
  int heads;      // of q
  int groups;     // heads of k, and of v
  int width;      // of a head
  int dims;       // rotated columns of a head
};

// Whether the current device and the shape suit the kernel: compute capability 9.0, a depth that is a
// multiple of 8 and at most 512, even numbers of heads and groups with at least eight heads of q, k and v
// together, 64 columns per head, 16 or none of them rotated.
bool qkv_rope_sm90_supports(const QkvRopeShape& shape);

struct QkvRope {
  const bf16* n;       // (tokens, depth) row-major, 16-byte aligned
  const bf16* weight;  // ((heads + 2 groups) width, depth) row-major, 16-byte aligned
  const void* gain;    // (heads,), 4-byte aligned
  bool gain_is_bf16;   // otherwise float32
  const float* cos;    // (tokens, dims / 2) row-major, 16-byte aligned
  const float* sin;    // (tokens, dims / 2) row-major, 16-byte aligned
  float eps;
  bf16* qkv;  // (tokens, heads + 2 groups, width) row-major, 16-byte aligned out
  bf16* q;    // (tokens, heads, width) row-major, 16-byte aligned out
  bf16* k;    // (tokens, groups, width) row-major, 16-byte aligned out
};

void qkv_rope_sm90(const QkvRope& args, const QkvRopeShape& shape, CUstream_st* stream);

}  // namespace pgolf
