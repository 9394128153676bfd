"""SentencePiece tokenizers: training of a lossless one, and encoding that counts bytes exactly.

A tokenizer is lossless if decoding gives back every text. That is tried whenever one is loaded: its
normalizer must not change anything, it must have all 256 byte pieces and a piece for the space, and difficult
texts (`_PROBES`) must come back. SentencePiece itself would lose two characters: it writes a space as U+2581,
so U+2581 would come back as a space, and NUL ends a C string. For a lossless tokenizer, both are replaced by
two private-use characters before encoding and restored after decoding (`escape`, `unescape`). The escape
character is escaped too, so the map is reversible.

A tokenizer whose ids 4 to 7 are the operators of CaseOps takes text in that form
(pgolf/data/caseops.py). It is recognised by its model: `encode` writes the operators, `decode` reads them.
CaseOps changes ASCII letters and U+E001 to U+E004 only, and the escape none of these, so their order does not
matter. An operator counts 0 bytes, and a letter 1 byte in both forms, so counts stay exact.

The byte table follows the rule of the parameter-golf challenge. The training settings are those of the
challenge's tokenizers, which, however, normalize the text (nmt_nfkc) and lose newlines.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from pgolf.data import caseops
from pgolf.data.shards import MAKE_SHARDS, TOKENIZER_NAME, Tokens, require_finished
from pgolf.errors import UserError
from pgolf.files import atomic_file

Counts = NDArray[np.int64]

SPACE = "\u2581"
ESCAPE = "\uf8f0"
_CODES = {SPACE: ESCAPE + "\uf8f1", "\0": ESCAPE + "\uf8f2", ESCAPE: ESCAPE + "\uf8f3"}
_ORIGINALS = {code: original for original, code in _CODES.items()}
_TO_ESCAPE = re.compile(f"[{SPACE}\0{ESCAPE}]")
_TO_UNESCAPE = re.compile(f"{ESCAPE}[\uf8f1-\uf8f3]")
_ESCAPED_BYTES = re.compile(ESCAPE.encode() + b"\xef\xa3[\xb1-\xb3]")
# An operator, or the ESC before an operator character of the text itself; only the first three bytes of a
# match are added by CaseOps.
_OPERATOR_BYTES = re.compile(b"\xee\x80(?:\x84\xee\x80[\x81-\x84]|[\x81-\x83])")
# Probes: every 63rd character, which covers all bytes of UTF-8 in every position (_WIDE); the ends of the
# ranges of UTF-8 (_EDGES); each ASCII character twice (_ASCII); what SentencePiece uses itself (_NAMES).
_WIDE = "".join(chr(c) for c in range(0, 0x110000, 63) if not 0xD800 <= c < 0xE000)
_EDGES = "\x7f\x80\u07ff\u0800\ud7ff\ue000\ufeff\ufffd\uffff\U00010000\U0010ffff"
_ASCII = "".join(chr(c) * 2 for c in range(128))
_NAMES = "<s></s><unk><pad><0x0A><0xFF>\u2047\u2585 \u2047 "
_PROBES = (
    "",
    " ",
    "   ",
    "\n",
    "\n \n",
    "\0",
    SPACE,
    SPACE + " " + SPACE,
    ESCAPE,
    ESCAPE * 2 + "\uf8f1\uf8f2\uf8f3" + ESCAPE + "\uf8f2",
    "  a\n\n \t\uff21e\u0301\u00a0 ",
    _ASCII,
    _EDGES,
    _NAMES,
    _WIDE,
    " The NASA iPhone X aB ABc" + "".join(caseops.CASE_OPERATORS) + " \u00c9Ab" + caseops.TITLE,
)
# SentencePiece skips training sentences above a limit, so lines are cut well below it.
_LINE_CHARS = 4000


def escape(text: str) -> str:
    """Replace the characters that SentencePiece would lose (U+2581 and NUL) and the escape character."""
    return _TO_ESCAPE.sub(lambda m: _CODES[m.group()], text)


def unescape(text: str) -> str:
    """Reverse `escape`: `unescape(escape(s)) == s` for every string."""
    return _TO_UNESCAPE.sub(lambda m: _ORIGINALS[m.group()], text)


class ByteTable(NamedTuple):
    """The challenge's byte accounting, one entry per id.

    Bytes of target y after token x: base_bytes[y] + (has_leading_space[y] and not is_boundary[x]).
    """

    base_bytes: NDArray[np.int16]
    has_leading_space: NDArray[np.bool_]
    is_boundary: NDArray[np.bool_]

    def target_bytes(self, previous: Tokens, target: Tokens) -> Counts:
        """Return the bytes `(n,)` of each `target` `(n,)` given the token before it, `previous` `(n,)`."""
        space = self.has_leading_space[target] & ~self.is_boundary[previous]
        return self.base_bytes[target].astype(np.int64) + space


class Tokenizer:
    """A SentencePiece model with exact byte accounting.

    Attributes:
        path: the `.model` file.
        vocab_size: number of ids.
        bos_id: the id before every document.
        lossless: whether `decode(encode(text)[0]) == text` for every Unicode text, with byte counts that sum
            to its size. True only if the settings promise it and `_PROBES` and all pieces came back.
        lossy_because: a sentence that says what is lost; empty if lossless.
        caseops: whether the model has the operators of CaseOps, so that its text has them too.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a SentencePiece model, or the model has no BOS id or too many ids.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"no tokenizer at {path}; train one with: pgolf data tokenizer --inputs TEXT --out {path}"
            )
        self._sp = sentencepiece.SentencePieceProcessor()
        try:
            proto = path.read_bytes()
            self._sp.LoadFromSerializedProto(proto)
            self.vocab_size: int = self._sp.vocab_size()
        except (RuntimeError, OSError) as e:
            raise UserError(f"{path}: not a SentencePiece model; name the .model file of a tokenizer") from e
        self.path = path
        self.bos_id: int = self._sp.bos_id()
        if self.bos_id < 0:
            raise UserError(f"{path}: the tokenizer has no BOS id, which must stand before every document")
        if self.vocab_size > 65536:
            raise UserError(
                f"{path}: the tokenizer has {self.vocab_size} ids, but shards hold uint16, so at most 65536; "
                "use a smaller one"
            )
        self.caseops = list(map(self._sp.piece_to_id, caseops.CASE_OPERATORS)) == caseops.IDS
        self._piece_bytes = self._piece_lengths()
        self.lossless = True  # `_loss` tries it as a lossless one
        self.lossy_because: str = _changes(proto) or self._loss()
        self.lossless = not self.lossy_because

    def encode(self, text: str) -> tuple[Tokens, Counts]:
        """Return the ids of a text, without BOS, and how many bytes of the text each id stands for.

        Returns:
            ids `(n,)` uint16 and byte counts `(n,)` int64. The counts sum to `len(text.encode())`, except if
            a normalizing tokenizer removes the whole text.
        """
        return self.encode_batch([text], threads=1)[0]

    def encode_batch(self, texts: Sequence[str], *, threads: int = 0) -> list[tuple[Tokens, Counts]]:
        """Encode many texts as `encode` does, on `threads` threads (0 = one per core)."""
        if not self.lossless:
            return [self._encode_by_surface(text) for text in texts]
        result = []
        for text, ids in zip(texts, self.encode_ids(texts, threads=threads), strict=True):
            counts = self._piece_bytes[ids]
            if self.caseops or _TO_ESCAPE.search(text):
                ends = np.cumsum(counts)
                counts = self._original_bytes(text, ends - counts, ends)
            result.append((ids, counts))
        return result

    def encode_ids(self, texts: Sequence[str], *, threads: int = 0) -> list[Tokens]:
        """Return only the ids of each text, which is faster; used for training shards."""
        encoded = self._sp.encode(
            list(map(self._prepare, texts)), out_type=int, num_threads=threads or os.cpu_count() or 1
        )
        return [np.array(ids, dtype=np.uint16) for ids in encoded]

    def usual_bytes(self, ids: Tokens) -> Counts:
        """Return the bytes that each id `(n,)` stands for in text that needs no escape and is not changed."""
        lengths = self._piece_bytes.copy()
        if self.caseops:
            pieces = map(self._sp.id_to_piece, range(self.vocab_size))
            lengths -= [3 * sum(map(piece.count, caseops.CASE_OPERATORS)) for piece in pieces]
        return np.asarray(lengths[ids])

    def decode(self, ids: NDArray[Any] | Sequence[int]) -> str:
        """Return the text of ids; BOS and other control ids give no text, invalid UTF-8 gives U+FFFD.

        An operator of CaseOps that has nothing to apply to gives no text: a model may write it, and a cut may
        leave it.

        Raises:
            ValueError: an id is not below the vocabulary size.
        """
        values = [int(i) for i in ids]
        if values and not 0 <= min(values) <= max(values) < self.vocab_size:
            raise UserError(
                f"ids must lie in [0, {self.vocab_size}) of {self.path}, got {min(values)}..{max(values)}"
            )
        text: str = self._sp.decode(values)
        text = unescape(text) if self.lossless else text
        return caseops.decode_written(text) if self.caseops else text

    def byte_table(self) -> ByteTable:
        """Return the challenge's byte accounting for this tokenizer.

        Control, unknown and unused ids have 0 bytes and are boundaries. A byte piece has 1 byte. For any
        other piece, a leading U+2581 sets has_leading_space and is removed, and base_bytes is the UTF-8
        length of the rest.

        Raises:
            ValueError: U+2581 itself is not a piece, so spaces would be miscounted; or the tokenizer is one
                of CaseOps, for which the challenge counts with byte sidecars, not with a table.
        """
        sp = self._sp
        if self.caseops:
            raise UserError(
                f"{self.path}: a CaseOps tokenizer has no byte table; the validation shards need their byte "
                f"sidecars (*_val_bytes_*.bin): copy them too, or make the shards again: {MAKE_SHARDS}"
            )
        if sp.piece_to_id(SPACE) == sp.unk_id():
            raise UserError(
                f"{self.path}: the tokenizer has no piece U+2581, so the byte table would miscount spaces; "
                "use another tokenizer"
            )
        base = np.zeros(self.vocab_size, dtype=np.int16)
        leading = np.zeros(self.vocab_size, dtype=np.bool_)
        boundary = np.ones(self.vocab_size, dtype=np.bool_)
        for i in range(self.vocab_size):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            piece = sp.id_to_piece(i)
            leading[i] = not sp.is_byte(i) and piece.startswith(SPACE)
            base[i] = 1 if sp.is_byte(i) else len(piece.removeprefix(SPACE).encode())
        return ByteTable(base, leading, boundary)

    def _loss(self) -> str:
        """Return a sentence that says what this tokenizer loses; empty if nothing was found."""
        sp = self._sp
        found = {sp.id_to_piece(i) for i in range(self.vocab_size) if sp.is_byte(i)}
        missing = [name for name in (f"<0x{value:02X}>" for value in range(256)) if name not in found]
        if missing:
            return f"it has no piece for {len(missing)} of the 256 bytes ({missing[0]}, ...)"
        if sp.piece_to_id(SPACE) == sp.unk_id():
            return "it has no piece for the space, which would come back as U+2581"
        apart = (sp.is_control, sp.is_unknown, sp.is_byte)
        own = (sp.id_to_piece(i) for i in range(self.vocab_size) if not any(kind(i) for kind in apart))
        vocabulary = unescape("".join(own).replace(SPACE, " "))
        for text in (*_PROBES, vocabulary):
            ids, counts = self.encode(text)
            back, size = self.decode(ids), len(text.encode())
            if back != text:
                at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), len(back))
                return f"it does not give back {text[at : at + 10] or text[-10:]!a}"
            if int(counts.sum()) != size or int(counts.min(initial=0)) < 0:
                return f"it counts {int(counts.sum())} bytes for the {size} of {text[:10]!a}"
        return ""

    def _prepare(self, text: str) -> str:
        """Return the text that SentencePiece gets."""
        text = caseops.encode(text) if self.caseops else text
        return escape(text) if self.lossless else text

    def _original_bytes(self, text: str, begins: Counts, ends: Counts) -> Counts:
        """Return how many bytes of `text` each range of bytes of the prepared text stands for.

        An escape has six bytes. The first three of them (for NUL the first one) stand for the original
        character, the others count as 0. So do the operators of CaseOps.

        Args:
            text: the original text.
            begins, ends: `(n,)` offsets in the UTF-8 of the prepared text.
        """
        data = self._prepare(text).encode()
        weights = np.ones(len(data), dtype=np.int64)
        if self.lossless:
            for match in _ESCAPED_BYTES.finditer(data):
                original = _ORIGINALS[match.group().decode()].encode()
                weights[match.start() + len(original) : match.end()] = 0
        if self.caseops:
            for match in _OPERATOR_BYTES.finditer(data):
                weights[match.start() : match.start() + 3] = 0
        total = np.concatenate(([0], np.cumsum(weights)))
        return np.asarray(total[ends] - total[begins], dtype=np.int64)

    def _piece_lengths(self) -> Counts:
        """Return the bytes of prepared text per id, which are exact if the normalizer changes nothing."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        for i in range(self.vocab_size):
            if self._sp.is_byte(i):
                lengths[i] = 1
            elif not (self._sp.is_control(i) or self._sp.is_unknown(i)):
                lengths[i] = len(self._sp.id_to_piece(i).replace(SPACE, " ").encode())
        return lengths

    def _encode_by_surface(self, text: str) -> tuple[Tokens, Counts]:
        """Encode with a normalizing tokenizer; a piece counts the original text that the encoder maps to it.

        If a character is encoded as byte pieces, its original text is attached to the last of them; if there
        are as many bytes as pieces, each piece counts one. Text that the normalizer removes at the ends
        counts for the last token.
        """
        pieces = list(_pieces(self._sp.encode(self._prepare(text), out_type="serialized_proto")))
        spans = np.array(pieces, dtype=np.int64).reshape(-1, 3)
        ids = spans[:, 0].astype(np.uint16)
        counts = self._original_bytes(text, spans[:, 1], spans[:, 2])
        run = 0
        for index, surface in enumerate(counts.tolist()):
            run = run + 1 if self._sp.is_byte(int(ids[index])) else 0
            if run and surface:
                if surface == run:
                    counts[index + 1 - run : index + 1] = 1
                run = 0
        if counts.size:
            counts[-1] += len(text.encode()) - int(counts.sum())
        return ids, counts


def find_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer in a folder of shards: `tokenizer.model`, or its only `.model` file.

    Raises:
        FileNotFoundError: there is no such folder, it has no tokenizer, or it has several and none of them is
            called `tokenizer.model`.
        ValueError: the folder holds an unfinished build.
    """
    require_finished(folder)
    named = folder / TOKENIZER_NAME
    models = [named] if named.is_file() else sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise FileNotFoundError(
            f"expected {TOKENIZER_NAME} in {folder}, found {[m.name for m in models] or 'no .model file'}; "
            f"copy the tokenizer there or make the folder with: {MAKE_SHARDS}"
        )
    return Tokenizer(models[0])


