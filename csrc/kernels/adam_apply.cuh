// The kernel of adam_step: one run of elements per block. Apart from adam_step_cuda.cu, so that the host can
// run it, too.
#pragma once

#include "kernels/adam_step.h"
#include "kernels/ahead.cuh"

namespace pgolf {

inline constexpr int kAdamThreads = 256;
inline constexpr int64_t kAdamRun = kAdamThreads * kVector;  // elements of a block
inline constexpr int kMaxAdamTargets = 56;

template <typename Target>
struct AdamArgs {
  Runs<Target, kMaxAdamTargets> runs;
  AdamRule rule;
};
static_assert(sizeof(AdamArgs<Ahead<AdamTarget>>) <= 4096, "kernel arguments hold 4 KB on every driver");

// EMA-Nesterov (Target is Ahead<AdamTarget>) is known to the compiler, so that a step without it needs no
// registers and no instructions for it.
template <typename Target>
__global__ void __launch_bounds__(kAdamThreads)
    adam_step_kernel(const __grid_constant__ AdamArgs<Target> args) {
  const int which = args.runs.of_block(blockIdx.x);
  const Target& t = args.runs.targets[which];
  const int64_t at = (blockIdx.x - args.runs.first[which]) * kAdamRun + threadIdx.x * kVector;
  const int64_t valid = t.count - at;
  if (valid <= 0) return;
  const bool aligned = args.runs.aligned[which] && valid >= kVector;
  const AdamRule& rule = args.rule;
  const float scale = rule.hyper[kHyperGradScale], weight = rule.hyper[kHyperAverageWeight];
  [[maybe_unused]] float base[kVector], velocity[kVector];
  if constexpr (kAhead<Target>) {
    load8(base, t.base + at, valid, aligned);
    load8(velocity, t.velocity + at, valid, aligned);
  }
  if (!isfinite(scale)) {
    zero8(t.grad + at, valid, aligned);
    if constexpr (kAhead<Target>) {
      shift8(base, velocity, rule.hyper);
      store8<true>(t.param + at, base, valid, aligned);
    }
    return;
  }
  float p[kVector], g[kVector], m[kVector], v[kVector], average[kVector];
  load8(g, t.grad + at, valid, aligned);
  load8(m, t.mean + at, valid, aligned);
  load8(v, t.square + at, valid, aligned);
  load8(p, t.param + at, valid, aligned);
  if (t.average != nullptr) load8(average, t.average + at, valid, aligned);
  const float lr = *rule.lr;
  const float keep = 1.0f - lr * rule.weight_decay, step = lr * rule.corrections[0];
  const float correction = rule.corrections[1];
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) {
    g[i] *= scale;
    m[i] = fmaf(rule.beta1, m[i], rule.rest1 * g[i]);
    v[i] = fmaf(rule.beta2, v[i], rule.rest2 * g[i] * g[i]);
    p[i] = fmaf(p[i], keep, -step * m[i] / (sqrtf(correction * v[i]) + rule.eps));
  }
  zero8(t.grad + at, valid, aligned);
  store8<true>(t.mean + at, m, valid, aligned);
  store8<true>(t.square + at, v, valid, aligned);
  if constexpr (!kAhead<Target>) store8<true>(t.param + at, p, valid, aligned);
  if (t.average != nullptr) {
    lerp8(average, p, weight);
    store8<true>(t.average + at, average, valid, aligned);
  }
  if constexpr (kAhead<Target>) {
    move_ahead8(p, base, velocity, rule.hyper);
    store8<true>(t.base + at, base, valid, aligned);
    store8<true>(t.velocity + at, velocity, valid, aligned);
    store8<true>(t.param + at, p, valid, aligned);
  }
}

// Calls launch(arguments, blocks) for every kMaxAdamTargets of the tensors that have elements.
template <typename Target, typename Launch>
void launch_adam(const Target* targets, int count, AdamRule rule, const Launch& launch) {
  launch_runs<kMaxAdamTargets>(
      targets, count, "adam_step", [](const Target& t) { return (t.count + kAdamRun - 1) / kAdamRun; },
      [](const Target& t) {
        return aligned16(t.param) && aligned16(t.grad) && aligned16(t.mean) && aligned16(t.square) &&
               aligned16(t.average) && aligned_ahead(t);
      },
      [&](const Runs<Target, kMaxAdamTargets>& runs, unsigned int blocks) {
        launch(AdamArgs<Target>{.runs = runs, .rule = rule}, blocks);
      });
}

}  // namespace pgolf
