"""Presets: named configurations. `pgolf presets` lists them, `pgolf config PRESET` prints all settings.

A preset named after a pull request of the challenge is its training run: network, optimizer, schedules and
batch, from the settings that its log prints. Each changes another preset, as the pull requests did. What a
pull request reports is in `published.py`. Three things are pgolf's own in all of them: the text is cut as the
pull request cut it (`data.order`), but in an order that depends on the seed and not on the number of GPUs,
the file has pgolf's format, though in the older presets the coder of the pull request, and schedules depend
on the fraction of the clock, so that a shorter run has a shorter warm-down.
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
    SgdConfig,
    TiltConfig,
    TrainConfig,
)


def pr1855() -> Config:
    """PR #1855's settings: 11 layers x 512, SP8192, 35,945,671 parameters, 600 s."""
    return Config()


def best_1gpu() -> Config:
    """The best that this project has measured on one GPU.

    #1855 on CaseOps text, with EMA-Nesterov around the optimizer, scored with 3,072 tokens. The text is a
    matter of the tokenizer: `pgolf data tokenizer --caseops --marker-pairs`. Each difference to `pr1855` is
    measured on the page about presets.
    """
    base = pr1855()
    return replace(
        base,
        name="best_1gpu",
        optim=replace(base.optim, ema_nesterov=0.6),
        evaluate=EvaluateConfig(ttt=True, context=3072, method="ttt"),
    )


def best() -> Config:
    """The settings of `best_1gpu` for eight GPUs, with 786,432 tokens per step. Not run.

    What `best_1gpu` changes was measured on one GPU alone, where a step has a quarter of the tokens.
    """
    return replace(best_1gpu(), name="best")


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
        optim=replace(
            base.optim,
            muon=replace(base.optim.muon, momentum_warmup=0.24),  # 1,500 steps of 96 ms
            adam=replace(base.optim.adam, beta2=0.95),
            warmdown=0.75,
            ema_horizon=0.067,  # 285 steps of 141 ms
        ),
        quant=_published_quantizer(mlp_clip=12.0, attn_clip=13.0, embed_bits=7, embed_clip=15.0),
        artifact=ArtifactConfig(fit=False, coder="brotli"),
        evaluate=EvaluateConfig(phases=replace(phases, documents=2000, adapters=adapters)),
    )


def pr2014() -> Config:
    """PR #2014's training: #1855 with segments of 1,024, then 2,048, then 3,072 tokens."""
    base = pr1855()
    adapters = replace(base.evaluate.phases.adapters, on="k,o,mlp,head", lr=7.5e-5)
    phases = replace(base.evaluate.phases, count=1, adapters=adapters, two_caps=True)
    return replace(
        base,
        name="pr2014",
        model=replace(base.model, max_context=3072, qk_gain=5.25),
        optim=replace(
            base.optim,
            muon=replace(base.optim.muon, momentum_warmup=0.2386),  # 1,500 steps of 94.8 ms
            ema_horizon=0.07,  # 285 steps of 146 ms
        ),
        train=replace(base.train, context_stages="1024@0.1,2048@0.7"),
        evaluate=EvaluateConfig(phases=phases),
    )


def pr2135() -> Config:
    """PR #2135's training: #1855, a higher learning rate of Muon, twice the calibration, 2,560 context."""
    base = pr1855()
    muon = replace(base.optim.muon, lr=0.028, momentum_warmup=0.2383)  # 1,500 steps of 95.2 ms
    adapters = replace(base.evaluate.phases.adapters, on="q,v,o,mlp,head", lr=8e-5, weight_decay=2.0)
    phases = replace(base.evaluate.phases, count=1, adapters=adapters, two_caps=True)
    return replace(
        base,
        name="pr2135",
        model=replace(base.model, max_context=2560),
        optim=replace(base.optim, muon=muon, ema_horizon=0.0665),  # 285 steps of 140 ms
        train=replace(base.train, context_stages="2048@1"),
        quant=replace(base.quant, calibration_batches=32),
        evaluate=EvaluateConfig(phases=phases, tilt=TiltConfig(on=True)),
    )


def pr1874() -> Config:
    """PR #1874's settings: output gates of 24 channels in place of #1787's head gates, smear gate, LQER."""
    base = pr1851()
    phases = base.evaluate.phases
    return replace(
        base,
        name="pr1874",
        model=replace(base.model, head_gate="out", gate_window=24, smear_window=12, qk_gain=5.25),
        evaluate=EvaluateConfig(phases=replace(phases, adapters=replace(phases.adapters, rank=128))),
    )


def pr1831() -> Config:
    """PR #1831's settings, the arm with a triple per iteration: its other arm with Polar Express."""
    base = pr1831_fixed()
    muon = replace(base.optim.muon, coefficients="polar_express_golf")
    return replace(base, name="pr1831", optim=replace(base.optim, muon=muon))


def pr1831_fixed() -> Config:
    """PR #1831's settings, the arm with one fixed triple: #1493 with a gain of queries that begins at 5."""
    base = pr1493()
    return replace(base, name="pr1831_fixed", model=replace(base.model, qk_gain=5.0))


def pr1809() -> Config:
    """PR #1809's settings: #1493 with four steps of Polar Express, a learning rate that ends at a tenth."""
    base = pr1493()
    muon = replace(
        base.optim.muon,
        coefficients="polar_express_golf_truncated",
        ns_steps=4,
        momentum_warmup=0.253,  # 1,500 steps of 101 ms
    )
    return replace(
        base,
        name="pr1809",
        optim=replace(base.optim, muon=muon, min_lr=0.1, ema_horizon=0.0711),  # 285 steps of 149 ms
    )


