// Hopper (sm_90a) form of newton_schulz.h for several banks of matrices at once.
//
// Per matrix, exactly the iteration of newton_schulz.h, on the short side. Tensor-core products of float16
// operands with float32 accumulation. The input is scaled by a power of two that brings its Frobenius norm to
// [16, 32), exactly for bfloat16 and float16 input; the rest of 1 / (norm + eps) is folded, in float32, into
// the first polynomial. Nearly square matrices take each iteration as R = X X^T, Z = a I + b R + c R^2, X = Z
// X. Longer ones take two iterations at once (the first alone where the number of iterations is odd):
//   R = X X^T,  Z = p(R),  R1 = Z (R Z),  Q = p1(R1) Z,  X = Q X
// and then start from X again: longer chains in float16 lose the small singular values (up to 0.2 on
// power-law and rank-deficient input), while pairs stay within 0.01 of the exact map (docs/findings.md,
// 2026-11-23). Few matrices take Y = Z X at the same time as R1 and p1(R1), then X = p1(R1) Y: one product
// less to wait for. Deterministic.
#pragma once

#include <cstddef>

#include "kernels/common.h"

namespace pgolf {

enum class NsType : uint8_t { kFloat32, kBfloat16, kFloat16 };

struct NsBank {
  const void* in;  // (batch, rows, cols) row-major
  void* out;       // the same shape and type; must not alias `in`
  NsType type;
  int64_t batch, rows, cols;
};

// Whether the current device is Hopper and every bank has 16-byte aligned pointers and sides that are
// multiples of 8.
bool newton_schulz_sm90_can_run(const NsBank* banks, int count);

// Longest side of the matrices that "auto" gives to newton_schulz_cuda although this kernel can run; 0 =
// none. For 64 matrices of 128 x 128 newton_schulz_cuda takes 0.074 ms and this kernel 0.092 ms
// (docs/benchmarks.md). `bench_newton_schulz` measures both for the sides up to 256, as "pgolf standard" and
// "pgolf gram"; until that says which side pays, nothing changes.
inline constexpr int64_t kNsPortableSide = 0;

// Whether newton_schulz_cuda is the faster one for banks that both can run. Several banks are one launch here
// and several there. The number of matrices does not count, so that ranks that iterate different numbers of
// them take the same kernel.
constexpr bool newton_schulz_portable_pays(const NsBank* banks, int count, int64_t side = kNsPortableSide) {
  return count == 1 && banks[0].rows <= side && banks[0].cols <= side;
}

// Bytes of scratch memory, to be 256-byte aligned. It holds the banks in 16 bits, once more where `out` is
// float32, and one square of the short side per matrix; two squares where the sides are 1 : 2 to below 1 : 3
// and two iterations are taken at once; three where the matrices are few and the sides are 1 : 2 or longer.
size_t newton_schulz_sm90_workspace(const NsBank* banks, int count, int steps);

inline constexpr int kNsMaxBanks = 6;  // of one launch
inline constexpr int kNsParts = 8;     // partial sums per matrix, of a caller that writes X itself

// Places in the workspace for a caller that writes X itself.
struct NsPrepared {
  void* x[kNsMaxBanks];  // float16, each matrix times a power of two 2^e that brings its norm near [16, 32)
  float* sigma;          // 1 / ((norm + eps) 2^e) of all matrices, in the order of the banks
  float* partials;       // scratch, 3 * kNsParts per matrix
  uint32_t* counters;    // to be zeroed
  int counter_count;
};

// How many of the banks, from the first on, one launch takes, at least one, and where their X belongs.
int newton_schulz_sm90_prepare(const NsBank* banks, int count, int steps, void* workspace,
                               NsPrepared* prepared);

// As newton_schulz_sm90, of what the caller wrote to the places that newton_schulz_sm90_prepare named for
// these banks; their `in` is not read.
void newton_schulz_sm90_prepared(const NsBank* banks, int count, const float (*coefficients)[3], int steps,
                                 void* workspace, CUstream_st* stream);

// Banks that newton_schulz_sm90_can_run takes.
void newton_schulz_sm90(const NsBank* banks, int count, const float (*coefficients)[3], int steps, float eps,
                        void* workspace, CUstream_st* stream);

}  // namespace pgolf
