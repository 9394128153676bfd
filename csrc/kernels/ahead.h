// EMA-Nesterov in the passes that write the weights: parameters p are kept ahead of the weights, along a
// velocity v.
//
// v <- lerp(v, x - base, velocity_weight);  base <- x;  p <- x + shift v
//
// x is what the optimizer made of p, base that of the step before. A step that is skipped leaves v and base:
// p <- base + shift v. velocity_weight and shift, which is that of the next step, come from the tensor of
// hyper.h. pgolf/optim/ema_nesterov.py has the source.
#pragma once

#include <cstdint>

#include "kernels/hyper.h"

namespace pgolf {

// A tensor of muon_apply or adam_step with its base and velocity: both (count,), in place.
template <typename Target>
struct Ahead : Target {
  float* base;
  float* velocity;
};

template <typename Target>
inline constexpr bool kAhead = false;
template <typename Target>
inline constexpr bool kAhead<Ahead<Target>> = true;

// On the CPU: `param` holds x, unless the step is skipped.
template <typename Target>
void move_ahead(const Ahead<Target>& t, const float* hyper, bool skipped, int64_t begin, int64_t end) {
  const float weight = hyper[kHyperVelocityWeight], shift = hyper[kHyperShift];
  if (skipped) {
    for (int64_t i = begin; i < end; ++i) t.param[i] = t.base[i] + shift * t.velocity[i];
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    const float x = t.param[i], moved = x - t.base[i], gap = moved - t.velocity[i];
    // Two forms, as torch.lerp: exact at both ends of the weight.
    const float v = weight < 0.5f ? t.velocity[i] + weight * gap : moved - gap * (1.0f - weight);
    t.velocity[i] = v;
    t.base[i] = x;
    t.param[i] = x + shift * v;
  }
}

}  // namespace pgolf
