"""Whatever the bytes, a reader answers with a state or ArtifactError: nothing else, no big allocation."""

import io
import json
import random
import struct
import tracemalloc

import pytest
from artifact_helpers import CONFIG, FACTS
from mutate import TEXT, signed

from pgolf.artifact.codec import compress, decompress
from pgolf.artifact.format import Reader, parse, raw_limit
from pgolf.artifact.header import ArtifactError
from pgolf.artifact.read import read_state
from pgolf.artifact.write import write_artifact


@pytest.fixture(scope="module")
def good(tmp_path_factory, state):
    path = tmp_path_factory.mktemp("artifact") / "model.pgolf"
    write_artifact(path, state, CONFIG, **FACTS, limit=16_000_000, quality=1)
    return path.read_bytes()


def refused(path, data, match=""):
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=match):
        read_state(path)


def with_header(data, change):
    """Return the file with its header JSON changed by `change(fields)` and a matching checksum."""
    stored, raw = struct.unpack_from("<II", data, 8)
    fields = json.loads(decompress(data[16 : 16 + stored], raw_length=raw))
    text = json.dumps(change(fields) or fields).encode()
    packed = compress(text, quality=1)
    prefix = data[:8] + struct.pack("<II", len(packed), len(text))
    return signed(prefix + packed + data[16 + stored : -32])


def test_every_bit_of_the_header_region_is_guarded(tmp_path, good):
    stored = struct.unpack_from("<I", good, 8)[0]
    for position in range(16 + stored):
        for bit in range(8) if position < 16 else (position % 8,):
            data = bytearray(good)
            data[position] ^= 1 << bit
            with pytest.raises(ArtifactError):
                parse(bytes(data))


def test_random_flips_and_truncations_are_refused(tmp_path, good):
    rng = random.Random(0)
    for _ in range(1500):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        with pytest.raises(ArtifactError):
            parse(bytes(data))
    for size in [*range(80), *(rng.randrange(len(good)) for _ in range(300)), len(good) - 1]:
        with pytest.raises(ArtifactError, match=r"truncated|corrupt"):
            parse(good[:size])
    refused(tmp_path / "a", good + b"\0", "corrupt or not whole")
    refused(tmp_path / "a", b"", "truncated: 0 bytes")


def test_random_damage_under_a_valid_checksum_never_escapes(tmp_path, good):
    """A forger can recompute the checksum, so everything behind it has to hold on its own."""
    rng = random.Random(1)
    body, outcomes = good[:-32], {"read": 0, "refused": 0}
    stored = struct.unpack_from("<I", good, 8)[0]
    path = tmp_path / "a"
    for i in range(400):
        data = bytearray(body)
        for _ in range(rng.choice((1, 3))):
            low, high = ((0, 16), (16, 16 + stored), (16 + stored, len(data)))[i % 3]
            data[rng.randrange(low, high)] = rng.randrange(256)
        if i % 10 == 0:
            data = data[: rng.randrange(len(data))]
        path.write_bytes(signed(bytes(data)))
        try:
            read_state(path)
            outcomes["read"] += 1
        except ArtifactError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 300


def test_random_damage_of_the_json_never_escapes(good):
    rng = random.Random(2)
    stored, raw = struct.unpack_from("<II", good, 8)
    text = decompress(good[16 : 16 + stored], raw_length=raw)
    junk = [*TEXT, b"[" * 2000]
    for _ in range(1500):
        begin = rng.randrange(len(text))
        damaged = text[:begin] + rng.choice(junk) + text[begin + rng.randrange(12) :]
        packed = compress(damaged, quality=0)
        prefix = good[:8] + struct.pack("<II", len(packed), len(damaged))
        try:
            parse(signed(prefix + packed + good[16 + stored : -32]))
        except ArtifactError:
            continue


def set_section(index, **values):
    return lambda fields: fields["sections"][index].update(values)


