"""The bench that times a published script beside pgolf, on the stand-in of the comparison with scripts."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from bench import script_step, step
from bench.common import Recorder
from bench.published import error, map_parameters
from bench.published_script import load_script
from bench.script_step import GRADIENT_LIMIT, SCRIPT, Bench, NotTheSame, Ours, Theirs, compare
from pgolf.model.gpt import GPT
from tests.test_bench_published import config, stand_in

CPU = torch.device("cpu")
TOKENS = 120


def made(script, *, trained: bool | None = None):
    """Return both contenders, with weights none of which is zero."""
    torch.manual_seed(0)
    own = config()
    model = step.make_model(own.model).prepare(CPU)
    work = step.make_work(TOKENS, own.model.vocab_size, CPU)
    return Ours(model, own, work, CPU), Theirs(script, own, model, work, CPU, trained=trained), model


def run(monkeypatch, folder, *arguments: str) -> tuple[int, list[dict[str, object]]]:
    """Run the program; return its exit status and its result lines."""
    out = folder / "out"
    short = ["--device", "cpu", "--tokens", str(TOKENS), "--settle", "0", "--seconds", "0.02"]
    monkeypatch.setattr(sys, "argv", ["script_step", *arguments, *short, "--out", str(out)])
    monkeypatch.setattr(script_step, "pr1855", config)
    status = script_step.main()
    files = list(out.glob("*_step-script.jsonl"))
    return status, [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_micro_steps_and_whole_steps_of_both_are_recorded(tmp_path, monkeypatch, capsys):
    status, lines = run(monkeypatch, tmp_path, str(stand_in(tmp_path, packed=True)))
    assert status == 0
    found = {(line["case"], line["impl"], line["metric"]) for line in lines}
    assert found == {
        (case, impl, metric)
        for case in ("record_real_off", "record_real_on")
        for impl in ("pgolf", SCRIPT)
        for metric in ("ms_fwd_bwd", "tokens_per_s", "peak_mib", "warm_up_s", "ms_step", "ms_tail")
    }
    assert {line["bench"] for line in lines} == {"step"}
    value = {(line["impl"], line["metric"]): line["value"] for line in lines}
    for impl in ("pgolf", SCRIPT):  # a whole step has two micro-steps and a tail
        assert value[impl, "ms_step"] > value[impl, "ms_tail"] > 0
        assert value[impl, "ms_fwd_bwd"] > 0
    out = capsys.readouterr().out
    assert out.count("above 1, pgolf is better") == 4
    assert out.count("ppm of their norms apart") == 2


def test_one_loop_mode_without_whole_steps(tmp_path, monkeypatch):
    _, lines = run(monkeypatch, tmp_path, str(stand_in(tmp_path)), "--loop", "on", "--no-tail")
    assert {line["case"] for line in lines} == {"record_real_on"}
    assert "ms_step" not in {line["metric"] for line in lines}


def test_compiling_alone_times_and_writes_nothing(tmp_path, monkeypatch, capsys):
    status, lines = run(monkeypatch, tmp_path, str(stand_in(tmp_path)), "--compile-only", "--loop", "off")
    assert (status, lines) == (0, [])
    out = capsys.readouterr().out
    assert "record_real_off: loss of pgolf" in out and "record_real_on" not in out
    assert f"{SCRIPT}: three steps and their tails took" in out


FAULTS = {
    "no kernel": (
        {"half, saved = len": 'raise OSError("no kernel")\n        half, saved = len'},
        "no kernel",
    ),
    "other": ({"0.5).square()": "0.2).square()"}, "the gradients of mlp_up_bank are"),
    "optimizer": (
        {"def step(self):": "def step(self):\n        raise OSError('no optimizer')"},
        "no optimizer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_the_script_pgolf_is_measured(tmp_path, monkeypatch, capsys, fault):
    changes, message = FAULTS[fault]
    status, lines = run(monkeypatch, tmp_path, str(stand_in(tmp_path, changes)))
    assert status == 3
    ours = {(line["case"], line["metric"]) for line in lines if line["impl"] == "pgolf"}
    assert {("record_real_on", "ms_fwd_bwd"), ("record_real_on", "ms_step")} <= ours
    theirs = {line["metric"] for line in lines if line["impl"] == SCRIPT}
    assert "ms_step" not in theirs and ("ms_fwd_bwd" in theirs) == (fault == "optimizer")
    err = capsys.readouterr().err
    assert message in err and "Traceback" in err and f"{SCRIPT}: not measured" in err


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, tmp_path, str(tmp_path / "train_gpt.py")) == (2, [])
    assert "there is no such file; expected train_gpt.py of PR #1855" in capsys.readouterr().err
    path = stand_in(tmp_path)
    (tmp_path / "train_seed1.log").unlink()
    assert run(monkeypatch, tmp_path, str(path)) == (2, [])
    assert "expected a train*.log next to the script" in capsys.readouterr().err


def test_without_flash_attn_4_a_gpu_run_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "pgolf.model.fa4", raising=False)
    with pytest.raises(
        ValueError, match=r"attends with flash-attn-4, which is not .*pip install 'pgolf\[fa4\]'"
    ):
        script_step.load(stand_in(tmp_path), None, config(), torch.device("cuda"))


def test_in_the_dtypes_of_its_training_the_script_is_the_same_function(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: compiled.append(settings) or model)
    ours, theirs, _ = made(load_script(stand_in(tmp_path)), trained=True)
    assert compiled == [{"dynamic": False, "fullgraph": True}]
    dtypes = {n: p.dtype for n, p in theirs._model.named_parameters()}
    assert dtypes["tok_emb.weight"] == torch.bfloat16
    assert dtypes["blocks.1.attn.c_q.weight"] == dtypes["blocks.1.attn_scale"] == torch.float32
    rotary = theirs._model.blocks[0].attn.rotary
    assert rotary.inv_freq.dtype == torch.float32
    assert error(rotary.inv_freq, 10000 ** -(torch.arange(0, 16, 2) / 16)) < 1
    before = torch.get_float32_matmul_precision()
    with theirs.settings():
        assert torch.get_float32_matmul_precision() == "high"
        theirs.micro(False)
    assert torch.get_float32_matmul_precision() == before
    ours.micro(False)
    found, wanted = ours.outcome(), theirs.outcome()
    assert compare(found, wanted, "off") == ""
    worst = max(error(found.grads[n], wanted.grads[n]) for n in wanted.grads)
    assert 1000 < worst < GRADIENT_LIMIT / 2  # bfloat16 rounds, but leaves room below the limit


def test_gradients_of_a_step_add_up_and_the_next_begins_anew(tmp_path):
    ours, theirs, _ = made(load_script(stand_in(tmp_path)))
    for contender in (ours, theirs):
        contender.micro(False)
        once = {n: g.clone() for n, g in contender.outcome().grads.items()}
        loss = contender.outcome().loss
        contender.micro(False)
        twice = contender.outcome()
        assert twice.loss == pytest.approx(2 * loss)
        assert all(error(twice.grads[n], 2 * g) < 10 for n, g in once.items())
        contender.clear()
        assert all(not g.any() for g in contender.outcome().grads.values())
    theirs.micro(False), theirs.micro(False), theirs.micro(False)
    assert all(error(g, once[n]) < 10 for n, g in theirs.outcome().grads.items())


def test_the_tails_of_both_apply_the_same_step(tmp_path):
    ours, theirs, model = made(load_script(stand_in(tmp_path)))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ours.make_tail(), theirs.make_tail()
    for contender in (ours, theirs):
        contender.micro(False), contender.micro(False)
        contender.tail()
    assert all(p.grad is None for p in theirs._model.parameters())
    assert all(not p.grad.any() for p in model.parameters())
    named = dict(theirs._model.named_parameters())
    for name, p in model.named_parameters():
        moved = theirs._map[name].gather(named).detach() - before[name]
        # Muon of the script iterates in bfloat16.
        assert moved.any() and error(p.detach() - before[name], moved) < 30_000, name
    live = theirs._model.tok_emb.weight
    average = next(average for average, tensor in theirs._averages if tensor is live)
    start, end = before["tok_emb"], live.detach()
    assert error(average - start, (1 - script_step.DECAY) * (end - start)) < 1000


def test_a_value_that_is_scattered_is_gathered_again(tmp_path):
    theirs = load_script(stand_in(tmp_path)).model()
    named, ours = dict(theirs.named_parameters()), GPT(config().model)
    for name, mapped in map_parameters(config(), named).items():
        value = torch.randn_like(ours.get_parameter(name))
        mapped.scatter(value, named)
        assert mapped.gather(named).equal(value)


class Sleeper:
    """A contender that says when it runs."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self._name, self._calls = name, calls

    def settings(self):
        self._calls.append(self._name)
        return nullcontext()

    def micro(self, loop: bool) -> None:
        del loop

    def clear(self) -> None:
        pass


