// Batched polar iteration (Newton-Schulz with per-step quintic coefficients).
//
//   X = x / (||x||_F + eps)
//   for (a, b, c) in coefficients:   A = X X^T,   B = b A + c A^2,   X = a X + B X
//
// Every product runs on the short side: a matrix with rows > cols is treated as its transpose.
// CPU: float32 arithmetic throughout, rounded once at the end. CUDA: the norm and the first scaling are
// float32, operands are float16 and products accumulate in float32; A, B and X are rounded after each
// product, X keeps what its rounding took away where later iterations would enlarge it, and the last product
// is rounded once, to T. Both are deterministic.
#pragma once

#include "kernels/common.h"

namespace pgolf {

inline constexpr int kNewtonSchulzMaxSteps = 10;

// How the iteration is computed: kGram is the Hopper kernel or an error. pgolf/ops/_algorithm.py has the
// names.
enum class NsAlgorithm : int64_t { kAuto, kStandard, kGram };

struct NewtonSchulzShape {
  int64_t batch;
  int64_t rows;
  int64_t cols;
  int steps;                                     // 1..kNewtonSchulzMaxSteps
  float coefficients[kNewtonSchulzMaxSteps][3];  // (a, b, c) of each step
  float eps;                                     // >= 0
};

// T is float, bf16 or f16.
template <typename T>
void newton_schulz_cpu(const T* x,  // (batch, rows, cols) row-major
                       T* out,      // (batch, rows, cols) row-major
                       const NewtonSchulzShape& shape, int threads);

// Bytes of scratch memory that newton_schulz_cuda needs, 256-byte aligned.
int64_t newton_schulz_workspace_bytes(const NewtonSchulzShape& shape);

template <typename T>
void newton_schulz_cuda(const T* x,       // (batch, rows, cols) row-major
                        T* out,           // (batch, rows, cols) row-major; must not alias x
                        void* workspace,  // newton_schulz_workspace_bytes(shape)
                        const NewtonSchulzShape& shape, CUstream_st* stream);

}  // namespace pgolf
