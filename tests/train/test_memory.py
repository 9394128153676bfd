"""The estimate of memory against what was measured, and what a run is told where it does not fit."""

import json
import re
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgolf.config import Config, ModelConfig
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.optim.step import Optimizer
from pgolf.presets import PRESETS
from pgolf.train import memory
from pgolf.train.memory import available_memory, check_memory, estimate_memory, fitting_micro_tokens

ROOT = Path(__file__).resolve().parents[2]
GIB, MIB = 2**30, 2**20
CPU = {"device_type": "cpu", "world_size": 1, "attention": "sdpa"}

# (preset, tokens of the micro-batch, quantized, peak resident MiB): one rank, one thread, x86, torch 2.13.
CPU_PEAKS = [
    ("tiny", 2048, False, 547),
    ("tiny", 8192, False, 1235),
    ("tiny", 16384, False, 2213),
    ("tiny", 32768, False, 3749),
    ("naive", 1024, False, 1166),
    ("naive", 4096, False, 2470),
    ("pr1855", 1024, False, 2626),
    ("pr1855", 2048, False, 3641),
    ("pr1855", 4096, False, 6195),
    ("tiny", 2048, True, 664),
    ("tiny", 8192, True, 1560),
    ("naive", 1024, True, 1398),
    ("naive", 4096, True, 2635),
    ("pr1855", 1024, True, 4725),
]


class OneRank:
    """What `check_memory` needs of a Dist."""

    world_size = 1

    def __init__(self, device="cpu"):
        self.device = torch.device(device)

    def share(self, values):
        return values

    def check(self, error):
        if error is not None:
            raise RuntimeError(error)


def config_of(preset: str, micro: int, *, quantize: bool = True) -> Config:
    config = PRESETS[preset]()
    data = replace(config.data, batch_tokens=max(micro, config.data.batch_tokens), micro_tokens=micro)
    return replace(config, data=data, train=replace(config.train, quantize=quantize))


@pytest.mark.parametrize(("preset", "micro", "quantize", "peak"), CPU_PEAKS)
def test_estimate_is_within_a_tenth_of_what_was_measured(preset, micro, quantize, peak):
    found = estimate_memory(config_of(preset, micro, quantize=quantize), **CPU).total / MIB
    assert found == pytest.approx(peak, rel=0.1)


RESULTS = ROOT / "bench" / "results"
# (file, commit, preset, quantized, kernels of norm_mlp): earlier commits of the first file kept more.
TABLE = "20261129_nvidia-h200_run-presets_120s_1gpu.jsonl"
CUDA_RUNS = [
    ("20261129_nvidia-h200_run-pr1855_30s_1gpu_196k.jsonl", "8f2227c", "pr1855", False, False),
    *((TABLE, "", preset, True, True) for preset in ("pr1855", "pr1787", "pr1394", "pr1493")),
]


@pytest.mark.parametrize(("file", "commit", "preset", "quantize", "kernels"), CUDA_RUNS)
def test_estimate_is_near_the_committed_peak_on_a_gpu(file, commit, preset, quantize, kernels):
    lines = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    peaks = (d for d in lines if d["metric"] == "peak_mib" and d["commit"].startswith(commit))
    (peak,) = (d["value"] for d in peaks if d["case"].startswith(preset))
    config = config_of(preset, 98_304, quantize=quantize)
    found = estimate_memory(config, device_type="cuda", world_size=1, attention="fa4", kernels=kernels)
    assert found.total / MIB == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("quantize", [False, True])
def test_captured_passes_keep_the_memory_of_one_pass(quantize):
    config = config_of("pr1855", 98_304, quantize=quantize)
    asked = replace(config, train=replace(config.train, capture=True))
    gpu = {"device_type": "cuda", "world_size": 1, "attention": "fa4", "kernels": True}
    before, after = (estimate_memory(c, **gpu) for c in (config, asked))
    assert replace(after, graphs=0) == before
    # Activations, loss and cast weights; the weights that the warm-up keeps are not part of a pass.
    assert after.total - before.total == after.graphs > before.activations + before.loss
    assert after.graphs < before.activations + before.loss + before.copies
    assert "graphs" in after.parts() and "graphs" not in before.parts()
    assert estimate_memory(asked, **CPU) == estimate_memory(config, **CPU)