def test_the_contenders_take_turns_there_and_back(monkeypatch):
    calls: list[str] = []
    seconds = []

    def passes(_step, _device, each):
        seconds.append(each)
        return step.Timed([1.0, 2.0], 3.0, 1600.0 + len(seconds), 100.0)

    monkeypatch.setattr(script_step, "time_passes", passes)
    monkeypatch.setattr(script_step, "run_for", lambda *_: None)
    bench = Bench(Recorder("step", CPU), 10, settle=1, seconds=6, turns=2, top=0)
    bench._contenders = {name: Sleeper(name, calls) for name in ("pgolf", SCRIPT)}
    found = bench._alternate(lambda contender: lambda: contender.micro(False))
    assert calls == ["pgolf", SCRIPT, SCRIPT, "pgolf"]
    assert seconds == [3, 3, 3, 3]
    assert found["pgolf"] == step.Timed([1.0, 2.0] * 2, 3.0, 1602.5, 100.0)
    # What the other holds is not part of a peak.
    bench._held = {"pgolf": 10 << 20, SCRIPT: 30 << 20}
    bench._warm_up = {("pgolf", True): 1.0, (SCRIPT, True): 2.0}
    bench.time_micro(True)
    peaks = {line["impl"]: line["value"] for line in bench._recorder.lines if line["metric"] == "peak_mib"}
    assert peaks == {"pgolf": 70, SCRIPT: 90}


def test_turns_count_as_their_passes():
    one = step.Timed([1.0], 10.0, 1600.0, 5.0)
    assert script_step.merged([one, step.Timed([2.0, 3.0], 40.0, 1700.0, 7.0)]) == step.Timed(
        [1.0, 2.0, 3.0], 30.0, 1650.0, 7.0
    )
    assert script_step.merged([one, replace(one, joules=None, sm_mhz=None)]).joules is None


def test_a_fault_of_pgolf_is_not_hidden():
    bench = Bench(Recorder("step", CPU), 10, settle=0, seconds=1, turns=1, top=0)
    with pytest.raises(NotTheSame), bench._guarded("pgolf"):
        raise NotTheSame
    with bench._guarded(SCRIPT):
        raise NotTheSame
    assert bench.failed


def test_kernels_of_published_scripts_belong_to_families():
    assert step.family("_softcapped_ce_bwd_kernel") == "loss"
    assert step.family("linear_leaky_relu_square_kernel_1") == "mlp"
    assert step.family("triton_red_fused__softcapped_ce_mean_3") == "norms_and_mixes"
