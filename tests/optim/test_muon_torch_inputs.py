"""`pgolf.optim.Muon` on the inputs with which torch tests its own Muon, those for errors included.

They are in `torch.testing._internal.common_optimizers`, whose import changes torch's global flags. So this
file also runs as a program in a process of its own, which prints what it saw as JSON.
"""

import importlib.util
import json
import subprocess
import sys
import types
import unittest
import warnings

import pytest
import torch
from torch import nn

import pgolf.optim
from tests.conftest import DEVICES

STEPS = 3
# What torch says, and what this class says about the same input.
ERRORS = {
    "invalid param type": ("TypeError", "params argument given to the optimizer should be an iterable"),
    "a param group cannot have duplicate parameters": ("UserWarning", "parameter group with duplicate param"),
    "duplicate parameters should not occur across param groups either": (
        "ValueError",
        "some parameters appear in more than one parameter group",
    ),
    "Tensor lr must be 1-element": ("ValueError", "tensor lr must have one element, got shape (2,)"),
    "all optimizer params should be with/without names": ("ValueError", "Some param names are missing"),
    "all optimizer param groups should be with/without names.": (
        "ValueError",
        "cannot add param group with names to the optimizer",
    ),
    "only support `original` and `match_rms_adamw`": (
        "ValueError",
        "adjust_lr_fn must be one of (None, 'original', 'match_rms_adamw'), got 'arbitrary'",
    ),
    # Torch raises RuntimeError in the step, this class already when it is made.
    "does not support complex parameters": ("TypeError", "is torch.complex64, expected a real dtype"),
}
ACCEPTED = {"only support 2D parameters"}  # a stack of matrices is a parameter of this class


@pytest.fixture(scope="module", params=DEVICES)
def seen(request):
    """What the program saw on a device."""
    done = subprocess.run(
        [sys.executable, __file__, request.param], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_there_are_inputs_and_none_is_new(seen):
    assert len(seen["inputs"]) >= 7
    assert set(seen["errors"]) == set(ERRORS) | ACCEPTED


def test_each_input_moves_the_parameters_as_torchs_muon_does(seen):
    # Torch iterates in bfloat16; the distance is relative to how far torch's parameters moved.
    assert {desc: d for desc, d in seen["inputs"].items() if not d < 0.05} == {}


@pytest.mark.parametrize("desc", list(ERRORS))
def test_each_error_input_is_refused(seen, desc):
    kind, message = ERRORS[desc]
    assert seen["errors"][desc][0] == kind
    assert message in seen["errors"][desc][1]


def test_stacks_of_matrices_are_accepted(seen):
    assert {desc: seen["errors"][desc] for desc in ACCEPTED} == {desc: ["", ""] for desc in ACCEPTED}


def distance(kwargs, device):
    """Return |ours - torch's| / |torch's - start| after some steps."""
    ends = []
    for make in (pgolf.optim.Muon, torch.optim.Muon):
        rng = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(10, 6, generator=rng).to(device))
        start = p.detach().clone()
        optimizer = make([p], **kwargs)
        for _ in range(STEPS):
            p.grad = torch.randn(p.shape, generator=rng).to(device)
            optimizer.step()
        ends.append(p.detach())
    return ((ends[0] - ends[1]).norm() / (ends[1] - start).norm()).item()


def refusal(case):
    """Return the error that an input raises in the constructor or in a step."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pgolf.optim.Muon(case.params, **case.kwargs).step()
    except (TypeError, ValueError, RuntimeError, UserWarning) as e:
        return [type(e).__name__, str(e)]
    return ["", ""]


def main(device):
    """Print what the inputs do on a device."""
    if importlib.util.find_spec("expecttest") is None:  # only torch's tests use it
        stub = types.ModuleType("expecttest")
        stub.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stub
    from torch.testing._internal import common_optimizers as inputs

    found = inputs.optim_inputs_func_muon(device)
    # For other devices torch leaves out those that every optimizer shares; these stay on the CPU then.
    errors = {
        error.optimizer_error_input.desc: error.optimizer_error_input
        for place in dict.fromkeys(["cpu", device])
        for error in inputs.optim_error_inputs_func_muon(place, torch.float32)
    }
    result = {
        "inputs": {case.desc: distance(case.kwargs, device) for case in found},
        "errors": {desc: refusal(case) for desc, case in errors.items()},
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1])
