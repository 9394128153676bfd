// The two halves of a Muon step around the polar iteration, each one pass over all banks.
//
// muon_direction:  m = mu m + s g, u = s g + mu m  (heavy ball)  or  m = mu m + (1 - mu) s g,
//                  u = (1 - mu) s g + mu m  (lerp); without nesterov u = m; with row_normalize each row of u
//                  is divided by max(its L2 norm, 1e-7). u is rounded once, from float32.
// muon_apply:      p = p (1 - lr wd) - lr lr_scale o;  then  average = lerp(average, p, average_weight).
//
// lr, mu, wd, s (grad_scale) and average_weight are read from memory by the kernels, so that a captured CUDA
// graph follows a schedule. When s is not finite, muon_direction leaves the momentum and writes zeros, and
// muon_apply does nothing: that is how a step with non-finite gradients is skipped on the device. float32
// arithmetic, no atomics: deterministic.
#pragma once

#include "kernels/common.h"
#include "kernels/newton_schulz_sm90.h"

namespace pgolf {

// Places in `hyper`, (kMuonHyper,) float32.
enum MuonScalar : int {
  kMuonLr,
  kMuonMomentum,
  kMuonWeightDecay,
  kMuonGradScale,
  kMuonAverageWeight,
  kMuonHyper
};

inline constexpr float kMuonRowEps = 1e-7f;

// One bank of muon_direction: `rows` counts the rows of all its matrices.
struct MuonDirection {
  const void* grad;  // (rows, cols) row-major, G
  void* momentum;    // (rows, cols) row-major, M, in place
  void* direction;   // (rows, cols) row-major, X; must not alias the others
  int64_t rows;
  int64_t cols;
};

// One bank of muon_direction_sm90: what newton_schulz_sm90 takes as prepared.
struct MuonPolarInput {
  const void* grad;              // (matrices, rows, cols) row-major, G
  void* momentum;                // the same shape, M, in place
  void* x;                       // the same shape, float16
  int64_t matrices, rows, cols;  // cols a multiple of 8; pointers aligned to 16 bytes
};

struct MuonOptions {
  bool nesterov;
  bool lerp;
  bool row_normalize;
};

// One tensor of muon_apply.
struct MuonTarget {
  float* param;        // (count,), in place
  const void* update;  // (count,) X
  float* average;      // (count,), in place, or null
  int64_t count;
  float lr_scale;
};

// G, M and X are float or bf16. `hyper` is (kMuonHyper,), on the device for the CUDA forms.
template <typename G, typename M, typename X>
void muon_direction_cpu(const MuonDirection* banks, int count, const float* hyper, MuonOptions options,
                        int threads);

template <typename G, typename M, typename X>
void muon_direction_cuda(const MuonDirection* banks, int count, const float* hyper, MuonOptions options,
                         CUstream_st* stream);

// The same directions, not rounded before, as float16 times a power of two that brings each matrix' norm near
// [16, 32), and prepared.sigma = 1 / ((norm + eps) 2^e). At most kNsMaxBanks banks; Hopper.
template <typename G, typename M>
void muon_direction_sm90(const MuonPolarInput* banks, int count, const NsPrepared& prepared, float eps,
                         const float* hyper, MuonOptions options, CUstream_st* stream);

template <typename X>
void muon_apply_cpu(const MuonTarget* targets, int count, const float* hyper, int threads);

template <typename X>
void muon_apply_cuda(const MuonTarget* targets, int count, const float* hyper, CUstream_st* stream);

}  // namespace pgolf
