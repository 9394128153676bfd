"""The bench that compares a preset with a published script, on a stand-in with the same names."""

import base64
import inspect
import lzma
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import published
from bench.common import Recorder
from bench.published import Comparison, map_parameters
from bench.published_script import (
    RAW,
    FlashAttention,
    Script,
    flash_attn_varlen_func,
    load_script,
    parse,
    read_source,
)
from pgolf.config import Config
from pgolf.errors import UserError
from pgolf.model.attention import sdpa_attention
from pgolf.presets import naive

SCRIPT = """
import os
import torch
import torch.nn.functional as F
from torch import nn
from flash_attn_interface import flash_attn_varlen_func

class Hyperparameters:
    layers = int(os.environ.get("LAYERS", 1))
    model_dim = int(os.environ.get("MODEL_DIM", 64))
    vocab = int(os.environ.get("VOCAB", 8))
    train_batch_tokens = int(os.environ.get("TRAIN_BATCH_TOKENS", 1))
    train_seq_len = 1024
    grad_clip_norm, muon_backend_steps = 1.0, 5
    max_wallclock_seconds, enable_looping_at = 10.0, None
    warm = float(os.environ.get("WARM", 20))

BOS_ID = None
RATE = 0.04

class CastedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))

def norm(x):
    return F.rms_norm(x, (x.shape[-1],))

class Rotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** -(torch.arange(0, dim, 2) / dim), persistent=False)
        self._cos_cached = None

    def forward(self, seq_len, device, dtype):
        angle = torch.outer(torch.arange(seq_len, device=device).float(), self.inv_freq.float())
        return angle.cos()[None, :, None].to(dtype), angle.sin()[None, :, None].to(dtype)

def turn(x, cos, sin):
    one, two = x.chunk(2, dim=-1)
    return torch.cat((one * cos + two * sin, two * cos - one * sin), dim=-1)

class Attention(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.c_q, self.c_k, self.c_v, self.proj = (
            CastedLinear(dim, out, bias=False) for out in (dim, dim // 2, dim // 2, dim)
        )
        self.q_gain = nn.Parameter(torch.full((4,), 1.5))
        self.rotary = Rotary(dim // 4)
        for layer in (self.c_q, self.c_k, self.c_v):
            nn.init.orthogonal_(layer.weight)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x, cu, size):
        heads = (self.c_q, 4), (self.c_k, 2), (self.c_v, 2)
        q, k, v = (layer(x).view(len(x), count, -1) for layer, count in heads)
        cos, sin = (table[0] for table in self.rotary(len(x), x.device, x.dtype))
        q, k = turn(norm(q), cos, sin) * self.q_gain.to(x.dtype)[:, None], turn(norm(k), cos, sin)
        y = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=size, causal=True)
        return self.proj(y.flatten(1))

class MLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc, self.proj = CastedLinear(dim, 2 * dim, bias=False), CastedLinear(2 * dim, dim, bias=False)
        nn.init.orthogonal_(self.fc.weight)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x):
        return self.proj(F.leaky_relu(self.fc(x), 0.5).square())

class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.attn, self.mlp = Attention(dim), MLP(dim)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.ones(dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(dim), torch.zeros(dim))))

    def forward(self, x, x0, cu, size):
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x), cu, size)
        return x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x))

class GPT(nn.Module):
    def __init__(self, h):
        super().__init__()
        self.tok_emb = nn.Embedding(h.vocab, h.model_dim)
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        self.blocks = nn.ModuleList(Block(h.model_dim) for _ in range(h.layers))
        self.skip_weights = nn.Parameter(torch.ones(h.layers // 2, h.model_dim))

    def forward(self, input_ids, target_ids, cu_seqlens=None, max_seqlen=0):
        x = x0 = norm(self.tok_emb(input_ids[0]))
        half, saved = len(self.blocks) // 2, []
        for i, block in enumerate(self.blocks):
            if i >= half and saved:
                x = x + self.skip_weights[i - half].to(x.dtype) * saved.pop()
            x = block(x, x0, cu_seqlens, max_seqlen)
            if i < half:
                saved.append(x)
        logits = 30 * torch.tanh(F.linear(norm(x), self.tok_emb.weight) / 30)
        return F.cross_entropy(logits.float(), target_ids[0])

def _build_cu_seqlens(starts, total, device, longest, bucket):
    found = [p for a, b in zip(starts, starts[1:] + [total]) for p in range(a, b, longest)] + [total]
    return torch.tensor(found + [total] * (-len(found) % bucket), dtype=torch.int32), longest

@torch.compile
def zeropower_via_newtonschulz5(G, steps):
    X = G.bfloat16()
    X = X / (X.norm() + 1e-7)
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X

class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, base_lr=lr, momentum=0.9, nesterov=True))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("buffer", torch.zeros_like(p))
                buffer.mul_(group["momentum"]).add_(p.grad)
                update = zeropower_via_newtonschulz5(p.grad + group["momentum"] * buffer, steps=5)
                p.add_(update * max(1, p.shape[0] / p.shape[1]) ** 0.5, alpha=-group["lr"])

def restore_fp32_params(model):
    for p in model.parameters():
        if p.dim() < 2 or p.shape[0] == 2:
            p.data = p.data.float()

def adam(params, lr):
    return torch.optim.Adam([{"params": params, "lr": lr, "base_lr": lr}], lr=lr, betas=(0.9, 0.95), eps=1e-8)

def main():
    args = Hyperparameters()
    base_model = GPT(args).cuda()
    block_named_params = list(base_model.blocks.named_parameters())
    ema_decay = 0.99
    matrix = [p for n, p in block_named_params if n.endswith("weight")]
    rest = [p for n, p in block_named_params if not n.endswith("weight")]
    optimizers: list = [Muon(matrix, RATE), adam([base_model.tok_emb.weight], 0.05)]
    optimizers = [*optimizers, adam([*rest, base_model.skip_weights], 0.04)]
    def lr_mul(step, elapsed_ms):
        return min(1.0, (max_wallclock_ms - elapsed_ms) / (0.25 * max_wallclock_ms))
    for step in range(200):
        frac = min(step / args.warm, 1.0)
        muon_momentum = (1 - frac) * 0.5 + frac * 0.9

if __name__ == "__main__":
    main()
"""
LOG = """Hyperparameters:
  data_dir: /somewhere
  layers: 3
  model_dim: 64
  rank: 0
  train_batch_tokens: 100
  vocab: 512
  warm: 20.0
model_params:{}
100/200 train_loss: 3.0 train_time: 0.1m tok/s: 2000
stopping_early: wallclock_cap train_time: 10000ms step: 200/200
"""


