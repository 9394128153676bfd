"""Rules for the source code that a program can check; the sources are parsed, not imported."""

import ast
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pgolf"

# A part of the package may import the parts on earlier lines; parts on one line must not import each other.
FLOORS = [
    ["errors", "files"],
    ["config_checks", "config_io", "config_versions"],
    ["config_evaluate", "config_model"],
    ["config", "env", "peers", "stats"],
    ["presets", "published", "_C", "track", "watch"],
    ["ops"],
    ["dist", "graphs", "log", "data", "integrations"],
    ["model", "optim"],
    ["quant"],
    ["artifact"],
    ["evaluate"],
    ["report"],
    ["train"],
    ["ablate"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}

NATIVE_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}
SOURCE_SUFFIXES = NATIVE_SUFFIXES | {".py", ".pyi", ".md", ".toml", ".txt", ""}
FILE_WARN, FILE_LIMIT = 500, 600
FUNCTION_WARN, FUNCTION_LIMIT = 40, 60
TODO_LIMIT = 5


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def all_sources() -> list[Path]:
    folders = [
        p for p in (ROOT / f for f in ("pgolf", "csrc", "tests", "bench", "examples", ".ci")) if p.is_dir()
    ]
    found = [p for p in ROOT.iterdir() if p.is_file()] + [
        p for f in folders for p in f.rglob("*") if p.is_file()
    ]
    return sorted(p for p in found if p.suffix in SOURCE_SUFFIXES and "__pycache__" not in p.parts)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_parts(tree: ast.AST) -> Iterator[str]:
    """Yield the first part below `pgolf` of every import, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (d.split(".")[1] for d in dotted if d.startswith("pgolf."))


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor_violations(floor: str, source: str) -> list[str]:
    """Return the floors that a file on `floor` must not import but does."""
    parts = {p for p in imported_parts(ast.parse(source)) if not p.startswith("__version")}
    return sorted(p for p in parts if p != floor and LEVEL.get(p, -1) >= LEVEL[floor])


@pytest.mark.parametrize("path", python_files("pgolf"), ids=name)
def test_imports_only_go_to_lower_floors(path: Path) -> None:
    floor = floor_of(path)
    if floor == "__init__":
        return  # it belongs to no floor: see the two tests of importing pgolf
    assert floor in LEVEL, f"{floor} has no floor; add it to a line of FLOORS"
    assert not floor_violations(floor, path.read_text())


@pytest.mark.parametrize(
    ("floor", "source", "expected"),
    [
        ("data", "from pgolf.model.gpt import GPT", ["model"]),
        ("data", "def f():\n    import pgolf.train.trainer", ["train"]),
        ("data", "from pgolf import log, config", ["log"]),
        ("train", "from pgolf.model import gpt\nfrom pgolf.train import weights", []),
    ],
)
def test_the_floor_check_finds_forbidden_imports(floor: str, source: str, expected: list[str]) -> None:
    assert floor_violations(floor, source) == expected


def imported_at_once(source: str) -> list[str]:
    """Return the imports that run when a file is imported: those at the top, except under TYPE_CHECKING."""
    body = [
        n
        for n in ast.parse(source).body
        if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))
    ]
    return [ast.unparse(n) for n in body if isinstance(n, ast.Import | ast.ImportFrom)]


def test_the_check_of_imports_at_once_sees_only_those() -> None:
    source = "import torch\nif TYPE_CHECKING:\n    import numpy\ndef f():\n    import brotli"
    assert imported_at_once(source) == ["import torch"]


def test_importing_pgolf_loads_nothing_but_itself() -> None:
    assert imported_at_once((PACKAGE / "__init__.py").read_text()) == [
        "from typing import TYPE_CHECKING, Any"
    ]
    program = (
        "import sys, pgolf; dir(pgolf); print(*(m for m in sys.modules if m.startswith(('pgolf', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["pgolf"]


def test_config_presets_and_env_do_not_import_torch() -> None:
    for module in (
        "config",
        "config_checks",
        "config_evaluate",
        "config_io",
        "config_model",
        "config_versions",
        "presets",
        "published",
        "env",
    ):
        for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "torch"], module


def test_kernels_include_only_standard_cuda_and_kernel_headers() -> None:
    for path in sorted((ROOT / "csrc" / "kernels").iterdir()):
        for quote, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), flags=re.M):
            if quote == '"':
                assert header.startswith("kernels/"), f"{name(path)} includes {header}"
            else:
                standard = re.fullmatch(r"[a-z_0-9]+", header)
                cuda = re.fullmatch(r"(cuda|cooperative_groups|mma)[a-z_0-9A-Z]*(\.h)?|(cuda|cub)/.+", header)
                vector = header in ("immintrin.h", "arm_neon.h", "cpuid.h")
                assert standard or cuda or vector, f"{name(path)} includes {header}"


def uses(path: Path, *patterns: str) -> list[str]:
    """Return the attribute accesses and imports in a file that match one of the dotted names."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            dotted = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dotted = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [f"{name(path)}:{node.lineno} {d}" for d in dotted if d in patterns]
    return found


