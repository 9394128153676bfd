"""The parameters of the model: their shapes and initial values, and the order in which layers run.

Legend: `T` tokens, `D` width, `V` vocab, `L` layers, `H` heads, `K` head dim, `M` hidden, `W` gate window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgolf.config import ModelConfig
from pgolf.model.mudd import mudd_shapes


def layer_order(config: ModelConfig, *, loop: bool) -> tuple[list[int], list[int]]:
    """Return the physical layers of the encoder half and of the decoder half, in execution order.

    With recurrence on, layers recurrence_start..recurrence_end run recurrence_repeats + 1 times in a row.
    """
    order = list(range(config.layers))
    if loop and config.recurrence_repeats:
        start, end = config.recurrence_start, config.recurrence_end + 1
        order = order[:start] + order[start:end] * (config.recurrence_repeats + 1) + order[end:]
    half = len(order) // 2
    return order[:half], order[half:]


def skip_count(config: ModelConfig) -> int:
    """Return the number of skips in the longer of the two layer orders, with and without the loop."""
    return max(min(map(len, layer_order(config, loop=loop))) for loop in (False, True))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name; a part that is switched off has no parameters."""
    c, skips = config, skip_count(config)
    shapes: dict[str, tuple[int, ...]] = {
        "tok_emb": (c.vocab_size, c.width),
        "qo_bank": (2 * c.layers, c.width, c.width),
        "kv_bank": (2 * c.layers, c.kv_width, c.width),
        "mlp_up_bank": (c.layers, c.hidden, c.width),
        "mlp_down_bank": (c.layers, c.width, c.hidden),
        "q_gain": (c.layers, c.heads),
        "attn_scale": (c.layers, c.width),
        "mlp_scale": (c.layers, c.width),
    }
    if c.head_gate != "none":
        shapes["head_gate"] = (c.layers, c.heads, c.width if c.head_gate == "dense" else c.gate_window)
    if c.resid_mix:
        shapes["resid_mix"] = (c.layers, 2, c.width)
    if c.skip != "none":
        shapes["skip_weights"] = (skips, c.width)
    if c.skip == "gated":
        shapes["skip_gates"] = (skips, c.width)
    if c.bigram_buckets:
        shapes["bigram_table"] = (c.bigram_buckets, c.bigram_width)
        shapes |= {"bigram_proj": (1, c.width, c.bigram_width), "bigram_scale": (1,)}
    if c.value_embed_layers:
        shapes["value_table"] = (c.vocab_size, c.value_embed_width)
        shapes["value_proj"] = (1, c.kv_width, c.value_embed_width)
        shapes |= {"value_scale": (1,), "value_layer_scale": (c.value_embed_layers,)}
    if c.lanes:
        shapes |= {"lane_post": (c.layers, 2, 2), "lane_resid": (c.layers, 2)}
    if c.smear_gate and c.smear_kind == "token":
        shapes |= {"smear_weight": (1, c.smear_window or c.gate_window), "smear_lambda": (1,)}
    elif c.smear_gate:
        shapes["smear_logit"] = (c.width,)
    if c.xsa_strength:
        shapes["xsa_strength"] = (c.xsa_layers, c.heads)
    if c.mudd:
        shapes |= mudd_shapes(c)
    return shapes


def initial_parameters(config: ModelConfig, *, seed: int) -> dict[str, Tensor]:
    """Return the initial value of every parameter by name, float32.

    The embedding is N(0, embed_init_std^2); the matrices of q, k, v and MLP-up are orthogonal; both output
    projections are 0; scales are 1; gates are 0 (a dense head gate is N(0, 0.005^2)); the factors of the
    lanes are 1.1. The table of the bigram hash is 0 and its scale 0.05; the table of the value embeddings is
    N(0, 0.01^2) and their scale 0.1; both projections are orthogonal, as the script of PR #549 makes them.
    The first matrices of the MUDD connections are uniform in +-1 / sqrt(D), as in modded-nanogpt #259; the
    second ones, their biases and the strengths of exclusive self-attention are 0.
    """
    rng = torch.Generator().manual_seed(seed)
    p = {name: torch.zeros(shape) for name, shape in parameter_shapes(config).items()}
    p["tok_emb"].normal_(std=config.embed_init_std, generator=rng)
    for stack in (p["qo_bank"][: config.layers], p["kv_bank"], p["mlp_up_bank"]):
        for matrix in stack:
            nn.init.orthogonal_(matrix, generator=rng)
    ones = {"attn_scale": 1.0, "mlp_scale": 1.0, "skip_weights": 1.0, "lane_post": 1.0}
    ones["value_layer_scale"] = 1.0
    scales = {"lane_resid": 1.1, "q_gain": config.qk_gain, "bigram_scale": 0.05, "value_scale": 0.1}
    for name, value in {**ones, **scales}.items():
        if name in p:
            p[name].fill_(value)
    if config.resid_mix:
        p["resid_mix"][:, 0] = 1.0
    if config.head_gate == "dense":
        p["head_gate"].normal_(std=0.005, generator=rng)
    if config.bigram_buckets:
        nn.init.orthogonal_(p["bigram_proj"][0], generator=rng)
    if config.value_embed_layers:
        p["value_table"].normal_(std=0.01, generator=rng)
        nn.init.orthogonal_(p["value_proj"][0], generator=rng)
    if config.mudd:
        bound = config.width**-0.5
        p["mudd_in"].uniform_(-bound, bound, generator=rng)
    return p
