"""The range coder that is compiled when it is needed: its source is the kernel's, and it does the same."""

import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from pgolf import _C
from pgolf.ops import _coder, decode_codes, encode_codes
from tests.ops.test_range_coder import CASES, gaussian

ROOT = Path(__file__).resolve().parents[2]


def test_the_source_is_that_of_the_kernel():
    source = runpy.run_path(str(ROOT / "csrc" / "alone" / "make.py"))["source"]
    for name, encoder in (("range_coder.cpp", True), ("range_decoder.cpp", False)):
        committed = Path(_coder.__file__).with_name(name).read_text()
        assert source(encoder=encoder) == committed, "the coder was changed: run python csrc/alone/make.py"


@pytest.mark.parametrize("name", CASES)
def test_it_writes_and_reads_what_the_extension_does(name):
    codes = CASES[name]
    for fast in (False, True):
        stream = encode_codes(codes, fast=fast)
        assert _coder.encode_codes(codes.tobytes(), *codes.shape, b"", fast) == stream
        assert _coder.decode_codes(stream, *codes.shape, b"") == codes.tobytes()


def test_it_reads_rows_that_lean_on_a_pool():
    pool = gaussian(40, 64, seed=3)
    codes = np.clip(pool[::-1] + gaussian(40, 64, 0.7), -128, 127).astype(np.int8)
    stream = encode_codes(codes, pool=pool)
    assert len(stream) < len(encode_codes(codes))
    assert _coder.decode_codes(stream, 40, 64, pool.tobytes()) == codes.tobytes()
    assert _coder.encode_codes(codes.tobytes(), 40, 64, pool.tobytes(), False) == stream
    assert np.array_equal(decode_codes(stream, (40, 64), pool=pool), codes)


def test_threads_share_one_library():
    _coder._compiled.cache_clear()
    matrices = [gaussian(50, 30, seed=seed) for seed in range(8)]
    streams = [encode_codes(m) for m in matrices]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda s: _coder.decode_codes(s, 50, 30, b""), streams))
    assert found == [m.tobytes() for m in matrices]
    assert _coder._compiled.cache_info().misses == 1


def test_it_refuses_what_the_extension_refuses_with_the_same_words():
    stream = encode_codes(gaussian(19, 23))
    damaged = [b"", b"\x09", b"\x00\x01", stream[:-3], stream + b"\x01", b"\x01\xff" + stream[2:], bytes(30)]
    damaged += [stream[:i] + bytes([stream[i] ^ 1]) + stream[i + 1 :] for i in range(2, len(stream), 9)]
    said = [[outcome(decode, data) for data in damaged] for decode in (_C.decode_codes, _coder.decode_codes)]
    assert said[0] == said[1]
    assert all(isinstance(words, str) for words in said[0][:3]), "no stream begins so"


def outcome(decode, data):
    """Return the codes of a stream of 19 x 23, or the words with which it is refused."""
    try:
        return bytes(decode(data, 19, 23, b""))
    except ValueError as e:
        return str(e)


@pytest.mark.parametrize(("shape", "pool"), [((-1, 4), b""), ((1 << 20, 1 << 20), b""), ((2, 3), bytes(7))])
def test_impossible_shapes_and_pools_are_refused(shape, pool):
    with pytest.raises(
        ValueError, match="decode_codes: expected a shape of at most 2\\^31 codes and a pool of"
    ):
        _coder.decode_codes(b"\x00", *shape, pool)
