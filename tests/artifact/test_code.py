"""The counted code: stripped, complete, as small as the ledger says. That it runs: tests/e2e/test_code.py."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

from pgolf.artifact.code import (
    EVALUATE,
    EVALUATE_GENERAL,
    SCRIPT,
    TRAIN,
    _Strip,
    code_bytes,
    code_program,
    code_text,
    reader_code,
    unpack_code,
)
from pgolf.artifact.portable import references, without_extension

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def code():
    return reader_code()


def test_it_is_what_reading_and_scoring_import(code):
    wanted = {"artifact/read", "artifact/header", "evaluate/ttt", "model/gpt", "quant/grid", "config"}
    assert {f"pgolf/{name}.py" for name in wanted} <= set(code)
    folders = {path.split("/")[1] for path in code}
    assert not folders & {"train", "optim", "cli", "presets.py"}
    reports = {path for path in code if path.startswith("pgolf/report/")}
    assert reports == {"pgolf/report/__init__.py", "pgolf/report/alone.py"}
    assert not set(code) & {"pgolf/quant/gptq.py", "pgolf/artifact/write.py", "pgolf/ops/muon_step.py"}


def test_nothing_is_left_that_does_not_run(code):
    for path, source in code.items():
        kinds = {token.type for token in tokenize.generate_tokens(io.StringIO(source).readline)}
        assert tokenize.COMMENT not in kinds, path
        for node in ast.walk(ast.parse(source)):
            bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert not (bare and isinstance(node.value.value, str)), f"{path}: {node.value.value!r}"


def test_functions_that_nothing_names_are_left_out_and_others_kept(code):
    names = {
        path: {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        for path, source in code.items()
    }
    assert "decode_codes" in names["pgolf/ops/range_coder.py"]
    assert "encode_codes" not in names["pgolf/ops/range_coder.py"]
    assert "compress" not in names["pgolf/artifact/codec.py"]
    # Called by the dispatcher only: their decorators registered them.
    assert "_forward" in names["pgolf/model/fa4.py"]


def methods(source):
    """Return the methods of each class in a module."""
    classes = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
    return {c.name: {n.name for n in c.body if isinstance(n, ast.FunctionDef)} for c in classes}


def test_methods_that_nothing_names_are_left_out_but_for_what_the_scoring_program_calls(code):
    program = ast.parse((ROOT / "pgolf" / "report" / "alone.py").read_text())
    called = {n.attr for n in ast.walk(program) if isinstance(n, ast.Attribute)}
    gone = set()
    for path, source in code.items():
        kept = methods(source)
        for name, found in methods((ROOT / path).read_text()).items():
            gone |= {f"{name}.{method}" for method in found - kept.get(name, found)}
    assert not {name for name in gone if name.split(".")[1] in called}
    assert {"Dist.reduce_scatter_avg", "DataFolder.facts"} <= gone
    assert "Dist.all_reduce" not in gone and not [name for name in gone if "__" in name]


def test_no_function_that_nothing_registers_has_types(code):
    for path, source in code.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                assert node.returns is None, f"{path}: {node.name}"
                assert not [a for a in node.args.args if a.annotation], f"{path}: {node.name}"
    assert "max_context: int" in code["pgolf/config_model.py"]  # a field
    assert "branch: Branch" in code["pgolf/model/blocks.py"]  # one of a named tuple
    assert "attention_name:" not in code["pgolf/model/gpt.py"]


def test_what_is_counted_is_what_unpacks(code, tmp_path):
    text = code_text()
    paths = unpack_code(text, tmp_path)
    found = {str(p.relative_to(tmp_path)): p.read_text().removesuffix("\n") for p in paths}
    assert found.pop(EVALUATE.coder) == (ROOT / EVALUATE.coder).read_text().strip()
    assert found == code
    assert code_bytes() == len(code_program())
    assert 30_000 < code_bytes() < 69_000


ALLOWED = {"torch", "numpy", "sentencepiece", "brotli", "triton", "flash_attn", "pgolf"}


OPTIONAL = {EVALUATE: set(), EVALUATE_GENERAL: set(), TRAIN: {"matplotlib", "tensorboard", "wandb"}}
"""Packages that a program uses where they are installed: a run without them has no plot and no tracker."""


@pytest.mark.parametrize("program", [EVALUATE, EVALUATE_GENERAL, TRAIN], ids=lambda p: p.coder or p.name)
def test_nothing_needs_the_extension_and_only_allowed_packages_are_imported(program):
    allowed = ALLOWED | OPTIONAL[program] | set(sys.stdlib_module_names)
    for path, source in {**reader_code(program), SCRIPT: code_program(program).decode()}.items():
        for node in ast.walk(ast.parse(source)):
            named = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.Import):
                top = {name.split(".")[0] for name in named}
            elif isinstance(node, ast.ImportFrom):
                top = {(node.module or "").split(".")[0]}
                assert node.level == 0
            else:
                continue
            assert top <= allowed, path
            assert "_C" not in named and not [n for n in named if n.startswith("pgolf._C")], path
        if path != "pgolf/model/fa4.py":  # which defines its operators itself
            assert "torch.ops.pgolf" not in source and "pgolf::" not in source, path


@pytest.mark.parametrize("program", [EVALUATE, EVALUATE_GENERAL, TRAIN], ids=lambda p: p.coder or p.name)
def test_programs_that_a_newer_python_wrote_can_be_read_by_python_3_10(program):
    """ast.unparse of Python 3.12 uses the quotes of an f-string within its braces, too."""
    for path, source in {**reader_code(program), SCRIPT: code_program(program).decode()}.items():
        for node in ast.walk(ast.parse(source)):
            parts = node.values if isinstance(node, ast.JoinedStr) else []
            braces = [part.value for part in parts if isinstance(part, ast.FormattedValue)]
            inside = [n for part in braces for n in ast.walk(part) if isinstance(n, ast.Constant)]
            assert not [n for n in inside if isinstance(n.value, str | bytes)], path


def test_f_strings_become_calls_that_give_the_same_text():
    source = """print(f'{{{x["a"]!r:>{n}}}} {n:03}', f'{n}', f'{x["b"]:{n}.{n}f}')"""
    tree = ast.fix_missing_locations(_Strip().visit(ast.parse(source)))
    texts = []
    for code in (source, ast.unparse(tree)):
        exec(code, {"x": {"a": "q", "b": 1.5}, "n": 7, "print": lambda *a: texts.append(a)})
    assert texts[0] == texts[1] == ("{    'q'} 007", "7", "1.5000000")
    assert ".format(" in ast.unparse(tree) and "f'{n}'" in ast.unparse(tree)


def test_the_program_of_a_general_compressor_has_no_coder_to_compile(code):
    found = reader_code(EVALUATE_GENERAL)
    assert set(code) - set(found) == {"pgolf/ops/_coder.py"} and set(found) <= set(code)
    assert "ctypes" not in "".join(found.values()) and "_coder" not in found["pgolf/ops/range_coder.py"]
    assert code_bytes("zlib") == code_bytes("brotli") == len(code_program(EVALUATE_GENERAL))
    assert 6_000 < code_bytes("range") - code_bytes("brotli") < 8_000


def test_only_the_program_that_trains_has_threads():
    path = "pgolf/model/threads.py"
    assert "autograd.Function" in reader_code(TRAIN)[path] and "class" in reader_code(TRAIN)[path]
    for program in (EVALUATE, EVALUATE_GENERAL):
        assert "class" not in reader_code(program)[path] and "threaded" in reader_code(program)[path]


def test_the_size_of_the_program_that_trains():
    assert 90_000 < len(code_program(TRAIN)) < 162_500


@pytest.mark.parametrize("which", [EVALUATE, TRAIN], ids=lambda p: p.name)
def test_the_program_is_plain_text_that_runs_nothing_when_it_is_imported(which):
    program = code_program(which)
    tree = ast.parse(program)
    assert program.isascii() and isinstance(tree.body[-1], ast.If)
    assert {type(node) for node in tree.body} == {
        ast.Import,
        ast.ImportFrom,
        ast.Assign,
        ast.FunctionDef,
        ast.If,
    }


def test_references_take_the_place_of_operators(code):
    found = references(ROOT / "pgolf" / "ops")
    assert {"linear_softcap_ce_ref": "linear_softcap_ce", "trellis_values_ref": "trellis_values"}.items() <= (
        found.items()
    )
    assert "decode_codes_ref" not in found, "60 us per code"
    source = code["pgolf/ops/linear_softcap_ce.py"]
    assert "torch.nn.functional.linear" in source and "_ref" not in source and "_backward" not in source


def test_a_module_is_rewritten_to_need_no_extension():
    source = """
import pgolf.ops._extension
from pgolf import _C
from pgolf.ops.other import other, other_ref
from safetensors.torch import save
def f(x):
    return torch.ops.pgolf.f(x)
def f_ref(x):
    return other_ref(x) + _used(x)
def _used(x):
    return x
def _backward(x):
    return _only_for_backward(x)
def _only_for_backward(x):
    return x
torch.library.register_autograd("pgolf::f", _backward)
refuse_derivatives("f", "f")
"""
    names = {"f_ref": "f", "other_ref": "other"}
    assert ast.unparse(without_extension(ast.parse(source), names, operators=True)) == (
        "from pgolf.ops import _coder as _C\n"
        "from pgolf.ops.other import other\n"
        "from pgolf.artifact.tensor_file import save\n\n"
        "def f(x):\n    return other(x) + _used(x)\n\n"
        "def _used(x):\n    return x"
    )
