"""Marks for torch.compile: they mean what torch's own do, and loading pgolf does not load the compiler."""

import subprocess
import sys

import pytest
import torch

from pgolf.ops._compiler import constant_result, not_compiled, room_for_graphs

MODULES = ["pgolf.ops", "pgolf.optim", "pgolf.train.run", "pgolf.evaluate.validation", "pgolf.report.alone"]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="torch's attention kernel for CUDA loads it")
def test_nothing_of_pgolf_loads_the_compiler():
    program = f"import sys, {', '.join(MODULES)}\nprint('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_constant_result_is_marked_as_torch_marks_it():
    def ours():
        pass

    def theirs():
        pass

    assert constant_result(ours) is ours
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_a_compiled_caller_keeps_a_constant_result_and_stays_out_of_what_is_not_compiled():
    """Neither body could be traced: a graph that takes one in would break, which fullgraph refuses."""
    seen = []

    @constant_result
    def constant() -> float:
        seen.append("constant")
        return 2.0

    @not_compiled
    def outside(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.compiler.is_compiling())
        return x + 1

    one = torch.ones(3)
    doubled = torch.compile(lambda x: x * constant(), backend="eager", fullgraph=True)
    assert doubled(one).tolist() == doubled(one).tolist() == [2.0] * 3 and seen == ["constant"]
    both = torch.compile(lambda x: outside(x) * 3, backend="eager")
    assert both(one).tolist() == [6.0] * 3 and seen == ["constant", False]


def test_several_models_have_room_for_the_graphs_of_all():
    config = torch._dynamo.config
    with config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        for _ in range(5):  # five kinds of layers, trained and scored, are 10 graphs of each model
            room_for_graphs(11)
        assert config.recompile_limit >= 5 * 10 and config.accumulated_recompile_limit >= 256 + 5 * 10
