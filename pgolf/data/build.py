"""Make shards from documents: encode on all cores, check that no document is in both splits, write.

A document becomes one BOS and its tokens (no EOS), and a shard ends between two documents. The main process
finds the documents in the files; worker processes parse, hash and encode them; the main process collects the
results in order and writes them. The validation text comes first, because the hashes of its documents must be
known when the training text is read.

While a build runs, the folder contains the file UNFINISHED, which holds the command of the build. The file
stays if the build ends without a manifest, and every reader refuses such a folder. Running the same command
again starts the build from the beginning.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.config import check_name
from pgolf.data.shards import (
    MANIFEST_NAME,
    MARKER_NAME,
    TOKENIZER_NAME,
    Manifest,
    ShardInfo,
    Split,
    Tokens,
    check_challenge,
    sidecar_path,
    write_manifest,
    write_shard,
)
from pgolf.data.text import TEXT_KEY, Document, RawBatch, check_text_file, read_batches
from pgolf.data.tokenizer import Counts, Tokenizer
from pgolf.errors import RunError, UserError
from pgolf.files import atomic_file, file_sha256

Report = Callable[[str], None]

MOST_JOBS = 4096
"""Largest number of processes that can be asked for."""
NEW_NAME = ".new"
"""Folder inside the data folder for new shards, until they are complete and replace the old ones."""

# Starting a process takes about a second; encoding this much compressed text takes longer.
_BYTES_PER_PROCESS = 500_000


@dataclass(frozen=True, kw_only=True)
class ShardsJob:
    """Encode documents into training and validation shards."""

    train: tuple[Path, ...]
    """Text files to train on: .jsonl, .ndjson or .txt (also compressed as .xz, .gz, .zst), or .parquet."""
    val: tuple[Path, ...]
    """Text files to validate on, in the same formats."""
    tokenizer: Path
    """SentencePiece model with which the text is encoded; it is copied to OUT/tokenizer.model."""
    out: Path
    """Folder for the shards; it is created if it does not exist."""
    name: str = "text"
    """Prefix of the names of the shards. "fineweb" is that of the challenge, whose validation text has 50,000
    documents; with this name another number is an error."""
    text_key: str = TEXT_KEY
    """Key of the text in the objects of .jsonl files, and name of its column in .parquet files."""
    shard_tokens: int = 10_000_000
    """Largest number of tokens in a shard, 1 to 2^31 - 1; a longer document is a shard by itself."""
    drop_overlap: bool = False
    """If a training document is also in the validation text, leave it out of the training text. Without this
    option such a document is an error."""
    overwrite: bool = False
    """Replace shards that are already in the folder, as soon as the new ones are complete. Without this
    option existing shards are an error; only those of an unfinished build are always removed."""
    jobs: int = 0
    """Number of encoding processes; 0 = one per core (fewer for little text), 1 = encode in the main
    process."""

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            if not getattr(self, split):
                raise UserError(f"{split}: expected at least one text file, got none")
        if not 1 <= self.shard_tokens < 2**31:
            raise UserError(f"shard_tokens must be >= 1 and below 2^31, got {self.shard_tokens}")
        if not 0 <= self.jobs <= MOST_JOBS:
            raise UserError(f"jobs must be >= 0 and at most {MOST_JOBS:,}, got {self.jobs}")
        check_name(self.name, "the shards' names")


class _Encoded(NamedTuple):
    """One document as a worker process returns it."""

    line: int
    title: str
    digest: bytes
    size: int  # UTF-8 bytes
    tokens: Tokens  # BOS first
    counts: Tokens | None  # bytes of each token; for validation text only
    exact: bool  # whether decoding gives the text back; checked for validation text only


@dataclass
class _Tally:
    """Counts of what was done so far, for the progress line and the totals."""

    documents: int = 0
    size: int = 0
    tokens: int = 0
    dropped: int = 0
    inexact: int = 0


def build_shards(job: ShardsJob, *, report: Report) -> Manifest:
    """Make a folder of shards, byte sidecars, tokenizer and manifest from text.

    After an error in the first checks the folder is as before. After a later error the folder stays marked as
    unfinished; but if complete shards were to be replaced, those are kept unchanged.

    Args:
        job: inputs, output and options.
        report: called with a line of progress about twice per second, and with one line per finished split.

    Returns:
        The manifest, which is written last.

    Raises:
        FileNotFoundError: an input file or the tokenizer does not exist.
        FileExistsError: the folder already holds shards.
        ValueError: a document is not valid (the message names file and line) or is in both splits, the
            tokenizer loses bytes of the validation text, a split has no text, or shards that are called as
            the challenge's do not have all of its validation documents.
        OSError: a file cannot be written.
        RuntimeError: another build runs in the folder, or a worker process was killed.
    """
    tokenizer = Tokenizer(job.tokenizer)
    for path in (*job.val, *job.train):
        check_text_file(path)
        if path.stat().st_size == 0:
            report(f"note: {path} is empty")
    if not tokenizer.lossless:
        report(f"note: the tokenizer is not lossless: {tokenizer.lossy_because}")
    if tokenizer.caseops:
        report("note: a CaseOps tokenizer; the text is encoded with operators for upper case")
    _check_out(job)
    with _unfinished(job) as (finish, created):
        staged = created and job.overwrite and (job.out / MANIFEST_NAME).is_file()
        try:
            manifest = _replace_old(job, tokenizer, report) if staged else _begin_anew(job, tokenizer, report)
        except _OldIsWhole as e:
            finish()
            report(f"{job.out} is unchanged")
            assert e.__cause__ is not None
            raise e.__cause__ from None
        except Exception:
            report(f"{job.out} is marked as unfinished; run the same command to build it again")
            raise
        finish()
    return manifest


class _OldIsWhole(Exception):
    """The build failed before it changed the shards that were in the folder."""


def _begin_anew(job: ShardsJob, tokenizer: Tokenizer, report: Report) -> Manifest:
    """Build in a folder that has no complete shards."""
    shutil.rmtree(job.out / NEW_NAME, ignore_errors=True)
    _remove_old(job.out)
    manifest = _build(job, tokenizer, report)
    write_manifest(job.out, manifest)
    return manifest


def _replace_old(job: ShardsJob, tokenizer: Tokenizer, report: Report) -> Manifest:
    """Build in an inner folder, and replace the finished shards only when the new ones are complete."""
    new = job.out / NEW_NAME
    try:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        manifest = _build(replace(job, out=new), tokenizer, report)
    except BaseException as e:
        shutil.rmtree(new, ignore_errors=True)
        raise _OldIsWhole from e
    _remove_old(job.out)
    for path in (new / TOKENIZER_NAME, *(new / name for name in manifest.files)):
        path.replace(job.out / path.name)
    new.rmdir()
    write_manifest(job.out, manifest)
    return manifest


def _build(job: ShardsJob, tokenizer: Tokenizer, report: Report) -> Manifest:
    """Write everything except for the manifest."""
    with atomic_file(job.out / TOKENIZER_NAME) as handle, job.tokenizer.open("rb") as source:
        shutil.copyfileobj(source, handle)
    seen: dict[bytes, str] = {}
    val_files, val = _build_split(job, "val", seen=seen, report=report)
    check_challenge(job.name, val.documents)
    train_files, _ = _build_split(job, "train", seen=seen, report=report)
    manifest = Manifest(
        name=job.name,
        tokenizer_sha256=file_sha256(job.out / TOKENIZER_NAME),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        lossless=val.inexact == 0,
        files={**train_files, **val_files},
        caseops=tokenizer.caseops,
    )
    if manifest.total("val_bytes").bytes != val.size:
        raise RunError(
            f"the byte sidecars sum to {manifest.total('val_bytes').bytes} bytes, but the validation text "
            f"has {val.size}; its files were changed during the build: run the command again"
        )
    return manifest


def _check_out(job: ShardsJob) -> None:
    """Make the output folder; refuse one that holds shards, unless --overwrite was given."""
    if job.out.exists() and not job.out.is_dir():
        raise NotADirectoryError(f"{job.out} is a file, expected a folder; choose another --out")
    job.out.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(job.out / MARKER_NAME):
        _refuse_shards(job)


def _refuse_shards(job: ShardsJob) -> None:
    """Refuse a folder with shards or a manifest, unless --overwrite was given."""
    old = _shards_in(job.out)
    manifest = job.out / MANIFEST_NAME
    if not old and os.path.lexists(manifest) and not job.overwrite:
        raise FileExistsError(
            f"{job.out} already holds {manifest.name}; choose another one, or pass --overwrite to replace it"
        )
    if old and not job.overwrite:
        raise FileExistsError(
            f"{job.out} already holds {len(old)} shards ({old[0].name}, ...); "
            "choose another folder, or pass --overwrite to remove them"
        )


def _shards_in(folder: Path) -> list[Path]:
    return [p for split in ("train", "val") for p in sorted(folder.glob(f"*_{split}_*.bin"))]


def _remove_old(folder: Path) -> None:
    """Remove the shards and the manifest, and the temporary files of a build that was killed."""
    temporary = re.compile(rf"\.(.+\.bin|{TOKENIZER_NAME}|{MANIFEST_NAME})\.\d+\.tmp")
    left = [p for p in folder.iterdir() if temporary.fullmatch(p.name)]
    for path in (folder / MANIFEST_NAME, *_shards_in(folder), *left):
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _unfinished(job: ShardsJob) -> Iterator[tuple[Callable[[], None], bool]]:
    """Mark the folder as unfinished; yield the function that removes the mark, and whether the mark is new.

    The file is locked as long as this process runs, so that a second build can tell a running build from one
    that was killed.

    Raises:
        RuntimeError: another build has the lock.
        OSError: the mark cannot be written.
    """
    path = job.out / MARKER_NAME
    try:
        marker, created = _open_marker(path)
    except OSError as e:
        raise OSError(e.errno, f"cannot write {path}: {e.strerror}; nothing was changed") from e
    with contextlib.closing(os.fdopen(marker, "rb+", buffering=0)):
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise RunError(
                f"another build is running in {job.out}; wait for it, or choose another --out"
            ) from e
        except OSError:
            pass  # a file system without locks
        if os.fstat(marker).st_nlink == 0:
            raise RunError(f"another build in {job.out} has just finished; choose another --out")
        try:
            if created:
                _refuse_shards(job)  # another build may have finished since the first check
            _write_marker(marker, f"{command_of(job)}\n".encode("utf-8", "surrogateescape"))
        except OSError as e:
            if created:
                path.unlink(missing_ok=True)
            if isinstance(e, FileExistsError):
                raise
            raise OSError(e.errno, f"cannot write {path}: {e.strerror}; nothing was removed") from e
        yield path.unlink, created


def _open_marker(path: Path) -> tuple[int, bool]:
    """Open the mark without following a link; return its descriptor and whether it was created now."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags), False


