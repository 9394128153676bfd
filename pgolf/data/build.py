"""Documents to shards: encode on all cores, check that no document is in both splits, write, sum up.

Every document is one BOS and its tokens (no EOS), and shards end between documents. The reader only finds the
documents; parsing, hashing and encoding run in worker processes; this process collects the results in order
and writes. Validation goes first, as its document hashes must be known before the training text is read.
"""

from __future__ import annotations

import functools
import hashlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.data.corpus import Document, RawBatch, read_batches
from pgolf.data.shards import (
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardInfo,
    Split,
    Tokens,
    atomic_file,
    file_sha256,
    sidecar_path,
    write_manifest,
    write_shard,
)
from pgolf.data.tokenizer import Counts, Tokenizer

Report = Callable[[str], None]

# Starting a process takes about a second; encoding this much compressed text takes longer.
_BYTES_PER_PROCESS = 500_000


@dataclass(frozen=True, kw_only=True)
class ShardsJob:
    """Encode documents into training and validation shards."""

    train: tuple[Path, ...]
    """Text files to train on: .jsonl, .jsonl.xz, .txt, .txt.xz or .parquet."""
    val: tuple[Path, ...]
    """Text files to validate on."""
    tokenizer: Path
    """SentencePiece model; copied to OUT/tokenizer.model."""
    out: Path
    """Folder to make."""
    name: str = "text"
    """Prefix of the shard names."""
    shard_tokens: int = 10_000_000
    """Most tokens in a shard; a longer document gets a shard of its own."""
    drop_overlap: bool = False
    """Leave training documents out that are also in the validation text, instead of stopping."""
    overwrite: bool = False
    """Remove the shards that are already in the folder."""
    jobs: int = 0
    """Encoding processes; 0 = one per core (fewer for little text), 1 = none besides this one."""

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            if not getattr(self, split):
                raise ValueError(f"{split}: expected at least one text file, got none")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be >= 1, got {self.shard_tokens}")
        if self.jobs < 0:
            raise ValueError(f"jobs must be >= 0, got {self.jobs}")
        if not self.name or "/" in self.name:
            raise ValueError(f"name must be a file name prefix, got {self.name!r}")


class _Encoded(NamedTuple):
    """One document after a worker."""

    line: int
    title: str
    digest: bytes
    size: int  # UTF-8 bytes
    tokens: Tokens  # BOS first
    counts: Tokens | None  # bytes of each token; validation only
    exact: bool  # decoding gives the text back; checked for validation only


@dataclass
class _Tally:
    """What was done so far: the numbers that the progress line and the summary show."""

    documents: int = 0
    size: int = 0
    tokens: int = 0
    dropped: int = 0
    inexact: int = 0


def build_shards(job: ShardsJob, *, report: Report) -> Manifest:
    """Make a folder of shards, byte sidecars, tokenizer and manifest from text.

    Args:
        job: inputs, output and choices.
        report: called with a line of progress about twice a second and a line per finished split.
    Returns:
        The manifest, which is written last.
    Raises:
        FileNotFoundError: an input or the tokenizer is not there. FileExistsError: the folder holds shards.
        ValueError: a bad document (named by file and line), one in both splits, or text that is lost.
        OSError: a file cannot be written; finished shards stay.
    """
    tokenizer = Tokenizer(job.tokenizer)
    for path in (*job.val, *job.train):
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
    _prepare_folder(job)
    with atomic_file(job.out / TOKENIZER_NAME) as handle, job.tokenizer.open("rb") as source:
        shutil.copyfileobj(source, handle)
    seen: dict[bytes, str] = {}
    val_files, val = _build_split(job, "val", seen=seen, report=report)
    train_files, train = _build_split(job, "train", seen=seen, report=report)
    for split, tally in (("val", val), ("train", train)):
        if not tally.documents:
            raise ValueError(f"no {split} documents in {', '.join(map(str, getattr(job, split)))}")
    manifest = Manifest(
        name=job.name,
        tokenizer_sha256=file_sha256(job.out / TOKENIZER_NAME),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        lossless=val.inexact == 0,
        files={**train_files, **val_files},
    )
    if manifest.total("val_bytes").bytes != val.size:
        raise RuntimeError(
            f"the byte sidecars sum to {manifest.total('val_bytes').bytes}, the text to {val.size}"
        )
    write_manifest(job.out, manifest)
    return manifest


def _prepare_folder(job: ShardsJob) -> None:
    """Make the output folder; leave no shard in it that the new manifest would not list."""
    job.out.mkdir(parents=True, exist_ok=True)
    old = [p for split in ("train", "val") for p in sorted(job.out.glob(f"*_{split}_*.bin"))]
    if old and not job.overwrite:
        raise FileExistsError(
            f"{job.out} already holds {len(old)} shards ({old[0].name}, ...); "
            "choose another folder, or pass --overwrite to remove them"
        )
    for path in (job.out / MANIFEST_NAME, *old):
        path.unlink(missing_ok=True)


def _build_split(
    job: ShardsJob, split: Split, *, seen: dict[bytes, str], report: Report
) -> tuple[dict[str, ShardInfo], _Tally]:
    """Encode and write one split; `seen` maps document hashes to places and is filled by val."""
    writer = _ShardWriter(job.out, job.name, split, job.shard_tokens)
    tally = _Tally()
    progress = _Progress(split, getattr(job, split), report)
    for batch, documents in _encode(job, split):
        for document in documents:
            place = f"{batch.source}, line {document.line}"
            if split == "val":
                seen.setdefault(document.digest, place)
            elif document.digest in seen:
                if not job.drop_overlap:
                    raise ValueError(
                        f"the document {document.title!r} is in both splits: {place} and "
                        f"{seen[document.digest]}; remove it, or pass --drop-overlap to train without it"
                    )
                tally.dropped += 1
                continue
            writer.add(document)
            tally.documents += 1
            tally.size += document.size
            tally.tokens += len(document.tokens)
            tally.inexact += not document.exact
        progress.update(batch, tally)
    files = writer.finish()
    progress.finish(tally)
    return files, tally