def stand_in(folder: Path, changes: dict[str, str] | None = None, *, packed: bool = False) -> Path:
    """Write a script in which texts are replaced, and the log of its run."""
    text = SCRIPT
    for old, new in (changes or {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    if packed:
        form = {"format": "L.FORMAT_RAW", "filters": '[{"id":L.FILTER_LZMA2}]'}
        data = base64.b85encode(lzma.compress(text.encode(), **RAW)).decode()
        given = ",".join(f"{k}={v}" for k, v in form.items())
        text = f"import lzma as L,base64 as B\nexec(L.decompress(B.b85decode({data!r}),{given}))\n"
    path = folder / "train_gpt.py"
    path.write_text(text)
    parameters = 512 * 64 + 3 * (3 * 64 * 64 + 4 * 64 * 64 + 4 + 4 * 64) + 64
    (folder / "train_seed1.log").write_text(LOG.format(parameters))
    return path


def config() -> Config:
    base = naive()
    sizes = {"vocab_size": 512, "layers": 3, "width": 64, "heads": 4, "kv_heads": 2, "rope_dims": 16}
    model = replace(base.model, **sizes, activation="leaky_relu2", parallel_from=3)
    muon = replace(base.optim.muon, momentum=0.9, momentum_start=0.5, momentum_warmup=0.1)
    # The average reaches 99 steps back, each of which took 1/200 of the clock.
    optim = replace(base.optim, muon=muon, grad_clip=1.0, warmdown=0.25, ema_horizon=0.4975)
    return replace(
        base, model=model, optim=optim, data=replace(base.data, batch_tokens=100, micro_tokens=100)
    )


def compared(script: Script) -> list[str]:
    comparison = Comparison(script, config(), Recorder("published", torch.device("cpu")))
    comparison.run()
    return comparison.problems


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(published, "NARROW", 32)


def test_a_script_with_our_formulas_has_no_differences(tmp_path):
    script = load_script(stand_in(tmp_path, packed=True))
    assert script.packs_documents and script.clock_ms == 10_000
    assert script.step_at(0.25) == 50 and script.last_step() == pytest.approx(0.005)
    assert script.ema_decay == 0.99
    assert compared(script) == []


FORMULAS = {
    "0.5).square()": ("0.4).square()", "loop off, float32, mlp_up_bank", "loop off, bfloat16, mlp_up_bank"),
    "10000 **": ("9900 **", "rotation, float32, cos", "rotation, float32, sin"),
    "2.0315": ("2.0316", "polar iteration, float64, kv_bank"),
    '-group["lr"])': ('-group["lr"] / 2)', "change by three steps, qo_bank"),
}
SETTINGS = {
    "RATE = 0.04": ("RATE = 0.041", "change by three steps, qo_bank", "rates, qo_bank"),
    "(1 - frac) * 0.5": ("(1 - frac) * 0.6", "momentum at 5% of the clock"),
    "(0.25 * max": ("(0.5 * max", "learning rate at 55% of the clock", "learning rate at 95% of the clock"),
    "torch.full((4,), 1.5)": ("torch.full((4,), 1.6)", "initial values, q_gain"),
    "range(a, b, longest)": ("range(a, b, 2 * longest)", "cut documents, segments"),
    "train_seq_len = 1024": ("train_seq_len = 512", "longest segment at 5% of the clock: 1024"),
    "ema_decay = 0.99": ("ema_decay = 0.98", "the weight average reaches 99 steps back, not 49"),
}


@pytest.mark.parametrize("changes", [FORMULAS, SETTINGS], ids=["formulas", "settings"])
def test_what_a_script_does_otherwise_is_named(tmp_path, changes):
    script = load_script(stand_in(tmp_path, {old: new for old, (new, *_) in changes.items()}))
    problems, wanted = compared(script), [start for _, *starts in changes.values() for start in starts]
    assert not [start for start in wanted if not any(p.startswith(start) for p in problems)], problems
    kinds = {start.split(",")[0].split(" at ")[0] for start in wanted}
    assert all(p.startswith(tuple(kinds)) for p in problems), problems


def test_a_setting_that_the_script_does_not_take_over_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"does not have these settings of train_seed1.log: warm=20.0"):
        load_script(stand_in(tmp_path, {'"WARM", 20': '"HEAT", 30'}))


def test_what_a_script_imports_stays_imported_but_for_the_stand_ins(tmp_path, monkeypatch):
    # triton cannot be imported twice in one process.
    (tmp_path / "only_of_this_script.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_script(stand_in(tmp_path, {"import os\n": "import os\nimport only_of_this_script\n"}))
    assert sys.modules.pop("only_of_this_script").value == 1
    assert not {"flash_attn_interface", "published_script"} & sys.modules.keys()


def test_a_script_that_is_to_be_timed_compiles_with_torch(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: ("compiled", function))
    assert load_script(stand_in(tmp_path)).polar.__name__ == "zeropower_via_newtonschulz5"
    attention = FlashAttention(flash_attn_varlen_func=max)
    names = load_script(stand_in(tmp_path), attention=attention).names
    assert names["zeropower_via_newtonschulz5"][0] == "compiled"
    assert names["flash_attn_varlen_func"] is max


def test_settings_that_the_log_does_not_print_are_given(tmp_path):
    path = stand_in(
        tmp_path, {"grad_clip_norm, muon": 'grad_clip_norm, half = 1.0, os.environ.get("HALF")\n    muon'}
    )
    assert load_script(path, given={"HALF": "yes"}).settings.half == "yes"
    with pytest.raises(UserError, match="the script does not read WHOLE"):
        load_script(path, given={"WHOLE": "no"})


def test_the_source_of_a_packed_script_is_found(tmp_path):
    # Triton compiles a kernel from what inspect finds.
    script = load_script(stand_in(tmp_path, packed=True))
    assert inspect.getsource(script.names["turn"]).startswith(
        "def turn(x, cos, sin):\n    one, two = x.chunk"
    )


def test_of_two_polar_iterations_the_one_in_use_is_compared(tmp_path):
    name, line = "zeropower_via_polar_express", "max_wallclock_seconds, enable_looping_at ="
    script = load_script(stand_in(tmp_path, {line: f"use_polar_express = True\n    {line}"}))
    script.names[name] = torch.neg
    assert script.polar is torch.neg
    script = load_script(stand_in(tmp_path))
    assert script.polar is script.names["zeropower_via_newtonschulz5"]


def test_banks_of_a_script_are_float32_in_training(tmp_path):
    script = load_script(stand_in(tmp_path))
    model = script.model()
    model.qo_bank = torch.nn.Parameter(torch.zeros(2, 64, 64))
    assert script.as_trained(model).qo_bank.dtype == torch.float32
    assert model.tok_emb.weight.dtype == torch.bfloat16


def test_rows_shorter_than_those_of_training_rotate_as_those(tmp_path):
    script = load_script(stand_in(tmp_path))
    model = script.model()
    rotary = model.blocks[1].attn.rotary
    rotary.train_seq_len = 512  # the script stretches rows of 1,024 tokens by 2
    with script._rows_of(128, model):
        assert rotary.train_seq_len == 64
    assert rotary.train_seq_len == 512


def test_a_preset_is_compared_with_the_leak_of_its_script(tmp_path):
    script, recorder = load_script(stand_in(tmp_path)), Recorder("published", torch.device("cpu"))
    for name, leaks in (("pr1874", True), ("pr1851", False)):
        found = Comparison(script, replace(config(), name=name), recorder)
        assert found.config.model.smear_over_bos is leaks


def test_parameters_without_a_counterpart_are_named(tmp_path):
    theirs = dict(load_script(stand_in(tmp_path)).model().named_parameters())
    mapped = map_parameters(config(), theirs)
    assert mapped["kv_bank"].gather(theirs)[4].equal(theirs["blocks.1.attn.c_v.weight"])
    with pytest.raises(UserError, match=r"nothing for extra of the script"):
        map_parameters(config(), theirs | {"extra": torch.zeros(1)})
    map_parameters(config(), theirs | {"softcap_pos": torch.zeros(())})
    del theirs["blocks.2.mlp.fc.weight"]
    with pytest.raises(UserError, match=r"the script has nothing for mlp_up_bank"):
        map_parameters(config(), theirs)


def test_a_definition_that_this_python_cannot_parse_is_left_out(capsys):
    tree = parse("a = 1\ndef f():\n    return 1 +\nclass B:\n    c = 2\n")
    assert [type(n).__name__ for n in tree.body] == ["Assign", "ClassDef"]
    assert "left out, line 3" in capsys.readouterr().err


def test_a_script_in_an_unknown_wrapping_is_refused(tmp_path):
    path = tmp_path / "train_gpt.py"
    path.write_text(f"exec(unpack({base64.b85encode(b'no lzma at all')!r}))")
    with pytest.raises(UserError, match="expected a script, or one that is packed with lzma"):
        read_source(path)


def test_the_stand_in_for_flash_attention_keeps_segments_apart():
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(50, heads, 8, generator=rng) for heads in (4, 2, 2))
    cu = torch.tensor([0, 20, 21, 50, 50], dtype=torch.int32)
    found = flash_attn_varlen_func(q, k, v, cu_seqlens_q=cu, causal=True)
    torch.testing.assert_close(found, sdpa_attention(q, k, v, cu, 50))
