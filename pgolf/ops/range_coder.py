"""Entropy coding of a matrix of int8 codes: arithmetic coding with a Gaussian model of each code.

The format is specified in csrc/kernels/range_coder.h. This module is the Python interface of the compiled
coder, and has a second, slow implementation, `encode_codes_ref` and `decode_codes_ref`; each implementation
reads what the other one writes. Both run on the host and take NumPy arrays.

The Gaussian follows what trained weights have in common. In a quantized matrix all rows have about the same
spread of codes, but columns have not, so the variance is learned per column. Some rows resemble each other
(rows of an embedding, queries and their keys, the weights into and out of a head or a hidden unit), so the
mean may depend on one earlier row and, in tall matrices, on the codes to the left.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isqrt
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

import pgolf.ops._extension  # noqa: F401  (explains how to build the extension if it is missing)
from pgolf import _C

RAW, COLUMNS, ROWS, PREDICTED = 0, 1, 2, 3
MOST_COLS, ROWS_COLS, PREDICT_RATIO = 1 << 20, 2048, 8
"""Matrices with more than `MOST_COLS` columns are stored raw. The modes `ROWS` and `PREDICTED` need at most
`ROWS_COLS` columns; `PREDICTED` replaces `ROWS` if there are at least `PREDICT_RATIO` rows per column."""
WORD = (1 << 64) - 1
Codes = NDArray[np.int8]


def encode_codes(codes: Codes, *, pool: Codes | None = None, fast: bool = False) -> bytes:
    """Return the entropy-coded stream of a matrix, the same bytes on every machine.

    Encoding takes about 0.2 us per code, half of it for comparing all pairs of rows; with `fast` 0.06 us. The
    interpreter lock is released, so threads can encode several matrices in parallel.

    Args:
        codes: `(rows, cols)` int8, any strides.
        pool: `(n, cols)` int8, further rows that the codes may resemble; the decoder needs the same pool.
        fast: do not search for similar rows; the stream of trained weights is then about 1 % longer.

    Returns:
        The stream, at most rows * cols + 1 bytes. It contains neither the shape nor the pool, which
        `decode_codes` takes as arguments.

    Raises:
        TypeError: codes are not int8.
        ValueError: codes are not two-dimensional or more than 2^31, or the pool has another width.

    Source: csrc/kernels/range_coder.h.
    """
    _check_codes(codes, pool)
    rows, cols = codes.shape
    return _C.encode_codes(np.ascontiguousarray(codes).tobytes(), rows, cols, _buffer(pool), fast)


def decode_codes(data: bytes | memoryview, shape: tuple[int, int], *, pool: Codes | None = None) -> Codes:
    """Return the codes that `encode_codes` encoded.

    The format has no checksum: a damaged stream may decode to other codes without an error.

    Args:
        data: the whole stream and nothing else.
        shape: (rows, cols) of the encoded matrix.
        pool: the pool that the encoder was given.

    Returns:
        An int8 array of `shape`, writable.

    Raises:
        ValueError: `encode_codes` cannot have written this stream for this shape.

    Source: csrc/kernels/range_coder.h.
    """
    codes: Codes = np.frombuffer(_C.decode_codes(data, *shape, _buffer(pool)), np.int8).reshape(shape)
    return codes


def encode_codes_ref(codes: Codes, *, pool: Codes | None = None, fast: bool = False) -> bytes:
    """Compute `encode_codes` one code at a time in Python integers (60 us per code)."""
    _check_codes(codes, pool)
    rows, cols = codes.shape
    streams = [bytes([RAW]) + codes.tobytes()]
    largest = int(np.abs(codes.astype(int)).max(initial=0))
    modes = [COLUMNS] if codes.size and cols <= MOST_COLS else []
    if largest and not fast and cols <= ROWS_COLS:
        modes += [PREDICTED if rows >= PREDICT_RATIO * cols else ROWS]
    for mode in modes:
        encoder = _Encoder(bytearray([mode, largest]))
        if largest:
            matrix = _Matrix(codes.astype(int), _pool(pool, cols), mode, largest)
            matrix.encode(encoder)
            encoder.finish()
        streams.append(bytes(encoder.out))
    return min(streams, key=len)


def decode_codes_ref(data: bytes | memoryview, shape: tuple[int, int], *, pool: Codes | None = None) -> Codes:
    """Compute `decode_codes` one code at a time in Python integers.

    Raises:
        ValueError: `encode_codes` cannot have written this stream for this shape.
    """
    rows, cols = shape
    mode, largest = (data[0] if len(data) else -1), (data[1] if len(data) > 1 else -1)
    if mode == RAW and len(data) == rows * cols + 1:
        raw: Codes = np.frombuffer(data, np.int8, offset=1).reshape(shape).copy()
        return raw
    possible = mode == COLUMNS or (mode in (ROWS, PREDICTED) and largest > 0 and cols <= ROWS_COLS)
    if not possible or cols > MOST_COLS or not 0 <= largest <= 128 or (largest == 0 and len(data) != 2):
        raise ValueError(f"decode_codes: no stream of a {rows} x {cols} matrix begins with these two bytes")
    codes = np.zeros(shape, int)
    if largest:
        decoder = _Decoder(bytes(data[2:]))
        _Matrix(codes, _pool(pool, cols), mode, largest).decode(decoder)
        if not decoder.finished():
            raise ValueError(f"decode_codes: the stream does not end with the last of {rows} x {cols} codes")
    result: Codes = codes.astype(np.int8)
    return result


def _buffer(pool: Codes | None) -> bytes:
    return b"" if pool is None else np.ascontiguousarray(pool).tobytes()


def _pool(pool: Codes | None, cols: int) -> NDArray[np.int_]:
    rows: NDArray[np.int_] = np.zeros((0, cols), int) if pool is None else pool.astype(int)
    return rows


def _check_codes(codes: Codes, pool: Codes | None) -> None:
    if codes.dtype != np.int8:
        raise TypeError(f"encode_codes: codes must be int8, got {codes.dtype}")
    if codes.ndim != 2:
        raise ValueError(f"encode_codes: codes must be (rows, cols), got shape {codes.shape}")
    if pool is not None and (pool.dtype != np.int8 or pool.ndim != 2 or pool.shape[1] != codes.shape[1]):
        raise ValueError(
            f"encode_codes: the pool must be int8 of {codes.shape[1]} columns, got {pool.dtype} {pool.shape}"
        )


def _tail_table() -> list[int]:
    """Return the mass of a Gaussian above i / 32 for i in [0, 256], by the trapezoidal rule in integers."""
    density, value, ratio = [], 1 << 31, 2146435328
    for _ in range(258):
        density.append(value)
        value, ratio = value * ratio >> 31, ratio * 2145387520 >> 31
    pieces = [(a + b) // 2 + 1 for a, b in pairwise(density)]
    return list(accumulate(reversed(pieces)))[::-1]


TAIL = _tail_table()


def _tail(distance: int, inverse: int) -> int:
    """Return the Gaussian mass above `distance`, in 1/256 of a code; `inverse` is 2^21 / deviation."""
    z = distance * inverse >> 8
    i = z >> 16
    return TAIL[256] if i >= 256 else TAIL[i] - ((TAIL[i] - TAIL[i + 1]) * (z & 65535) >> 16)


def _inverse_deviation(variance: int) -> int:
    """Return 2^21 / deviation, with the variance rounded to the middle of 1/32 of its octave."""
    octave = variance.bit_length() - 1
    mantissa = variance >> (octave - 5) if octave >= 5 else variance << (5 - octave)
    return isqrt((1 << 56) // ((65 + 2 * (mantissa & 31)) << octave))


def _clamped(variance: int) -> int:
    return min(max(variance, 16), (1 << 25) - 1)


class _Coder(Protocol):
    """Either an encoder, which writes the bit it is given, or a decoder, which ignores it and reads one."""

    def bit(self, p: int, bit: bool) -> bool:
        """Code one bit whose probability of being true is p / 65536, and return it."""


@dataclass
class _Interval:
    """The interval of an arithmetic coder: the 64-bit numbers from low to high."""

    low: int = 0
    high: int = WORD

    def middle(self, p: int) -> int:
        return self.low + ((self.high - self.low) * p >> 16)

    def narrow(self, middle: int, *, bit: bool) -> int:
        """Keep the part of `bit`, remove the leading bytes that are now certain, and return their number."""
        self.low, self.high = (self.low, middle) if bit else (middle + 1, self.high)
        settled = 0
        while (self.low ^ self.high) >> 56 == 0:
            self.low, self.high = self.low << 8 & WORD, (self.high << 8 | 255) & WORD
            settled += 1
        return settled

    def ending(self) -> bytes:
        """Return the shortest byte string that, followed by zeros, lies inside the interval."""
        for count in range(9):
            unit = 1 << (64 - 8 * count)
            value = -(-self.low // unit) * unit
            if value <= self.high:
                return value.to_bytes(8, "big")[:count]
        raise AssertionError("eight bytes can represent every number of 64 bits")


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
        """Return whether the stream ends here, with the bytes that an encoder would have written."""
        return self.data[self.left :] == self.ending() and self.left <= len(self.data)


class _Correction:
    """Adaptive correction of predicted probabilities: 33 running means for each of 33 kinds of bit."""

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
    """Predicts the mean of a code, in 1/256, from the codes to its left; 0 if `active` is false."""

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
    """The variance of each column's residuals, and of the row so far relative to its columns, in 1/256."""

    sums: list[int]
    prior: int = 0
    reciprocal: int = 0
    total: int = 0
    found: int = 0
    promised: int = 1
    ratio: int = 256

    def start_row(self, row: int) -> None:
        mean = (self.total + 7 * 256 * 64) // (row * len(self.sums) + 64)
        self.prior, self.reciprocal = mean * 24, (1 << 32) // (row + 24)
        self.found = self.promised = _clamped(mean) * 64
        self.ratio = 256

    def column(self, col: int) -> int:
        return _clamped((self.sums[col] + self.prior) * self.reciprocal >> 32)

    def scaled(self, variance: int) -> int:
        return _clamped(variance * self.ratio >> 8)

    def learn(self, col: int, residual: int, variance: int) -> None:
        square = residual * residual >> 8
        self.sums[col] += square
        self.total += square
        self.found += min(square, variance * 16)
        self.promised += variance

    def refresh(self) -> None:
        self.ratio = min((self.found << 8) // self.promised, 4096)


class _Lean:
    """The earlier row that the current row leans on (adds a multiple of to its mean), and the multiple."""

    def __init__(self) -> None:
        self.row: list[int] | None = None
        self.prior = self.factor = self.products = 0
        self.squares = 1

    def start_row(self, row: list[int] | None) -> None:
        self.row, self.factor, self.squares = row, 0, 1
        if row is not None:
            self.factor = self.prior
            self.squares = sum(v * v for v in row) * 64 // len(row) + 1
        self.products = self.squares * self.factor >> 12

    def mean(self, col: int) -> int:
        return 0 if self.row is None else self.factor * self.row[col] >> 8

    def learn(self, col: int, left: int) -> None:
        if self.row is not None:
            self.products += self.row[col] * left
            self.squares += self.row[col] ** 2

    def refresh(self) -> None:
        size = min((abs(self.products) << 12) // self.squares, 8191)
        self.factor = -size if self.products < 0 else size

    def finish_row(self) -> None:
        if self.row is not None:
            self.prior += (self.factor - self.prior) >> 4


class _Choice:
    """Codes which earlier row the current one leans on: the row after the last choice, another, or none."""

    def __init__(self) -> None:
        self.last = -1
        self.follows, self.any = [32768], [32768]

    def following(self, count: int) -> int:
        return self.last + 1 if self.last + 1 < count else -1

    def code(self, coder: _Coder, count: int, wanted: int) -> int:
        following = self.following(count)
        if following >= 0:
            self.last = following
            if _habit(coder, self.follows, wanted == following):
                return following
        if count == 0 or not _habit(coder, self.any, wanted >= 0):
            return -1
        index = 0
        for place in reversed(range((count - 1).bit_length())):
            index = index * 2 + coder.bit(32768, bool(max(wanted, 0) >> place & 1))
        if index >= count:
            raise ValueError(f"decode_codes: a row leans on row {index}, of only {count} earlier rows")
        self.last = index
        return index


def _habit(coder: _Coder, p: list[int], wanted: bool) -> bool:
    bit = coder.bit(p[0], wanted)
    p[0] = min(max(p[0] + (((65536 if bit else 0) - p[0]) >> 4), 256), 65280)
    return bit


def _gain(products: NDArray[np.int_], earlier: int, later: int, cols: int) -> int:
    """Return 16 times the bits that leaning saves: about 0.72 cols r^2, r being the rows' correlation."""
    product, energy, other = (
        int(products[i]) for i in ((earlier, later), (earlier, earlier), (later, later))
    )
    return 0 if energy == 0 else product * product // energy * cols * 23 // (2 * other + 1)


class _Matrix:
    """The codes of a matrix, the rows of the pool, and everything that is learned during coding."""

    def __init__(self, codes: NDArray[np.int_], pool: NDArray[np.int_], mode: int, largest: int) -> None:
        self.codes, self.mode = codes, mode
        self.low, self.high, cols = -largest, min(largest, 127), codes.shape[1]
        self.correction, self.variances = _Correction(), _Variances([0] * cols)
        self.predictor = _Predictor(cols, active=mode == PREDICTED)
        self.rows: list[list[int]] = [[16 * int(q) for q in row] for row in pool]
        self.lean, self.choice = _Lean(), _Choice()

    def encode(self, coder: _Coder) -> None:
        own, cols = len(self.rows), self.codes.shape[1]
        bases = []
        if self.mode != COLUMNS:
            for row, codes in enumerate(self.codes.tolist()):
                bases.append(self.look_ahead(row, codes))
                self.rows.append([(q * 256 - b) >> 4 for q, b in zip(codes, bases[-1], strict=True)])
            whole = (np.array(self.rows, int).reshape(len(self.rows), cols) + 8) >> 4
            products = whole @ whole.T
        for row in range(len(self.codes)):
            if self.mode != COLUMNS:
                wanted = self.search(products, own + row)
                self.start_row(coder, own + row, wanted)
            self.code_row(coder, row, bases[row] if bases else None)

    def decode(self, coder: _Coder) -> None:
        for row in range(len(self.codes)):
            self.predictor.start_row(row)
            if self.mode != COLUMNS:
                self.start_row(coder, len(self.rows), -1)
            self.code_row(coder, row, None, learn=True)

    def look_ahead(self, row: int, codes: list[int]) -> list[int]:
        """Return the predicted means of a known row, each from the codes to its left."""
        self.predictor.start_row(row)
        bases = []
        for col, code in enumerate(codes):
            bases.append(self.predictor.mean(col, self.low, self.high))
            self.predictor.learn(col, code, code * 256 - bases[-1])
        return bases

    def search(self, products: NDArray[np.int_], index: int) -> int:
        """Return the row that row `index` should lean on, or -1 if none saves bits."""
        cols = self.codes.shape[1]
        gains = [_gain(products, i, index, cols) for i in range(index)]
        found = max(range(index), key=lambda i: (gains[i], -i), default=-1)
        price = 16 * (index.bit_length() + 5)
        following = self.choice.following(index)
        along = gains[following] - 8 if following >= 0 else -1
        if along > 0 and along >= gains[found] - price:
            return following
        return found if found >= 0 and gains[found] > price else -1

    def start_row(self, coder: _Coder, count: int, wanted: int) -> None:
        index = self.choice.code(coder, count, wanted)
        self.lean.start_row(self.rows[index] if index >= 0 else None)

    def code_row(self, coder: _Coder, row: int, bases: list[int] | None, *, learn: bool = False) -> None:
        rows = self.mode != COLUMNS
        self.variances.start_row(row)
        lefts = []
        for col in range(self.codes.shape[1]):
            base = bases[col] if bases is not None else self.predictor.mean(col, self.low, self.high)
            mean = min(max(base + self.lean.mean(col), self.low * 256), self.high * 256)
            column = self.variances.column(col)
            inverse = _inverse_deviation(self.variances.scaled(column) if rows else column)
            value = _Value(mean, inverse, self.low, self.high, rows)
            code = value.code(coder, self.correction, int(self.codes[row, col]))
            self.codes[row, col] = code
            if learn:
                self.predictor.learn(col, code, code * 256 - base)
            lefts.append((code * 256 - base) >> 4)
            self.variances.learn(col, code * 256 - mean, column)
            self.lean.learn(col, lefts[-1])
            if rows and col & 7 == 7:
                self.variances.refresh()
                self.lean.refresh()
        self.lean.finish_row()
        if learn:
            self.rows.append(lefts)


@dataclass
class _Value:
    """One code as a series of bits: is it the center? is it above? then, going outwards, is it the next?"""

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
