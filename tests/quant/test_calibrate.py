from dataclasses import dataclass, replace

import pytest
import torch

from pgolf.config import ModelConfig, QuantConfig
from pgolf.model.gpt import GPT
from pgolf.quant.calibrate import collect_hessians
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import dequantize_state

CONFIG = ModelConfig(
    vocab_size=97,
    layers=4,
    width=24,
    heads=3,
    kv_heads=1,
    mlp_mult=2,
    max_context=16,
    rope_dims=4,
    xsa_layers=4,
    gate_window=11,
    parallel_from=3,
    recurrence_start=1,
    recurrence_end=2,
    recurrence_repeats=1,
)


SPREAD = QuantConfig(row_scales="spread", column_scales=False, matrix_bits=6, embed_bits=7, rate=0.0)


@dataclass
class FakeBatch:
    inputs: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int = 16


class FakeDist:
    """One rank; `others` are sums that the other ranks would bring, in call order."""

    rank, world_size, is_main = 0, 1, True
    device = torch.device("cpu")

    def __init__(self, others=()):
        self.others, self.seen = list(others), []

    def all_reduce(self, tensor):
        self.seen.append(tensor.clone())
        if self.others:
            tensor += self.others.pop(0)
        return tensor


def trained_like_model():
    """A model whose zero-initialized matrices are not zero, so that every input is alive."""
    model = GPT(CONFIG, seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=g)
    return model


def batches(count, seed=0):
    g = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(0, 97, (33,), generator=g)
        yield FakeBatch(ids[:-1], ids[1:], torch.tensor([0, 10, 25, 32], dtype=torch.int32))


def test_hessians_are_mean_outer_products_over_passes_and_batches():
    model = trained_like_model()
    expected, tokens = {}, 0

    def observe(kind, layer, x):
        gram = x.double().T @ x.double()
        expected[kind, layer] = expected.get((kind, layer), 0) + gram

    for b in batches(3):
        model(b.inputs, b.targets, b.cu_seqlens, max_seqlen=16, loop=True, observe=observe)
        tokens += len(b.inputs)
    model.train()
    got = collect_hessians(model, batches(3), FakeDist())
    assert set(got) == {(k, i) for k in ("attn_in", "attn_out", "mlp_in", "mlp_out") for i in range(4)} | {
        ("head", 0)
    }
    for key, h in got.items():
        torch.testing.assert_close(h.double(), expected[key] / tokens, rtol=1e-4, atol=1e-6)
    assert model.training
    # Layer 1 runs twice on inputs of variance 1/2 (LN scale), layer 0 once on variance 1.
    assert got["attn_in", 1].trace() / got["attn_in", 0].trace() == pytest.approx(1, rel=0.05)


def test_hessians_of_all_ranks_are_summed():
    model = trained_like_model()
    first, second = FakeDist(), FakeDist()
    collect_hessians(model, batches(2, seed=5), first)
    collect_hessians(model, batches(1, seed=6), second)
    joint = collect_hessians(model, batches(2, seed=5), FakeDist(others=second.seen))
    both = collect_hessians(model, [*batches(2, seed=5), *batches(1, seed=6)], FakeDist())
    for key in both:
        torch.testing.assert_close(joint[key], both[key], rtol=1e-5, atol=1e-7)


def test_quantized_model_keeps_every_parameter_and_the_loss():
    model = trained_like_model()
    state = {k: v.detach() for k, v in model.named_parameters()}
    hessians = collect_hessians(model, batches(8), FakeDist())
    qs = Quantizer(state, model.quant_inputs(), hessians, SPREAD).quantize()
    assert set(qs.quantized) == {"tok_emb", "qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"}
    assert set(qs.gates) == {"head_gate"}
    back = dequantize_state(qs)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in state.items()}
    assert all(v.dtype == torch.float32 for v in back.values())
    for name, value in state.items():
        assert (back[name] - value).norm() < 0.2 * value.norm(), name

    def loss():
        with torch.no_grad():
            return torch.stack(
                [
                    model(b.inputs, b.targets, b.cu_seqlens, max_seqlen=16, loop=True).mean()
                    for b in batches(8)
                ]
            ).mean()

    before = loss()
    model.load_state_dict(back)
    assert abs(loss() - before) < 0.05


def test_each_family_gets_its_bits_and_clip():
    model = trained_like_model()
    state = {k: v.detach() for k, v in model.named_parameters()}
    hessians = collect_hessians(model, batches(2), FakeDist())
    config = replace(SPREAD, mlp_clip=11.5, attn_clip=13.0, embed_clip=14.0)
    qs = Quantizer(state, model.quant_inputs(), hessians, config).quantize(1.25)
    for name, bits, clip in (
        ("tok_emb", 7, 14.0),
        ("qo_bank", 6, 13.0),
        ("kv_bank", 6, 13.0),
        ("mlp_up_bank", 6, 11.5),
        ("mlp_down_bank", 6, 11.5),
    ):
        expected = state[name].double().std(dim=-1) * clip * 1.25 / (2 ** (bits - 1) - 1)
        assert qs.quantized[name].bits == bits
        torch.testing.assert_close(qs.quantized[name].scales.double(), expected, rtol=2e-3, atol=0)


def test_small_gates_stay_float16():
    state = {"head_gate": torch.ones(2, 3, 5)}  # 15 elements a layer, the rule starts at 32
    qs = Quantizer(state, {}, {}, SPREAD).quantize()
    assert not qs.gates and qs.small["head_gate"].dtype == torch.float16


@pytest.mark.parametrize(
    ("state", "inputs", "hessians", "message"),
    [
        (
            {},
            {"w": [("head", 0)]},
            {},
            r"parameters \['w'\] have inputs but are not among the weights",
        ),
        (
            {"w": torch.ones(4, 4)},
            {"w": [("head", 0)]},
            {},
            r"w: no Hessian for the inputs \[\('head', 0\)\]",
        ),
        (
            {"w": torch.ones(3, 4, 4)},
            {"w": [("mlp_in", 0)]},
            {("mlp_in", 0): torch.eye(4)},
            r"w: expected a bank of 1 matrices.*got \(3, 4, 4\)",
        ),
        ({"w": torch.ones(65_537)}, {}, {}, "w: 65,537 elements are too many for float16.*quant_inputs"),
        ({"w": torch.tensor([1.0, 7e4])}, {}, {}, "w: largest magnitude 70000 does not fit float16"),
        ({"w": torch.tensor([float("nan")])}, {}, {}, "w: largest magnitude nan does not fit"),
        (
            {"w": torch.full((2, 4), float("nan"))},
            {"w": [("head", 0)]},
            {("head", 0): torch.eye(4)},
            "quantize: w: .*NaN or infinity",
        ),
    ],
)
def test_bad_state_is_explained(state, inputs, hessians, message):
    with pytest.raises(ValueError, match=message):
        Quantizer(state, inputs, hessians, SPREAD).quantize()


def test_calibration_without_batches_is_explained():
    with pytest.raises(ValueError, match=r"got 0 tokens and 0 inputs; raise quant\.calibration_batches"):
        collect_hessians(GPT(CONFIG), [], FakeDist())
