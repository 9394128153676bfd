// Single-precision matrix product for CPU kernels: C = alpha * A * B + beta * D.
#pragma once

#include "kernels/common.h"

namespace pgolf {

struct GemmArgs {
  int64_t m, n, k;
  const float* a;        // (m, k), element (i, p) at a[i * a_stride + p]
  int64_t a_stride;      // elements
  const float* b;        // (k, n), element (p, j) at b[p * b_row_stride + j * b_col_stride]
  int64_t b_row_stride;  // elements
  int64_t b_col_stride;  // elements; b_row_stride = 1 reads a stored (n, k) matrix as its transpose
  float alpha = 1.0f, beta = 0.0f;
  const float* d = nullptr;  // (m, n) row-major, contiguous; may be null when beta is 0; must not alias c
  float* c;                  // (m, n) row-major, contiguous, out
  bool symmetric =
      false;  // the result is symmetric (m == n): only tiles on and above the diagonal are computed
};

// Deterministic: the order of summation does not depend on `threads`.
void gemm_cpu(const GemmArgs& args, int threads);

}  // namespace pgolf
