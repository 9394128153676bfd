"""qk_norm_rope_backward with a float32 gradient of q, while everything else is bfloat16.

Multiplied by `FINER`, a number of bfloat16 becomes one that bfloat16 rounds back to what it was. So an
operator that rounds the gradient of q is wrong by 0.13% everywhere.
"""

import pytest
import torch

from pgolf.ops import qk_norm_rope_backward, qk_norm_rope_backward_ref
from tests.conftest import requires_gpu
from tests.ops.checks import assert_no_worse_than_twice
from tests.ops.test_qk_norm_rope import (
    CPU,
    SIZES,
    Sizes,
    make_inputs,
    upstream_of,
)

FINER = 1.0013


@pytest.mark.parametrize("sizes", [Sizes(9), Sizes(9, 4, 4, 64, 6), Sizes(9, 1, 1, 10, 4)])
def test_a_float32_gradient_of_q_is_not_rounded(sizes: Sizes) -> None:
    inputs = make_inputs(sizes, torch.bfloat16, CPU)
    dq, dk, *dv = upstream_of(inputs, 2)
    dq = dq.float() * FINER
    want = qk_norm_rope_backward(dq.double(), dk.double(), [t.double() for t in dv], *inputs.double())
    dqkv, dgain = qk_norm_rope_backward(dq, dk, dv, *inputs)
    assert dqkv.dtype == torch.bfloat16 and dgain.dtype == torch.float32
    torch.testing.assert_close(dgain.double(), want[1], rtol=1e-5, atol=1e-4)
    # One rounding, that of the result: with a second one, of dq, some would be further away.
    torch.testing.assert_close(dqkv.double(), want[0], rtol=2**-8, atol=1e-5)


def test_only_the_gradient_of_q_may_be_float32() -> None:
    inputs = make_inputs(Sizes(3), torch.bfloat16, CPU)
    given = dict(zip(("dq", "dk", "dv"), upstream_of(inputs, 1), strict=True))
    for name, wanted in (("dq", "torch.bfloat16 or torch.float32"), ("dk", "torch.bfloat16")):
        changed = {**given, "dv": [given["dv"]], name: given[name].double()}
        with pytest.raises(TypeError, match=f"{name} must be {wanted}, got torch.float64"):
            qk_norm_rope_backward(**changed, **inputs._asdict())
    for name in ("dk", "dv"):
        changed = {**given, name: given[name].float()}
        with pytest.raises(TypeError, match=f"{name} must be torch.bfloat16, got torch.float32"):
            qk_norm_rope_backward(**{**changed, "dv": [changed["dv"]]}, **inputs._asdict())


@requires_gpu
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("values", [0, 2])
def test_a_float32_gradient_of_q_is_used_as_it_is(sizes: Sizes, values: int) -> None:
    inputs = make_inputs(sizes)
    dq, dk, *dv = upstream_of(inputs, values)
    dq = dq.float() * FINER
    names = ("dqkv", "dgain")
    got, base, rounded = (
        dict(zip(names, fn(grad, dk, dv, *inputs), strict=True))
        for fn, grad in (
            (qk_norm_rope_backward, dq),
            (qk_norm_rope_backward_ref, dq),
            (qk_norm_rope_backward, dq.bfloat16()),
        )
    )
    wide = [dq.double(), dk.double(), [t.double() for t in dv]]
    want = dict(zip(names, qk_norm_rope_backward_ref(*wide, *inputs.double()), strict=True))
    assert_no_worse_than_twice(got, base, want)
    # The sum over tokens and columns, which is not rounded, shows that dq was not either.
    error, of_rounded = ((t["dgain"].double() - want["dgain"]).norm().item() for t in (got, rounded))
    assert error <= 0.05 * of_rounded or sizes.tokens == 0
