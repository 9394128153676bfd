"""Numbers that benches compute rather than measure."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import muon_memory, step
from bench.common import Recorder, Sample, torch_name
from bench.ops import bench_doc_attention, bench_newton_schulz
from bench.run import figures, of_run
from bench.steps_bought import (
    BANKS,
    REST_BYTES,
    Setting,
    Value,
    effective_bandwidth,
    newest_pass,
    wire_ms,
)
from pgolf.evaluate.bpb import Score
from pgolf.model.gpt import GPT, layer_order, parameter_shapes
from pgolf.optim.polar import JORDAN
from pgolf.presets import pr1855, tiny
from pgolf.report.summary import Summary, Training


def test_banks_of_the_communication_model_are_the_record_models():
    shapes = parameter_shapes(pr1855().model)
    assert sorted(BANKS) == sorted((shapes[n][0], shapes[n][1] * shapes[n][2]) for n in GPT.bank_names)


@pytest.mark.parametrize(
    ("world", "matrices"), [(2, (22, 22, 12, 12)), (4, (24, 24, 12, 12)), (8, (24, 24, 16, 16))]
)
def test_every_bank_is_padded_to_whole_shares(world: int, matrices: tuple[int, ...]):
    # Scattered and gathered in bfloat16; the replicated gradients are reduced in float32.
    wires = sum(2 * count * size for count, (_, size) in zip(matrices, BANKS, strict=True))
    moved = (world - 1) / world * 2 * (wires + REST_BYTES)
    assert wire_ms(world, 250.0).value == pytest.approx(moved / 250e9 * 1e3)
    assert wire_ms(1, 250.0).value == 0


def test_result_lines_keep_small_and_large_values(tmp_path, capsys):
    recorder = Recorder("check", torch.device("cpu"), tmp_path)
    for value in (4.3718e-7, 473_156_608.0, 0.1 + 0.2):
        recorder.add("case", "pgolf", "metric", Sample(value, value / 10, 3), "1")
    path = recorder.write()
    assert path is not None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["value"] for line in lines] == [4.3718e-7, 473_156_608.0, 0.3]
    assert [line["spread"] for line in lines] == [4.3718e-8, pytest.approx(47_315_660.8, rel=1e-5), 0.03]


def test_rates_count_the_same_operations_for_pgolf_and_for_products(monkeypatch):
    contenders = {}

    def timed(found, device, *, repeats, **settings):
        contenders.update(found)
        return {name: Sample(2.0, 0.5, repeats) for name in found}

    monkeypatch.setattr(bench_newton_schulz, "time_launched", timed)
    recorder, x = Recorder("newton_schulz", torch.device("cpu")), torch.randn(3, 16, 16)
    bench_newton_schulz.rates(recorder, "3x16x16", x, (JORDAN,) * 3, 4)
    assert contenders.keys() == {"pgolf", torch_name("bmm")}
    with FlopCounterMode(display=False) as counter:
        contenders[torch_name("bmm")]()
    assert counter.get_total_flops() == 3 * 3 * 4 * 16**3
    contenders["pgolf"]()
    assert [(line["metric"], line["unit"]) for line in recorder.lines] == [("tflops", "TFLOP/s")] * 2
    assert recorder.lines[0]["value"] == pytest.approx(3 * 3 * 4 * 16**3 / 2e-3 / 1e12)
    assert recorder.lines[0]["spread"] == pytest.approx(recorder.lines[0]["value"] / 4, rel=1e-5)


def test_singular_values_are_those_of_the_first_matrix_of_each_bank():
    wide, tall, square = (torch.randn(2, m, n).bfloat16() for m, n in ((24, 40), (40, 24), (16, 16)))
    values = torch.cat([torch.linalg.svdvals(x[0].double()) for x in (wide, tall, square)])
    # torch's iteration returns a list of matrices for a bank.
    found = bench_newton_schulz.singular_values([wide, list(tall), square])
    assert found == pytest.approx((values.min().item(), values.max().item()), rel=1e-9)


def test_steps_gained_are_the_difference_of_the_steps():
    setting = Setting(600.0, 0.35, 8, 1.0, (Value(90.0, 0.5), Value(140.0, 0.5)))
    slow, fast, other = Value(2.0, 0.03), Value(1.9, 0.04), Value(30.0, 5.0)
    gained = setting.gained(fast, slow, other)
    wanted = setting.steps(fast + other).value - setting.steps(slow + other).value
    assert gained.value == pytest.approx(wanted, rel=2e-3)
    assert gained.error == pytest.approx(gained.value * 0.05 / 0.1)  # that of the difference alone


def test_the_model_of_communication_goes_through_the_largest_measurement():
    bandwidth = effective_bandwidth({2: Value(0.7), 4: Value(1.4)})
    assert wire_ms(4, bandwidth).value == pytest.approx(1.4)
    assert effective_bandwidth({}) == 300.0


def test_a_run_without_an_artifact_has_figures_but_no_bytes():
    summary = Summary("tiny", "0" * 16, "CPU", 1, "sdpa", 1000)
    summary.scores["raw"] = Score(nats=100.0, tokens=50, bytes=96, bpb=1.5, loss=2.0, seconds=1.0)
    summary.put("train", 2.0)
    summary.train = Training(
        steps=1,
        tokens=512,
        loop_step=None,
        last_loss=2.0,
        ms_loop_off=1.0,
        ms_loop_on=None,
        tokens_per_s=256.0,
    )
    found = figures(summary)
    assert found["bpb_raw"] == (1.5, "bits/byte") and found["seconds_train"] == (2.0, "s")
    assert not {"bytes", "bytes_code", "clip_scale"} & found.keys()


def test_the_newest_pass_is_found_in_whatever_file(tmp_path):
    def line(value: float, time: str, impl: str = "pgolf") -> str:
        facts = {"bench": "step", "case": "record_real_off", "metric": "ms_fwd_bwd", "impl": impl}
        return json.dumps({**facts, "value": value, "spread": 0.0, "n": 4, "time": time}) + "\n"

    (tmp_path / "20261130_h_step-attention.jsonl").write_text(line(67.7, "b") + line(71.4, "d", "other"))
    (tmp_path / "20261130_h_step.jsonl").write_text(line(92.2, "a"))
    (tmp_path / "20261130_h_adam_step.jsonl").write_text(line(0.1, "e").replace('"step"', '"adam_step"'))
    assert newest_pass(tmp_path, "record_real_off", "pgolf").value == 67.7
    with pytest.raises(
        ValueError, match=r"no record_real_off of 'fa4' in .*choose another --impl: other, pgolf"
    ):
        newest_pass(tmp_path, "record_real_off", "fa4")


def test_the_lines_of_a_run_name_its_device_and_commit_wherever_they_are_written(tmp_path, capsys):
    summary = Summary("tiny", "0" * 16, "NVIDIA H200", 1, "doc", 1000)
    summary.commit, summary.versions = "ab" * 20 + "-dirty", {"torch": "2.11.0"}
    recorder = Recorder("run", torch.device("cpu"), tmp_path, file="run-tiny", measured=of_run(summary))
    recorder.add("tiny", "pgolf doc", "steps", Sample(3.0, 0.0, 1), "steps")
    path = recorder.write()
    line = json.loads(path.read_text())
    assert path.name.endswith("_nvidia-h200_run-tiny.jsonl") and line["device"] == "NVIDIA H200"
    assert (line["commit"], line["dirty"], line["versions"]) == ("ab" * 20, True, {"torch": "2.11.0"})


def test_the_bench_of_a_step_has_segments_of_real_documents():
    work = step.make_work(98_304, 8192, torch.device("cpu"))
    lengths = work.cu.diff()
    assert lengths.sum() == 98_304 and lengths.max() == 2048 and work.squares == float(lengths.square().sum())
    # The text itself has 1.46e8 tokens^2 per micro-batch, and log-normal lengths have 1.12e8.
    assert work.squares == pytest.approx(1.46e8, rel=0.05)
    assert (work.ids[work.cu[:-1][lengths > 0].long()] == step.BOS).all()


def test_the_bench_of_a_step_multiplies_nothing_but_zeros_nowhere():
    model = step.make_model(replace(tiny().model, vocab_size=64))
    for name, p in model.named_parameters():
        assert (p.reshape(p.shape[0], -1).abs().amax(1) > 0).all(), name


@pytest.mark.parametrize("loop", [False, True])
def test_operations_of_a_step_are_those_of_its_matrices(loop: bool):
    config = pr1855().model
    model, work = GPT(config), step.make_work(2048, config.vocab_size, torch.device("cpu"))
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        hidden, table = model.hidden(work.ids, work.cu, max_seqlen=2048, loop=loop)
        hidden @ table.T
    products = sum(n for name, n in counter.get_flop_counts()["Global"].items() if "mm" in str(name))
    gates = 2 * 2048 * config.heads * config.gate_window * sum(map(len, layer_order(config, loop=loop)))
    counts = step.count(config, work, loop=loop)
    assert 3 * (products - gates) == pytest.approx(counts.products, rel=1e-3)


def test_time_in_which_no_kernel_runs_is_idle():
    kernels = [
        step.Kernel("triton_poi_fused_add", 0, 10),
        step.Kernel("nvjet_tst_128x256", 5, 25),
        step.Kernel("flash_bwd_cutlass", 30, 50),
        step.Kernel("void pgolf::forward_kernel<8>(float)", 50, 60),
        step.Kernel("Memset (Device)", 61, 62),
        step.Kernel("void pgolf::head_mix_backward_kernel<64, 2>(HeadMixBackward)", 62, 65),
        step.Kernel("void pgolf::mix_backward_kernel<3>(MixBackward)", 65, 69),
    ]
    found = step.families(kernels)
    assert found["idle"] == (pytest.approx(0.006), 2)
    assert {name: ms for name, (ms, _) in found.items() if name != "idle"} == pytest.approx(
        {
            "norms_and_mixes": 0.014,
            "products": 0.02,
            "attention": 0.02,
            "loss": 0.01,
            "heads": 0.003,
            "other": 0.001,
        }
    )


def test_the_kernels_of_the_own_attention_are_attention():
    names = [
        "Memset (Device)",
        "pgolf::attention::plan_kernel(int const*, int, int, pgolf::DocTile*, unsigned int*, long)",
        "pgolf::attention::delta_kernel(pgolf::bf16 const*, long, pgolf::bf16 const*, float*, long, int)",
        "pgolf::attention::backward::kernel(CUtensorMap_st, pgolf::attention::backward::Args)",
        "pgolf::attention::forward::kernel(CUtensorMap_st, CUtensorMap_st, pgolf::attention::forward::Args)",
    ]
    found = step.families([step.Kernel(name, 10 * i, 10 * i + 5) for i, name in enumerate(names)])
    assert found["attention"] == (pytest.approx(0.02), 4)
    assert found["other"] == (pytest.approx(0.005), 1)
    assert step.families([])["idle"] == (0, 0)


def test_operations_of_attention_are_those_of_its_products():
    cu = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    pairs = 6 + 1 + 15
    assert bench_doc_attention.operations(cu, 5) == 5 * 2 * 64 * 8 * pairs


def test_the_bench_of_attention_runs_and_is_right(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench_doc_attention", "--quick", "--device", "cpu"])
    monkeypatch.setitem(bench_doc_attention.CASES, "small", 150)
    bench_doc_attention.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    found = {words[3]: float(words[4]) for words in lines if words[:2] == ["doc_attention", "small"]}
    assert all(found[f"{name}_{way}"] > 0 for name in ("ms", "tflops") for way in ("fwd", "bwd"))
    assert all(found[f"error_{name}"] < 1e-4 for name in ("y", "dq", "dk", "dv"))


@pytest.mark.parametrize("name", ["linear", "dynamic"])
def test_the_other_codes_of_the_momentum_take_the_nearest_value(name: str):
    code, x = muon_memory.CODES[name], torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    codes, scales = code.encode(x)
    every = torch.arange(-128 if name == "dynamic" else -127, 128, dtype=torch.int8)
    table = code.decode(every.repeat(3, 1), scales)
    nearest = (x.unsqueeze(-1) - table.unsqueeze(1)).abs().amin(-1)
    torch.testing.assert_close((code.decode(codes, scales) - x).abs(), nearest, rtol=1e-5, atol=1e-7)
    assert len(table[0].unique()) == len(every) and (code.decode(codes, scales)[1] == 0).all()
