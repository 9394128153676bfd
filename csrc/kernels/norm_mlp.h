// The feed-forward branch of a block on Hopper: RMS norm, up projection, squared leaky ReLU, down projection,
// and the way back.
//
//   rho = (mean x^2 + eps)^-1/2     h = rho x up^T     act = h^2 (h > 0), (slope h)^2 (else)
//   q = g down     d = 2 act^1/2 (h > 0), -2 slope act^1/2 (else)     e = rho q d     S = 2 sum_m q act
//
// With them, g = dy: ddown = g^T act, dup = e^T x, dx = e up - (rho^2 S / width) x. h is not stored: act and
// the signs of h say all. Nor is the normed input: its factor rho is in h, and in e. Deterministic.
#pragma once

#include "kernels/common.h"

namespace pgolf {

struct NormMlpShape {
  int64_t rows;    // tokens
  int64_t width;   // of x
  int64_t hidden;  // of act
  float slope;     // in [0, 1]
};

// Words of the signs of h: one bit an element, set where h < 0, in the order in which the threads of the
// products hold them; a word is 32 elements of a row. Those of rows past the end are never written.
inline int64_t norm_mlp_sign_words(const NormMlpShape& shape) {
  return (shape.rows + 127) / 128 * (shape.hidden / 128) * 512;
}

// Whether the current device and the shape suit the kernels: compute capability 9.0, width a multiple of 8
// and at most 512, hidden a multiple of 128 and at least 512.
bool norm_mlp_sm90_supports(const NormMlpShape& shape);

struct NormMlpUp {
  const bf16* x;   // (rows, width) row-major, 16-byte aligned
  const bf16* up;  // (hidden, width) row-major, 16-byte aligned
  float eps;
  float* rho;       // (rows,) out
  bf16* act;        // (rows, hidden) row-major out, 16-byte aligned
  uint32_t* signs;  // norm_mlp_sign_words out
};

void norm_mlp_up_sm90(const NormMlpUp& args, const NormMlpShape& shape, CUstream_st* stream);

struct NormMlpDact {
  const bf16* grad;       // (rows, width) row-major, 16-byte aligned: g
  const bf16* down;       // (hidden, width) row-major, 16-byte aligned: the transpose of the forward's
  const bf16* act;        // (rows, hidden) of norm_mlp_up_sm90
  const uint32_t* signs;  // of norm_mlp_up_sm90
  const float* rho;       // (rows,)
  bf16* e;                // (rows, hidden) row-major out, 16-byte aligned
  float* partials;        // (hidden / 128, rows) out: S of each row and 128 columns
};

void norm_mlp_dact_sm90(const NormMlpDact& args, const NormMlpShape& shape, CUstream_st* stream);

// out = residual + a b - (rho^2 S / width) x. With act and the transpose of down, the branch's output; with e
// and up, the gradient of its input.
struct NormMlpSum {
  const bf16* a;         // (rows, hidden) row-major, 16-byte aligned
  const bf16* b;         // (hidden, width) row-major, 16-byte aligned
  const bf16* residual;  // (rows, width) row-major, 16-byte aligned; null: not wanted
  const bf16* x;         // (rows, width) row-major, 16-byte aligned; null: not wanted, nor are the next three
  const float* rho;      // (rows,)
  const float* partials;  // of norm_mlp_dact_sm90
  float* rate;            // (rows,) workspace
  bf16* out;              // (rows, width) row-major out, 16-byte aligned
};

void norm_mlp_sum_sm90(const NormMlpSum& args, const NormMlpShape& shape, CUstream_st* stream);

}  // namespace pgolf
