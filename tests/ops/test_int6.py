"""pack_int6, unpack_int6 and the fused quantizers: golden bytes, round trips, errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgolf.ops import pack_int6, pack_int6_ref, unpack_int6, unpack_int6_ref
from tests.conftest import requires_gpu

# 4096 codes are one tile of the CUDA kernel; 4100 is a tile and one group; 7 and 5001 end in half a group.
SHAPES = [(1,), (4,), (7,), (3, 7), (2, 3, 8), (4096,), (3, 4100), (2, 5001), (0,), (0, 5), (3, 0)]


def random_codes(shape: tuple[int, ...], device: torch.device) -> Tensor:
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-32, 32, shape, generator=g, dtype=torch.int8).to(device)


# By hand from the layout in csrc/kernels/int6.h: v = u0 | u1 << 6 | u2 << 12 | u3 << 18, little-endian.
@pytest.mark.parametrize(
    ("codes", "packed"),
    [
        ([0, 0, 0, 0], [0x00, 0x00, 0x00]),
        ([-1, -1, -1, -1], [0xFF, 0xFF, 0xFF]),
        ([1, 2, 3, 4], [0x81, 0x30, 0x10]),
        ([31, -32, 31, -32], [0x1F, 0xF8, 0x81]),
        ([-32], [0x20, 0x00, 0x00]),
        ([0, 0, 0, -1, 5], [0x00, 0x00, 0xFC, 0x05, 0x00, 0x00]),
    ],
)
def test_golden_bytes(codes: list[int], packed: list[int], device) -> None:
    c = torch.tensor(codes, dtype=torch.int8, device=device)
    assert pack_int6(c).tolist() == packed
    assert pack_int6_ref(c).tolist() == packed
    assert unpack_int6(pack_int6(c), len(codes)).tolist() == codes
    assert unpack_int6_ref(pack_int6(c), len(codes)).tolist() == codes


@pytest.mark.parametrize("shape", SHAPES)
def test_kernel_and_reference_read_each_other(shape: tuple[int, ...], device) -> None:
    codes = random_codes(shape, device)
    packed = pack_int6(codes)
    assert packed.shape == (*shape[:-1], (shape[-1] + 3) // 4 * 3) and packed.dtype == torch.uint8
    assert torch.equal(packed, pack_int6_ref(codes))
    assert torch.equal(unpack_int6(packed, shape[-1]), codes)
    assert torch.equal(unpack_int6_ref(packed, shape[-1]), codes)


def test_large_tensor_survives(device) -> None:
    codes = random_codes((2048, 516), device)
    assert torch.equal(unpack_int6(pack_int6(codes), 516), codes)


@pytest.mark.parametrize("offset", [1, 4, 16])
def test_unaligned_views_give_the_same_bytes(offset: int, device) -> None:
    codes = random_codes((4096 + offset,), device)[offset:]
    packed = pack_int6(codes)
    assert torch.equal(packed, pack_int6_ref(codes))
    shifted = torch.cat((packed.new_zeros(offset), packed))[offset:]
    assert torch.equal(unpack_int6(shifted, 4096), codes)


def test_transposed_codes_are_packed_in_logical_order(device) -> None:
    codes = random_codes((8, 12), device)
    assert torch.equal(pack_int6(codes.T), pack_int6_ref(codes.T.contiguous()))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-32, 31), min_size=0, max_size=40))
def test_any_row_survives_a_round_trip(codes: list[int]) -> None:
    c = torch.tensor(codes, dtype=torch.int8)
    packed = pack_int6(c)
    assert torch.equal(packed, pack_int6_ref(c))
    assert unpack_int6(packed, len(codes)).tolist() == codes


def test_every_byte_pattern_unpacks_to_the_range(device) -> None:
    packed = torch.arange(256, dtype=torch.uint8, device=device).repeat_interleave(3)
    codes = unpack_int6(packed, 1024)
    assert codes.min() == -32 and codes.max() == 31
    assert torch.equal(pack_int6(codes), packed)


def test_opcheck_accepts_the_operators(device) -> None:
    codes = random_codes((3, 7), device)
    torch.library.opcheck(torch.ops.pgolf.pack_int6, (codes,))
    torch.library.opcheck(torch.ops.pgolf.unpack_int6, (pack_int6(codes), 7))


def test_compile_in_one_graph_matches_eager(device) -> None:
    codes = random_codes((5, 18), device)
    compiled = torch.compile(lambda c: unpack_int6(pack_int6(c), 18) + 1, fullgraph=True, dynamic=True)
    assert torch.equal(compiled(codes), codes + 1)


@pytest.mark.parametrize("bad", [32, -33, 127, -128])
def test_cpu_code_out_of_range_is_named(bad: int) -> None:
    codes = torch.zeros(3, 5, dtype=torch.int8)
    codes[1, 2:] = bad
    with pytest.raises(ValueError, match=rf"codes must be in \[-32, 31\], got {bad} at flat index 7; clamp"):
        pack_int6(codes)


@requires_gpu
@pytest.mark.parametrize("n", [4, 5])
def test_cuda_code_out_of_range_wraps(n: int) -> None:
    codes = torch.full((n,), 33, dtype=torch.int8, device="cuda")
    assert unpack_int6(pack_int6(codes), n).tolist() == [-31] * n


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d: pack_int6(torch.zeros(4, device=d)), TypeError, "codes must be int8, got Float"),
        (
            lambda d: pack_int6(torch.zeros((), dtype=torch.int8, device=d)),
            ValueError,
            "at least one dimension",
        ),
        (lambda d: unpack_int6(torch.zeros(3, device=d), 4), TypeError, "packed must be uint8, got Float"),
        (
            lambda d: unpack_int6(torch.zeros(3, dtype=torch.uint8, device=d), -1),
            ValueError,
            "n must be >= 0, got -1",
        ),
        (
            lambda d: unpack_int6(torch.zeros(2, 4, dtype=torch.uint8, device=d), 5),
            ValueError,
            r"=\(..., 6\) for n=5, got \[2, 4\]",
        ),
    ],
)
def test_bad_input_is_named(call, error, message: str, device) -> None:
    with pytest.raises(error, match=message):
        call(device)