@pytest.mark.parametrize("implementation", ["pgolf", "pgolf, composed mlp"])
@pytest.mark.parametrize("loop", ["off", "on"])
def test_estimate_is_a_little_more_than_the_committed_peak_of_a_step(implementation, loop):
    """The bench of a step has weights, gradients, averages and optimizer, and no quantization after it."""
    lines = (RESULTS / "20261129_nvidia-h200_step-mlp.jsonl").read_text().splitlines()
    (peak,) = (
        d["value"]
        for d in map(json.loads, lines)
        if (d["metric"], d["case"], d["impl"]) == ("peak_mib", f"record_real_{loop}", implementation)
    )
    config = config_of("pr1855", 98_304, quantize=False)
    if loop == "off":
        config = replace(config, model=replace(config.model, recurrence_repeats=0))
    kernels = implementation == "pgolf"
    gpu = {"device_type": "cuda", "world_size": 1, "kernels": kernels}
    found = estimate_memory(config, attention="fa4", **gpu)
    assert peak <= found.total / MIB <= 1.1 * peak
    # pgolf's own attention keeps the same tensors.
    assert estimate_memory(config, attention="doc", **gpu) == found


def saved_bytes(model: ModelConfig, tokens: int) -> int:
    """Return the bytes that one eager forward pass keeps for the backward pass, parameters aside."""
    gpt = GPT(model).prepare(torch.device("cpu"))
    owned = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor):
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.zeros(tokens, dtype=torch.int64)
    cu = torch.tensor([0, tokens], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        gpt(ids, ids, cu, max_seqlen=tokens, loop=True)
    return sum(t.untyped_storage().nbytes() for p, t in kept.items() if p not in owned)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"xsa_layers": 0},
        {"head_gate": "none"},
        {"head_gate": "none", "xsa_layers": 0},
        {"resid_mix": False},
        {"smear_gate": False},
        {"skip": "none"},
        {"skip": "weighted"},
        {"parallel_from": 4},
        {"recurrence_repeats": 0},
        {"recurrence_repeats": 3},
        {"kv_heads": 4},
        {"mlp_mult": 6},
        {"layers": 6, "parallel_from": 4},
        {"vocab_size": 4096},
        {"leaky_slope": 0.3},
        {"smear_over_bos": True},
        {"smear_kind": "channel"},
        {"parallel": "gptj"},
        {"bigram_buckets": 512, "bigram_width": 64},
        {"value_embed_layers": 2, "value_embed_width": 64},
        {"parallel": "gptj", "parallel_from": 1},
        {"xsa_strength": True},
        {"mudd": 64},
        {"mudd": 64, "layers": 6, "parallel_from": 4},
        {"mudd": 16, "parallel": "gptj", "parallel_from": 1},
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(monkeypatch, change):
    monkeypatch.setattr(memory, "HEAP", 1.0)
    monkeypatch.setattr(memory, "HEAP_WIDE", 1.0)
    config = config_of("tiny", 2048, quantize=False)
    model = replace(config.model, **change)
    few, many = 64, 192
    measured = saved_bytes(model, many) - saved_bytes(model, few)  # the weights' copies cancel

    def kept(tokens):
        data = replace(config.data, batch_tokens=tokens, micro_tokens=tokens)
        found = estimate_memory(replace(config, model=model, data=data), **CPU)
        return found.activations + tokens * model.vocab_size * 4

    assert kept(many) - kept(few) == pytest.approx(measured, rel=0.03)


