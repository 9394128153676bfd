// The kernel of muon_apply: one run of elements per block. Apart from muon_step_cuda.cu, so that the host can
// run it, too.
#pragma once

#include "kernels/ahead.cuh"
#include "kernels/muon_step.h"

namespace pgolf {

inline constexpr int kApplyThreads = 256;
inline constexpr int64_t kApplyRun = kApplyThreads * kVector;  // elements of a block
template <typename Target>
inline constexpr int kMaxTargets = kAhead<Target> ? 64 : 80;

template <typename Target>
struct ApplyArgs {
  Runs<Target, kMaxTargets<Target>> runs;
  const float* hyper;
};
static_assert(sizeof(ApplyArgs<MuonTarget>) <= 4096 && sizeof(ApplyArgs<Ahead<MuonTarget>>) <= 4096,
              "kernel arguments hold 4 KB on every driver");

// Cautious and EMA-Nesterov (Target is Ahead<MuonTarget>) are known to the compiler, so that a step without
// them needs no registers and no instructions for them.
template <typename X, bool Cautious, typename Target>
__global__ void __launch_bounds__(kApplyThreads)
    muon_apply_kernel(const __grid_constant__ ApplyArgs<Target> args) {
  const bool skipped = !isfinite(args.hyper[kHyperGradScale]);
  if (skipped && !kAhead<Target>) return;
  const int which = args.runs.of_block(blockIdx.x);
  const Target& t = args.runs.targets[which];
  const X* update = static_cast<const X*>(t.update);
  const int64_t at = (blockIdx.x - args.runs.first[which]) * kApplyRun + threadIdx.x * kVector;
  const int64_t valid = t.count - at;
  if (valid <= 0) return;
  const bool aligned = args.runs.aligned[which] && valid >= kVector;
  [[maybe_unused]] float base[kVector], velocity[kVector];
  if constexpr (kAhead<Target>) {
    load8(base, t.base + at, valid, aligned);
    load8(velocity, t.velocity + at, valid, aligned);
    if (skipped) {
      shift8(base, velocity, args.hyper);
      store8<true>(t.param + at, base, valid, aligned);
      return;
    }
  }
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
  if constexpr (!kAhead<Target>) store8<true>(t.param + at, p, valid, aligned);
  if (t.average != nullptr) {
    lerp8(average, p, args.hyper[kHyperAverageWeight]);
    store8<true>(t.average + at, average, valid, aligned);
  }
  if constexpr (kAhead<Target>) {
    move_ahead8(p, base, velocity, args.hyper);
    store8<true>(t.base + at, base, valid, aligned);
    store8<true>(t.velocity + at, velocity, valid, aligned);
    store8<true>(t.param + at, p, valid, aligned);
  }
}

// Calls launch(arguments, blocks) for every kMaxTargets of the tensors that have elements.
template <typename Target, typename Launch>
void launch_apply(const Target* targets, int count, const float* hyper, const Launch& launch) {
  launch_runs<kMaxTargets<Target>>(
      targets, count, "muon_step", [](const Target& t) { return (t.count + kApplyRun - 1) / kApplyRun; },
      [](const Target& t) {
        return aligned16(t.param) && aligned16(t.update) && aligned16(t.average) && aligned_ahead(t);
      },
      [&](const Runs<Target, kMaxTargets<Target>>& runs, unsigned int blocks) {
        launch(ApplyArgs<Target>{.runs = runs, .hyper = hyper}, blocks);
      });
}

}  // namespace pgolf
