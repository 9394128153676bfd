"""Two estimates of what an artifact will weigh, each in seconds, for `pgolf size`.

Without weights: Gaussian codes go through the range coder, one matrix of each shape, and the bytes are
multiplied by what training has been measured to save. With weights: they are rounded to nearest and coded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from pgolf.artifact.codec import compress
from pgolf.artifact.fit import search
from pgolf.artifact.format import DIGEST_BYTES, PREFIX
from pgolf.artifact.header import (
    Header,
    ScaleForm,
    TensorEntry,
    encode_header,
    matrix_shapes,
    place_sections,
    plan_sections,
)
from pgolf.artifact.size import Ledger, make_ledger
from pgolf.artifact.write import Facts, build_file, encode_matrix
from pgolf.config import Coder, Counted, ModelConfig, QuantConfig
from pgolf.errors import UserError
from pgolf.model.gpt import parameter_shapes
from pgolf.quant.grid import QuantizedTensor, max_code, quantize, quantize_gate_rows, sdclip_scales
from pgolf.quant.pipeline import is_gate
from pgolf.quant.quantized import QuantizedState

GAUSSIAN_BITS = 2.047
"""Bits of a code of a Gaussian whose scale is its standard deviation: log2(sqrt(2 pi e))."""
SAMPLE_ROWS = 2048
"""Rows of a sampled matrix: the range coder has learned its columns by then, and `pr1855` takes 0.3 s."""
SAMPLE_CODES = {"brotli": 1 << 17, "lzma": 1 << 19, "zlib": 1 << 20}
"""Codes of a sampled matrix for the general compressors, whose rates are settled by then within 0.3 %."""
TRAINED = {"tok_emb": 0.952, "qo_bank": 0.980, "kv_bank": 0.986, "mlp_down_bank": 0.9975}
"""Coded bytes of trained matrices after GPTQ, over those of Gaussian ones of the same shape and scale; 1
where absent. Measured on `pr1855` after 2,407 steps in 600 s (bench/results/*_range_coder.jsonl). Tokens
resemble each other, queries their keys, and outputs of heads their values; MLP-up has no such structure.
General compressors do not use that: without factors the published files of brotli come out 0.1 % larger."""
STORED = {
    "scales": 1.13,
    "centers": 2.0,
    "exponents": 0.35,
    "gates": 1.0,
    "small": 1.44,
    "corrections": 0.5,
    "correction_scales": 2.0,
}
"""Stored bytes per value of the sections that are not codes; scales, gates and small from the same run."""


LOSS_EXCESS = {False: 0.066, True: 0.042}
"""Bits per code above quant.mean_bits where scales follow the loss, without and with a trellis. With the
factors above that gives 15,739,571 bytes of codes at 3.45 bits and clip_scale 0.980 for one model of 600 s
(bench/results/20261123_*_quantize.jsonl), 15,879,145 and 15,875,472 at 0.953 and 0.957 for two others
(20261124_record_600s_1gpu_196k, 20261128_record_600s_2gpu)."""


def family_grid(name: str, config: QuantConfig) -> tuple[int, float]:
    """Return bits and clip of a matrix parameter.

    Where scales follow the loss, the clip is the one that gives Gaussian rows as many bits per code.
    """
    if config.row_scales == "loss":
        bits = config.embed_bits if name == "tok_emb" else config.matrix_bits
        return bits, max_code(bits) / 2 ** (config.mean_bits + LOSS_EXCESS[config.trellis] - GAUSSIAN_BITS)
    if name == "tok_emb":
        return config.embed_bits, config.embed_clip
    return config.matrix_bits, config.mlp_clip if name.startswith("mlp") else config.attn_clip


def predict_ledger(
    model: ModelConfig,
    quant: QuantConfig,
    *,
    limit: int,
    clip_scale: float = 1.0,
    coder: Coder = "range",
    program: Counted = "evaluate",
) -> Ledger:
    """Return the ledger that a trained model's artifact is expected to have, within 0.5 % in total.

    Args:
        model: the network. quant: bits, clips and mean_bits.
        limit: goes into the header. clip_scale: factor on the scales, as `Quantizer.quantize` takes it.
        coder: what the codes are written with. program: what is counted with the file.
    """
    entries = _entries(model, quant)
    rates: dict[tuple[int, ...], float] = {}
    trained = TRAINED if coder == "range" else {}
    lengths = []
    plans = plan_sections(entries, (), coder)
    for plan in plans:
        name = plan.name.split(".")[0]
        if plan.kind == "codes":
            bits, clip = family_grid(name, quant)
            key = (*plan.shape, bits)
            if key not in rates:
                spread = max_code(bits) / (clip * clip_scale)
                spread *= spread**2 / (spread**2 + quant.rate)  # rate-distortion rounding shrinks it
                # The values of a trellis lie a quarter of a scale from their codes.
                deviation = math.hypot(spread, 0.25 * quant.trellis)
                rates[key] = _gaussian_rate(plan.shape, deviation, max_code(bits), coder)
            lengths.append(trained.get(name, 1.0) * rates[key] * plan.raw)
        else:
            lengths.append(STORED[plan.name] * math.prod(plan.shape))
    sections = place_sections(plans, [bytes(round(n)) for n in lengths])
    header = Header(model, "0" * 64, "0" * 16, limit, entries, (), sections, coder)
    framing = PREFIX.size + DIGEST_BYTES + len(compress(encode_header(header), quality=11))
    size = framing + sum(s.length for s in sections)
    return make_ledger(header, file_bytes=size, clip_scale=clip_scale, program=program)


def predict_fitted(
    model: ModelConfig,
    quant: QuantConfig,
    *,
    limit: int,
    coder: Coder = "range",
    program: Counted = "evaluate",
) -> Ledger:
    """Return the ledger that artifact.fit is expected to end with; takes as long as a few predictions."""
    weights = sum(math.prod(shape) for shape in matrix_shapes(model).values())

    def make(scale: float) -> tuple[None, Ledger, int]:
        ledger = predict_ledger(model, quant, limit=limit, clip_scale=scale, coder=coder, program=program)
        return None, ledger, weights

    return search(make, limit=limit)[1]


def _entries(model: ModelConfig, quant: QuantConfig) -> tuple[TensorEntry, ...]:
    """Return the directory of the model's parameters, in the order of `write.py`."""
    matrices, gates, small = [], [], []
    logarithmic = quant.row_scales == "loss" or quant.column_scales
    form: ScaleForm = "log" if logarithmic else "float16"
    for name, shape in parameter_shapes(model).items():
        if name in matrix_shapes(model):
            bits = family_grid(name, quant)[0]
            matrices.append(
                TensorEntry(name, "matrix", shape, bits, form, quant.column_scales, quant.trellis)
            )
        elif is_gate(name, shape):
            gates.append(TensorEntry(name, "gate", shape, 8, "float16", False))
        else:
            small.append(TensorEntry(name, "small", shape, 16, "none", False))
    return (*matrices, *gates, *small)


def _gaussian_rate(shape: tuple[int, ...], deviation: float, largest: int, coder: Coder) -> float:
    """Return coded bytes per code of a matrix of Gaussian codes whose deviation is given in scales."""
    rows = min(shape[0], SAMPLE_ROWS if coder == "range" else -(-SAMPLE_CODES[coder] // shape[1]))
    values = np.random.default_rng(0).normal(scale=deviation, size=(rows, shape[1]))
    codes = np.clip(np.rint(values), -largest, largest).astype(np.int8)
    return len(encode_matrix(codes, coder=coder)) / codes.size


def nearest_ledger(
    tensors: dict[str, Tensor],
    model: ModelConfig,
    quant: QuantConfig,
    *,
    limit: int,
    clip_scale: float = 1.0,
    coder: Coder = "range",
    program: Counted = "evaluate",
) -> Ledger:
    """Return the ledger of weights that are rounded to nearest and coded; nothing is written."""
    state = nearest_state(tensors, model, quant, clip_scale=clip_scale)
    facts = Facts("0" * 64, "0" * 16, limit, clip_scale, coder, program)
    return build_file(state, model, facts, quality=11)[1]


def nearest_fitted(
    tensors: dict[str, Tensor],
    model: ModelConfig,
    quant: QuantConfig,
    *,
    limit: int,
    coder: Coder = "range",
    program: Counted = "evaluate",
) -> Ledger:
    """Return the ledger that artifact.fit would end with if it rounded to nearest; nothing is written."""
    weights = sum(math.prod(shape) for shape in matrix_shapes(model).values())
    nearest = partial(nearest_ledger, tensors, model, quant, limit=limit, coder=coder, program=program)

    def make(scale: float) -> tuple[None, Ledger, int]:
        return None, nearest(clip_scale=scale), weights

    return search(make, limit=limit)[1]


def in_each_coder(header: Header, state: QuantizedState) -> Iterator[tuple[Coder, Ledger]]:
    """Yield every coder with the ledger that an artifact has in it; brotli takes 2 us per code and core.

    Args:
        header, state: of an artifact, as `read_state` returns them.
    """
    for coder in get_args(Coder):
        facts = Facts(header.tokenizer_sha256, header.config_hash, header.limit, 1.0, coder)
        yield coder, build_file(state, header.model, facts, quality=11)[1]


def nearest_state(
    tensors: dict[str, Tensor], model: ModelConfig, quant: QuantConfig, *, clip_scale: float = 1.0
) -> QuantizedState:
    """Return the parameters on their grids, each rounded to nearest.

    Raises:
        ValueError: a matrix of the model is missing, or NaN or infinity in the weights.
    """
    missing = sorted(matrix_shapes(model).keys() - tensors.keys())
    if missing:
        raise UserError(f"nearest_state: the weights lack the parameters {', '.join(missing)} of their model")
    state = QuantizedState({}, {}, {})
    for name, weight in tensors.items():
        if name in matrix_shapes(model):
            bits, clip = family_grid(name, quant)
            scales = sdclip_scales(weight, bits=bits, clip=clip * clip_scale)
            state.quantized[name] = QuantizedTensor(quantize(weight, scales, bits=bits), scales, bits)
        elif is_gate(name, tuple(weight.shape)):
            state.gates[name] = quantize_gate_rows(weight)
        else:
            state.small[name] = weight.to(torch.float16)
    return state
