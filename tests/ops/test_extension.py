"""The compiled extension describes its build, and an error explains how to build it if it is missing."""

import subprocess
import sys

import torch

from pgolf import _C
from pgolf.ops import kernel_table


def test_extension_was_built_for_the_torch_in_use() -> None:
    info = _C.build_info()
    assert info["torch_version"] == torch.__version__
    assert info["torch_cuda"] == (torch.version.cuda or "")


def test_missing_cuda_kernels_come_with_a_reason() -> None:
    info = _C.build_info()
    assert info["cuda_linked"] == (info["cuda_reason"] == "")
    assert info["cuda_compiled"] == bool(info["cuda_archs"]) == bool(info["cuda_compiler"])


def test_kernel_table_lists_every_registered_operator() -> None:
    table = {row["op"]: row for row in kernel_table()}
    registered = {
        name.removeprefix("pgolf::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pgolf::")
    }
    # Attention of another package is registered in Python, by the file that wraps it.
    assert set(table) == {name for name in registered if not name.startswith("fa4_")}
    for row in table.values():
        assert row["cpu"]
        assert row["cuda"] == _C.build_info()["cuda_linked"]
        assert row["cuda"] != bool(row["reason"])


def test_missing_extension_names_the_build_command() -> None:
    program = "import sys; sys.modules['pgolf._C'] = None; import pgolf.ops"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pgolf's compiled extension pgolf._C could not be loaded")
    assert last.endswith("run: pip install --no-build-isolation -e .")
