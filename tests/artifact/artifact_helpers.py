from dataclasses import replace

import torch

from pgolf.config import ModelConfig
from pgolf.model.gpt import GPT
from pgolf.quant.grid import QuantizedTensor, quantize, quantize_gate_rows, sdclip_scales
from pgolf.quant.quantized import QuantizedState

CONFIG = ModelConfig(
    vocab_size=61,
    layers=3,
    width=24,
    heads=3,
    kv_heads=1,
    mlp_mult=2,
    max_context=16,
    rope_dims=4,
    xsa_layers=3,
    gate_window=11,
    parallel_from=2,
    recurrence_start=1,
    recurrence_end=1,
    recurrence_repeats=1,
)
FEW = {"vocab_size": 32, "layers": 2, "xsa_layers": 2, "parallel_from": 1}
TOY = replace(CONFIG, width=16, heads=4, recurrence_start=0, recurrence_end=0, **FEW)
"""The smallest network that has a section of every kind."""
MATRICES = ("tok_emb", "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")
FACTS = {"tokenizer_sha256": "ab" * 32, "config_hash": "0123456789abcdef"}


def make_state(config=CONFIG, *, clip_scale=1.0, seed=3):
    """Quantize a model to nearest: the file does not care how codes were chosen."""
    g = torch.Generator().manual_seed(seed)
    state = QuantizedState({}, {}, {})
    for name, p in GPT(config).named_parameters():
        w = p.detach() + 0.02 * torch.randn(p.shape, generator=g)
        if name in MATRICES:
            bits = 7 if name == "tok_emb" else 6
            scales = sdclip_scales(w, bits=bits, clip=12.0 * clip_scale)
            state.quantized[name] = QuantizedTensor(quantize(w, scales, bits=bits), scales, bits)
        elif name == "head_gate":
            state.gates[name] = quantize_gate_rows(w)
        else:
            state.small[name] = w.half()
    return state
