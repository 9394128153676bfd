"""The compiled extension describes its build, and an error explains how to build it if it is missing."""

import re
import subprocess
import sys
from pathlib import Path

import torch

from pgolf import _C
from pgolf.ops import kernel_table


def test_extension_is_bound_to_no_python_and_says_how_it_was_built() -> None:
    assert Path(_C.__file__).name == "_C.abi3.so"
    info = _C.build_info()
    assert re.match(r"\d+\.\d+", info["torch_headers"]) and info["cxx_compiler"]
    assert bool(info["cuda_archs"]) == bool(info["cuda_compiler"]) == (info["cuda_reason"] == "")
    if info["cuda_compiler"].startswith("nvcc 13"):
        # What docs/quickstart/kernels.md lists as compiled; the PTX of "100" serves all later GPUs.
        assert info["cuda_archs"] == "80-real,89-real,90a-real,100,120-real"


def test_kernel_table_lists_every_registered_operator() -> None:
    table = {row["op"]: row for row in kernel_table()}
    registered = {
        name.removeprefix("pgolf::").split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("pgolf::")
    }
    # Attention of another package is registered in Python, by the file that wraps it.
    # Names that begin with "_" are operators that Python registers for those of the table.
    assert set(table) == {name for name in registered if not name.startswith(("fa4_", "_"))}
    for row in table.values():
        assert row["cpu"] != row["op"].startswith(("norm_mlp_", "stream_mix"))  # composed on the CPU
        assert row["cuda"] == bool(_C.build_info()["cuda_archs"] and torch.version.cuda)
        assert row["cuda"] != bool(row["reason"])


def test_missing_extension_names_the_build_command() -> None:
    program = "import sys; sys.modules['pgolf._C'] = None; import pgolf.ops"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pgolf's compiled extension pgolf._C could not be loaded")
    assert last.endswith("run: pip install --no-build-isolation -e .")
