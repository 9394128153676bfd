"""Presets: named configurations. `pgolf presets` lists them, `pgolf config PRESET` prints all settings.

A preset named after a pull request of the challenge is its training run: network, optimizer, schedules and
batch, from the settings that its log prints. Each changes another preset, as the pull requests did. What a
pull request reports is in `published.py`. Three things are pgolf's own in all of them: documents are packed
whole and in random order, the file is written with pgolf's range coder, and schedules depend on the fraction
of the clock, so that a shorter run has a shorter warm-down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pgolf.config import (
    AdamConfig,
    ArtifactConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    MuonConfig,
    OptimConfig,
    QuantConfig,
    TrainConfig,
)


def pr1855() -> Config:
    """PR #1855's settings: 11 layers x 512, SP8192, 35,945,671 parameters, 600 s."""
    return Config()


def pr1851() -> Config:
    """PR #1851's settings: #1787 with the smear gate that stops at a BOS, and LQER."""
    base = pr1787()
    return replace(
        base,
        name="pr1851",
        model=replace(base.model, smear_gate=True),
        quant=replace(base.quant, lqer="asym"),
    )


def pr1787() -> Config:
    """PR #1787's settings: sparse head gates, Polar Express, a learning rate that ends at a tenth."""
    base = pr1855()
    phases = base.evaluate.phases
    adapters = replace(phases.adapters, rank=96, beta2=0.999, weight_decay=1.0)
    return replace(
        base,
        name="pr1787",
        model=replace(base.model, sparse_gate_scale=1.0, smear_gate=False),
        optim=replace(base.optim, adam=replace(base.optim.adam, beta2=0.95), warmdown=0.75),
        quant=_published_quantizer(mlp_clip=12.0, attn_clip=13.0, embed_bits=7, embed_clip=15.0),
        artifact=ArtifactConfig(fit=False),
        evaluate=EvaluateConfig(phases=replace(phases, documents=2000, adapters=adapters)),
    )


def pr2014() -> Config:
    """PR #2014's training: #1855 with segments of 1,024, then 2,048, then 3,072 tokens."""
    base = pr1855()
    return replace(
        base,
        name="pr2014",
        model=replace(base.model, max_context=3072, qk_gain=5.25),
        train=replace(base.train, context_stages="1024@0.1,2048@0.7"),
    )


def pr1831() -> Config:
    """PR #1831's settings, the arm with a triple per iteration: #1493 with five steps of Polar Express."""
    base = pr1493()
    muon = replace(base.optim.muon, coefficients="polar_express_golf")
    return replace(base, name="pr1831", optim=replace(base.optim, muon=muon))


def pr1831_fixed() -> Config:
    """PR #1831's settings, the arm with one fixed triple: those of #1493."""
    return replace(pr1493(), name="pr1831_fixed")


def pr1809() -> Config:
    """PR #1809's settings: #1493 with the first four of the five steps of Polar Express."""
    base = pr1493()
    muon = replace(base.optim.muon, coefficients="polar_express_golf_truncated", ns_steps=4)
    return replace(base, name="pr1809", optim=replace(base.optim, muon=muon))


def pr1516() -> Config:
    """PR #1516's settings: #1514 (Muon momentum 0.97) with Polar Express."""
    base = pr1394()
    muon = replace(base.optim.muon, momentum=0.97, coefficients="polar_express_golf")
    return replace(
        base,
        name="pr1516",
        model=replace(base.model, qk_gain=5.0, recurrence_start=3, parallel="gptj", parallel_from=7),
        optim=replace(base.optim, muon=muon, ema_horizon=0.0678),  # 333 of 4,912 steps
        evaluate=EvaluateConfig(method="sgd"),
    )


def pr1493() -> Config:
    """PR #1493's settings: #1394 with three layers repeated, attention beside the MLP from layer 7 on."""
    base = pr1394()
    muon = replace(base.optim.muon, lr=0.022, weight_decay=0.095)
    return replace(
        base,
        name="pr1493",
        model=replace(base.model, qk_gain=5.25, recurrence_start=3, parallel="gptj", parallel_from=7),
        optim=replace(
            base.optim,
            muon=muon,
            warmdown=0.72,
            ema_horizon=0.0629,  # 286 of 4,550 steps
            recurrence_at=0.35,
        ),
        evaluate=EvaluateConfig(method="sgd"),
    )


def pr1394() -> Config:
    """PR #1394's settings: SP8192, two layers repeated from half of the run on, no gates, no lanes."""
    base = pr1855()
    muon = replace(base.optim.muon, lr=0.02, weight_decay=0.085, momentum=0.99, coefficients="jordan")
    return replace(
        base,
        name="pr1394",
        model=replace(
            base.model,
            qk_gain=4.0,
            head_gate="none",
            smear_gate=False,
            parallel_from=11,
            recurrence_start=4,
        ),
        optim=replace(
            base.optim,
            muon=muon,
            adam=replace(base.optim.adam, beta2=0.95),
            warmdown=0.667,
            min_lr=0.0,
            ema_horizon=0.0668,  # 333 of 4,989 steps
            recurrence_at=0.5,
        ),
        quant=_published_quantizer(
            mlp_clip=12.85, attn_clip=12.85, embed_bits=8, embed_clip=20.0, batches=64
        ),
        artifact=ArtifactConfig(fit=False),
        evaluate=EvaluateConfig(method="sliding"),
    )


def _published_quantizer(
    *, mlp_clip: float, attn_clip: float, embed_bits: int, embed_clip: float, batches: int = 16
) -> QuantConfig:
    """Return GPTQ with scales from the spread of each row (SDClip) and 6 bits for matrices, since #1394."""
    return QuantConfig(
        matrix_bits=6,
        embed_bits=embed_bits,
        mlp_clip=mlp_clip,
        attn_clip=attn_clip,
        embed_clip=embed_clip,
        row_scales="spread",
        column_scales=False,
        trellis=False,
        rate=0.0,
        calibration_batches=batches,
    )


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
        evaluate=EvaluateConfig(method="plain"),
    )


def tiny() -> Config:
    """All parts of `pr1855` at a size that the CPU of a laptop trains in about a minute."""
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
        # A run of a few hundred small steps needs less momentum and higher learning rates than `pr1855`,
        # which takes thousands of steps.
        optim=replace(base.optim, muon=muon, adam=adam, grad_clip=1.0),
        train=TrainConfig(seconds=80.0, warmup_steps=1),
        quant=QuantConfig(calibration_batches=4, embed_floor=0.3),
    )


PRESETS: dict[str, Callable[[], Config]] = {
    make.__name__: make
    for make in (
        pr1855,
        pr2014,
        pr1851,
        pr1787,
        pr1831,
        pr1831_fixed,
        pr1809,
        pr1516,
        pr1493,
        pr1394,
        naive,
        tiny,
    )
}
OLD_NAMES = {"record": "pr1855"}
"""Earlier names of presets; they work, with a note, until version 0.3."""
