// Sums of streams, channel by channel, with the RMS norm of the last one, and the way back.
//
//   y_o = sum_i c_oi * s_i      n = rho y_last,  rho = (mean y_last^2 + eps)^-1/2
//   g_last += rho dn - rho^3 / width (dn . y_last) y_last      ds_i = sum_o c_oi * g_o      dc_oi = sum_t g_o
//   * s_i
//
// g_o is the gradient of y_o, and 0 where y_last is no output. The way back recomputes y_last and rho from
// the streams, in the same order as the forward pass, so neither is stored. Products and sums are float32,
// outputs are rounded once. Deterministic: every sum has a fixed order, which depends on the shape alone.
#pragma once

#include "kernels/common.h"

namespace pgolf {

inline constexpr int kMixStreams = 4;  // most streams
inline constexpr int kMixSums = 2;     // most sums
inline constexpr int64_t kMixMostWidth = 1024;
// Blocks that share the tokens of a backward pass, two for each multiprocessor of an H100. Not the number of
// the GPU at hand, so that a result does not depend on it.
inline constexpr int kMixPartials = 264;

struct StreamMixShape {
  int64_t tokens;
  int64_t width;
  int streams;
  int sums;   // the last one may be an output, or its norm, or both
  bool keep;  // y_last is an output
  bool norm;  // n is an output
};

// 2 to 4 streams, 1 or 2 sums, a width that is a multiple of 8 and at most 1024.
inline bool stream_mix_supports(const StreamMixShape& shape) {
  return 2 <= shape.streams && shape.streams <= kMixStreams && 1 <= shape.sums && shape.sums <= kMixSums &&
         shape.width > 0 && shape.width % 8 == 0 && shape.width <= kMixMostWidth &&
         (shape.keep || shape.norm);
}

struct StreamMixForward {
  const bf16* streams[kMixStreams];  // (tokens, width) row-major each, 16-byte aligned
  const float* coefficients;         // (sums, streams, width) row-major, 16-byte aligned
  float eps;
  bf16* sums[kMixSums];  // (tokens, width) row-major each, 16-byte aligned out; null: not wanted
  bf16* norm;            // (tokens, width) row-major, 16-byte aligned out; null: not wanted
};

void stream_mix_cuda(const StreamMixForward& args, const StreamMixShape& shape, CUstream_st* stream);

struct StreamMixBackward {
  const bf16* streams[kMixStreams];  // as forward
  const float* coefficients;         // as forward
  float eps;
  const bf16* grads[kMixSums];      // (tokens, width) row-major each, 16-byte aligned; null: no such output
  const bf16* grad_norm;            // (tokens, width) row-major, 16-byte aligned; null: no such output
  bf16* stream_grads[kMixStreams];  // (tokens, width) row-major each, 16-byte aligned out
  float* partials;                  // (kMixPartials, sums, streams, width) out: dc of each block's tokens
};

void stream_mix_backward_cuda(const StreamMixBackward& args, const StreamMixShape& shape,
                              CUstream_st* stream);

}  // namespace pgolf
