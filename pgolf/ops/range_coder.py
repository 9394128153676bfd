"""Entropy coding of a matrix of int8 codes: arithmetic coding under a Gaussian that follows the columns.

Owns the Python face of the compiled coder and, as `encode_codes_ref` and `decode_codes_ref`, a second, slow
statement of the format in csrc/kernels/range_coder.h; each reads the other's bytes. Rows of quantized weights
share one scale (their step is a multiple of their deviation), columns do not, and the rows of an embedding
share a mean and directions: so the scale comes from the column, and the mean, where it pays, from the codes
to the left. Host only; the operators for tensors on devices are in the other files.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import pgolf.ops._extension  # noqa: F401  (says how to build when the compiled half is missing)
from pgolf import _C

RAW, COLUMNS, PREDICTED = 0, 1, 2
MOST_COLS, PREDICT_COLS, PREDICT_RATIO = 1 << 20, 2048, 8
"""Matrices wider than the first are stored raw; `PREDICTED` needs at most the second number of columns, and
is tried from the third number of rows a column on."""
WORD = (1 << 64) - 1


def encode_codes(codes: NDArray[np.int8]) -> bytes:
    """Return the entropy-coded stream of a matrix; the same bytes on every machine.

    Releases the interpreter lock, so that threads encode matrices side by side. About 0.08 us a code.

    Args:
        codes: `(rows, cols)` int8, any strides.
    Returns:
        At most rows * cols + 1 bytes; `decode_codes` wants the shape again.
    Raises:
        TypeError: not int8. ValueError: not two-dimensional, more than 2^31 codes.
    Source: csrc/kernels/range_coder.h.
    """
    _check_codes(codes)
    return _C.encode_codes(np.ascontiguousarray(codes).tobytes(), *codes.shape)


def decode_codes(data: bytes | memoryview, shape: tuple[int, int]) -> NDArray[np.int8]:
    """Return the codes of a stream of `encode_codes`.

    Args:
        data: the whole stream and nothing else.
        shape: (rows, cols) of the encoded matrix.
    Returns:
        `shape` int8, writable.
    Raises:
        ValueError: a stream that `encode_codes` cannot have written for this shape. A damaged stream may be
            one of other codes, because nothing in it is redundant: keep a checksum.
    Source: csrc/kernels/range_coder.h.
    """
    codes: NDArray[np.int8] = np.frombuffer(_C.decode_codes(data, *shape), np.int8).reshape(shape)
    return codes


def encode_codes_ref(codes: NDArray[np.int8]) -> bytes:
    """Compute what `encode_codes` computes, one code at a time in Python integers (50 us a code)."""
    _check_codes(codes)
    rows, cols = codes.shape
    streams = [bytes([RAW]) + codes.tobytes()]
    largest = int(np.abs(codes.astype(int)).max(initial=0))
    modes = [COLUMNS] if codes.size and cols <= MOST_COLS else []
    if largest and cols <= PREDICT_COLS and rows >= PREDICT_RATIO * cols:
        modes += [PREDICTED]
    for mode in modes:
        encoder = _Encoder(bytearray([mode, largest]))
        if largest:
            _code_matrix(encoder, codes.astype(int), mode=mode, largest=largest)
            encoder.finish()
        streams.append(bytes(encoder.out))
    return min(streams, key=len)


def decode_codes_ref(data: bytes | memoryview, shape: tuple[int, int]) -> NDArray[np.int8]:
    """Compute what `decode_codes` computes, one code at a time in Python integers (50 us a code)."""
    rows, cols = shape
    mode, largest = (*data[:2], -1, -1)[:2]
    if mode == RAW and len(data) == rows * cols + 1:
        raw: NDArray[np.int8] = np.frombuffer(data, np.int8)[1:].reshape(shape).copy()
        return raw
    possible = mode == COLUMNS or (mode == PREDICTED and largest > 0 and cols <= PREDICT_COLS)
    if not possible or cols > MOST_COLS or not 0 <= largest <= 128 or (largest == 0 and len(data) != 2):
        raise ValueError(f"decode_codes: no stream of a {rows} x {cols} matrix begins like this")
    codes = np.zeros(shape, int)
    if largest:
        decoder = _Decoder(bytes(data[2:]))
        _code_matrix(decoder, codes, mode=mode, largest=largest)
        if not decoder.finished():
            raise ValueError(f"decode_codes: the stream does not end with the last of {rows} x {cols} codes")
    return codes.astype(np.int8)


def _check_codes(codes: NDArray[np.int8]) -> None:
    if codes.dtype != np.int8:
        raise TypeError(f"encode_codes: codes must be int8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"encode_codes: codes must be (rows, cols), got shape {codes.shape}")


def _tail_table() -> list[int]:
    """Return the mass of a Gaussian above i / 32, i in [0, 256]: trapezoids over two recurrences."""
    density, value, ratio = [], 1 << 31, 2146435328
    for _ in range(258):
        density.append(value)
        value, ratio = value * ratio >> 31, ratio * 2145387520 >> 31
    pieces = [(a + b) // 2 + 1 for a, b in pairwise(density)]
    return list(accumulate(reversed(pieces)))[::-1]


TAIL = _tail_table()


def _tail(distance: int, inverse: int) -> int:
    """Return the mass above `distance` (1/256) over a deviation, given as 2^21 / deviation."""
    z = distance * inverse >> 8
    i = z >> 16
    return TAIL[256] if i >= 256 else TAIL[i] - ((TAIL[i] - TAIL[i + 1]) * (z & 65535) >> 16)


def _inverse_deviation(variance: int) -> int:
    """Return 2^21 / deviation at the middle of the variance's 32nd of an octave."""
    octave = variance.bit_length() - 1
    mantissa = variance >> (octave - 5) if octave >= 5 else variance << (5 - octave)
    return isqrt((1 << 56) // ((65 + 2 * (mantissa & 31)) << octave))


def _clamped(variance: int) -> int:
    return min(max(variance, 16), (1 << 25) - 1)


class _Coder(Protocol):
    """Encodes the bit that it is given, or ignores it and returns the one it decodes."""

    def bit(self, p: int, bit: bool) -> bool:
        """Return the bit that has probability p / 65536 of being true."""


@dataclass
class _Interval:
    """What can still follow: the numbers low..high of 64 bits."""

    low: int = 0
    high: int = WORD

    def middle(self, p: int) -> int:
        return self.low + ((self.high - self.low) * p >> 16)

    def narrow(self, middle: int, *, bit: bool) -> int:
        """Keep the half of `bit` and return how many top bytes are settled; they are gone afterwards."""
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        settled = 0
        while (self.low ^ self.high) >> 56 == 0:
            self.low, self.high = self.low << 8 & WORD, (self.high << 8 | 255) & WORD
            settled += 1
        return settled

    def ending(self) -> bytes:
        """Return the fewest bytes that, followed by zeros, lie inside."""
        for count in range(9):
            unit = 1 << (64 - 8 * count)
            value = -(-self.low // unit) * unit
            if value <= self.high:
                return value.to_bytes(8, "big")[:count]
        raise AssertionError("eight bytes spell every number of 64 bits")


class _Encoder(_Interval):
    def __init__(self, out: bytearray) -> None:
        super().__init__()
        self.out = out

    def bit(self, p: int, bit: bool) -> bool:
        middle = self.middle(p)
        top = (middle if bit else self.high).to_bytes(8, "big")
        self.out += top[: self.narrow(middle, bit=bit)]
        return bit

    def finish(self) -> None:
        self.out += self.ending()


class _Decoder(_Interval):
    def __init__(self, data: bytes) -> None:
        super().__init__()
        self.data, self.left = data, 0

    def window(self) -> int:
        return int.from_bytes(self.data[self.left : self.left + 8].ljust(8, b"\0"), "big")

    def bit(self, p: int, bit: bool) -> bool:
        middle = self.middle(p)
        bit = self.window() <= middle
        self.left += self.narrow(middle, bit=bit)
        return bit

    def finished(self) -> bool:
        """Return whether the encoder would have ended here, with these bytes."""
        return self.data[self.left :] == self.ending() and self.left <= len(self.data)


class _Correction:
    """Learns what predicted probabilities are worth: 33 running means for each kind of bit."""

    def __init__(self) -> None:
        self.means = [[min(max(i << 11, 1), 65535) << 6 for i in range(33)] for _ in range(33)]
        self.counts = [[30] * 33 for _ in range(33)]

    def code(self, coder: _Coder, predicted: int, kind: int, bit: bool) -> bool:
        p = min(max(predicted, 1), 65535)
        i, above = p >> 11, p & 2047
        means, counts = self.means[kind], self.counts[kind]
        learned = ((means[i] >> 6) * (2048 - above) + (means[i + 1] >> 6) * above) >> 11
        bit = coder.bit(min(max((p + learned) >> 1, 16), 65520), bit)
        for k in (i, i + 1):
            means[k] += ((4194303 if bit else 0) - means[k]) * (131072 // (2 * counts[k] + 3)) >> 16
            counts[k] = min(counts[k] + 1, 1000)
        return bit


class _Predictor:
    """The mean of a code, in 1/256, from the codes to its left; all zero where `active` is false."""

    def __init__(self, cols: int, *, active: bool) -> None:
        self.cols, self.active, self.energy, self.gain = cols, active, 0, 0
        self.weights = np.zeros((cols, cols + 1) if active else (0, 0), np.uint32)
        self.inputs = np.zeros(cols + 1, np.uint32)
        self.inputs[0] = 16

    def start_row(self, row: int) -> None:
        self.gain = 40265318 // max(16, (self.energy + 7 * self.cols) // (row + 1))

    def mean(self, col: int, low: int, high: int) -> int:
        if not self.active:
            return 0
        total = int(np.dot(self.weights[col, : col + 1], self.inputs[: col + 1]))
        signed = (total ^ 1 << 31) - (1 << 31)
        return min(max(signed >> 12, low * 256), high * 256)

    def learn(self, col: int, code: int, residual: int) -> None:
        if self.active:
            step = np.uint32((residual * self.gain >> 16) & 0xFFFFFFFF)
            self.weights[col, : col + 1] += step * self.inputs[: col + 1]
            self.inputs[col + 1] = code & 0xFFFFFFFF
            self.energy += code * code


@dataclass
class _Variances:
    """The variance of each column's residuals, and of the row so far relative to its columns; in 1/256."""

    sums: list[int]
    row: int = 0
    prior: int = 0
    ratios: int = 0
    count: int = 1
    total: int = 0

    def start_row(self, row: int) -> None:
        self.row, self.ratios, self.count = row, 64 * 256, 64
        self.prior = (self.total + 7 * 256 * 64) // (row * len(self.sums) + 64) * 24

    def column(self, col: int) -> int:
        return _clamped((self.sums[col] + self.prior) * ((1 << 32) // (self.row + 24)) >> 32)

    def scaled(self, variance: int) -> int:
        return _clamped(variance * (self.ratios // self.count) >> 8)

    def learn(self, col: int, residual: int, variance: int) -> None:
        square = residual * residual >> 8
        self.sums[col] += square
        self.total += square
        self.ratios += min((square << 8) // variance, 4096)
        self.count += 1


def _code_matrix(coder: _Coder, codes: NDArray[np.int_], *, mode: int, largest: int) -> None:
    """Encode `codes`, or fill it in from a decoder."""
    rows, cols = codes.shape
    low, high, predicted = -largest, min(largest, 127), mode == PREDICTED
    correction, variances = _Correction(), _Variances([0] * cols)
    predictor = _Predictor(cols, active=predicted)
    for row in range(rows):
        variances.start_row(row)
        predictor.start_row(row)
        for col in range(cols):
            column = variances.column(col)
            mean = predictor.mean(col, low, high)
            inverse = _inverse_deviation(variances.scaled(column) if predicted else column)
            value = _Value(mean, inverse, low, high, predicted)
            code = value.code(coder, correction, int(codes[row, col]))
            codes[row, col] = code
            variances.learn(col, code * 256 - mean, column)
            predictor.learn(col, code, code * 256 - mean)


@dataclass
class _Value:
    """One code as a series of bits: at the center? above it? then, outwards, one step further?"""

    mean: int
    inverse: int
    low: int
    high: int
    signs_differ: bool

    def code(self, coder: _Coder, correction: _Correction, code: int) -> int:
        center = (self.mean + 128) >> 8
        offset = self.mean - center * 256
        above, below = _tail(128 - offset, self.inverse), _tail(128 + offset, self.inverse)
        if correction.code(coder, 65536 - ((above + below) << 15) // TAIL[0], 0, code == center):
            return center
        up = center < self.high
        if up and center > self.low:
            p = (above << 16) // (above + below)
            wanted = code > center
            up = correction.code(coder, p, 1, wanted) if self.signs_differ else coder.bit(32768, wanted)
        sign = 1 if up else -1
        most = self.high - center if up else center - self.low
        rest = above if up else below
        for size in range(1, most):
            beyond = _tail(size * 256 + 128 - sign * offset, self.inverse)
            p = 65536 - (beyond << 16) // rest
            if correction.code(coder, p, 2 + min(size, 30), (code - center) * sign == size):
                return center + sign * size
            rest = beyond
        return center + sign * most
