// Bindings of the CUDA kernels of head_mix. On the CPU pgolf/ops/head_mix.py computes with torch's own
// operators.
#include "ops/checks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def("head_mix(Tensor y, Tensor v, Tensor? z, float scale, int kind) -> Tensor");
  m.def(
      "head_mix_backward(Tensor grad, Tensor y, Tensor v, Tensor? z, float scale, int kind) -> (Tensor dy, "
      "Tensor dv, Tensor dz)");
}
