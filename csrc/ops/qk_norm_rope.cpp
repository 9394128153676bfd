// Bindings of the CUDA kernels of qk_norm_rope. On the CPU pgolf/ops/qk_norm_rope.py computes with torch's own
// operators.
#include "ops/checks.h"

STABLE_TORCH_LIBRARY_FRAGMENT(pgolf, m) {
  m.def(
      "qk_norm_rope(Tensor qkv, Tensor gain, Tensor cos, Tensor sin, int head_dim) -> (Tensor q, Tensor k)");
  m.def(
      "qk_norm_rope_backward(Tensor dq, Tensor dk, Tensor[] dv, Tensor qkv, Tensor gain, Tensor cos, Tensor "
      "sin, int head_dim) -> (Tensor dqkv, Tensor dgain)");
}
