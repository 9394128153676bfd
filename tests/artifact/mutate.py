"""Damaged artifacts without end: bits, cuts, swapped sections, forged lengths and JSON, checksums fixed."""

import hashlib
import json
import random
import struct

from pgolf.artifact.codec import compress, decompress
from pgolf.artifact.header import GENERAL

JUNK = (
    0,
    -1,
    1,
    2,
    3.5,
    2**30,
    2**31,
    2**63,
    10**30,
    "",
    "x",
    "qo_bank.0",
    None,
    True,
    False,
    [],
    {},
    [0],
    [2**20, 7],
)
TEXT = (
    b"0",
    b"-1",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b'""',
    b"true",
    b"9" * 30,
    b"[" * 300,
    b"\xff",
    b",",
    b'"',
)


def signed(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


class Mutator:
    """Makes damaged versions of one good artifact."""

    def __init__(self, good: bytes, seed: int) -> None:
        self.random = random.Random(seed)
        stored, raw = struct.unpack_from("<II", good, 8)
        self.good, self.begin = good, 16 + stored
        self.text = decompress(good[16 : self.begin], raw_length=raw)
        self.payload = good[self.begin : -32]
        self.kinds = (
            self.flip,
            self.flip,
            self.cut,
            self.swap,
            self.forge,
            self.forge,
            self.json,
            self.section,
        )

    def next(self) -> tuple[bytes, bool]:
        """Return a damaged file, and whether its checksum is right."""
        body = self.random.choice(self.kinds)()
        if self.random.random() < 0.05:
            return body + self.good[-32:], False
        return signed(body), True

    def flip(self) -> bytes:
        """Flip a few bits anywhere, the prefix more often than its size."""
        body = bytearray(self.good[:-32])
        for _ in range(self.random.choice((1, 1, 2, 8))):
            place = self.random.randrange(16 if self.random.random() < 0.2 else len(body))
            body[place] ^= 1 << self.random.randrange(8)
        return bytes(body)

    def cut(self) -> bytes:
        """Drop the end, or drop or insert bytes in the middle."""
        body = self.good[:-32]
        place = self.random.randrange(len(body))
        how = self.random.randrange(3)
        if how == 0:
            return body[:place]
        length = self.random.choice((1, 2, 40))
        return (
            body[:place]
            + (self.random.randbytes(length) if how == 1 else b"")
            + body[place + length * (how - 1) :]
        )

    def swap(self) -> bytes:
        """Exchange the streams of two sections, with the table following or not."""
        fields = json.loads(self.text)
        a, b = sorted(self.random.sample(range(len(fields["sections"])), 2))
        streams = self.streams(fields)
        streams[a], streams[b] = streams[b], streams[a]
        if self.random.random() < 0.8:
            lengths(fields, streams)
        return self.build(fields, streams)

    def forge(self) -> bytes:
        """Change values of the header; lengths, offsets and shapes above all."""
        fields = json.loads(self.text)
        for _ in range(self.random.choice((1, 1, 2))):
            rows = fields[self.random.choice(("sections", "tensors", "tensors", "model"))]
            row = rows if isinstance(rows, dict) else self.random.choice(rows)
            key = self.random.choice(sorted(row))
            if isinstance(row[key], list) and row[key] and self.random.random() < 0.7:
                row[key][self.random.randrange(len(row[key]))] = self.number(0)
            elif isinstance(row[key], int) and self.random.random() < 0.7:
                row[key] = self.number(row[key])
            else:
                row[key] = self.random.choice(JUNK)
        how = self.random.random()
        if how < 0.1:
            self.random.shuffle(fields[self.random.choice(("sections", "tensors"))])
        elif how < 0.2:
            fields["tensors"].append(dict(self.random.choice(fields["tensors"]), name="other"))
        elif how < 0.3:
            fields["corrections"].append(
                {
                    "name": "qo_bank",
                    "index": self.number(0),
                    "rank": 1,
                    "left_scales": 1,
                    "group": self.number(4),
                }
            )
        return self.build(fields, [self.payload])

    def number(self, value: int) -> int:
        """Return a number near `value`, or a large one."""
        return self.random.choice(
            (value + 1, value - 1, 2 * value, self.random.randrange(64), 2**20, 2**30, 2**40)
        )

    def json(self) -> bytes:
        """Replace a piece of the header's text."""
        place = self.random.randrange(len(self.text))
        text = self.text[:place] + self.random.choice(TEXT) + self.text[place + self.random.randrange(12) :]
        return self.wrap(text, self.payload)

    def section(self) -> bytes:
        """Replace a section's stream by noise, or by one that is longer, shorter or other, table and all."""
        fields = json.loads(self.text)
        streams = self.streams(fields)
        place = self.random.randrange(len(streams))
        old = streams[place]
        streams[place] = self.random.choice(
            (
                lambda: self.random.randbytes(self.random.randrange(2 * len(old) + 2)),
                lambda: old[: self.random.randrange(len(old) + 1)],
                lambda: old + self.random.randbytes(3),
                lambda: bytes([self.random.randrange(5), self.random.randrange(256)]) + old[2:],
                lambda: self.packed(bytes(self.random.choice((0, 1, 1 << 16, 1 << 22)))),
                lambda: self.packed(self.random.randbytes(fields["sections"][place]["raw"])),
            )
        )()
        lengths(fields, streams)
        return self.build(fields, streams)

    def packed(self, raw: bytes) -> bytes:
        return compress(raw, quality=0, coder=self.random.choice(GENERAL))

    def streams(self, fields: dict) -> list[bytes]:
        return [self.payload[s["offset"] : s["offset"] + s["length"]] for s in fields["sections"]]

    def build(self, fields: dict, streams: list[bytes]) -> bytes:
        return self.wrap(json.dumps(fields).encode(), b"".join(streams))

    def wrap(self, text: bytes, payload: bytes) -> bytes:
        stored = compress(text, quality=0)
        return self.good[:8] + struct.pack("<II", len(stored), len(text)) + stored + payload


def lengths(fields: dict, streams: list[bytes]) -> None:
    """Make the table say what the streams are."""
    offset = 0
    for row, stream in zip(fields["sections"], streams, strict=True):
        row["offset"], row["length"] = offset, len(stream)
        offset += len(stream)