def test_averages_and_rounded_copies_count():
    config = config_of("tiny", 2048, quantize=False)
    banks = 4 * sum(p.numel() for n, p in GPT(config.model).named_parameters() if n in memory.BANKS)
    plain = estimate_memory(config, **CPU)
    rounded = replace(config, train=replace(config.train, fake_quant_from=0.8))
    assert estimate_memory(rounded, **CPU).total - plain.total == banks + banks // 4
    no_ema = replace(config, optim=replace(config.optim, ema_horizon=0.0))
    swa = replace(config, optim=replace(config.optim, ema_horizon=0.0, average="swa"))
    assert estimate_memory(no_ema, **CPU).averages == 0
    assert estimate_memory(swa, **CPU).averages == plain.averages > 0


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_state_of_the_optimizer_counts(world_size):
    config = config_of("tiny", 2048, quantize=False)
    shapes = {n: p.shape for n, p in GPT(config.model).named_parameters()}
    squares = sum(4 * -(-b // world_size) * max(m, n) for b, m, n in (shapes[n] for n in memory.BANKS))
    slow = sum(4 * -(-b // world_size) * m * n for b, m, n in (shapes[n] for n in memory.BANKS))
    plain = estimate_memory(config, **CPU | {"world_size": world_size}).optimizer
    for changes, more in (
        ({"muon": replace(config.optim.muon, normalize=0.9)}, squares),
        ({"muon": replace(config.optim.muon, slow_age=0.01)}, slow),
        ({"ema_nesterov": 0.5}, 2 * 4 * sum(shape.numel() for shape in shapes.values())),
    ):
        changed = replace(config, optim=replace(config.optim, **changes))
        assert estimate_memory(changed, **CPU | {"world_size": world_size}).optimizer == plain + more


class Temporaries(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make and that are still alive: now, and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if torch.is_tensor(t) and t.untyped_storage().data_ptr() not in given:
                self.now += t.nbytes
                weakref.finalize(t, self.freed, t.nbytes)
        self.most = max(self.most, self.now)
        return result

    def freed(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("change", [{"cautious": True}, {"slow_age": 0.01}], ids=str)
def test_what_the_captured_step_makes_for_a_moment_counts(change):
    """Counted on a CPU, where gradients and weights have the dtype that they have on a GPU."""

    def most(config):
        optimizer = Optimizer(GPT(config.model), config.optim, Dist.start("cpu"))
        with Temporaries() as counted:
            optimizer.step(0.5)
        return counted.most

    def estimate(config, **place):
        return estimate_memory(config, **CPU | {"device_type": "cuda"} | place).optimizer

    plain = config_of("tiny", 2048, quantize=False)
    changed = replace(plain, optim=replace(plain.optim, muon=replace(plain.optim.muon, **change)))
    # The slow average itself, which `test_the_state_of_the_optimizer_counts` holds, is there in each case.
    state = estimate(changed, world_size=2) - estimate(plain, world_size=2)
    state *= 2  # two ranks share it, and they capture nothing
    found = estimate(changed) - estimate(plain) - state
    assert found == pytest.approx(most(changed) - most(plain), rel=0.02)


@pytest.mark.parametrize("scales", ["loss", "spread"])
def test_drift_holds_two_moments_of_all_inputs_and_two_sets_of_weights(scales):
    config = config_of("pr1855", 1024)
    config = replace(config, quant=replace(config.quant, row_scales=scales))
    drift = replace(config, quant=replace(config.quant, drift=1.0))
    c = config.model
    moments = 2 * 4 * (c.layers * (3 * c.width**2 + c.hidden**2) + c.width**2)
    without, found = (estimate_memory(which, **CPU) for which in (config, drift))
    assert found.total - without.total >= moments + 2 * without.weights
    training = replace(drift, train=replace(drift.train, quantize=False))
    assert estimate_memory(training, **CPU).quantization == 0


PROGRAM = """
import sys
import torch
import pgolf.train.run
from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.presets import tiny
def kib(name):
    return int(next(line.split()[1] for line in open('/proc/self/status') if line.startswith(name)))
tokens = int(sys.argv[1])
torch.set_num_threads(1)
imported = kib('VmRSS:')
config, dist = tiny(), Dist.start("cpu")
model = GPT(config.model).prepare(dist.device)
ema = Ema(dict(model.named_parameters()))
optimizer = Optimizer(model, config.optim, dist, ema=ema)
ids = torch.randint(0, config.model.vocab_size, (tokens,))
cu = torch.arange(0, tokens + 1, 256, dtype=torch.int32)
for _ in range(2):
    model(ids, ids, cu, max_seqlen=256, loop=True).mean().backward()
    optimizer.step(0.0, ema_decay=0.5)
print(imported, kib('VmHWM:'))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_estimate_against_a_process_of_now():
    """Not by ru_maxrss, in which a child of a large process starts with its parent's size."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, "2048"], capture_output=True, text=True, timeout=300, check=True
    )
    imported, most = (int(kib) << 10 for kib in result.stdout.split())
    found = estimate_memory(config_of("tiny", 2048, quantize=False), **CPU)
    assert found.total - found.process == pytest.approx(most - imported, rel=0.2)
    if torch.version.cuda is None:  # a build with CUDA has more libraries
        assert found.total == pytest.approx(most, rel=0.2)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", list(PRESETS))
def test_more_tokens_need_more_memory(preset, device):
    sizes = [256 * k for k in (1, 2, 3, 5, 16, 31, 32, 33, 64, 65, 85, 86, 100, 255, 256, 257, 400, 1000)]
    totals = []
    for micro in sizes:
        config = PRESETS[preset]()
        config = replace(config, data=replace(config.data, batch_tokens=micro, micro_tokens=micro))
        found = estimate_memory(config, device_type=device, world_size=1, attention="auto")
        totals.append(found.total)
    assert totals == sorted(totals) and totals[0] < totals[-1]


def test_parts_sum_to_the_total_and_ranks_share_the_optimizer():
    config = config_of("pr1855", 4096)
    one = estimate_memory(config, **CPU)
    assert one.weights == 4 * 35_945_671 == one.gradients == one.averages
    assert one.total == sum(vars(one).values()) and min(vars(one).values()) >= 0
    four = estimate_memory(config, device_type="cpu", world_size=4, attention="sdpa")
    assert four.activations == one.activations and four.optimizer < 2 * one.optimizer


def test_record_on_a_laptop_is_refused_with_the_flag_that_works(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: 24 * GIB)
    config = PRESETS["pr1855"]()
    with pytest.raises(ValueError, match=r"about \d+\.\d GiB of memory with data\.micro_tokens=98304") as e:
        check_memory(config, OneRank(), attention="sdpa")
    text = str(e.value)
    assert "24.0 GiB are available on this machine" in text and "activations" in text and "loss" in text
    micro = int(re.search(r"--data\.micro-tokens (\d+)", text).group(1))
    assert 8192 <= micro <= 24_576 and config.data.batch_tokens % micro == 0
    passing = replace(config, data=replace(config.data, micro_tokens=micro))
    assert re.fullmatch(
        r"memory: about .* of 24\.0 GiB available \(.*\)",
        check_memory(passing, OneRank(), attention="sdpa"),
    )
    # The proposal leaves slack, so the next larger micro-batch may fit, too; one that does not is refused.
    larger = min(
        m
        for m in range(micro + 1, 98_305)
        if config.data.batch_tokens % m == 0
        and memory.MARGIN
        * estimate_memory(replace(config, data=replace(config.data, micro_tokens=m)), **CPU).total
        > 24 * GIB
    )
    assert "This run is on the CPU" in text and "the preset tiny" in text
    with pytest.raises(ValueError, match=f"--data.micro-tokens {micro},"):
        check_memory(
            replace(config, data=replace(config.data, micro_tokens=larger)), OneRank(), attention="sdpa"
        )


def test_where_nothing_fits_no_flag_is_named(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda device: GIB)
    with pytest.raises(ValueError, match="not even the smallest micro-batch") as e:
        check_memory(PRESETS["pr1855"](), OneRank(), attention="sdpa")
    assert "--data.micro-tokens" not in str(e.value)


def test_suggestion_divides_the_batch_over_the_ranks():
    config = PRESETS["pr1855"]()
    for world in (1, 2, 3, 8):
        micro = fitting_micro_tokens(config, 12 * GIB, device_type="cpu", world_size=world, attention="sdpa")
        assert micro >= 16 and config.data.batch_tokens % (micro * world) == 0


def test_a_rank_with_less_memory_stops_all(monkeypatch):
    """Rank 0 has enough; this one does not, and says so through `check`."""
    monkeypatch.setattr(memory, "available_memory", lambda device: GIB)
    rank = OneRank()
    rank.share = lambda values: [200.0 * GIB]
    with pytest.raises(RuntimeError, match=r"1\.0 GiB are available"):
        check_memory(PRESETS["pr1855"](), rank, attention="sdpa")


def fake_root(tmp_path: Path, files: dict[str, str]) -> Path:
    files = {
        "proc/meminfo": "MemTotal: 9 kB\nMemAvailable:  8388608 kB\n",
        "proc/self/statm": "9 0 0\n",
    } | files
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


V1 = "sys/fs/cgroup/memory"
V2 = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8 * GIB),
        ({"proc/self/statm": "9 1024 7\n"}, 8 * GIB + 1024 * memory._page()),
        (  # v2, with a limit on the parent; 1 GiB of the usage is cache
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "1\n",
                f"{V2}/a/b/memory.stat": "anon 1\n",
                f"{V2}/a/memory.max": f"{4 * GIB}\n",
                f"{V2}/a/memory.current": f"{3 * GIB}\n",
                f"{V2}/a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        (  # v1 in a container: the path is the host's, the limit is at the top
            {
                "proc/self/cgroup": "7:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n",
                f"{V1}/memory.limit_in_bytes": f"{3 * GIB}",
                f"{V1}/memory.usage_in_bytes": f"{GIB}",
                f"{V1}/memory.stat": "total_inactive_file 0",
            },
            2 * GIB,
        ),
        (  # v1's "no limit"
            {
                "proc/self/cgroup": "5:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712",
                f"{V1}/memory.usage_in_bytes": "1",
                f"{V1}/memory.stat": "",
            },
            8 * GIB,
        ),
        (  # used up: nothing left, not less
            {
                "proc/self/cgroup": "0::/\n",
                f"{V2}/memory.max": "1",
                f"{V2}/memory.current": "2",
                f"{V2}/memory.stat": "",
            },
            0,
        ),
    ],
)
def test_available_memory_reads_meminfo_and_cgroups(tmp_path, monkeypatch, files, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert available_memory(torch.device("cpu"), root=fake_root(tmp_path, files)) == expected


def test_ranks_of_a_host_share_its_memory(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(torch.device("cpu"), root=fake_root(tmp_path, {})) == 2 * GIB


def test_available_memory_of_this_machine():
    assert GIB / 4 < available_memory(torch.device("cpu")) < 2**45
