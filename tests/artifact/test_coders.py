"""Files whose codes are written with a general compressor: bytes, damage, bombs, sizes; golden files."""

import hashlib
import json
import lzma
import random
import struct
import tracemalloc
import zlib
from base64 import b85decode
from dataclasses import replace

import brotli
import numpy as np
import pytest
import torch
from artifact_helpers import CONFIG, FACTS, TOY, make_state
from golden_files import GOLDEN
from mutate import Mutator, lengths, signed

from pgolf.artifact.code import code_bytes
from pgolf.artifact.codec import CodecError, compress, decompress
from pgolf.artifact.fit import fit_artifact, write_quantized
from pgolf.artifact.format import parse
from pgolf.artifact.header import GENERAL, ArtifactError
from pgolf.artifact.predict import (
    in_each_coder,
    nearest_ledger,
    nearest_state,
    predict_fitted,
    predict_ledger,
)
from pgolf.artifact.read import read_artifact, read_state
from pgolf.artifact.size import make_ledger
from pgolf.artifact.write import Facts, build_file, write_artifact
from pgolf.config import ArtifactConfig, Config, EvaluateConfig, ModelConfig, QuantConfig
from pgolf.model.gpt import GPT
from pgolf.presets import PRESETS
from pgolf.quant.grid import QuantizedTensor, max_code
from pgolf.quant.quantized import QuantizedState, dequantize_state

LIMIT = 16_000_000
DECOMPRESS = {"brotli": brotli.decompress, "lzma": lzma.decompress, "zlib": zlib.decompress}
CODERS = ("range", *GENERAL)


def write(path, state, coder, **kwargs):
    return write_artifact(
        path, state, CONFIG, **{**FACTS, "limit": LIMIT, "quality": 1, "coder": coder, **kwargs}
    )


def state_of(codes, bits):
    scales = torch.full(codes.shape[:-1], 0.75).half()
    return QuantizedState({"w": QuantizedTensor(codes, scales, bits)}, {}, {})


@pytest.fixture(scope="module", params=GENERAL)
def good(request, tmp_path_factory):
    """A file in each general compressor."""
    path = tmp_path_factory.mktemp("coders") / "a"
    write_artifact(path, make_state(TOY), TOY, **FACTS, limit=LIMIT, quality=1, coder=request.param)
    return path.read_bytes()


def coder_of(data):
    return parse(data)[0].coder


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("bits", [4, 5, 6, 7, 8])
# One code; odd and prime sides, wide and tall; a bank; long enough for several blocks of a compressor.
@pytest.mark.parametrize("shape", [(1, 1), (7, 129), (131, 3), (3, 5, 7), (257, 521)])
def test_codes_of_every_width_round_trip(tmp_path, coder, bits, shape):
    most = max_code(bits)
    codes = np.random.default_rng(0).normal(scale=most / 4, size=shape).round().clip(-most, most)
    codes.reshape(-1)[0], codes.reshape(-1)[-1] = -most, most
    state = state_of(torch.from_numpy(codes.astype(np.int8)), bits)
    write(tmp_path / "a", state, coder)
    header, back = read_state(tmp_path / "a")
    assert header.coder == coder and back.quantized["w"].bits == bits
    assert torch.equal(back.quantized["w"].codes, state.quantized["w"].codes)
    assert torch.equal(back.quantized["w"].scales, state.quantized["w"].scales)


@pytest.mark.parametrize("coder", CODERS)
def test_a_whole_state_round_trips_and_its_ledger_is_exact(tmp_path, coder):
    state = make_state()
    ledger = write(tmp_path / "a", state, coder)
    found, expected = read_artifact(tmp_path / "a"), dequantize_state(state)
    assert found.state.keys() == expected.keys()
    assert all(torch.equal(found.state[name], value) for name, value in expected.items())
    size = (tmp_path / "a").stat().st_size
    assert ledger.model_bytes == size and ledger.code == code_bytes(coder)
    assert make_ledger(found.header, file_bytes=size) == ledger


def golden_codes(*shape, bits):
    """Return the codes of the golden files: squares modulo the size of the grid."""
    n, most = torch.arange(int(np.prod(shape))), max_code(bits)
    return ((n * n * 7 + n) % (2 * most + 1) - most).to(torch.int8).reshape(shape)


