"""What the command line says of an error: one line where the user can mend it, a traceback where we must."""

import pytest
import torch

from pgolf.cli.main import main
from pgolf.errors import RunError, UserError


@pytest.fixture
def failing(monkeypatch):
    """Return a function that lets `pgolf config` raise an error, runs it, and returns the exit code."""

    def run(error: Exception, *words: str) -> int:
        def fail(argv: list[str]) -> int:
            raise error

        monkeypatch.setattr("pgolf.cli.config.main", fail)
        return main(["config", "tiny", *words])

    return run


CHECKED = [
    (UserError("steps must be >= 1, got 0; pass --steps"), "steps must be >= 1, got 0; pass --steps"),
    (RunError("no such GPU; use device cpu"), "no such GPU; use device cpu"),
    (FileNotFoundError(2, "No such file or directory", "a"), "a: No such file or directory"),
    (MemoryError(), "there is not enough memory for it; use smaller settings"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), "2.00 GiB); use"),
    (OverflowError(34, "Numerical result out of range"), "too large (Numerical result out of range); use"),
]


@pytest.mark.parametrize(("error", "message"), CHECKED, ids=lambda v: type(v).__name__)
def test_what_the_user_can_mend_is_one_line(failing, capsys, error, message):
    assert failing(error) == 2
    said = capsys.readouterr().err
    assert said.startswith("pgolf config: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [TypeError("no"), ValueError("no"), RuntimeError("no"), KeyError("no")])
def test_a_fault_keeps_its_traceback_and_is_said_to_be_ours(failing, capsys, error):
    assert failing(error) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)") and "in fail\n    raise error" in said
    assert f"pgolf config: {type(error).__name__}: " in said
    assert said.splitlines()[-1].startswith("This is a fault of pgolf, not of the command: please report it")


def test_the_traceback_of_a_checked_error_is_shown_on_demand(failing, capsys):
    assert failing(UserError("steps must be >= 1"), "--debug") == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last)")
    assert said.endswith("pgolf config: steps must be >= 1\n") and "fault of pgolf" not in said


def test_a_format_that_matplotlib_lacks_is_named(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["polar", "--plot", str(tmp_path / "map.nope")]) == 2
    said = capsys.readouterr().err
    assert "matplotlib writes no .nope files; use one of " in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())
