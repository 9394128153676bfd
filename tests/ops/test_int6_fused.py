"""quantize_pack, quantize_pack_sdclip, unpack_dequantize: golden bytes, bit-exact references, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf.ops import (
    pack_int6,
    quantize_pack,
    quantize_pack_ref,
    quantize_pack_sdclip,
    quantize_pack_sdclip_ref,
    unpack_dequantize,
    unpack_dequantize_ref,
)
from pgolf.ops.int6 import _packed_bytes
from pgolf.quant.grid import dequantize, max_code, quantize, sdclip_scales
from tests.conftest import requires_gpu

ALL_BITS = (4, 5, 6, 7, 8)
# 512 to 4096 are the CUDA tiles' rows, with rows that do not fill a tile; 520 and 8 take the tiles of the
# unpacker only; 2 to 513 end in a part of a group; 4104 is past the CPU's buffer.
SHAPES = [
    (9, 512),
    (5, 1024),
    (3, 2048),
    (3, 4096),
    (2, 3, 512),
    (7, 520),
    (3, 8),
    (4, 2),
    (5, 7),
    (3, 513),
    (2, 4104),
]


def random_weight(shape: tuple[int, ...], device: torch.device, *, std: float = 0.02) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=g) * std
    return (w * torch.exp(torch.randn(*shape[:-1], 1, generator=g))).to(device)


# By hand from the layout in csrc/kernels/int6.h: the low bits of 1, -1, 3, 0, -4, 2, 5, -7, 6, lowest first.
GOLDEN = {
    4: [0xF1, 0x03, 0x2C, 0x95, 0x06],
    5: [0xE1, 0x0F, 0xC0, 0x45, 0xC9, 0x06, 0x00, 0x00, 0x00, 0x00],
    6: [0xC1, 0x3F, 0x00, 0xBC, 0x50, 0xE4, 0x06, 0x00, 0x00],
    7: [0x81, 0xFF, 0x00, 0xC0, 0x17, 0x14, 0xF2, 0x06, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00],
    8: [0x01, 0xFF, 0x03, 0x00, 0xFC, 0x02, 0x05, 0xF9, 0x06],
}


@pytest.mark.parametrize("bits", ALL_BITS)
def test_golden_bytes(bits: int, device) -> None:
    codes = [1, -1, 3, 0, -4, 2, 5, -7, 6]
    w = torch.tensor(codes, dtype=torch.float32, device=device)[None] * 0.25
    scales = torch.tensor([0.25], dtype=torch.float16, device=device)
    packed = quantize_pack(w, scales, bits)
    assert packed.tolist() == [GOLDEN[bits]]
    assert quantize_pack_ref(w, scales, bits).tolist() == [GOLDEN[bits]]
    assert torch.equal(unpack_dequantize(packed, scales, 9, bits).float(), w)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_references_to_the_bit(shape: tuple[int, ...], bits: int, device) -> None:
    w, n = random_weight(shape, device), shape[-1]
    packed, scales = quantize_pack_sdclip(w, 2.5, bits)
    expected, expected_scales = quantize_pack_sdclip_ref(w, 2.5, bits)
    assert torch.equal(scales, expected_scales) and torch.equal(packed, expected)
    assert packed.shape == (*shape[:-1], _packed_bytes(n, bits)) and packed.dtype == torch.uint8
    assert torch.equal(quantize_pack(w, scales, bits), expected)
    back = unpack_dequantize(packed, scales, n, bits)
    assert back.dtype == torch.bfloat16
    assert torch.equal(back, unpack_dequantize_ref(packed, scales, n, bits))
    assert torch.equal(back, dequantize(quantize(w, scales, bits=bits), scales).bfloat16())


@requires_gpu
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("n", [512, 2048, 771])
def test_both_devices_give_the_same_bytes(bits: int, n: int) -> None:
    w = random_weight((257, n), torch.device("cpu"), std=3e-3)
    here, there = quantize_pack_sdclip(w, 3.0, bits), quantize_pack_sdclip(w.cuda(), 3.0, bits)
    assert torch.equal(here[0], there[0].cpu()) and torch.equal(here[1], there[1].cpu())
    back = unpack_dequantize(there[0], there[1], n, bits)
    assert torch.equal(back.cpu(), unpack_dequantize(*here, n, bits))


@pytest.mark.parametrize(("bits", "clip"), [(6, 11.5), (7, 14.0), (8, 20.0)])
def test_steps_are_those_of_sdclip(bits: int, clip: float, device) -> None:
    w = random_weight((300, 512), device)
    _, scales = quantize_pack_sdclip(w, clip, bits)
    expected = sdclip_scales(w, bits=bits, clip=clip)
    # Another order of summation may cross a rounding boundary of float16, 2^-11 apart.
    assert torch.allclose(scales.float(), expected.float(), rtol=2**-10, atol=0)
    assert (scales == expected).float().mean() > 0.99


@pytest.mark.parametrize("n", [512, 2048, 30])
def test_extreme_rows_have_positive_steps(n: int, device) -> None:
    w = torch.zeros(6, n, device=device)
    w[1, 3] = 1e30
    w[2] = 7.0
    w[3, 0] = 1e-38
    w[4] = torch.linspace(-1, 1, n) * 1e-12
    w[5, ::2] = -65504.0
    for bits in ALL_BITS:
        packed, scales = quantize_pack_sdclip(w, 3.0, bits)
        expected, expected_scales = quantize_pack_sdclip_ref(w, 3.0, bits)
        assert torch.equal(scales, expected_scales) and torch.equal(packed, expected)
        assert (scales > 0).all() and torch.isfinite(scales).all()


@pytest.mark.parametrize("n", [512, 30])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_gets_step_nan(n: int, bad: float, device) -> None:
    w = random_weight((3, n), device)
    w[1, 5] = bad
    packed, scales = quantize_pack_sdclip(w, 3.0, 6)
    assert scales.isnan().tolist() == [False, True, False]
    assert unpack_dequantize(packed, scales, n, 6)[1].isnan().all()


def test_six_bits_are_pack_int6(device) -> None:
    w = random_weight((4, 130), device)
    scales = sdclip_scales(w, bits=6, clip=4.0)
    assert torch.equal(quantize_pack(w, scales, 6), pack_int6(quantize(w, scales, bits=6)))


def test_unaligned_and_transposed_inputs_give_the_same_bytes(device) -> None:
    w = random_weight((3, 512), device)
    shifted = torch.cat((w.new_zeros(1), w.flatten()))[1:].view(3, 512)
    packed, scales = quantize_pack_sdclip(w, 3.0, 6)
    assert all(map(torch.equal, quantize_pack_sdclip(shifted, 3.0, 6), (packed, scales)))
    assert torch.equal(quantize_pack(w.T.contiguous().T, scales, 6), packed)
    moved = torch.cat((packed.new_zeros(3), packed.flatten()))[3:].view(packed.shape)
    assert torch.equal(unpack_dequantize(moved, scales, 512, 6), unpack_dequantize(packed, scales, 512, 6))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.floats(1e-3, 1e3),
    st.sampled_from(ALL_BITS),
)
def test_any_row_is_the_nearest_code_inside_the_grid(row: list[float], step: float, bits: int) -> None:
    w, scales = torch.tensor([row]), torch.tensor([step]).half()
    packed = quantize_pack(w, scales, bits)
    assert torch.equal(packed, quantize_pack_ref(w, scales, bits))
    codes = unpack_dequantize_ref(packed, scales, len(row), bits).float() / scales.float()
    assert codes.abs().max() <= max_code(bits) * 1.01


@pytest.mark.parametrize("shape", [(0, 512), (3, 0), (0, 7)])
def test_empty_tensors_stay_empty(shape: tuple[int, int], device) -> None:
    w = torch.zeros(shape, device=device)
    scales = torch.ones(shape[:1], dtype=torch.float16, device=device)
    packed = quantize_pack(w, scales, 5)
    assert packed.numel() == 0 and unpack_dequantize(packed, scales, shape[1], 5).shape == shape


def test_opcheck_accepts_the_operators(device) -> None:
    w = random_weight((3, 13), device)
    packed, scales = quantize_pack_sdclip(w, 3.0, 5)
    torch.library.opcheck(torch.ops.pgolf.quantize_pack, (w, scales, 5))
    torch.library.opcheck(torch.ops.pgolf.quantize_pack_sdclip, (w, 3.0, 5))
    torch.library.opcheck(torch.ops.pgolf.unpack_dequantize, (packed, scales, 13, 5))


def test_compile_in_one_graph_matches_eager(device) -> None:
    w = random_weight((5, 24), device)

    def there_and_back(x: Tensor) -> Tensor:
        return unpack_dequantize(*quantize_pack_sdclip(x, 3.0, 7), 24, 7) + 1

    assert torch.equal(torch.compile(there_and_back, fullgraph=True)(w), there_and_back(w))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w, s: quantize_pack(w, s, 3), ValueError, r"bits must be one of \(4, 5, 6, 7, 8\), got 3"),
        (lambda w, s: quantize_pack(w.half(), s, 6), TypeError, "weight must be float32, got Half"),
        (lambda w, s: quantize_pack(w, s.float(), 6), TypeError, "scales must be float16, got Float"),
        (lambda w, s: quantize_pack(w, s[:1], 6), ValueError, r"one step a row \[2\], got \[1\]"),
        (lambda w, s: quantize_pack_sdclip(w, 0.0, 6), ValueError, "clip must be > 0.*got 0"),
        (lambda w, s: quantize_pack_sdclip(w, 1e-60, 6), ValueError, "fit float32, got 1e-60"),
        (lambda w, s: quantize_pack_sdclip(w, 1e300, 6), ValueError, r"fit float32, got 1e\+300"),
        (lambda w, s: quantize_pack_sdclip(w[:, :1], 1.0, 6), ValueError, "2 to 2.20 columns.*got 1"),
        (
            lambda w, s: unpack_dequantize(quantize_pack(w, s, 6), s, 9, 6),
            ValueError,
            r"\(..., 9\) for n=9 of 6 bits, got \[2, 6\]",
        ),
        (lambda w, s: unpack_dequantize(w, s, 8, 6), TypeError, "packed must be uint8, got Float"),
    ],
)
def test_bad_input_is_named(call, error, message: str, device) -> None:
    w = torch.ones(2, 8, device=device)
    with pytest.raises(error, match=message):
        call(w, torch.ones(2, dtype=torch.float16, device=device))
