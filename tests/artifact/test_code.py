"""The counted code: stripped, complete, as small as the ledger says. That it runs: tests/e2e/test_code.py."""

import ast
import io
import tokenize
from pathlib import Path

import brotli
import pytest

from pgolf.artifact.code import code_bytes, code_text, reader_code, unpack_code

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def code():
    return reader_code()


def test_it_is_what_reading_and_scoring_import(code):
    wanted = {"artifact/read", "artifact/header", "evaluate/ttt", "model/gpt", "quant/grid", "config"}
    assert {f"pgolf/{name}.py" for name in wanted} <= set(code)
    folders = {path.split("/")[1] for path in code}
    assert not folders & {"train", "optim", "cli", "report", "presets.py"}
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
    assert "linear_softcap_ce" in names["pgolf/ops/linear_softcap_ce.py"]
    assert any("register_fake" in source for source in code.values())


def methods(source):
    """Return the methods of each class in a module."""
    classes = (n for n in ast.parse(source).body if isinstance(n, ast.ClassDef))
    return {c.name: {n.name for n in c.body if isinstance(n, ast.FunctionDef)} for c in classes}


def test_methods_that_nothing_names_are_left_out_but_for_what_the_scoring_program_calls(code):
    program = ast.parse((ROOT / "pgolf" / "report" / "score.py").read_text())
    called = {n.attr for n in ast.walk(program) if isinstance(n, ast.Attribute)}
    called |= {"checked"}  # by getattr
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


def test_what_is_counted_is_what_unpacks(code, tmp_path):
    text = code_text()
    paths = unpack_code(text, tmp_path)
    assert {str(p.relative_to(tmp_path)): p.read_text().removesuffix("\n") for p in paths} == code
    assert code_bytes() == len(brotli.compress(text.encode(), quality=11, lgwin=24))
    assert 15_000 < code_bytes() < 36_000
