// The gradients of causal attention within documents that are packed one after another, heads of 64 columns.
//
//   s_ij = scale q_i . k_j    p_ij = exp(s_ij - lse_i)  for tokens j <= i of one document, otherwise 0
//   dv_j = sum_i p_ij dy_i    ds_ij = p_ij (dy_i . v_j - delta_i),  delta_i = dy_i . y_i
//   dq_i = scale sum_j ds_ij k_j              dk_j = scale sum_i ds_ij q_i
//
// A head of q has the keys and values of its group, whose gradients are sums over its heads. Products of bf16
// with float32 sums; p and ds are rounded to bf16. The sums of dq over blocks of keys have no fixed order.
#pragma once

#include "kernels/common.h"

namespace pgolf {

struct DocAttentionShape {
  int64_t tokens;
  int heads;
  int groups;    // divides heads
  int segments;  // documents, also empty ones
  float scale;
};

inline constexpr int kDocWidth = 64;  // columns of a head
inline constexpr int kDocTile = 128;  // tokens of a block of keys or of queries

// Blocks of keys at most: each document ends with a part of one.
inline int64_t doc_attention_max_tiles(const DocAttentionShape& shape) {
  return shape.tokens / kDocTile + shape.segments;
}

struct DocAttentionBackward {
  // (tokens, heads or groups, 64), 16-byte aligned; strides are elements from a token to the next one.
  const bf16 *q, *k, *v, *grad;
  int64_t q_stride, k_stride, v_stride, grad_stride;
  const bf16* y;             // (tokens, heads, 64) row-major, the output of attention
  const float* lse;          // (heads, tokens), natural logarithms
  const int32_t* documents;  // (segments + 1) starts, the last one `tokens`
  // Scratch: (heads, tokens); (heads, tokens, 64), 16-byte aligned; 2 (doc_attention_max_tiles + 1), 8-byte
  // aligned.
  float *delta, *dq_sum;
  int32_t* plan;
  // (tokens, heads or groups, 64) row-major out, 16-byte aligned
  bf16 *dq, *dk, *dv;
};

// Whether the current device is of sm_90 and the kernels take this shape.
bool doc_attention_backward_supports(const DocAttentionShape& shape);

void doc_attention_backward_sm90(const DocAttentionBackward& args, const DocAttentionShape& shape,
                                 CUstream_st* stream);

}  // namespace pgolf