@pytest.mark.parametrize("coder", CODERS)
def test_golden_files_are_read_and_their_streams_written_again(tmp_path, coder):
    data = b85decode(GOLDEN[coder])
    (tmp_path / "a").write_bytes(data)
    header, state = read_state(tmp_path / "a")
    assert header.coder == coder and header.model == TOY
    shapes = {"tok_emb": (5, 3), "qo_bank": (2, 3, 3), "kv_bank": (2, 2, 3)}
    assert list(state.quantized) == list(shapes)
    for name, shape in shapes.items():
        t = state.quantized[name]
        assert t.bits == (8 if name == "tok_emb" else 6)
        assert torch.equal(t.codes, golden_codes(*shape, bits=t.bits))
        assert bool((t.scales == 0.75).all())
    facts = Facts("ab" * 32, "0123456789abcdef", LIMIT, 1.0, coder)
    (_, old), (_, new) = parse(data), parse(build_file(state, TOY, facts, quality=11)[0])
    codes = [i for i, s in enumerate(header.sections) if s.plan.kind == "codes"]
    if coder == "range":  # our own bytes, the same everywhere
        assert [old[i] for i in codes] == [new[i] for i in codes]
    else:  # another version of a library may write others
        assert [DECOMPRESS[coder](old[i]) for i in codes] == [DECOMPRESS[coder](new[i]) for i in codes]


def test_bytes_are_laid_out_as_documented(good):
    """Reads the file with the docstring of pgolf.artifact.format and no code of pgolf."""
    stored = struct.unpack_from("<I", good, 8)[0]
    header = json.loads(brotli.decompress(good[16 : 16 + stored]))
    assert good[-32:] == hashlib.sha256(good[:-32]).digest()
    state, seen = make_state(TOY), 0
    for row in header["sections"]:
        if row["kind"] != "codes":
            continue
        begin = 16 + stored + row["offset"]
        raw = DECOMPRESS[header["coder"]](good[begin : begin + row["length"]])
        name, _, index = row["name"].partition(".")
        codes = state.quantized[name].codes
        matrix = (codes[int(index)] if index else codes).numpy()
        assert raw == bytes(code & 255 for column in matrix.T.tolist() for code in column)
        assert row["transposed"] and row["pool"] is None and row["raw"] == matrix.size
        seen += matrix.size
    assert seen == sum(t.codes.numel() for t in state.quantized.values())


def test_a_file_of_the_range_coder_names_no_coder(tmp_path):
    write(tmp_path / "a", make_state(), "range")
    write_artifact(tmp_path / "b", make_state(), CONFIG, **FACTS, limit=LIMIT, quality=1)
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    stored = struct.unpack_from("<I", data, 8)[0]
    assert "coder" not in json.loads(brotli.decompress(data[16 : 16 + stored]))


# Damage.


def damaged(good, change, *, fields=None):
    """Return a file whose first stream is changed, its table and checksum with it."""
    parts = Mutator(good, 0)
    header = json.loads(parts.text) | (fields or {})
    streams = parts.streams(header)
    streams[0] = change(streams[0])
    lengths(header, streams)
    return signed(parts.build(header, streams))


def refused(path, data, match):
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=match):
        read_state(path)