def train_tokenizer(
    texts: Iterable[str],
    path: Path,
    *,
    vocab_size: int,
    threads: int = 0,
    with_caseops: bool = False,
    marker_pairs: bool = False,
) -> Tokenizer:
    """Train a lossless BPE tokenizer (pad 0, bos 1, eos 2, unk 3), write it to `path` and return it.

    The settings are those of the challenge (byte fallback, split digits, coverage 0.999, no dummy prefix),
    except that the normalizer is the identity and the newline is a piece.

    Args:
        texts: documents, which are read once.
        path: the `.model` file, which is written atomically.
        vocab_size: number of ids, in [300, 65536].
        threads: threads of the trainer; 0 = one per core.
        with_caseops: train on text in the form of CaseOps, with its operators at ids 4 to 7.
        marker_pairs: add a piece for a space and TITLE, ALLCAPS or CAPNEXT (ids 8 to 10), as PR #2109 does.

    Raises:
        ValueError: vocab_size is out of range, there is too little text for it, or marker_pairs was asked for
            without with_caseops.
    """
    if marker_pairs and not with_caseops:
        raise UserError("marker pairs are pieces with an operator of CaseOps; switch CaseOps on too")
    pairs = [SPACE + operator for operator in caseops.CASE_OPERATORS[:3]] if marker_pairs else []
    if not 300 <= vocab_size <= 65536:
        raise UserError(f"vocab_size must be in [300, 65536] (shards hold uint16), got {vocab_size}")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(map(caseops.encode, texts) if with_caseops else texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.999,
            required_chars=SPACE,  # the tokenizer needs a piece for the space even if no text has one
            user_defined_symbols=[*(caseops.CASE_OPERATORS if with_caseops else ()), *pairs, "\n"],
            hard_vocab_limit=False,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            max_sentence_length=4 * _LINE_CHARS,
            num_threads=threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as e:
        why = "there is no text" if "sentences_.empty()" in str(e) else str(e)
        raise UserError(f"cannot train {vocab_size} pieces: {why}; give more text or lower vocab_size") from e
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if pieces != vocab_size:
        raise UserError(
            f"the text gives only {pieces} of {vocab_size} pieces; give more text or lower vocab_size"
        )
    with atomic_file(path) as handle:
        handle.write(model.getvalue())
    return Tokenizer(path)


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in escape(text).split("\n"):
            yield from (line[i : i + _LINE_CHARS] for i in range(0, len(line), _LINE_CHARS))


def _changes(proto: bytes) -> str:
    """Return a sentence that says what the settings of a serialized model change in text; empty if nothing.

    Field numbers in sentencepiece_model.proto: ModelProto.normalizer_spec = 3, denormalizer_spec = 5;
    NormalizerSpec.precompiled_charsmap = 2, add_dummy_prefix = 3, remove_extra_whitespaces = 4,
    escape_whitespaces = 5. The last three are true if they are not set.
    """
    parts = dict(_fields(proto))
    normalizer, denormalizer = (
        dict(_fields(part)) if isinstance(part := parts.get(field, b""), bytes) else {} for field in (3, 5)
    )
    if normalizer.get(2) or denormalizer.get(2):
        return "its normalizer replaces characters"
    if normalizer.get(3, 1):
        return "it puts a space before the text (add_dummy_prefix)"
    if normalizer.get(4, 1):
        return "it removes spaces (remove_extra_whitespaces)"
    return "" if normalizer.get(5, 1) else "it does not tell a space from U+2581 (escape_whitespaces)"


def _pieces(proto: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (id, begin, end) of each piece of a serialized SentencePieceText, in bytes of its text.

    The message is parsed here, because sentencepiece 0.2.3 returns parsed messages only if protobuf is
    installed. Field numbers in sentencepiece.proto: SentencePieceText.pieces = 2; SentencePiece.id = 2,
    begin = 4, end = 5.
    """
    for field, value in _fields(proto):
        if field == 2 and isinstance(value, bytes):
            piece = dict(_fields(value))
            yield int(piece.get(2, 0)), int(piece.get(4, 0)), int(piece.get(5, 0))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message, varints as int, strings and messages as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        value, kind = 0, tag & 7
        if kind in (1, 5):
            at += 8 if kind == 1 else 4
            continue
        value, at = _varint(message, at)
        if kind == 2:
            yield tag >> 3, message[at : at + value]
            at += value
        else:
            yield tag >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
