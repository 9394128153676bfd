"""Every knob of a run, as frozen dataclasses: unit, meaning and range check beside the field.

No torch here. The defaults are those of preset pr1855 (PR #1855 of the parameter-golf challenge);
`presets.py` names the variations. The resolved configuration is written to `config.json` before step 0.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pgolf import config_versions
from pgolf.config_io import MAY_CHANGE as MAY_CHANGE
from pgolf.config_io import config_hash as config_hash
from pgolf.config_io import from_dict as from_dict
from pgolf.config_io import read_json as read_json
from pgolf.config_io import run_hash as run_hash
from pgolf.config_io import to_dict as to_dict
from pgolf.errors import UserError


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


MOST = {
    "model.layers": 1024,
    "model.width": 65_536,
    "model.mlp_mult": 256,
    "model.max_context": 2**24,
    "model.recurrence_repeats": 64,
    "data.prefetch": 1024,
    "train.warmup_steps": 1000,
    "train.seed": 2**63 - 1,
    "quant.lqer_rank": 65_536,
    "quant.lqer_top": 65_536,
    "quant.calibration_batches": 2**20,
    "quant.gradient_batches": 2**20,
    "ttt.rank": 65_536,
    "ttt.seed": 2**63 - 1,
}
"""Largest whole numbers, far beyond any use: what is above would hang or crash instead of being refused."""
MOST_ELSE = 2**40
"""That of all others, tokens and steps among them."""


def _check_finite(section: str, config: Any) -> None:
    """Refuse NaN, infinity and whole numbers beyond `MOST`, whatever else is asked of the settings."""
    for f in dataclasses.fields(config):
        value, name = getattr(config, f.name), f"{section}.{f.name}"
        if isinstance(value, float):
            _require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        elif isinstance(value, int):
            most = MOST.get(name, MOST_ELSE)
            _require(value <= most, f"{name} must be at most {most:,}, got {shown(value)}")


def shown(value: int) -> str:
    """Return a whole number in digits, or how many it has where Python does not write them."""
    return str(value) if value.bit_length() < 1000 else f"a number of {value.bit_length()} bits"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network. Dimension legend: `V` vocab, `D` width, `L` layers, `H` heads, `K` head dim."""

    vocab_size: int = 8192
    """Number of token ids `V`; must equal the tokenizer's."""
    layers: int = 11
    """Physical layers `L`."""
    width: int = 512
    """Model width `D`."""
    heads: int = 8
    """Query heads `H`; the head dim is width / heads."""
    kv_heads: int = 4
    """Key/value heads; consecutive groups of heads / kv_heads query heads share one."""
    mlp_mult: int = 4
    """Hidden width of the MLP as a multiple of the model width."""
    activation: Literal["leaky_relu2", "relu2"] = "leaky_relu2"
    """leaky_relu(x, 0.5)^2 or relu(x)^2."""
    max_context: int = 2048
    """Longest attention segment, tokens; longer documents are cut into segments of this length."""
    rope_dims: int = 16
    """Leading head dims that rotate (partial RoPE); the rest pass through. Even."""
    rope_base: float = 10000.0
    """RoPE base frequency."""
    qk_gain: float = 5.0
    """Initial value of the learned gain on each query head (after QK-norm and RoPE)."""
    xsa_layers: int = 11
    """The last n layers use exclusive self-attention: the output loses its part along the own value."""
    head_gate: Literal["none", "sparse", "dense", "out"] = "sparse"
    """Gate on each head's output: sparse sigmoid(scale * w.n[:window]), dense sigmoid(w.n), out
    2 * sigmoid(w.n[:window])."""
    gate_window: int = 12
    """Leading channels that the sparse, out and smear gates read."""
    sparse_gate_scale: float = 0.5
    """Multiplier inside the sparse gate's sigmoid."""
    smear_gate: bool = True
    """Add a gated copy of the previous token's embedding, masked where the current token is BOS."""
    ln_scale: bool = True
    """Divide the normed input of layer i by sqrt(i + 1)."""
    resid_mix: bool = True
    """Mix the block input with the first embedding: m0 * x + m1 * x0."""
    skip: Literal["none", "weighted", "gated"] = "gated"
    """U-Net skips from encoder to decoder: x + w * s, or the gated lerp w*s + sigmoid(g) * (x - w*s)."""
    parallel_from: int = 8
    """First physical layer that runs attention and MLP on two parallel residual lanes; layers = none."""
    recurrence_start: int = 3
    """First physical layer of the segment that depth recurrence repeats, from 0."""
    recurrence_end: int = 5
    """Last physical layer of that segment, inclusive; below parallel_from."""
    recurrence_repeats: int = 2
    """Further passes through the segment once recurrence is on, 0 to 64; 0 = no recurrence. More passes make
    the network deeper at the same bytes, and the steps slower."""
    softcap: float = 30.0
    """Logits are softcap * tanh(z / softcap)."""
    embed_init_std: float = 0.005
    """Standard deviation of the embedding at initialization."""

    def __post_init__(self) -> None:
        _check_finite("model", self)
        for name in ("layers", "width", "heads", "kv_heads", "mlp_mult", "max_context"):
            value = getattr(self, name)
            _require(value >= 1, f"model.{name} must be >= 1, got {value}")
        for name in ("recurrence_repeats", "sparse_gate_scale"):
            _require(getattr(self, name) >= 0, f"model.{name} must be >= 0, got {getattr(self, name)}")
        _require(
            self.width % self.heads == 0,
            f"model.width must be a multiple of model.heads, got {self.width} and {self.heads}",
        )
        _require(
            self.heads % self.kv_heads == 0,
            f"model.heads must be a multiple of model.kv_heads, got {self.heads} and {self.kv_heads}",
        )
        _require(
            self.rope_dims % 2 == 0 and 0 <= self.rope_dims <= self.head_dim,
            f"model.rope_dims must be even and in [0, head_dim={self.head_dim}], got {self.rope_dims}",
        )
        _require(
            0 <= self.recurrence_start <= self.recurrence_end < self.layers or self.recurrence_repeats == 0,
            f"model.recurrence_start..recurrence_end must lie in [0, layers={self.layers}), "
            f"got {self.recurrence_start}..{self.recurrence_end}",
        )
        _require(
            self.recurrence_repeats == 0 or self.recurrence_end < self.parallel_from,
            f"model.recurrence_end must be below model.parallel_from={self.parallel_from}, "
            f"got {self.recurrence_end}",
        )
        _require(
            0 <= self.xsa_layers <= self.layers,
            f"model.xsa_layers must be in [0, layers={self.layers}], got {self.xsa_layers}",
        )
        _require(
            1 <= self.parallel_from <= self.layers,
            f"model.parallel_from must be in [1, layers={self.layers}], got {self.parallel_from}",
        )
        _require(
            1 <= self.gate_window <= self.width,
            f"model.gate_window must be in [1, width={self.width}], got {self.gate_window}",
        )
        for name in ("rope_base", "qk_gain", "softcap", "embed_init_std"):
            _require(getattr(self, name) > 0, f"model.{name} must be > 0, got {getattr(self, name)}")
        _require(
            8 <= self.vocab_size <= 65536,
            f"model.vocab_size must be in [8, 65536] (shards hold uint16), got {self.vocab_size}",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head, `K`."""
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        """Total width of the keys (and of the values)."""
        return self.kv_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return self.mlp_mult * self.width


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from and how a step is cut from them."""

    dir: Path | None = None
    """Folder with `*_train_*.bin`, `*_val_*.bin` and the tokenizer (made by `pgolf data shards`)."""
    batch_tokens: int = 786_432
    """Tokens per optimizer step, over all ranks."""
    micro_tokens: int = 98_304
    """Tokens per forward/backward on one rank; batch_tokens is a multiple of micro_tokens * world size."""
    shuffle: bool = True
    """Shuffle shards and the documents inside each shard by seed; off reads in file order."""
    prefetch: int = 3
    """Micro-batches kept ready by the loader's thread."""
    verify: bool = False
    """Check the SHA-256 of the training shards too before the run; all else that manifest.json says is always
    checked, of training shards the size."""

    def __post_init__(self) -> None:
        _check_finite("data", self)
        _require(self.micro_tokens >= 16, f"data.micro_tokens must be >= 16, got {self.micro_tokens}")
        _require(
            self.batch_tokens > 0 and self.batch_tokens % self.micro_tokens == 0,
            f"data.batch_tokens={self.batch_tokens} must be a multiple of "
            f"data.micro_tokens={self.micro_tokens} and above 0",
        )
        _require(self.prefetch >= 1, f"data.prefetch must be >= 1, got {self.prefetch}")


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon on the matrix banks."""

    lr: float = 0.026
    """Learning rate before the schedule; the update is scaled by sqrt(max(1, rows / cols))."""
    weight_decay: float = 0.095
    """Decoupled weight decay, multiplied by the scheduled learning rate."""
    momentum: float = 0.97
    """Heavy-ball momentum after its warm-up."""
    momentum_start: float = 0.92
    """Momentum at step 0."""
    momentum_warmup: float = 0.3
    """Fraction of the run over which momentum rises linearly (PR #1855: 1,500 of about 4,930 steps)."""
    nesterov: bool = True
    """Use g + momentum * buffer as the update direction."""
    row_normalize: bool = True
    """MuonEq-R: divide each row of the update by its norm before the polar iteration."""
    ns_steps: int = 5
    """Polar iterations, 1 to 10."""
    coefficients: str = "polar_express_golf"
    """Coefficient table of `pgolf.optim.polar`."""
    algorithm: Literal["auto", "standard", "gram"] = "auto"
    """How the iteration is computed: auto takes Hopper's kernel (gram: float16, two steps at a time on long
    matrices) where it can, standard always the products of one step after another."""

    def __post_init__(self) -> None:
        _check_finite("optim.muon", self)
        _require(1 <= self.ns_steps <= 10, f"optim.muon.ns_steps must be in [1, 10], got {self.ns_steps}")
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            _require(value >= 0, f"optim.muon.{name} must be >= 0, got {value}")
        for name in ("momentum", "momentum_start"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.muon.{name} must be in [0, 1), got {value}")
        _require(
            0 <= self.momentum_warmup <= 1,
            f"optim.muon.momentum_warmup is a fraction of the run in [0, 1], got {self.momentum_warmup}",
        )


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """AdamW on everything that is not a matrix bank."""

    embed_lr: float = 0.03
    """Learning rate of the token embedding."""
    embed_weight_decay: float = 0.085
    """Decoupled weight decay of the token embedding."""
    scalar_lr: float = 0.02
    """Learning rate of gains, gates, scales and lambdas."""
    scalar_weight_decay: float = 0.02
    """Decoupled weight decay of the scalars."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def __post_init__(self) -> None:
        _check_finite("optim.adam", self)
        for name in ("embed_lr", "embed_weight_decay", "scalar_lr", "scalar_weight_decay"):
            value = getattr(self, name)
            _require(value >= 0, f"optim.adam.{name} must be >= 0, got {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, f"optim.adam.{name} must be in [0, 1), got {value}")
        _require(self.eps > 0, f"optim.adam.eps must be > 0, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizers, schedule and averaging; schedules follow the fraction of the run, not the step."""

    muon: MuonConfig = field(default_factory=MuonConfig)
    """Matrix banks."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    """Embedding and scalars."""
    grad_clip: float = 0.3
    """Global-norm clip of the reduced gradient; 0 = off."""
    warmdown: float = 0.85
    """Last fraction of the run over which the learning rate falls linearly."""
    min_lr: float = 0.1
    """Floor of the learning rate as a fraction of its peak."""
    ema_horizon: float = 0.058
    """Averaging horizon 1 / (1 - decay), fraction of the run (PR #1855: 286 of 4,931 steps); 0 = no EMA."""
    recurrence_at: float = 0.35
    """Fraction of the run at which depth recurrence is switched on, 0 to 1; steps are slower from then on."""

    def __post_init__(self) -> None:
        _check_finite("optim", self)
        _require(self.grad_clip >= 0, f"optim.grad_clip must be >= 0, got {self.grad_clip}")
        for name in ("warmdown", "min_lr", "ema_horizon", "recurrence_at"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optim.{name} is a fraction in [0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The clock and the run around the model."""

    seconds: float = 600.0
    """Wall-clock budget of training plus quantization, seconds; 0 = no clock, run `steps` steps."""
    steps: int = 0
    """Stop after this many optimizer steps; 0 = only the clock stops the run."""
    quantize_reserve: float | None = None
    """Seconds of the budget kept for saving, calibration and quantization; none given: what a rehearsal of
    them before the clock took, and 15 %; 0 puts them after the budget."""
    init: Path | None = None
    """raw.safetensors or ema.safetensors of a run of the same model: start from these weights, not from
    random ones. Nothing but weights: optimizer state starts from zero and the schedule from its beginning (to
    go on where a run ended, lower the rates and set optim.muon.momentum_warmup=0)."""
    quantize: bool = True
    """Quantize, write and score the artifact after training; off, a run ends with its raw and averaged
    weights, of which `pgolf quantize` makes an artifact later."""
    seed: int = 42
    """Seeds initialization and data order."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where to run; auto takes CUDA when it is there."""
    compile: Literal["off", "blocks", "model"] = "blocks"
    """torch.compile each kind of block once, or all layers as one graph; the CPU always runs eagerly."""
    attention: Literal["auto", "varlen", "fa4", "sdpa"] = "auto"
    """Attention kernel; auto takes flash-attn-4 where it works, else torch varlen on CUDA, SDPA elsewhere."""
    warmup_steps: int = 3
    """Untimed steps before the clock, without and with recurrence; all state is restored after them."""
    out: Path = Path("runs")
    """Run folders are made here; with several hosts, on a disk that all of them share."""
    checkpoint_every: float = 60.0
    """Seconds of the clock between checkpoints, from which `pgolf train --resume` goes on; the two newest
    stay until the run is finished. 0: only a signal (SIGTERM, SIGHUP, SIGINT) makes one."""
    rank_timeout: float = 30.0
    """Seconds without a sign of life after which a rank counts as lost and ends the run, naming it; a rank
    that was killed is noticed at once."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the run's metrics are recorded next to metrics.jsonl: nowhere, in TensorBoard event files in the
    run folder, or by Weights & Biases. Both are optional packages: pip install 'pgolf[tensorboard]' or
    'pgolf[wandb]'. Set it to watch a run from a browser; it changes no result."""

    def __post_init__(self) -> None:
        _check_finite("train", self)
        for name in ("seconds", "steps", "seed", "warmup_steps"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name} must be >= 0, got {value}")
        _require(
            self.seconds > 0 or self.steps > 0,
            "train.seconds and train.steps are both 0: the run would never stop; set one of them",
        )
        _require(
            0 <= self.checkpoint_every < float("inf"),
            f"train.checkpoint_every must be >= 0 s and finite, got {self.checkpoint_every}",
        )
        _require(
            5 <= self.rank_timeout <= 600,
            f"train.rank_timeout must be in [5, 600] s, got {self.rank_timeout}",
        )
        reserve = self.quantize_reserve or 0.0
        _require(reserve >= 0, f"train.quantize_reserve must be >= 0 s, got {reserve}")
        _require(
            self.seconds == 0 or reserve < self.seconds,
            f"train.quantize_reserve={reserve} leaves no time to train in train.seconds={self.seconds}",
        )


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How weights become codes: a weight is stored as a small whole number times a quantization scale."""

    matrix_bits: int = 8
    """Width of the codes of the attention and MLP matrices, 4 to 8 bits. With row_scales=loss it only bounds
    the codes, and mean_bits sets their size; lower it with row_scales=spread."""
    embed_bits: int = 8
    """The same for the codes of the token embedding, 4 to 8 bits."""
    mlp_clip: float = 11.5
    """With row_scales=spread: how many standard deviations of its row the largest code of an MLP matrix
    means, above 0. A larger value makes coarser codes and a smaller file; artifact.fit scales it."""
    attn_clip: float = 13.0
    """The same for the attention matrices, standard deviations."""
    embed_clip: float = 14.0
    """The same for the token embedding, standard deviations."""
    damp: float = 0.01
    """What GPTQ adds to the diagonal of a Hessian, as a fraction of the diagonal's mean, above 0. It grows
    tenfold by itself where that is not enough, so there is rarely a reason to touch it."""
    row_scales: Literal["spread", "loss"] = "loss"
    """What the scale of a row follows: loss = how much the training loss minds an error in the row; spread =
    the standard deviation of its weights (SDClip), which published stacks use."""
    column_scales: bool = True
    """Give columns factors on the scales, by what is left of an input once the inputs that are rounded later
    are known. Turn it off to repeat a published stack."""
    mean_bits: float = 3.45
    """With row_scales=loss: bits per code, averaged over the model, from which artifact.fit starts, 0.5 to 8.
    It sets the size of the file where artifact.fit is off."""
    rate: float = 1 / 12
    """Weight of the bits of a code against its squared error in rounding, 0 to 1. 0 rounds to the nearest
    code; 1/12 is the exchange rate of the scales themselves. Which is better depends on the model: try
    both."""
    trellis: bool = True
    """Round the weights of a column together, along a trellis: less error in as many bits, for more time. A
    bank of fewer than 2 bits per code is rounded without a trellis all the same."""
    row_floor: float = 0.02
    """With row_scales=loss: least weight of a row, as a fraction of its matrix's mean, 0 to 1. Raise it where
    little calibration text lets rows look unimportant by chance."""
    embed_floor: float = 0.02
    """The same for the rows of the token embedding, 0 to 1. Tokens that do not occur in the calibration text
    get scales far too coarse otherwise: raise it to 0.3 with much less than a million tokens of that text."""
    lqer: Literal["off", "asym", "sym"] = "off"
    """Correct the matrices with the largest errors by products of two small matrices: off, or the form of
    their codes (asym is that of PR #1855). Set it to repeat a published stack."""
    lqer_rank: int = 4
    """Columns of the first of the two small matrices, at least 1 and at most the matrix's shorter side."""
    lqer_top: int = 3
    """How many matrices are corrected, at least 1."""
    gradient_batches: int = 8
    """With row_scales=loss: micro-batches of training text, over all ranks, whose gradients weigh the rows,
    at least 1. The time that they take is on the clock."""
    calibration_batches: int = 16
    """Micro-batches of training text, over all ranks, on which the inputs of the matrices are measured, at
    least 1. The time that they take is on the clock."""

    def __post_init__(self) -> None:
        _check_finite("quant", self)
        for name in ("matrix_bits", "embed_bits"):
            value = getattr(self, name)
            _require(4 <= value <= 8, f"quant.{name} must be one of (4, 5, 6, 7, 8), got {value}")
        for name in ("mlp_clip", "attn_clip", "embed_clip", "damp"):
            value = getattr(self, name)
            _require(value > 0, f"quant.{name} must be > 0, got {value}")
        for name in ("calibration_batches", "gradient_batches", "lqer_rank", "lqer_top"):
            value = getattr(self, name)
            _require(value >= 1, f"quant.{name} must be >= 1, got {value}")
        for name in ("row_floor", "embed_floor", "rate"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"quant.{name} must be in [0, 1], got {value}")
        _require(0.5 <= self.mean_bits <= 8, f"quant.mean_bits must be in [0.5, 8], got {self.mean_bits}")


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """The file that counts against the limit of the challenge."""

    limit: int = 16_000_000
    """Bytes that the file and the counted code may have together; a larger file is refused."""
    fit: bool = True
    """Multiply all scales by one factor, and quantize again, until file and code fill the limit to within 0.1
    %. A model that is too small for that gets its finest scales. Off: the scales stay as configured."""

    def __post_init__(self) -> None:
        _check_finite("artifact", self)
        _require(self.limit > 0, f"artifact.limit must be > 0 bytes, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class TttConfig:
    """Test-time training: low-rank adapters per document, scored first, then trained (PR #1855's values)."""

    rank: int = 80
    """Rank r of every adapter."""
    alpha: float = 144.0
    """Adapter outputs are multiplied by alpha / rank."""
    lr: float = 1e-4
    """Learning rate of AdamW without momentum (beta1 = 0), one step after every chunk."""
    beta2: float = 0.99
    """Decay of the second moment."""
    eps: float = 1e-10
    """Added to the root of the second moment."""
    weight_decay: float = 0.5
    """Decoupled weight decay, multiplied by lr."""
    chunk: int = 48
    """Shortest chunk, tokens: how many are scored before the adapters learn from them."""
    chunk_growth: int = 16
    """From position p on, chunks have p / chunk_growth tokens, if that is more; 0 = all as long as chunk."""
    chunk_max: int = 256
    """Longest chunk, tokens."""
    batch_tokens: int = 65_536
    """Tokens of one forward and backward, over all documents in it; speed and memory, not the score."""
    batch_documents: int = 128
    """Most documents of a batch: each has its own adapters and second moments (`pr1855`: 84 MB)."""
    seed: int = 0
    """Seeds the adapters' start, the same for every document."""

    def __post_init__(self) -> None:
        _check_finite("ttt", self)
        for name in ("rank", "chunk", "batch_tokens", "batch_documents"):
            value = getattr(self, name)
            _require(value >= 1, f"ttt.{name} must be >= 1, got {value}")
        _require(
            self.chunk_max >= self.chunk,
            f"ttt.chunk_max must be at least ttt.chunk={self.chunk}, got {self.chunk_max}",
        )
        for name in ("lr", "weight_decay", "chunk_growth", "seed"):
            value = getattr(self, name)
            _require(value >= 0, f"ttt.{name} must be >= 0, got {value}")
        _require(
            self.alpha > 0 and self.eps > 0, f"ttt.alpha, eps: must be > 0, got {self.alpha}, {self.eps}"
        )
        _require(0 <= self.beta2 < 1, f"ttt.beta2 must be in [0, 1), got {self.beta2}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Rows of a run's table: which weights are scored, and other legal ways to score the quantized ones."""

    raw: bool = True
    """Score the raw weights after training."""
    ema: bool = True
    """Score the averaged weights after training."""
    every: int = 0
    """Score the raw weights during training too, every so many steps, over the whole validation text; the
    time that takes is on the clock. 0: never."""

    sliding: bool = False
    """Add a row `sliding`: a window over each document, so that more tokens see a long context."""
    stride: int = 64
    """Tokens that each window of `sliding` scores."""
    ttt: bool = False
    """Add a row `ttt`: adapters that learn each document while it is read."""
    adapters: TttConfig = field(default_factory=TttConfig)
    """Settings of `ttt`."""

    def __post_init__(self) -> None:
        _check_finite("evaluate", self)
        _require(self.every >= 0, f"evaluate.every must be >= 0 steps, got {self.every}")
        _require(self.stride >= 1, f"evaluate.stride must be >= 1, got {self.stride}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    VERSION: ClassVar[int] = config_versions.VERSION
    """Goes into every saved configuration; what each version meant is in `config_versions.CHANGES`."""

    name: str = "pr1855"
    """Names the run folder: printable characters, no path."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Tokens."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and schedules."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Clock, seed, device."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantization."""
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)
    """The counted file."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Further ways to score."""

    def __post_init__(self) -> None:
        check_name(self.name, "a folder's name")
        longest = self.model.max_context
        _require(
            self.train.quantize or not (self.evaluate.sliding or self.evaluate.ttt),
            "evaluate.sliding and evaluate.ttt score quantized weights, and train.quantize is off; "
            "switch it on or them off",
        )
        _require(
            not self.evaluate.sliding or self.evaluate.stride <= longest,
            f"evaluate.stride must be at most model.max_context={longest}, got {self.evaluate.stride}",
        )

    @staticmethod
    def completed(data: dict[str, Any], where: str) -> dict[str, Any]:
        """Return saved settings with those that are missing as their writer had them; `from_dict` asks."""
        return config_versions.completed(data, where)


def check_name(name: str, of: str) -> None:
    """Refuse a part of a file name (`of` says which) that is none, or would be hidden or unreadable there.

    Raises:
        ValueError: it is.
    """
    plain = name.isprintable() and not set(name) & set("/\\") and not name.startswith((".", "-", " "))
    _require(
        bool(name) and plain and len(name.encode("utf-8", "replace")) <= 128,
        f"name is part of {of}: 1 to 128 bytes, printable, no / or \\, and no '.', '-' or space at "
        f"its beginning, got {name!r}",
    )
