// The kernel of muon_apply: one run of elements per block. Apart from muon_step_cuda.cu, so that the host can
// run it, too.
#pragma once

#include "kernels/muon_step.h"
#include "kernels/vector8.cuh"

namespace pgolf {

inline constexpr int kApplyThreads = 256;
inline constexpr int64_t kApplyRun = kApplyThreads * kVector;  // elements of a block
inline constexpr int kMaxTargets = 80;

struct ApplyArgs {
  Runs<MuonTarget, kMaxTargets> runs;
  const float* hyper;
};
static_assert(sizeof(ApplyArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

// Cautious is known to the compiler, so that a step without it needs no registers and no instructions for it.
template <typename X, bool Cautious>
__global__ void __launch_bounds__(kApplyThreads) muon_apply_kernel(const __grid_constant__ ApplyArgs args) {
  if (!isfinite(args.hyper[kHyperGradScale])) return;
  const int which = args.runs.of_block(blockIdx.x);
  const MuonTarget& t = args.runs.targets[which];
  const X* update = static_cast<const X*>(t.update);
  const int64_t at = (blockIdx.x - args.runs.first[which]) * kApplyRun + threadIdx.x * kVector;
  const int64_t valid = t.count - at;
  if (valid <= 0) return;
  const bool aligned = args.runs.aligned[which] && valid >= kVector;
  float p[kVector], o[kVector], average[kVector];
  load8(p, t.param + at, valid, aligned);
  load8(o, update + at, valid, aligned);
  if (t.average != nullptr) load8(average, t.average + at, valid, aligned);
  const float lr = args.hyper[kHyperLr];
  const float keep = 1.0f - lr * args.hyper[kHyperWeightDecay];
  const float step = lr * t.lr_scale;
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const bool decays = !Cautious || p[i] * o[i] > 0.0f;
    p[i] = fmaf(p[i], decays ? keep : 1.0f, -step * o[i]);
  }
  store8<true>(t.param + at, p, valid, aligned);
  if (t.average == nullptr) return;
  lerp8(average, p, args.hyper[kHyperAverageWeight]);
  store8<true>(t.average + at, average, valid, aligned);
}

// Calls launch(arguments, blocks) for every kMaxTargets of the tensors that have elements.
template <typename Launch>
void launch_apply(const MuonTarget* targets, int count, const float* hyper, const Launch& launch) {
  launch_runs<kMaxTargets>(
      targets, count, "muon_step", [](const MuonTarget& t) { return (t.count + kApplyRun - 1) / kApplyRun; },
      [](const MuonTarget& t) { return aligned16(t.param) && aligned16(t.update) && aligned16(t.average); },
      [&](const Runs<MuonTarget, kMaxTargets>& runs, unsigned int blocks) {
        launch(ApplyArgs{.runs = runs, .hyper = hyper}, blocks);
      });
}

}  // namespace pgolf