def set_tensor(index, **values):
    return lambda fields: fields["tensors"][index].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_section(1, length=2**30), "claims bytes"),
        (set_section(1, length=2**31), r"length of section .* integer in \[0, 2\^30\], got 2147483648"),
        (set_section(1, length=-1), "got -1"),
        (set_section(1, length=3.0), "got 3.0"),
        (set_section(1, length=True), "got True"),
        (set_section(2, offset=0), "claims bytes 0 to"),
        (set_section(0, raw=7), "section 'tok_emb': expected .* got"),
        (set_section(0, dtype="float16"), "section 'tok_emb': expected"),
        (set_section(0, name="other"), "section 'tok_emb': expected"),
        (lambda f: f["sections"].pop(), "sections, its tensors need"),
        (lambda f: f["sections"][0].pop("raw"), "section: expected the keys"),
        (set_tensor(0, shape=[2**30, 2**30]), "shape .* is not possible"),
        (
            set_tensor(0, shape=[2**29, 2]),
            "would unpack to .* at most [0-9]+ are allowed for a file of its size",
        ),
        (set_tensor(1, shape=[2**30, 1, 1]), "matrices, at most 4096 are allowed"),
        (set_tensor(0, shape=[0, 5]), "shape .* is not possible"),
        (set_tensor(0, shape=[[]]), "must be an integer"),
        (set_tensor(0, shape="ab"), "must be a list"),
        (set_tensor(0, bits=3), "kind 'matrix' with 3 bits is not known"),
        (set_tensor(0, bits=4), "code magnitude [0-9]+ is not on a 4-bit grid"),
        (set_tensor(0, kind=[]), "is not known"),
        (set_tensor(0, name="../x"), "tensor name must match"),
        (set_tensor(0, name="qo_bank"), "names a tensor twice"),
        (lambda f: f.update(extra=1), "header: expected the keys"),
        (lambda f: f.update(limit="big"), "limit must be an integer"),
        (lambda f: f.update(config_hash="xyz"), "config_hash must match"),
        (lambda f: f.update(model=[]), "model must be an object, got list"),
        (lambda f: f["model"].update(heads=0), "bad model configuration"),
        (lambda f: f["model"].pop("softcap") and None, "the model lacks softcap; its writer left none out"),
        (lambda f: f["model"].update(widht=3), "unknown key 'widht'; did you mean 'width'"),
        (lambda f: f["model"].update(skip="left"), "model.skip must be one of"),
        (lambda f: [1], "header: expected the keys .* got list"),
    ],
)
def test_forged_headers_are_refused_by_name(tmp_path, good, change, message):
    def apply(fields):
        result = change(fields)
        return result if isinstance(result, list) else fields

    refused(tmp_path / "a", with_header(good, apply), message)


def test_forged_sizes_do_not_allocate(tmp_path, good):
    bomb = compress(bytes(1 << 26), quality=5)
    tracemalloc.start()
    try:
        refused(tmp_path / "a", with_header(good, set_tensor(0, shape=[2**29, 1])), "would unpack")
        refused(tmp_path / "a", signed(good[:8] + struct.pack("<II", len(bomb), 1000) + bomb), "holds more")
        refused(
            tmp_path / "a",
            signed(good[:8] + struct.pack("<II", len(bomb), 1 << 26) + bomb),
            "raw limit",
        )
        assert tracemalloc.get_traced_memory()[1] < 1 << 23
    finally:
        tracemalloc.stop()


def test_other_files_are_named(tmp_path):
    refused(
        tmp_path / "a", b"PK\x03\x04" + bytes(100), r"not a pgolf artifact: expected magic b'PGLF', got b'PK"
    )
    for version in (1, 2, 3, 5):
        refused(
            tmp_path / "a", b"PGLF" + bytes([version, 0]) + bytes(100), rf"version {version} .* expected 4"
        )
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_state(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no artifact at .*nothing; a run writes one: pgolf train"):
        read_state(tmp_path / "nothing")


def test_broken_numbers_are_refused(tmp_path, state):
    for section, group, name in (
        ("scales", state.quantized["kv_bank"].scales, "scale"),
        ("small", None, "NaN"),
    ):
        target = group if group is not None else next(iter(state.small.values()))
        kept = target.flatten()[0].clone()
        target.view(-1)[0] = 0.0 if section == "scales" else float("nan")
        write_artifact(tmp_path / "a", state, CONFIG, **FACTS, limit=16_000_000, quality=1)
        target.view(-1)[0] = kept
        with pytest.raises(ArtifactError, match=f"section '{section}' holds .*{name}"):
            read_state(tmp_path / "a")


def test_declared_bytes_are_bounded_by_the_file_before_anything_is_allocated(tmp_path, good):
    """1 MiB + 64 x the file, whatever the header says; a gate of 2 MiB in a file of 8 KiB is refused."""
    limit = raw_limit(len(good))
    assert limit == (1 << 20) + 64 * len(good) and raw_limit(1 << 30) == 1 << 30

    def gate(rows):
        return with_header(
            good, lambda f: next(t for t in f["tensors"] if t["kind"] == "gate").update(shape=[rows, 1])
        )

    tracemalloc.start()
    try:
        refused(tmp_path / "a", gate(limit), "are allowed for a file of its size")
        refused(tmp_path / "a", gate(limit // 3 - 20_000), "section 'scales': expected")
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read_is_refused(good):
    with pytest.raises(ArtifactError, match="truncated"):
        list(Reader(io.BytesIO(good[:-100]), len(good)).sections())
