// A Muon step: two halves around the polar iteration of newton_schulz.h, each one pass over all banks.
//
// muon_direction:  m = mu m + s g, u = s g + mu m  (heavy ball)  or  m = mu m + (1 - mu) s g,
//                  u = (1 - mu) s g + mu m  (lerp); without nesterov u = m; with row_normalize each row of u
//                  is divided by max(its L2 norm, 1e-7). u is rounded once, from float32.
// muon_apply:      p = p (1 - lr wd) - lr lr_scale o;  then  average = lerp(average, p, average_weight).
//                  With `cautious`, elements with p o <= 0 do not decay. Then EMA-Nesterov (ahead.h).
//
// lr, mu, wd, s (grad_scale) and average_weight come from the tensor of hyper.h. When s is not finite,
// muon_direction leaves the momentum and writes zeros, and muon_apply does nothing but what EMA-Nesterov does
// then: that is how a step with non-finite gradients is skipped on the device. float32 arithmetic, no
// atomics: deterministic.
#pragma once

#include "kernels/ahead.h"
#include "kernels/common.h"
#include "kernels/hyper.h"
#include "kernels/newton_schulz.h"

namespace pgolf {

inline constexpr float kMuonRowEps = 1e-7f;

// One bank of muon_direction: `rows` counts the rows of all its matrices.
struct MuonDirection {
  const void* grad;  // (rows, cols) row-major, G
  void* momentum;    // (rows, cols) row-major, M, in place
  void* direction;   // (rows, cols) row-major, X; must not alias the others
  int64_t rows;
  int64_t cols;
};

struct MuonOptions {
  bool nesterov;
  bool lerp;
  bool row_normalize;
};

// One bank of muon_step, none of whose sizes is 0.
struct MuonBank {
  const void* grad;  // (matrices, rows, cols) row-major, G
  void* momentum;    // the same shape, M, in place
  void* update;      // the same shape, X, out: the iterated direction; must not alias the others
  int64_t matrices, rows, cols;
};

// muon_direction and the iteration of all banks.
struct MuonStep {
  const MuonBank* banks;
  int count;
  const float* hyper;  // (kHyperCount,), on the device for the CUDA form
  MuonOptions options;
  NsAlgorithm algorithm;
  NewtonSchulzShape iteration;  // its batch, rows and cols are not read
};

// One tensor of muon_apply.
struct MuonTarget {
  float* param;        // (count,), in place
  const void* update;  // (count,) X
  float* average;      // (count,), in place, or null
  int64_t count;
  float lr_scale;
};

// G, M and X are float or bf16. `hyper` is (kHyperCount,), on the device for the CUDA forms.
template <typename G, typename M, typename X>
void muon_direction_cpu(const MuonDirection* banks, int count, const float* hyper, MuonOptions options,
                        int threads);

template <typename G, typename M, typename X>
void muon_direction_cuda(const MuonDirection* banks, int count, const float* hyper, MuonOptions options,
                         CUstream_st* stream);

// Bytes of scratch memory for muon_step_cpu: the directions of all banks.
template <typename X>
int64_t muon_step_workspace_cpu(const MuonStep& step);

template <typename G, typename M, typename X>
void muon_step_cpu(const MuonStep& step, void* workspace, int threads);

// Which kernels muon_step_cuda takes on the current device.
enum class MuonKernels {
  kNone,         // there are no banks
  kPortable,     // muon_direction_cuda, then newton_schulz_cuda for one bank after the other
  kHopper,       // muon_direction_cuda, then newton_schulz_sm90 for all banks
  kHopperFused,  // muon_direction_sm90, which writes to where the products of newton_schulz_sm90 start
};

struct MuonPlan {
  MuonKernels kernels;
  int64_t workspace;  // bytes of scratch memory, to be 256-byte aligned
};

template <typename X>
MuonPlan muon_step_plan_cuda(const MuonStep& step);

// `plan` is that of this step on the current device.
template <typename G, typename M, typename X>
void muon_step_cuda(const MuonStep& step, const MuonPlan& plan, void* workspace, CUstream_st* stream);

// Target is MuonTarget, or Ahead<MuonTarget> with EMA-Nesterov.
template <typename X, typename Target>
void muon_apply_cpu(const Target* targets, int count, const float* hyper, bool cautious, int threads);

template <typename X, typename Target>
void muon_apply_cuda(const Target* targets, int count, const float* hyper, bool cautious,
                     CUstream_st* stream);

}  // namespace pgolf
