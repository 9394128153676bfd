// Causal attention within documents that are packed one after another, heads of 64 columns, and its
// gradients.
//
//   s_ij = scale q_i . k_j    p_ij = exp(s_ij - lse_i)  for tokens j <= i of one document, otherwise 0
//   y_i = sum_j p_ij v_j      lse_i = log sum_j exp(s_ij)
//   dv_j = sum_i p_ij dy_i    ds_ij = p_ij (dy_i . v_j - delta_i),  delta_i = dy_i . y_i
//   dq_i = scale sum_j ds_ij k_j              dk_j = scale sum_i ds_ij q_i
//
// A head of q has the keys and values of its group, whose gradients are sums over its heads. Products of bf16
// with float32 sums; p and ds are rounded to bf16. dq is a sum over tiles of keys, in no fixed order, and
// stays in float32.
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
inline constexpr int kDocKeys = 128;  // of a tile of the backward pass

// Consecutive tokens, from `first` on, of the document of tokens `begin` to `end` - 1.
struct alignas(16) DocTile {
  int32_t first, begin, end, unused;
};

// Tiles of `size` tokens at most: each document ends with a part of one.
inline int64_t doc_attention_max_tiles(const DocAttentionShape& shape, int size) {
  return shape.tokens / size + shape.segments;
}

// Flags of the backward pass: one for each group of each of its tiles.
inline int64_t doc_attention_flags(const DocAttentionShape& shape) {
  return doc_attention_max_tiles(shape, kDocKeys) * shape.groups;
}

// Queries of a tile of the forward pass, for `ratio` heads per group, which divides 4.
PGOLF_HOST_DEVICE constexpr int doc_attention_queries(int ratio) { return 192 / ratio; }

struct DocAttentionForward {
  // (tokens, heads or groups, 64), 16-byte aligned; strides are elements from a token to the next one.
  const bf16 *q, *k, *v;
  int64_t q_stride, k_stride, v_stride;
  const int32_t* documents;  // (segments + 1) starts, the last one `tokens`
  DocTile* plan;             // scratch: doc_attention_max_tiles(doc_attention_queries) + 1
  bf16* y;                   // (tokens, heads, 64) row-major out, 16-byte aligned
  float* lse;                // (heads, tokens) out, natural logarithms
};

// Whether the current device is of sm_90 and the kernels take this shape: 1, 2 or 4 heads per group.
bool doc_attention_supports(const DocAttentionShape& shape);

void doc_attention_sm90(const DocAttentionForward& args, const DocAttentionShape& shape, CUstream_st* stream);

struct DocAttentionBackward {
  // (tokens, heads or groups, 64), 16-byte aligned; strides are elements from a token to the next one.
  const bf16 *q, *k, *v, *grad;
  int64_t q_stride, k_stride, v_stride, grad_stride;
  const bf16* y;             // (tokens, heads, 64) row-major, the output; null: delta is given
  const float* lse;          // (heads, tokens), natural logarithms
  const int32_t* documents;  // (segments + 1) starts, the last one `tokens`
  float* delta;              // (heads, tokens); scratch if y is given
  DocTile* plan;             // scratch: doc_attention_max_tiles(kDocKeys) + 1
  uint32_t* filled;          // scratch: doc_attention_flags
  float* dq;                 // (tokens, heads, 64) row-major out, 16-byte aligned, float32
  bf16 *dk, *dv;             // (tokens, groups, 64) row-major out, 16-byte aligned
};

void doc_attention_backward_sm90(const DocAttentionBackward& args, const DocAttentionShape& shape,
                                 CUstream_st* stream);

}  // namespace pgolf