def pr1516() -> Config:
    """PR #1516's settings: #1514 (Muon momentum 0.97) with Polar Express."""
    base = pr1394()
    muon = replace(base.optim.muon, momentum=0.97, coefficients="polar_express_margin")
    return replace(
        base,
        name="pr1516",
        model=replace(base.model, qk_gain=5.0, recurrence_start=3, parallel="gptj", parallel_from=7),
        optim=replace(base.optim, muon=muon, ema_horizon=0.084),  # 333 steps of 148 ms
        evaluate=EvaluateConfig(method="sgd"),
    )


def pr1493() -> Config:
    """PR #1493's settings: #1394, three layers repeated, attention parallel to the MLP from layer 7 on."""
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
            ema_horizon=0.0732,  # 285 steps of 151 ms
            recurrence_at=0.35,
        ),
        evaluate=EvaluateConfig(method="sgd"),
    )


def pr1394() -> Config:
    """PR #1394's settings: SP8192, two layers repeated from half of the run on, no gates, no lanes."""
    base = pr1855()
    muon = replace(base.optim.muon, lr=0.02, weight_decay=0.085, momentum=0.99, coefficients="jordan")
    muon = replace(muon, momentum_warmup=0.26)  # 1,500 steps of 102 ms
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
        data=replace(base.data, order="sequences"),
        optim=replace(
            base.optim,
            muon=muon,
            adam=replace(base.optim.adam, beta2=0.95),
            warmdown=0.667,
            min_lr=0.0,
            ema_horizon=0.0793,  # 333 steps of 140 ms
            recurrence_at=0.5,
        ),
        quant=_published_quantizer(
            mlp_clip=12.85, attn_clip=12.85, embed_bits=8, embed_clip=20.0, batches=64
        ),
        artifact=ArtifactConfig(coder="brotli"),  # fits: the counted program is larger than theirs
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


def pr1298() -> Config:
    """PR #1298's settings: #549 with four steps of Polar Express and exclusive attention in all layers."""
    base = pr549()
    muon = replace(
        base.optim.muon,
        momentum_warmup=0.2171,  # 1,500 steps of 86.8 ms
        row_normalize=True,
        coefficients="polar_express_golf_truncated",
        ns_steps=4,
    )
    return replace(
        base,
        name="pr1298",
        model=replace(base.model, bigram_width=112, xsa_layers=11),
        optim=replace(
            base.optim,
            muon=muon,
            warmdown=0.58,  # 4,000 steps of 87.0 ms: its log has a factor of 0.1499 at step 6,298 of 6,898
            ema_horizon=0.0484,  # 333 steps of 87.2 ms
        ),
        evaluate=EvaluateConfig(method="slot"),
    )


def pr549() -> Config:
    """PR #549's settings: 11 layers, bigram hash, value embeddings, a smear gate with a gate per channel."""
    base = naive()
    return replace(
        base,
        name="pr549",
        model=replace(
            base.model,
            layers=11,
            mlp_mult=3,
            activation="leaky_relu2",
            max_context=2048,
            rope_dims=16,
            rope_base=10_000 * 2 ** (16 / 14),  # its script stretches 10,000 where a sequence has 2 x 1,024
            xsa_layers=4,
            smear_gate=True,
            smear_kind="channel",
            bigram_buckets=1536,
            value_embed_layers=2,
            ln_scale=True,
            parallel_from=11,
        ),
        data=DataConfig(order="stream"),
        optim=replace(
            base.optim,
            muon=replace(
                base.optim.muon,
                lr=0.025,
                weight_decay=0.04,
                momentum=0.99,
                momentum_start=0.92,
                momentum_warmup=0.2078,  # 1,500 steps of 83.1 ms
            ),
            adam=replace(
                base.optim.adam,
                embed_lr=0.035,
                embed_weight_decay=0.04,
                scalar_lr=0.025,
                scalar_weight_decay=0.04,
            ),
            grad_clip=0.3,
            warmdown=0.4866,  # 3,500 steps of 83.4 ms
            ema_horizon=0.0474,  # 333 steps of 85.3 ms
        ),
        quant=QuantConfig(),
        artifact=ArtifactConfig(coder="lzma"),
        evaluate=EvaluateConfig(method="sgd", sgd=SgdConfig(lr=0.002)),
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
        data=DataConfig(batch_tokens=524_288, micro_tokens=65_536, order="stream"),
        optim=OptimConfig(
            muon=MuonConfig(
                lr=0.04,
                weight_decay=0.0,
                momentum=0.95,
                momentum_start=0.85,
                momentum_warmup=0.036,  # 500 steps of 43.5 ms
                row_normalize=False,
                coefficients="jordan",
            ),
            adam=AdamConfig(
                embed_lr=0.05, embed_weight_decay=0.0, scalar_lr=0.04, scalar_weight_decay=0.0, beta2=0.95
            ),
            grad_clip=0.0,
            warmdown=0.087,  # 1,200 steps of 43.5 ms
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
        artifact=ArtifactConfig(coder="zlib"),
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
        best_1gpu,
        best,
        pr1855,
        pr2135,
        pr2014,
        pr1851,
        pr1787,
        pr1874,
        pr1831,
        pr1831_fixed,
        pr1809,
        pr1516,
        pr1493,
        pr1394,
        pr1298,
        pr549,
        naive,
        tiny,
    )
}
OLD_NAMES = {"record": "pr1855"}
"""Earlier names of presets; they work, with a note, until version 0.3."""
