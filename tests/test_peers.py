"""Optional packages: every exception of their import is recorded as the reason and ends nothing."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from bench import ce_peers, peers_case, polar_peers
from bench.ops import bench_linear_softcap_ce, bench_muon_step, bench_newton_schulz
from pgolf.cli import info
from pgolf.data import text
from pgolf.ops import newton_schulz_ref
from pgolf.optim.polar import JORDAN, coefficients
from pgolf.peers import find_peer
from pgolf.report.plots import plot_loss

TABLE = coefficients("polar_express_golf", 5)
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


@pytest.mark.parametrize(
    "package",
    ["quack", "liger_kernel", "cut_cross_entropy", "gram_newton_schulz", "emerging_optimizers", "dion"],
)
def test_a_peer_that_breaks_at_import_leaves_the_benches_running(broken, capsys, package: str):
    broken(package, "TypeError('made for another version')")
    names = [
        *ce_peers.from_logits(),
        *ce_peers.materialising(),
        *ce_peers.chunked(),
        *polar_peers.others(TABLE),
        *bench_muon_step.dion_muon([(2, 4, 3)], torch.device("cpu")),
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


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch):
    """Return a function that makes a module with these attributes importable, and its packages."""

    def install(name: str, **attributes) -> None:
        parts = name.split(".")
        for path in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            module = sys.modules.get(path)
            if not getattr(module, "fake", False):
                module = ModuleType(path)
                module.fake, module.__path__ = True, []
                monkeypatch.setitem(sys.modules, path, module)
        vars(module).update(attributes)

    return install


def test_peers_of_the_polar_iteration_compute_it(fake):
    def step(x, a, b, c):
        gram = x @ x.mT
        return a * x + (b * gram + c * gram @ gram) @ x

    utils = "emerging_optimizers.orthogonalized_optimizers.muon_utils"
    fake(utils, batched_newton_schulz_step_tsyrk=step)
    fake("dion.polar_express", polar_express_triton=lambda x: newton_schulz_ref(x, TABLE))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 40, 16, generator=rng).bfloat16()
    kept = x.clone()
    own = [JORDAN] * len(TABLE)
    peers = ((polar_peers.emerging_optimizers, TABLE), (polar_peers.dion, TABLE))
    for peer, table in (*peers, (polar_peers.torch_iteration, own)):
        (iterate,) = peer(TABLE).values()
        for given in (x, x.mT):
            found, wanted = torch.stack(list(iterate(given))), newton_schulz_ref(given.double(), table)
            assert found.shape == given.shape
            assert (found.double() - wanted).norm() < 0.1 * wanted.norm(), peer.__name__
    assert torch.equal(x, kept)


def test_a_peer_with_its_own_number_of_iterations_is_left_out_of_other_cases(fake, capsys):
    fake("dion.polar_express", polar_express_triton=abs)
    assert polar_peers.dion(TABLE) == {"dion, triton": abs}
    assert polar_peers.dion(TABLE[:4]) == {}
    assert "dion, triton                 left out: it always makes 5 iterations" in capsys.readouterr().out


@pytest.mark.parametrize("newest", [True, False])
def test_losses_without_a_cap_are_called_as_their_versions_want(fake, newest: bool):
    calls = []

    def loss(name):
        return lambda *args, **settings: calls.append((name, len(args), settings)) or torch.zeros(3)

    liger = "liger_kernel.ops.cutedsl.ops"
    for kind in ("Linear", "Scaled"):
        function = SimpleNamespace(apply=loss(kind))
        module = f"{liger}.fused_{kind.lower()}_cross_entropy_sm90"
        fake(module, **{f"LigerFused{kind}CrossEntropySM90Function": function})
    quack = {"linear_cross_entropy_func": loss("all"), "chunked_linear_cross_entropy": loss("chunks")}
    if newest:
        quack["scaled_exp_linear_cross_entropy"] = loss("scaled-exp")
    fake("quack.linear_cross_entropy", **quack)
    for name, call in (ce_peers.materialising() | ce_peers.chunked()).items():
        if "liger" in name or "quack" in name:
            assert "no cap" in name
            call(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(3, dtype=torch.long), 30.0)
    chunks = {"tuned": False} | ({"use_scaled_exp": False} if newest else {})
    wanted = [("Linear", 3, {}), ("all", 4, {}), ("Scaled", 3, {}), ("chunks", 3, chunks)]
    assert calls == wanted + ([("scaled-exp", 3, {"chunk_size": 4096})] if newest else [])


def test_a_chunk_of_the_scaled_exp_path_never_has_as_many_rows_as_columns():
    widths = {rows_vocab_width[-1] for rows_vocab_width in bench_linear_softcap_ce.SHAPES.values()}
    assert 4096 in widths
    for width in widths:
        assert ce_peers.scaled_chunk(width) % 128 == 0 and ce_peers.scaled_chunk(width) != width


def test_an_optimizer_that_cannot_be_made_is_left_out(fake, capsys):
    def refuse(*_, **settings):
        raise TypeError(f"no argument {sorted(settings)[0]}")

    fake("dion", Muon=refuse)
    assert bench_muon_step.dion_muon([(2, 4, 3)], torch.device("cpu")) == {}
    assert "not usable: TypeError: no argument lr" in capsys.readouterr().out


def test_every_configuration_is_compiled_and_none_is_launched_or_timed(fake, monkeypatch):
    compiled = []

    class Kernel:
        def run(self, *args, grid, warmup, **settings):
            compiled.append((args[0].block, grid, warmup, settings["scale"], settings["tile"]))
            if settings["tile"] == 512:
                raise RuntimeError("too much shared memory")

    class Configuration(SimpleNamespace):
        def all_kwargs(self):
            return {"tile": self.tile}

    def hook(named):
        named["description"].block = named["tile"]

    class Autotuner:
        arg_names, fn = ("description", "scale"), Kernel()

        def prune_configs(self, settings):
            assert "tile" not in settings and self.nargs["description"] is description
            return [Configuration(tile=tile, pre_hook=hook) for tile in (64, 512, 128)]

    # The stand-in is taken away after the test.
    monkeypatch.setattr(CachingAutotuner, "benchmark_all_configs", None)
    fake("triton.runtime.autotuner", Autotuner=Autotuner)
    peers_case.compile_all_configurations()
    description = SimpleNamespace(block=0)
    for scale in (1.0, 2.0):
        Autotuner().run(description, grid=(3,), warmup=False, scale=scale)
    wanted = [(tile, (3,), True, scale, tile) for scale in (1.0, 2.0) for tile in (64, 512, 128)]
    assert compiled == wanted
    several = SimpleNamespace(launchers=["first", "second"])
    timings = CachingAutotuner.benchmark_all_configs(several, 1, stream=2)
    assert min(timings, key=timings.get) == "first" and len(timings) == 2


def test_cases_are_named_by_their_shapes():
    wanted = ["1x1536x7168", "1x18432x1536", "1x12288x7168", "384x768x2048", "24x1024x4096", "16x2048x2048"]
    for cases in (bench_newton_schulz.CASES, {k: (v, 5) for k, v in bench_muon_step.CASES.items()}):
        for name in wanted:
            assert cases[name] == ([tuple(map(int, name.split("x")))], 5)
    for name, (rows, vocab, width) in bench_linear_softcap_ce.SHAPES.items():
        assert name == f"n{rows}_v{vocab}_d{width}"
    wanted = ["n4096_v128256_d4096_memory", "n8192_v131072_d4096_fast", "n98304_v8192_d512_fast"]
    assert set(wanted) <= set(bench_linear_softcap_ce.CASES)


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
