"""All settings of a run as frozen dataclasses, with their meanings, units and range checks.

This module does not import torch. The defaults are those of preset pr1855 (PR #1855 of the parameter-golf
challenge); `presets.py` has the other presets. A run writes its configuration to `config.json` before step 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pgolf import config_versions
from pgolf.config_checks import check_finite, parse_fractions, parse_stages, require
from pgolf.config_checks import check_name as check_name
from pgolf.config_evaluate import ADAPTIVE as ADAPTIVE
from pgolf.config_evaluate import ILLEGAL as ILLEGAL
from pgolf.config_evaluate import LOOSE as LOOSE
from pgolf.config_evaluate import METHODS as METHODS
from pgolf.config_evaluate import PLACES as PLACES
from pgolf.config_evaluate import EvaluateConfig as EvaluateConfig
from pgolf.config_evaluate import Method as Method
from pgolf.config_evaluate import PhasesConfig as PhasesConfig
from pgolf.config_evaluate import SgdConfig as SgdConfig
from pgolf.config_evaluate import SlotConfig as SlotConfig
from pgolf.config_evaluate import TiltConfig as TiltConfig
from pgolf.config_evaluate import TttConfig as TttConfig
from pgolf.config_io import MAY_CHANGE as MAY_CHANGE
from pgolf.config_io import config_hash as config_hash
from pgolf.config_io import flat as flat
from pgolf.config_io import from_dict as from_dict
from pgolf.config_io import read_json as read_json
from pgolf.config_io import run_hash as run_hash
from pgolf.config_io import to_dict as to_dict
from pgolf.config_model import ModelConfig as ModelConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The training and validation text, and how a training step is cut from it."""

    dir: Path | None = None
    """Folder with `*_train_*.bin`, `*_val_*.bin` and the tokenizer, as `pgolf data shards` makes it."""
    batch_tokens: int = 786_432
    """Tokens per training step over all ranks, a multiple of micro_tokens * number of ranks."""
    micro_tokens: int = 98_304
    """Tokens per forward and backward pass on one rank, >= 16; lower it if memory is short."""
    shuffle: bool = True
    """Shuffle the shards, and the documents in each shard, by train.seed; false reads in file order."""
    order: Literal["documents", "sequences", "coprime", "stream"] = "documents"
    """How the training text is cut. documents: whole documents, and attention stays within each. The others
    repeat published stacks, with rows of model.max_context tokens whose attention crosses documents:
    sequences (PR #1394) takes rows from everywhere in random order, coprime (PR #1060) from some shards at a
    time with a stride, stream (the challenge's baseline) from the files in order. micro_tokens should then be
    a multiple of model.max_context, or rows are cut in two."""
    prefetch: int = 3
    """Number of micro-batches that the loader's thread prepares ahead of time, >= 1."""
    verify: bool = False
    """Compare the SHA-256 of the training shards with manifest.json before the run, which reads all of them.
    Everything else in manifest.json is always checked, including the sizes of the training shards."""

    def __post_init__(self) -> None:
        check_finite("data", self)
        require(self.micro_tokens >= 16, f"data.micro_tokens must be >= 16, got {self.micro_tokens}")
        require(
            self.batch_tokens > 0 and self.batch_tokens % self.micro_tokens == 0,
            f"data.batch_tokens={self.batch_tokens} must be a multiple of "
            f"data.micro_tokens={self.micro_tokens} and above 0",
        )
        require(self.prefetch >= 1, f"data.prefetch must be >= 1, got {self.prefetch}")
        require(
            self.shuffle or self.order in ("documents", "stream"),
            f"data.shuffle=false reads in file order, which data.order={self.order} does not; leave one of "
            "them out, or take data.order=stream",
        )


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon, the optimizer of the matrix banks."""

    lr: float = 0.026
    """Learning rate before the schedule, >= 0; updates are also scaled by sqrt(max(1, rows / columns))."""
    weight_decay: float = 0.095
    """Decoupled weight decay, >= 0; it is multiplied by the scheduled learning rate."""
    cautious: bool = False
    """Cautious weight decay (arXiv 2510.12402): a weight decays only in steps whose update also moves it
    towards 0. These are about half of the steps, so twice the weight_decay is the same amount. It is not in
    the fused kernel, and takes several more passes over all weights."""
    momentum: float = 0.97
    """Momentum after its warm-up, in [0, 1)."""
    momentum_age: float = 0.0
    """Mean age of the gradients in the momentum, as a fraction of the run, 0 to 1; 0 = off. momentum is then
    age / (age + fraction of the run that a step takes), so that runs of any length remember the same part of
    themselves. 0.97 is an age of 32 steps, 0.0065 of 4,931."""
    slow_age: float = 0.0
    """Mean age of a slow average of the gradients, as a fraction of the run, 0 to 1, with which the gradients
    are mixed before the momentum takes them in; 0 = off. In modded-nanogpt it falls from 0.018 to 0.008
    (track 3, pull request 357). It takes several more passes over the gradients."""
    slow_weight: float = 0.56
    """Weight, 0 to 1, of the slow average in that mix, where slow_age is above 0."""
    momentum_start: float = 0.92
    """Momentum at the start of the run, in [0, 1)."""
    momentum_warmup: float = 0.3
    """Fraction of the run, 0 to 1, over which momentum rises linearly (0.24 in PR #1855's logs)."""
    momentum_end: float = 0.9
    """Momentum at the end of the run, in [0, 1), where momentum_cooldown is above 0."""
    momentum_cooldown: float = 0.0
    """Last fraction of the run, 0 to 1, over which momentum falls linearly to momentum_end; 0: it stays."""
    late_lr: float = 1.0
    """Further factor on the learning rate of the banks at the end of the run, >= 0; 1 = none."""
    late_from: float = 0.6
    """Fraction of the run, 0 to 1, from which on that factor goes linearly from 1 to late_lr."""
    nesterov: bool = True
    """Use gradient + momentum * buffer as the direction of the update; false uses the buffer."""
    row_normalize: bool = True
    """MuonEq-R: divide each row of the direction by its norm before the polar iteration."""
    normalize: float = 0.0
    """NorMuon (arXiv 2510.05491): divide each row of the update (in a matrix with more columns than rows each
    column) by the root of its mean square over time; the norm of the matrix stays. The value is the decay of
    the mean squares per step, in [0, 1); modded-nanogpt has 0.9 and 0.95; 0 = off. It takes two more passes
    over the updates."""
    ns_steps: int = 5
    """Number of polar iterations, 1 to 10; fewer are faster and less accurate."""
    head_pairs: Literal["off", "qk", "kv", "qkv"] = "off"
    """Iterate the projections to queries, keys or values in blocks of two heads each, in place of whole
    matrices (modded-nanogpt, pull request 80, has qk)."""
    coefficients: str = "polar_express_golf"
    """Name of the coefficient table of the polar iteration; `pgolf polar` compares all of them."""
    algorithm: Literal["auto", "standard", "gram"] = "auto"
    """How the iteration is computed: gram is the Hopper kernel (float16, two iterations at a time on long
    matrices), standard computes one iteration after another, auto takes gram where it can run."""

    def __post_init__(self) -> None:
        check_finite("optim.muon", self)
        require(1 <= self.ns_steps <= 10, f"optim.muon.ns_steps must be in [1, 10], got {self.ns_steps}")
        for name in ("lr", "weight_decay", "late_lr"):
            value = getattr(self, name)
            require(value >= 0, f"optim.muon.{name} must be >= 0, got {value}")
        for name in ("momentum", "momentum_start", "momentum_end", "normalize"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.muon.{name} must be in [0, 1), got {value}")
        fractions = ("momentum_age", "slow_age", "momentum_warmup", "momentum_cooldown", "late_from")
        for name in fractions:
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.muon.{name} is a fraction of the run in [0, 1], got {value}")
        require(
            0 <= self.slow_weight <= 1, f"optim.muon.slow_weight must be in [0, 1], got {self.slow_weight}"
        )

    @property
    def paired(self) -> tuple[str, ...]:
        """Numbers of heads of the model that head_pairs cuts in pairs."""
        return tuple(heads for of, heads in (("q", "heads"), ("k", "kv_heads")) if of in self.head_pairs)


@dataclass(frozen=True, kw_only=True)
class AdamConfig:
    """AdamW, the optimizer of all parameters that are not in a matrix bank."""

    embed_lr: float = 0.03
    """Learning rate of the token embedding before the schedule, >= 0."""
    embed_weight_decay: float = 0.085
    """Decoupled weight decay of the token embedding, >= 0."""
    embed_warmup: float = 0.0
    """Fraction of the run, 0 to 1, over which the embedding's learning rate rises from a tenth of its value:
    0.004 are ten of 2,500 steps; 0 = no warm-up. Adam's first steps have the full size however small the
    gradient is, so that the loss jumps up with an embedding that is also the output projection."""
    embed_warmdown: float = -1.0
    """Last fraction of the run, 0 to 1, over which embed_lr falls; -1 = that of optim.warmdown."""
    scalar_warmdown: float = -1.0
    """Last fraction of the run, 0 to 1, over which scalar_lr falls; -1 = that of optim.warmdown."""
    scalar_lr: float = 0.02
    """Learning rate of the scalars (gains, gates, mixes) before the schedule, >= 0."""
    mudd_lr: float = 0.002
    """Learning rate of the MUDD connections (model.mudd) before the schedule, >= 0; they share the scalars'
    other settings."""
    scalar_weight_decay: float = 0.02
    """Decoupled weight decay of the scalars, >= 0."""
    beta1: float = 0.9
    """Decay of the first moment per step, in [0, 1)."""
    beta2: float = 0.99
    """Decay of the second moment per step, in [0, 1)."""
    eps: float = 1e-8
    """Added to the square root of the second moment, > 0."""

    def __post_init__(self) -> None:
        check_finite("optim.adam", self)
        for name in ("embed_lr", "embed_weight_decay", "scalar_lr", "mudd_lr", "scalar_weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optim.adam.{name} must be >= 0, got {value}")
        require(
            0 <= self.embed_warmup <= 1,
            f"optim.adam.embed_warmup is a fraction of the run in [0, 1], got {self.embed_warmup}",
        )
        for name in ("embed_warmdown", "scalar_warmdown"):
            value = getattr(self, name)
            require(
                0 <= value <= 1 or value == -1,
                f"optim.adam.{name} is a fraction in [0, 1], or -1 for that of optim.warmdown, got {value}",
            )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.adam.{name} must be in [0, 1), got {value}")
        require(self.eps > 0, f"optim.adam.eps must be > 0, got {self.eps}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizers, schedules and averaging; schedules depend on the fraction of the run, not on the step."""

    muon: MuonConfig = field(default_factory=MuonConfig)
    """Optimizer of the matrix banks."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    """Optimizer of the embedding and the scalars."""
    grad_clip: float = 0.3
    """Largest global norm of the averaged gradient; a longer one is scaled down to it. 0 = no clip."""
    warmdown: float = 0.85
    """Last fraction of the run, 0 to 1, over which the learning rates fall."""
    warmdown_power: float = 1.0
    """Power of the warm-down, > 0: learning rates fall as (the part of it that is left)^warmdown_power. 1 is
    linear; 1.2 is the PowerCool of modded-nanogpt's track 3."""
    min_lr: float = 0.1
    """Lowest learning rate in the warm-down, as a fraction (0 to 1) of its peak."""
    ema_nesterov: float = 0.0
    """EMA-Nesterov (arXiv 2605.25395): gradients are taken, and steps made, this many velocities ahead of the
    weights, times the learning rate's multiplier; in [0, 1), 0 = off. A steady direction moves 1 / (1 - s)
    times as fast, so compare at several learning rates."""
    ema_nesterov_horizon: float = 0.032
    """Horizon of the average that is the velocity, fraction of the run, > 0."""
    ema_nesterov_from: float = 0.16
    """Fraction of the run, 0 to 1, from which on the velocity is used; it is averaged from the beginning."""
    ema_nesterov_until: float = 0.76
    """Fraction of the run, 0 to 1, from which on it is not used any more."""
    average: Literal["ema", "swa"] = "ema"
    """How the weights are averaged: ema, exponentially over ema_horizon; swa, equally over snapshots that are
    taken every swa_every steps from swa_from on."""
    ema_horizon: float = 0.058
    """Averaging horizon 1 / (1 - decay), fraction of the run (0.068 in PR #1855's logs); 0 = no EMA."""
    swa_from: float = 0.9
    """Fraction of the run from which on average=swa takes snapshots, 0 to 1; PR #549 takes them where the
    learning rate is below 0.2 of its peak, which is from 1 - 0.2 * warmdown on."""
    swa_every: int = 50
    """Training steps from one of these snapshots to the next, >= 1."""
    recurrence_at: float = 0.35
    """Fraction of the run at which depth recurrence is switched on, 0 to 1; steps are slower from then on."""

    def __post_init__(self) -> None:
        check_finite("optim", self)
        require(self.grad_clip >= 0, f"optim.grad_clip must be >= 0, got {self.grad_clip}")
        fractions = ("warmdown", "min_lr", "ema_horizon", "swa_from", "recurrence_at")
        for name in (*fractions, "ema_nesterov_from", "ema_nesterov_until"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name} is a fraction in [0, 1], got {value}")
        require(
            0 <= self.ema_nesterov < 1,
            f"optim.ema_nesterov must be in [0, 1), got {self.ema_nesterov}; at 1 a steady direction would "
            "grow without end",
        )
        require(
            self.ema_nesterov_horizon > 0,
            f"optim.ema_nesterov_horizon must be > 0, got {self.ema_nesterov_horizon}",
        )
        require(
            not self.ema_nesterov or self.ema_nesterov_from <= self.ema_nesterov_until,
            f"optim.ema_nesterov_from must be at most ema_nesterov_until={self.ema_nesterov_until}, or "
            f"ema_nesterov={self.ema_nesterov} would have no effect; got {self.ema_nesterov_from}",
        )
        require(self.warmdown_power > 0, f"optim.warmdown_power must be > 0, got {self.warmdown_power}")
        require(self.swa_every >= 1, f"optim.swa_every must be >= 1 steps, got {self.swa_every}")

    @property
    def averages(self) -> bool:
        """Whether the weights are averaged at all."""
        return self.average == "swa" or self.ema_horizon > 0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The clock, the device and the files of a run."""

    seconds: float = 600.0
    """Wall-clock seconds for training and quantization together; 0 = no clock, only `steps` stops the run."""
    steps: int = 0
    """Stop training after this many training steps; 0 = only the clock stops it."""
    quantize_reserve: float | None = None
    """Seconds of the budget to keep for saving, calibration and quantization; 0 does them after the budget.
    None: a rehearsal before the clock measures how long they take, and 15 % is added."""
    init: Path | None = None
    """raw.safetensors or ema.safetensors of a run with the same model, whose weights replace the random ones.
    Only weights are loaded: optimizer state and schedules start from the beginning (train.start keeps them).
    To train a finished model further, lower the learning rates and set optim.muon.momentum_warmup=0.
    Parameters that the file lacks start so that the network computes the same (pgolf/model/neutral.py)."""
    start: Path | None = None
    """A snapshot of another run, such as RUN/snapshots/0.75, from which this run continues. Weights, average,
    momentum, moments and place in the text are the snapshot's, and every schedule continues from its fraction
    to until; train.steps and train.seconds count from there. State that the snapshot lacks starts in a
    neutral way."""
    until: float = 1.0
    """Fraction of the schedules, above 0 and at most 1, that is reached when this run's steps or seconds end;
    below 1, the run is a trunk that others continue (train.start)."""
    snapshots: str = ""
    """Fractions of the schedules, such as 0.7,0.75, rising and at most until, at which the whole state of
    training is written to RUN/snapshots and kept. A snapshot has about 11 bytes per parameter; it is written
    while training goes on."""
    quantize: bool = True
    """Quantize after training, then write and score the artifact. If false, the run ends with its raw and
    averaged weights, from which `pgolf quantize` can make an artifact later."""
    seed: int = 42
    """Seed of the initial weights and of the order of the data, >= 0."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses CUDA if there is a GPU."""
    compile: Literal["off", "blocks", "model"] = "blocks"
    """torch.compile each kind of block once, or all layers as one graph; the CPU is never compiled."""
    attention: Literal["auto", "doc", "fa4", "varlen", "sdpa"] = "auto"
    """Attention kernel; auto takes doc (pgolf's own, for Hopper) where it takes the model's heads, else fa4
    (flash-attn-4, for Hopper) where it works, else varlen (torch's) on CUDA, else sdpa."""
    capture: bool = False
    """Capture forward and backward passes as CUDA graphs before the clock and replay them, so that what stops
    the host for a moment does not stop the GPU. Losses and gradients are computed by the same kernels. The
    graphs hold the memory of one pass in addition. What cannot be captured is launched, with a line in the
    log."""
    fake_quant_from: float = 0.0
    """Fraction of the run from which on training rounds attention and MLP matrices to 6 bits in each forward
    pass (late QAT), with scales by quant.attn_clip and quant.mlp_clip; 0 = never."""
    context_stages: str = ""
    """Longest attention segment in training, by fraction of the run: 1024@0.1,2048@0.7 means 1,024 tokens up
    to 0.1, 2,048 up to 0.7, then model.max_context (PR #2014). Shorter segments take less time."""
    warmup_steps: int = 3
    """Untimed steps before the clock, without and with recurrence; all state is restored after them."""
    out: Path = Path("runs")
    """Folder in which run folders are made; with several hosts, on a disk that all of them share."""
    checkpoint_every: float = 60.0
    """Seconds of the clock between checkpoints, from which `pgolf train --resume` continues; the two newest
    are kept until the run is finished. 0 = only a signal (SIGTERM, SIGHUP, SIGINT) makes one."""
    rank_timeout: float = 30.0
    """Seconds, 5 to 600, without a sign of life from a rank after which the run ends and names the rank; a
    rank that was killed is noticed at once."""
    track: Literal["none", "tensorboard", "wandb"] = "none"
    """Where the metrics are recorded in addition to metrics.jsonl: nowhere, in TensorBoard event files in the
    run folder, or by Weights & Biases, to watch a run in a browser; results do not change. Needs pip install
    'pgolf[tensorboard]' or 'pgolf[wandb]'."""
    profile: bool = False
    """Write a trace of three steps, without and with recurrence, to RUN/trace_*.json.gz: what the GPU and the
    host do when. It costs a few seconds of the clock, so do not score such a run."""

    def __post_init__(self) -> None:
        check_finite("train", self)
        for name in ("seconds", "steps", "seed", "warmup_steps"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} must be >= 0, got {value}")
        require(
            self.seconds > 0 or self.steps > 0,
            "train.seconds and train.steps are both 0: the run would never stop; set one of them",
        )
        require(
            0 <= self.checkpoint_every < float("inf"),
            f"train.checkpoint_every must be >= 0 s and finite, got {self.checkpoint_every}",
        )
        require(
            5 <= self.rank_timeout <= 600,
            f"train.rank_timeout must be in [5, 600] s, got {self.rank_timeout}",
        )
        require(
            0 <= self.fake_quant_from <= 1,
            f"train.fake_quant_from is a fraction in [0, 1], got {self.fake_quant_from}",
        )
        parse_stages(self.context_stages, "train.context_stages")
        self._check_part_of_schedule()
        reserve = self.quantize_reserve or 0.0
        require(reserve >= 0, f"train.quantize_reserve must be >= 0 s, got {reserve}")
        require(
            self.seconds == 0 or reserve < self.seconds,
            f"train.quantize_reserve={reserve} leaves no time to train in train.seconds={self.seconds}",
        )

    def _check_part_of_schedule(self) -> None:
        """Check which part of the schedules the run covers, and where it writes snapshots."""
        require(0 < self.until <= 1, f"train.until is a fraction in (0, 1], got {self.until}")
        parse_fractions(self.snapshots, "train.snapshots", most=self.until)
        require(
            self.init is None or self.start is None,
            "train.init and train.start both say where the weights come from; init takes weights alone, "
            "start continues with the optimizer's state: take one of them out",
        )

    @property
    def snapshot_fractions(self) -> tuple[float, ...]:
        """`snapshots` as numbers."""
        return parse_fractions(self.snapshots, "train.snapshots", most=self.until)

    @property
    def stages(self) -> tuple[tuple[int, float], ...]:
        """`context_stages` as pairs: a length, and the fraction of the run at which it ends."""
        return parse_stages(self.context_stages, "train.context_stages")


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
    drift: float = 0.0
    """Correct the output matrices of attention and MLP for the inputs that they get in the quantized model, 0
    to 1: 0 = off, 1 = measure these inputs only, between = blend them with those of the unquantized model. It
    rounds twice, with another pass over the calibration text between, all of it on the clock."""
    gains: bool = False
    """Multiply the output scales of attention and MLP by what fits each row of quantized weights best."""
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
    cap_documents: int = 0
    """Leave that many documents at the end of the training text out of training, and fit model.softcap and
    model.logit_scale of the quantized model to them, on the clock; 0 = off. Only the file has the fitted
    numbers. It was measured with 25,000 tokens."""

    def __post_init__(self) -> None:
        check_finite("quant", self)
        for name in ("matrix_bits", "embed_bits"):
            value = getattr(self, name)
            require(4 <= value <= 8, f"quant.{name} must be one of (4, 5, 6, 7, 8), got {value}")
        for name in ("mlp_clip", "attn_clip", "embed_clip", "damp"):
            value = getattr(self, name)
            require(value > 0, f"quant.{name} must be > 0, got {value}")
        for name in ("calibration_batches", "gradient_batches", "lqer_rank", "lqer_top"):
            value = getattr(self, name)
            require(value >= 1, f"quant.{name} must be >= 1, got {value}")
        for name in ("row_floor", "embed_floor", "rate", "drift"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"quant.{name} must be in [0, 1], got {value}")
        require(self.cap_documents >= 0, f"quant.cap_documents must be >= 0, got {self.cap_documents}")
        require(0.5 <= self.mean_bits <= 8, f"quant.mean_bits must be in [0.5, 8], got {self.mean_bits}")


Coder = Literal["range", "brotli", "lzma", "zlib"]
Counted = Literal["evaluate", "train"]
"""What the codes of an artifact's matrices are written with."""


@dataclass(frozen=True, kw_only=True)
class ArtifactConfig:
    """The file that counts against the limit of the challenge."""

    limit: int = 16_000_000
    """Bytes that the file and the counted code may have together; a larger file is refused."""
    fit: bool = True
    """Multiply all scales by one factor, and quantize again, until file and code fill the limit to within 0.1
    %. A model that is too small for that gets its finest scales. Off: the scales stay as configured."""
    coder: Coder = "range"
    """What the codes of the matrices are written with: pgolf's range coder, or the general compressor of a
    published stack (brotli 11, lzma as xz 6, zlib 9), whose files are larger. `pgolf size FILE --coders`
    compares them."""
    program: Counted = "evaluate"
    """The program that is counted with the file: evaluate_gpt.py, which reads and scores it, or train_gpt.py,
    which trains, quantizes and writes as well, as the challenge asks, and takes 90,000 bytes more."""

    def __post_init__(self) -> None:
        check_finite("artifact", self)
        require(self.limit > 0, f"artifact.limit must be > 0 bytes, got {self.limit}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """The complete configuration of one run."""

    VERSION: ClassVar[int] = config_versions.VERSION
    """Version of the settings in every saved configuration; `config_versions.CHANGES` lists all versions."""

    name: str = "pr1855"
    """Part of the run folder's name: printable characters, no path."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizers and schedules."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Clock, device and files."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """Quantization."""
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)
    """The counted file."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """What is scored, and how."""

    def __post_init__(self) -> None:
        check_name(self.name, "a folder's name")
        longest = self.model.max_context
        require(
            self.train.quantize or not self.evaluate.ways,
            "evaluate.sliding, local, ttt and published score quantized weights, but train.quantize is "
            "false; set it to true, or all of them to false",
        )
        for key in self.optim.muon.paired:
            heads = getattr(self.model, key)
            require(
                heads % 2 == 0,
                f"optim.muon.head_pairs={self.optim.muon.head_pairs} needs an even model.{key}, got {heads}",
            )
        lengths = [length for length, _ in self.train.stages]
        require(
            all(length <= longest for length in lengths),
            f"train.context_stages must not be above model.max_context={longest}, got {lengths}",
        )
        widest = self.evaluate.context or longest
        require(
            not {"sliding", "sgd", "slot", "causal_slot"} & set(self.evaluate.ways)
            or self.evaluate.stride <= widest,
            f"evaluate.stride must be at most {'evaluate.context' if self.evaluate.context else ''}"
            f"{'' if self.evaluate.context else 'model.max_context'}={widest}, got {self.evaluate.stride}",
        )

    @staticmethod
    def completed(data: dict[str, Any], where: str) -> dict[str, Any]:
        """Return saved settings with the missing ones added as their writer had them, for `from_dict`."""
        return config_versions.completed(data, where)
