"""`pgolf polar` prints what the package computes, and writes the plot to a file."""

import ast
import sys

import pytest

from pgolf.cli.main import main
from pgolf.optim.polar import NAMES, POLAR_EXPRESS_GOLF, golf_lower, polar_express, quality, slope
from pgolf.report.polar_plot import plot_scalar_maps


def printed(capsys, *arguments):
    """Return the title, the table, and the numbers by name that one run of the command prints."""
    assert main(["polar", *arguments]) == 0
    text = capsys.readouterr().out
    title, rest = text.split("\n", 1)
    literal, rest = rest.split("]\n", 1)
    rows = [line.split() for line in rest.splitlines() if line.startswith((*NAMES, "solved"))]
    return title, ast.literal_eval(literal + "]"), {row[0]: [float(v) for v in row[1:]] for row in rows}


def test_default_prints_the_solved_table_and_all_named_ones(capsys):
    title, table, rows = printed(capsys)
    assert title == "solved, 5 steps for [0.003, 1], cushion 0.02407, safety 1"
    assert table == polar_express(3e-3, 5)
    assert set(rows) == {"solved", *NAMES}
    # Noted before this code was written: slope, range, RMS, mean, variation over [3e-3, 1].
    assert rows["jordan"] == pytest.approx([5, 485, 0.68, 1.20, 0.19, 0.92, 0.188], rel=0.01)
    assert rows["polar_express_golf"] == pytest.approx([5, 989, 0.859, 1.141, 0.094, 1.00, 0.094], rel=0.01)
    got = quality(table, 3e-3)
    assert rows["solved"] == pytest.approx([5, slope(table), *got], abs=0.06)
    assert rows["solved"][4:] == pytest.approx([got.rms, got.mean, got.variation], abs=1e-4)


def test_arguments_reach_the_generator(capsys):
    arguments = ["--steps", "4", "--lower", f"{golf_lower(4)}", "--cushion", "0.02", "--safety", "1.02"]
    _, table, rows = printed(capsys, *arguments)
    assert table == polar_express(golf_lower(4), 4, cushion=0.02, safety=1.02)
    assert rows["solved"] == rows["polar_express_golf"]
    assert (rows["jordan"][0], rows["you"][0]) == (4, 5)


def test_named_table_is_printed_digit_for_digit(capsys):
    title, table, _ = printed(capsys, "--table", "polar_express_golf")
    assert title == "polar_express_golf, 5 steps"
    assert tuple(table) == POLAR_EXPRESS_GOLF


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "polar"], "pgolf polar: --table must be solved or one of ('jordan', "),
        (["--table", "cans", "--steps", "4"], "'cans' exist for 5 steps only, got steps=4"),
        (["--lower", "1"], "lower must be in (0, 1), got 1.0"),
        (["--steps", "0"], "expected steps >= 1"),
        (["--steps", "1000000000"], "--steps must be at most 100, got 1000000000"),
    ],
    ids=["name", "length", "lower", "steps", "endless"],
)
def test_bad_arguments_are_one_line(capsys, arguments, message):
    assert main(["polar", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_plot_is_written_in_the_format_of_its_suffix(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    for name, magic in (("maps.png", b"\x89PNG"), ("maps.svg", b"<?xml")):
        assert main(["polar", "--steps", "3", "--plot", str(tmp_path / name)]) == 0
        assert capsys.readouterr().out.endswith(f"{tmp_path / name}\n")
        assert (tmp_path / name).read_bytes().startswith(magic)
    assert main(["polar", "--plot", str(tmp_path / "maps.docx")]) == 2
    assert "docx" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["maps.png", "maps.svg"]


def test_plot_without_matplotlib_says_what_to_install(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert plot_scalar_maps({"one": [(2.0, -1.5, 0.5)]}, tmp_path / "a.png", lower=0.01) is False
    assert main(["polar", "--plot", str(tmp_path / "a.png")]) == 2
    assert "--plot needs matplotlib; pip install 'pgolf[plot]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
