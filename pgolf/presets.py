"""Named runs, each a function that changes another run. `pgolf config PRESET` shows what one would do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pgolf.config import (
    AdamConfig,
    Config,
    DataConfig,
    ModelConfig,
    MuonConfig,
    OptimConfig,
    QuantConfig,
    TrainConfig,
)


def pr1855() -> Config:
    """PR #1855's settings: 11 layers x 512, SP8192, 35,945,671 parameters, 600 s."""
    return Config()


def naive() -> Config:
    """The challenge's baseline: 9 layers x 512, SP1024, relu^2, no gates, no recurrence, 1,024 context."""
    return Config(
        name="naive",
        model=ModelConfig(
            vocab_size=1024,
            layers=9,
            mlp_mult=2,
            activation="relu2",
            max_context=1024,
            rope_dims=64,
            qk_gain=1.5,
            xsa_layers=0,
            head_gate="none",
            smear_gate=False,
            ln_scale=False,
            skip="weighted",
            parallel_from=9,
            recurrence_repeats=0,
        ),
        data=DataConfig(batch_tokens=524_288, micro_tokens=65_536),
        optim=OptimConfig(
            muon=MuonConfig(
                lr=0.04,
                weight_decay=0.0,
                momentum=0.95,
                momentum_start=0.85,
                momentum_warmup=0.04,
                row_normalize=False,
                coefficients="jordan",
            ),
            adam=AdamConfig(
                embed_lr=0.05, embed_weight_decay=0.0, scalar_lr=0.04, scalar_weight_decay=0.0, beta2=0.95
            ),
            grad_clip=0.0,
            warmdown=0.09,
            min_lr=0.0,
            ema_horizon=0.0,
        ),
        quant=QuantConfig(
            matrix_bits=8,
            embed_bits=8,
            mlp_clip=20.0,
            attn_clip=20.0,
            embed_clip=20.0,
            row_scales="spread",
            column_scales=False,
            rate=0.0,
        ),
    )


def tiny() -> Config:
    """Every part of `pr1855` at a size that a laptop's CPU trains in about a minute."""
    base = pr1855()
    muon = replace(base.optim.muon, lr=0.05, momentum=0.92, momentum_start=0.85)
    adam = replace(base.optim.adam, embed_lr=0.08)
    return replace(
        base,
        name="tiny",
        model=ModelConfig(
            vocab_size=1024,
            layers=4,
            width=128,
            heads=4,
            kv_heads=2,
            mlp_mult=3,
            max_context=256,
            rope_dims=8,
            xsa_layers=4,
            parallel_from=3,
            recurrence_start=1,
            recurrence_end=2,
            recurrence_repeats=1,
        ),
        data=DataConfig(batch_tokens=2048, micro_tokens=2048),
        # A few hundred small steps want a shorter memory and larger steps than the thousands of `pr1855`.
        optim=replace(base.optim, muon=muon, adam=adam, grad_clip=1.0),
        train=TrainConfig(seconds=80.0, warmup_steps=1),
        quant=QuantConfig(calibration_batches=4, embed_floor=0.3),
    )


PRESETS: dict[str, Callable[[], Config]] = {"pr1855": pr1855, "naive": naive, "tiny": tiny}
OLD_NAMES = {"record": "pr1855"}
"""Names that presets had before; they work, with a notice, until version 0.3."""