def test_environment_variables_are_read_in_env_only() -> None:
    others = [p for p in python_files("pgolf") if p != PACKAGE / "env.py"]
    assert not [u for p in others for u in uses(p, "os.environ", "os.getenv", "os.putenv", "os.environb")]


def test_nothing_is_loaded_with_pickle() -> None:
    forbidden = ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "torch.load")
    assert not [u for p in python_files("pgolf") for u in uses(p, *forbidden)]
    assert not [name(p) for p in python_files("pgolf") if "allow_pickle=True" in p.read_text()]


@pytest.mark.parametrize("path", all_sources(), ids=name)
def test_source_is_ascii(path: Path) -> None:
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        assert line.isascii(), f"{name(path)}:{number}: {line!r}"


def test_files_stay_readable_in_length() -> None:
    long = []
    for path in all_sources():
        lines = len(path.read_bytes().splitlines())
        code = path.suffix in NATIVE_SUFFIXES | {".py"}
        if code and lines > FILE_WARN:
            warnings.warn(f"{name(path)} has {lines} lines, aim at {FILE_WARN}", stacklevel=1)
        if code and lines > FILE_LIMIT:
            long.append(f"{name(path)}: {lines}")
    assert not long, f"more than {FILE_LIMIT} lines; split by what a reader looks for"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function's body without its docstring."""
    body = node.body
    if ast.get_docstring(node) is not None:
        body = body[1:]
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def test_functions_stay_readable_in_length() -> None:
    long = []
    for path in python_files("pgolf"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = function_lines(node)
            if lines > FUNCTION_WARN:
                warnings.warn(f"{name(path)}:{node.lineno} {node.name} has {lines} lines", stacklevel=1)
            if lines > FUNCTION_LIMIT:
                long.append(f"{name(path)}:{node.lineno} {node.name}: {lines}")
    assert not long, f"more than {FUNCTION_LIMIT} lines of code in one function"


COMPOSED = {"doc_attention", "head_mix", "norm_mlp", "qk_norm_rope", "qkv_rope", "stream_mix"}
"""Operators that torch's own compute where they have no CUDA kernel."""
STEMS = [p for p in python_files("pgolf/ops") if not p.stem.startswith("_")]


@pytest.mark.parametrize("path", STEMS, ids=name)
def test_every_operator_has_reference_kernels_tests_and_bench(path: Path) -> None:
    functions = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
    public = {f for f in functions if not f.startswith("_") and not f.endswith("_ref")}
    assert public
    assert {f"{f}_ref" for f in public} <= functions, "a public operator has no _ref"
    stem = path.stem
    needed = [f"csrc/kernels/{stem}.h", f"csrc/ops/{stem}.cpp"]
    needed += [f"tests/ops/test_{stem}.py", f"bench/ops/bench_{stem}.py"]
    # One that is made of another operator, through its tensor face, has that one's CPU kernel.
    binding = (ROOT / "csrc" / "ops" / f"{stem}.cpp").read_text()
    others = set(re.findall(r'#include "ops/(\w+)\.h"', binding)) - {"checks", stem}
    if not others and stem not in COMPOSED:
        needed += [f"csrc/kernels/{stem}_cpu.cpp", f"csrc/tests/test_{stem}.cpp"]
    assert not [n for n in needed if not (ROOT / n).is_file()], "missing files of this operator"


def test_todos_are_few() -> None:
    found = [
        f"{name(p)}:{n}"
        for p in all_sources()
        if p != Path(__file__)
        for n, line in enumerate(p.read_text().splitlines(), start=1)
        if "TODO(" in line and p.name != "Makefile"
    ]
    assert len(found) <= TODO_LIMIT, found