def test_streams_that_are_damaged_under_a_valid_checksum_are_refused(tmp_path, good):
    coder, path = coder_of(good), tmp_path / "a"
    refused(path, damaged(good, lambda s: s[:-1]), "section 'tok_emb': (expected 512 bytes|corrupt)")
    refused(
        path, damaged(good, lambda s: s[: len(s) // 2]), "section 'tok_emb': (expected 512 bytes|corrupt)"
    )
    refused(path, damaged(good, lambda _: b""), "section 'tok_emb': expected 512 bytes")
    refused(path, damaged(good, lambda s: s + b"\0"), "section 'tok_emb': (expected 512 bytes|corrupt)")
    refused(path, damaged(good, lambda s: s + s), "section 'tok_emb': (expected 512 bytes|corrupt)")
    short, long = (compress(bytes(n), quality=1, coder=coder) for n in (511, 513))
    refused(path, damaged(good, lambda _: short), "expected 512 bytes and then the stream's end, got 511")
    refused(path, damaged(good, lambda _: long), "expected 512 bytes, the stream holds more")
    far = compress(bytes([128]) * 512, quality=1, coder=coder)
    refused(path, damaged(good, lambda _: far), "code magnitude 128 is not on a 7-bit grid")


def test_flipped_bits_never_escape_and_checked_streams_refuse_them_all(tmp_path, good):
    coder, rng, path, read = coder_of(good), random.Random(0), tmp_path / "a", 0
    for _ in range(300):

        def flip(stream):
            data = bytearray(stream)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            return bytes(data)

        path.write_bytes(damaged(good, flip))
        try:
            codes = read_state(path)[1].quantized["tok_emb"].codes
        except ArtifactError:
            continue
        # A brotli stream has no checksum of its own; the file has one, which was made to match. A zlib stream
        # has up to seven bits that mean nothing.
        assert coder == "brotli" or torch.equal(codes, make_state(TOY).quantized["tok_emb"].codes)
        read += 1
    assert read < 300 if coder == "brotli" else read < 20


def test_a_stream_of_another_coder_than_the_header_says_is_refused(tmp_path, good):
    coder, path = coder_of(good), tmp_path / "a"
    for other in set(GENERAL) - {coder}:
        refused(
            path, damaged(good, lambda s: s, fields={"coder": other}), f"section .*: .*({other}|expected)"
        )
    for wrong in ("range", "zstd", "", None, 3, ["zlib"], {}):
        message = r"coder must be one of \('brotli', 'lzma', 'zlib'\), or absent for the range coder, got"
        refused(path, damaged(good, lambda s: s, fields={"coder": wrong}), message)
    header = json.loads(Mutator(good, 0).text)
    del header["coder"]
    parts = Mutator(good, 0)
    refused(path, signed(parts.build(header, parts.streams(header))), "section 'tok_emb': expected .* got")


def test_bombs_take_no_memory(tmp_path, good):
    """64 MiB of zeros for 512 bytes; and an xz stream whose decoder would need a dictionary of 1 GiB.

    The decoder of an honest xz stream takes 9 MiB.
    """
    coder, path = coder_of(good), tmp_path / "a"
    bombs = [compress(bytes(1 << 26), quality=9, coder=coder)]
    if coder == "lzma":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
        bombs.append(lzma.compress(bytes(512), filters=filters))
    tracemalloc.start()
    try:
        for bomb, message in zip(bombs, ("the stream holds more", "corrupt lzma stream"), strict=False):
            refused(path, damaged(good, lambda _, bomb=bomb: bomb), message)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("coder", GENERAL)
def test_decompress_is_bounded_and_exact(coder):
    for raw in (b"", b"x", bytes(range(256)) * 999):
        stream = compress(raw, quality=3, coder=coder)
        assert decompress(stream, raw_length=len(raw), coder=coder) == raw
        for length in {len(raw) + 1, max(len(raw) - 1, 0)} - {len(raw)}:
            with pytest.raises(CodecError, match=f"expected {length} bytes"):
                decompress(stream, raw_length=length, coder=coder)
        for bad in (stream[:-1], stream + b"\0", stream + stream, b"", b"\0" * 40):
            with pytest.raises(CodecError):
                decompress(bad, raw_length=len(raw), coder=coder)


def test_streams_are_those_of_the_published_stacks():
    raw = np.random.default_rng(0).normal(scale=3, size=20_000).round().astype(np.int8).tobytes()
    assert compress(raw, quality=11, coder="zlib") == zlib.compress(raw, level=9)
    assert compress(raw, quality=11, coder="lzma") == lzma.compress(raw, preset=6)
    assert compress(raw, quality=11, coder="brotli") == brotli.compress(raw, quality=11, lgwin=24)


# Sizes.


@pytest.mark.parametrize("coder", GENERAL)
def test_the_fit_fills_the_limit(tmp_path, coder):
    plain = write(tmp_path / "a", make_state(), coder).total
    for change in (-1_000, 150):
        limit = plain + change
        ledger = fit_artifact(
            tmp_path / "b",
            lambda clip_scale: make_state(clip_scale=clip_scale),
            CONFIG,
            **FACTS,
            limit=limit,
            coder=coder,
        )
        assert 0.999 * limit <= ledger.total <= limit
        assert ledger.total == (tmp_path / "b").stat().st_size + code_bytes(coder)
        assert read_state(tmp_path / "b")[0].coder == coder


@pytest.mark.parametrize("fit", [False, True])
def test_a_run_writes_with_the_coder_of_its_settings(tmp_path, fit):
    class Fake:
        def quantize(self, factor=1.0):
            return make_state(clip_scale=factor)

    artifact = ArtifactConfig(fit=fit, coder="zlib")
    config = Config(model=CONFIG, evaluate=EvaluateConfig(stride=16), artifact=artifact)
    ledger = write_quantized(tmp_path / "a", Fake(), config, tokenizer_sha256=FACTS["tokenizer_sha256"])
    assert read_state(tmp_path / "a")[0].coder == "zlib" and ledger.code == code_bytes("zlib")


def test_a_file_above_the_limit_is_refused_with_the_smaller_coder(tmp_path):
    with pytest.raises(ArtifactError, match=r"set artifact\.coder=range, which takes less than zlib, or set"):
        write(tmp_path / "a", make_state(), "zlib", limit=20_000)
    with pytest.raises(ArtifactError, match=r"header [0-9.]+ MB; set artifact\.fit|MB; set artifact\.fit"):
        write(tmp_path / "a", make_state(), "range", limit=20_000)


# Model files of brotli that the logs of the pull requests report, without code: five seeds of #1394, three of
# #1787, one of #1851 (whose low-rank corrections, about 15 kB, the prediction leaves out).
@pytest.mark.parametrize(
    ("preset", "published"),
    [("pr1394", 15_971_800), ("pr1787", 15_909_630), ("pr1851", 15_920_836)],
)
def test_predictions_are_near_the_published_files(preset, published):
    config = PRESETS[preset]()
    assert config.artifact.coder == "brotli"
    ledger = predict_ledger(config.model, config.quant, limit=LIMIT, coder="brotli")
    assert ledger.model_bytes == pytest.approx(published, rel=0.0025)
    assert ledger.code == code_bytes("brotli") < code_bytes("range")


SPREAD = QuantConfig(
    row_scales="spread", column_scales=False, trellis=False, matrix_bits=6, embed_bits=7, rate=0.0
)


@pytest.mark.parametrize("coder", GENERAL)
def test_both_estimates_know_the_coder(tmp_path, coder):
    model = ModelConfig(**{**vars(CONFIG), "vocab_size": 1024, "width": 96})
    tensors = {n: p.detach() for n, p in GPT(model).named_parameters()}
    g = torch.Generator().manual_seed(0)
    tensors = {n: t + 0.02 * torch.randn(t.shape, generator=g) for n, t in tensors.items()}
    nearest = nearest_ledger(tensors, model, SPREAD, limit=LIMIT, coder=coder)
    facts = Facts("0" * 64, "0" * 16, LIMIT, 1.0, coder)
    data, ledger = build_file(nearest_state(tensors, model, SPREAD), model, facts, quality=11)
    assert nearest == ledger and ledger.model_bytes == len(data)
    predicted = predict_ledger(model, SPREAD, limit=LIMIT, coder=coder)
    assert predicted.model_bytes == pytest.approx(len(data), rel=0.03)
    fitted = predict_fitted(model, SPREAD, limit=predicted.total - 5_000, coder=coder)
    assert fitted.total <= predicted.total - 5_000 and fitted.clip_scale > 1


def test_each_coder_is_compared_by_the_file_that_it_would_write(tmp_path):
    state = make_state()
    write(tmp_path / "a", state, "zlib", quality=11)
    header, back = read_state(tmp_path / "a")
    found = dict(in_each_coder(header, back))
    assert list(found) == ["range", "brotli", "lzma", "zlib"]
    for coder, ledger in found.items():
        assert ledger == replace(write(tmp_path / coder, state, coder, quality=11), clip_scale=1.0)
    assert found["zlib"].model_bytes == (tmp_path / "a").stat().st_size