def _encode(job: ShardsJob, split: Split) -> Iterator[tuple[RawBatch, list[_Encoded]]]:
    """Yield every batch of a split with its encoded documents, in order."""
    paths: tuple[Path, ...] = getattr(job, split)
    encode = functools.partial(_encode_batch, job.tokenizer, split)
    batches = (batch for path in paths for batch in read_batches(path))
    size = sum(path.stat().st_size for path in paths)
    jobs = job.jobs or min(os.cpu_count() or 1, 1 + size // _BYTES_PER_PROCESS)
    if jobs == 1:
        yield from map(encode, batches)
        return
    # spawn, not fork: the caller may have threads (torch does), and a forked lock would hang.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap(encode, batches)


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer once per worker process."""
    return Tokenizer(path)


def _encode_batch(model: Path, split: Split, batch: RawBatch) -> tuple[RawBatch, list[_Encoded]]:
    """Encode one batch; the batch comes back without its text, for progress."""
    tokenizer = _load_tokenizer(model)
    documents = list(batch.documents())
    texts = [d.text for d in documents]
    if split == "train":
        ids = tokenizer.encode_ids(texts, threads=1)
        encoded = [_finish(tokenizer, d, i, None) for d, i in zip(documents, ids, strict=True)]
    else:
        pairs = tokenizer.encode_batch(texts, threads=1)
        encoded = [_finish(tokenizer, d, i, c) for d, (i, c) in zip(documents, pairs, strict=True)]
    return RawBatch(batch.source, batch.is_json, [], batch.consumed), encoded


def _finish(tokenizer: Tokenizer, document: Document, ids: Tokens, counts: Counts | None) -> _Encoded:
    """Hash a document and put BOS before its tokens; with `counts`, check that no byte of it is lost."""
    raw = document.text.encode()
    exact = True
    side = None
    if counts is not None:
        if int(counts.sum()) != len(raw) or int(counts.max(initial=0)) > 65535:
            raise ValueError(
                f"{document.source}, line {document.line}: the tokens account for {int(counts.sum())} of "
                f"{len(raw)} bytes, so bits per byte would be wrong: use a lossless tokenizer "
                "(pgolf data tokenizer)"
            )
        exact = tokenizer.decode(ids) == document.text
        side = np.concatenate(([0], counts)).astype(np.uint16)
    tokens = np.concatenate((np.array([tokenizer.bos_id], dtype=np.uint16), ids))
    digest = hashlib.sha256(raw).digest()
    return _Encoded(document.line, document.text.strip()[:60], digest, len(raw), tokens, side, exact)


@dataclass
class _ShardWriter:
    """Collects documents and writes a shard (and its sidecar) when the next document would not fit."""

    folder: Path
    name: str
    split: Split
    limit: int
    files: dict[str, ShardInfo] = field(default_factory=dict)
    waiting: list[_Encoded] = field(default_factory=list)
    tokens: int = 0

    def add(self, document: _Encoded) -> None:
        """Take one document."""
        if self.waiting and self.tokens + len(document.tokens) > self.limit:
            self.finish()
        self.waiting.append(document)
        self.tokens += len(document.tokens)

    def finish(self) -> dict[str, ShardInfo]:
        """Write what is waiting; return all files of this writer."""
        if not self.waiting:
            return self.files
        number = sum(info.split == self.split for info in self.files.values())
        path = self.folder / f"{self.name}_{self.split}_{number:06d}.bin"
        digest = write_shard(path, np.concatenate([d.tokens for d in self.waiting]))
        size = sum(d.size for d in self.waiting)
        self.files[path.name] = ShardInfo(self.split, self.tokens, len(self.waiting), size, digest)
        counts = [d.counts for d in self.waiting if d.counts is not None]
        if counts:
            side = sidecar_path(path)
            data = np.concatenate(counts)
            digest = write_shard(side, data)
            self.files[side.name] = ShardInfo("val_bytes", self.tokens, len(counts), int(data.sum()), digest)
        self.waiting, self.tokens = [], 0
        return self.files


class _Progress:
    """Rate and time left of one split, by the fraction of its files that was read."""

    def __init__(self, split: str, paths: Sequence[Path], report: Report) -> None:
        self._split = split
        self._report = report
        self._before = dict[str, int]()
        self._total = 0
        for path in paths:
            self._before[str(path)] = self._total
            self._total += path.stat().st_size
        self._begin = self._last = time.perf_counter()

    def update(self, batch: RawBatch, tally: _Tally) -> None:
        """Report at most twice a second."""
        now = time.perf_counter()
        if now - self._last < 0.5:
            return
        self._last = now
        share = (self._before[batch.source] + batch.consumed) / max(1, self._total)
        left = (now - self._begin) * (1 - share) / max(share, 1e-9)
        self._report(f"{self._line(tally)}, {100 * share:.0f} %, {left:.0f} s left")

    def finish(self, tally: _Tally) -> None:
        """Report the totals of the split."""
        notes = f", {tally.dropped:,} dropped (also in val)" if tally.dropped else ""
        if tally.inexact:
            notes += f"; the tokenizer is lossy: {tally.inexact:,} documents do not decode exactly"
        self._report(self._line(tally) + notes)

    def _line(self, tally: _Tally) -> str:
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        return (
            f"{self._split}: {tally.documents:,} documents, {tally.size:,} bytes, {tally.tokens:,} tokens, "
            f"{tally.size / 1e6 / seconds:.1f} MB/s"
        )
