// The small tensor that carries what changes from step to step. Kernels read it from device memory, so that a
// captured CUDA graph follows a schedule. muon_step.h and adam_step.h share it: one tensor tells all of a
// step.
#pragma once

namespace pgolf {

// Places in the tensor, (kHyperCount,) float32.
enum HyperPlace : int {
  kHyperLr,
  kHyperMomentum,
  kHyperWeightDecay,
  kHyperGradScale,  // factor of the clip; NaN or infinity: the step is skipped
  kHyperAverageWeight,
  kHyperVelocityWeight,  // of EMA-Nesterov, ahead.h, and so is the last one
  kHyperShift,
  kHyperCount
};

}  // namespace pgolf