def _write_marker(marker: int, text: bytes) -> None:
    """Replace the contents of the mark by `text`, and wait until they are on disk."""
    os.lseek(marker, 0, os.SEEK_SET)
    rest = text
    while rest:
        rest = rest[os.write(marker, rest) :]
    os.ftruncate(marker, len(text))
    os.fsync(marker)


def command_of(job: ShardsJob) -> str:
    """Return the shell command that does this job and works from any folder."""
    words = ["pgolf", "data", "shards"]
    for item in fields(job):
        value = getattr(job, item.name)
        option = f"--{item.name.replace('_', '-')}"
        if item.default is not MISSING and value == item.default:
            continue
        if isinstance(value, bool):
            words.append(option)
        else:
            values = value if isinstance(value, tuple) else (value,)
            words += [option, *(str(v.absolute() if isinstance(v, Path) else v) for v in values)]
    return shlex.join(words)


def _build_split(
    job: ShardsJob, split: Split, *, seen: dict[bytes, str], report: Report
) -> tuple[dict[str, ShardInfo], _Tally]:
    """Encode and write one split; return its files and counts.

    Args:
        seen: maps the hash of a validation document to where it stands; "val" fills it, "train" reads it.
    """
    writer = _ShardWriter(job.out, job.name, split, job.shard_tokens)
    tally = _Tally()
    paths: tuple[Path, ...] = getattr(job, split)
    progress = _Progress(split, paths, report)
    with contextlib.closing(_encode(job, split)) as encoded:  # closing ends the workers, after an error too
        for batch, documents in encoded:
            for document in documents:
                place = f"{batch.source}, line {document.line}"
                if split == "val":
                    seen.setdefault(document.digest, place)
                elif document.digest in seen:
                    if not job.drop_overlap:
                        raise UserError(
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
    where = ", ".join(map(str, paths))
    if not tally.documents:
        raise UserError(
            f"no {split} documents in {where}{' except for those of val' * (tally.dropped > 0)}; give other "
            f"files with --{split}"
        )
    if not tally.size:
        raise UserError(
            f"the {split} text has no bytes: all of the {tally.documents:,} documents in {where} are empty; "
            f"give text with --{split}"
        )
    files = writer.finish()
    progress.finish(tally)
    return files, tally


def _encode(job: ShardsJob, split: Split) -> Generator[tuple[RawBatch, list[_Encoded]], None, None]:
    """Yield every batch of a split with its encoded documents, in order.

    Raises:
        RuntimeError: a worker process died.
    """
    paths: tuple[Path, ...] = getattr(job, split)
    encode = functools.partial(_encode_batch, job.tokenizer, split)
    batches = (batch for path in paths for batch in read_batches(path, text_key=job.text_key))
    size = sum(path.stat().st_size for path in paths)
    jobs = job.jobs or min(os.cpu_count() or 1, 1 + size // _BYTES_PER_PROCESS)
    if jobs == 1:
        yield from map(encode, batches)
        return
    # spawn, not fork: the caller may have threads (torch does), whose locks could stay locked in a fork. The
    # executor notices a worker that was killed, where multiprocessing.Pool would wait forever.
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    waiting = deque[concurrent.futures.Future[tuple[RawBatch, list[_Encoded]]]]()
    try:
        for batch in batches:
            waiting.append(pool.submit(encode, batch))
            if len(waiting) > 2 * jobs:  # limits the memory, and is enough to keep every worker busy
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as e:
        if sys.version_info < (
            3,
            11,
            5,
        ):  # the executor's own clean-up would hang: github.com/python/cpython/issues/94777
            pool._call_queue._reader.close()  # type: ignore[attr-defined, unused-ignore]
        raise RunError(
            f"a worker process died while it encoded the {split} text; the system may have killed it because "
            f"memory ran out. Free memory or pass fewer --jobs than {jobs}, and run the command again"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Ignore Ctrl-C, which the main process handles, and end this worker when the main process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, name="pgolf-parent", daemon=True).start()


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer once per worker process."""
    return Tokenizer(path)


def _encode_batch(model: Path, split: Split, batch: RawBatch) -> tuple[RawBatch, list[_Encoded]]:
    """Encode one batch; return it without its text (for the progress line), and its encoded documents."""
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
    """Hash a document and put BOS before its tokens; with `counts`, check that no byte is lost."""
    raw = document.text.encode()
    exact = True
    side = None
    if counts is not None:
        if int(counts.max(initial=0)) > 65535:
            raise UserError(
                f"{document.source}, line {document.line}: one token has {int(counts.max())} bytes, but "
                "a byte sidecar holds at most 65535; use a lossless tokenizer (pgolf data tokenizer)"
            )
        if int(counts.sum()) != len(raw):
            raise UserError(
                f"{document.source}, line {document.line}: the tokens account for {int(counts.sum())} of "
                f"{len(raw)} bytes, so bits per byte would be wrong; use a lossless tokenizer "
                "(pgolf data tokenizer)"
            )
        exact = tokenizer.decode(ids) == document.text
        side = np.concatenate(([0], counts)).astype(np.uint16)
    tokens = np.concatenate((np.array([tokenizer.bos_id], dtype=np.uint16), ids))
    digest = hashlib.sha256(raw).digest()
    return _Encoded(document.line, document.text.strip()[:60], digest, len(raw), tokens, side, exact)


@dataclass
class _ShardWriter:
    """Collects documents, and writes a shard and its sidecar when the next document would not fit."""

    folder: Path
    name: str
    split: Split
    limit: int
    files: dict[str, ShardInfo] = field(default_factory=dict)
    waiting: list[_Encoded] = field(default_factory=list)
    tokens: int = 0

    def add(self, document: _Encoded) -> None:
        """Add one document."""
        if self.waiting and self.tokens + len(document.tokens) > self.limit:
            self.finish()
        self.waiting.append(document)
        self.tokens += len(document.tokens)

    def finish(self) -> dict[str, ShardInfo]:
        """Write the documents that are waiting; return all files that were written."""
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
    """Reports the rate of one split and the time left, from the fraction of its files that was read."""

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
        """Report the progress, at most twice per second."""
        now = time.perf_counter()
        if now - self._last < 0.5:
            return
        self._last = now
        share = (self._before[batch.source] + batch.consumed) / max(1, self._total)
        line = self._line(tally)
        if share:  # it is 0 for a parquet file, whose position is not known
            left = (now - self._begin) * (1 - share) / share
            line += f", {100 * share:.0f} %, {left:.0f} s left"
        self._report(line)

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
