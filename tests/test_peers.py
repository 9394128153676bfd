"""Optional packages: every exception of their import is recorded as the reason and ends nothing."""

import sys
from pathlib import Path

import pytest

from bench import ce_peers, polar_peers
from pgolf.cli import info
from pgolf.data import text
from pgolf.peers import find_peer
from pgolf.report.plots import plot_loss

BROKEN = {
    "TypeError('unsupported operand')": "not usable: TypeError: unsupported operand",
    "ImportError('libcuda.so.1: not there\\nmore')": "not usable: ImportError: libcuda.so.1: not there",
    "ModuleNotFoundError('No module named x', name='x')": "not installed",
    "AttributeError('no attribute')": "not usable: AttributeError: no attribute",
    "SystemExit(3)": "not usable: SystemExit: 3",
    "ZeroDivisionError": "not usable: ZeroDivisionError",
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that puts a package on the path whose import raises an exception."""

    def install(package: str, error: str) -> None:
        for name in [n for n in sys.modules if n.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise {error}\n")
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize("error", list(BROKEN))
def test_whatever_an_import_raises_is_the_reason(broken, error: str):
    broken("surprising", error)
    peer = find_peer("surprising", "surprising.module", "attribute")
    assert (peer.usable, peer.found, peer.version, peer.problem) == (False, None, "", BROKEN[error])


def test_a_package_that_works_is_found_and_a_missing_attribute_is_a_reason():
    peer = find_peer("torch", "torch.nn.functional", "linear")
    assert peer.usable and peer.found is sys.modules["torch"].nn.functional.linear and peer.version
    assert (
        "has no attribute 'linear_typo'" in find_peer("torch", "torch.nn.functional", "linear_typo").problem
    )
    assert find_peer("no-such-package", "no_such_package").problem == "not installed"


def test_interrupts_are_not_swallowed(broken):
    broken("surprising", "KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        find_peer("surprising", "surprising")


@pytest.mark.parametrize("package", ["quack", "liger_kernel", "cut_cross_entropy", "gram_newton_schulz"])
def test_a_peer_that_breaks_at_import_leaves_the_benches_running(broken, capsys, package: str):
    broken(package, "TypeError('made for another version')")
    names = [
        *ce_peers.from_logits(),
        *ce_peers.chunked(),
        *polar_peers.gram_newton_schulz(((1.0, 0.0, 0.0),)),
    ]
    assert not [n for n in names if package.split("_")[0] in n]
    assert "not usable: TypeError: made for another version" in capsys.readouterr().out


def test_a_peer_that_breaks_when_it_is_made_or_called_is_left_out(broken, capsys, tmp_path):
    broken("gram_newton_schulz", "")
    broken("quack", "")
    text = "class GramNewtonSchulz:\n    def __init__(self, **_): raise TypeError('no such argument')\n"
    (tmp_path / "gram_newton_schulz" / "__init__.py").write_text(text)
    (tmp_path / "quack" / "__init__.py").write_text("")
    (tmp_path / "quack" / "gemm_interface.py").write_text("gemm_symmetric = None\n")
    assert polar_peers.gram_newton_schulz(((1.0, 0.0, 0.0),)) == {}
    assert "not usable: TypeError: no such argument" in capsys.readouterr().out
    calls = {"pgolf": lambda: 1, "other": lambda: 1 / 0}
    assert list(ce_peers.working(calls)) == ["pgolf"]
    assert "failed: ZeroDivisionError: division by zero" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("package", "imported"),
    [("matplotlib", "matplotlib"), ("pyarrow", "pyarrow"), ("flash-attn-4", "flash_attn")],
)
def test_info_says_what_is_not_usable_and_why(broken, capsys, monkeypatch, package: str, imported: str):
    broken(imported, "OSError('a library of its own is missing')")
    monkeypatch.delitem(sys.modules, "pgolf.model.fa4", raising=False)
    info.main([])
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith(package))
    assert "not usable: OSError: a library of its own is missing: " in line
    assert "pip install 'pgolf[" in line


def test_plots_and_parquet_without_a_usable_package(broken, tmp_path):
    broken("matplotlib", "TypeError('numpy of another age')")
    assert "TypeError: numpy of another age" in plot_loss(tmp_path / "none.jsonl", tmp_path / "none.png")
    broken("pyarrow", "TypeError('numpy of another age')")
    with pytest.raises(
        RuntimeError, match=r"needs pyarrow, which is not usable: TypeError: numpy of another"
    ):
        list(text._parquet_rows(tmp_path / "a.parquet", "text"))
