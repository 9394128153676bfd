"""The short form of `make fuzz`: a few thousand damaged files, the same ones every time."""

import pytest
import torch
from artifact_helpers import TOY, make_state
from fuzz_reader import fuzz, good_artifact, outcome
from mutate import Mutator

from pgolf.artifact.header import GENERAL
from pgolf.quant.lqer import correct
from pgolf.quant.quantized import QuantizedState


@pytest.fixture(scope="module")
def good():
    return good_artifact()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_files_are_refused_or_hold_something_else(good, seed):
    result = fuzz(good, count=800, seed=seed)
    assert result["refused"] > 0.7 * result["count"] and result["read"] > 0


@pytest.mark.parametrize("coder", GENERAL)
def test_files_of_general_compressors_are_fuzzed_too(coder):
    result = fuzz(good_artifact(coder=coder), count=400, seed=6)
    assert result["refused"] > 0.7 * result["count"] and result["read"] > 0


def test_files_with_corrections_are_fuzzed_too():
    plain, error = make_state(TOY), torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    correction = correct(error, torch.ones(16), rank=2, kind="asym", group=5)
    good = good_artifact(QuantizedState(plain.quantized, plain.gates, plain.small, {"qo_bank.1": correction}))
    assert fuzz(good, count=600, seed=4)["read"] > 0


def test_the_mutator_reaches_every_part(good):
    """Mutations that no reader ever refuses, or always, would find nothing."""
    mutator = Mutator(good, 5)
    for kind in {k.__name__ for k in mutator.kinds}:
        bodies = [getattr(mutator, kind)() for _ in range(20)]
        assert len(set(bodies)) > 10, kind
        assert any(body != good[:-32] for body in bodies), kind
    assert outcome(good) == "read" and outcome(good[:-1] + bytes([good[-1] ^ 1])) == "refused"
