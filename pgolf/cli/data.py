"""`pgolf data`: train a tokenizer; make, inspect, hold out or download shards."""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from pgolf.data.build import ShardsJob, build_shards
from pgolf.data.challenge import known_text
from pgolf.data.fetch import FetchJob, fetch
from pgolf.data.foreign import check_foreign
from pgolf.data.held_out import HeldOutJob, make_held_out
from pgolf.data.loader import validation_totals
from pgolf.data.manifest import NO_MANIFEST, verify_folder
from pgolf.data.shards import (
    MAKE_SHARDS,
    MANIFEST_NAME,
    TOKENIZER_NAME,
    Split,
    Tokens,
    find_shards,
    list_files,
    read_shard,
)
from pgolf.data.text import TEXT_KEY, check_text_file, iterate_documents
from pgolf.data.tokenizer import Tokenizer, find_tokenizer, train_tokenizer
from pgolf.errors import UserError
from pgolf.files import file_sha256


@dataclass(frozen=True, kw_only=True)
class TokenizerJob:
    """Train a lossless SentencePiece BPE tokenizer."""

    inputs: tuple[Path, ...]
    """Text files: .jsonl, .ndjson or .txt (also compressed as .xz, .gz, .zst), or .parquet."""
    out: Path
    """The .model file to write."""
    vocab_size: int = 8192
    """Number of token ids, 300 to 65536."""
    text_key: str = TEXT_KEY
    """Key of the text in the objects of .jsonl files, and name of its column in .parquet files."""
    max_bytes: int = 100_000_000
    """Bytes of text to train on; equal shares are taken from the beginnings of all inputs."""
    caseops: bool = False
    """Train on text in which operators stand for upper case (CaseOps), so that the spellings of a word share
    their tokens. Shards, scores and generated text follow the tokenizer without another option."""
    marker_pairs: bool = False
    """With --caseops: one token for a space and the operator after it, which gives fewer tokens."""


@dataclass(frozen=True, kw_only=True)
class InspectJob:
    """Check a folder of shards (or one shard) and print what is in it."""

    path: tyro.conf.Positional[Path]
    """A folder of shards, made by this package or by another tool, or one .bin file."""
    tokenizer: Path | None = None
    """SentencePiece model, to print text and to count bytes; default: the one in the folder, if any."""
    bos_id: int = 1
    """The id that starts a document; it is only used if there is no tokenizer."""


def run_tokenizer(job: TokenizerJob) -> None:
    """Train and write a tokenizer; print its size, SHA-256 and bytes per token on the first input."""
    began = time.perf_counter()
    if not job.inputs:
        raise UserError("inputs: expected at least one text file, got none")
    for path in job.inputs:
        check_text_file(path)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    share = job.max_bytes // len(job.inputs)
    texts = itertools.chain.from_iterable(_texts(path, share, job.text_key) for path in job.inputs)
    tokenizer = train_tokenizer(
        texts,
        job.out,
        vocab_size=job.vocab_size,
        with_caseops=job.caseops,
        marker_pairs=job.marker_pairs,
    )
    check = list(_texts(job.inputs[0], 1_000_000, job.text_key))
    tokens = sum(len(ids) for ids in tokenizer.encode_ids(check))
    size = sum(len(text.encode()) for text in check)
    kind = f"lossless {tokenizer.lossless}{', CaseOps' * tokenizer.caseops}"
    print(f"{job.out}: {tokenizer.vocab_size:,} ids, bos {tokenizer.bos_id}, {kind}")
    if not tokenizer.lossless:
        print(f"not lossless because {tokenizer.lossy_because}")
    print(f"SHA-256 {file_sha256(job.out)}")
    print(f"{size / max(1, tokens):.3f} bytes per token; {time.perf_counter() - began:.1f} s")


def _texts(path: Path, limit: int, text_key: str) -> Iterator[str]:
    """Yield the documents at the beginning of a file until they have `limit` bytes."""
    size = 0
    for document in iterate_documents(path, text_key=text_key):
        yield document.text
        size += len(document.text.encode())
        if size >= limit:
            return


def run_shards(job: ShardsJob) -> None:
    """Make shards with progress lines on stderr, then print the totals."""
    manifest = build_shards(job, report=lambda line: print(line, file=sys.stderr, flush=True))
    for split in ("train", "val"):
        total = manifest.total(split)
        print(
            f"{split}: {total.documents:,} documents, {total.tokens:,} tokens, {total.bytes:,} bytes "
            f"({total.bytes / total.tokens:.3f} bytes per token)"
        )
    print(f"no document is in both splits; manifest: {job.out / MANIFEST_NAME}")


def run_fetch(job: FetchJob) -> None:
    """Download with progress lines on stderr, then print what was compared and what is known of the text."""
    record = fetch(job, report=lambda line: print(line, file=sys.stderr, flush=True))
    files = record["files"].values()
    print(f"{job.out}: {len(files)} files of {job.repository}, {sum(f['bytes'] for f in files):,} bytes")
    for by, count in sorted(Counter(f["compared"] for f in files).items()):
        print(f"  SHA-256 {'recorded at the ' if by == 'first download' else ''}{by}: {count} files")
    for name, entry in record["files"].items():
        if "beginning" in entry:
            print(f"  {name}: {entry['beginning']}")
    known = known_text(file_sha256(job.out / TOKENIZER_NAME), validation_totals(job.out)[0])
    print(known or "the number of validation tokens of this text is not known to pgolf")


def run_inspect(job: InspectJob) -> None:
    """Check a folder against its manifest, including the hash of every file, and print what is in it."""
    if not job.path.exists():
        raise FileNotFoundError(f"no data folder or shard at {job.path}; make shards with: {MAKE_SHARDS}")
    if not job.path.is_dir():
        tokenizer = Tokenizer(job.tokenizer) if job.tokenizer else _folder_tokenizer(job.path.parent)
        _print_shards([job.path], tokenizer.bos_id if tokenizer else job.bos_id, tokenizer)
        return
    manifest = verify_folder(job.path, training=True)
    check_foreign(job.path, training=True)
    tokenizer = Tokenizer(job.tokenizer) if job.tokenizer else _folder_tokenizer(job.path)
    bos_id = tokenizer.bos_id if tokenizer else job.bos_id
    splits: tuple[Split, ...] = ("train", "val")
    present = [split for split in splits if list_files(job.path, split)]
    if not present:
        find_shards(job.path, "train")
    for split in present:
        print(f"{split}:")
        _print_shards(find_shards(job.path, split), bos_id, tokenizer)
    if "val" in present:
        _print_validation(job.path, tokenizer)
    if manifest is not None:
        print(
            f"manifest: all {len(manifest.files)} files and the tokenizer have the listed SHA-256 and "
            "counts, and there are no other files; not checked: the number of bytes of the training text"
        )
    else:
        print(f"manifest: {NO_MANIFEST}")


def _folder_tokenizer(folder: Path) -> Tokenizer | None:
    named = (folder / TOKENIZER_NAME).is_file()
    return find_tokenizer(folder) if named or len(list(folder.glob("*.model"))) == 1 else None


def _print_shards(paths: list[Path], bos_id: int, tokenizer: Tokenizer | None) -> None:
    tokens = documents = 0
    for path in paths:
        shard = read_shard(path, vocab_size=tokenizer.vocab_size if tokenizer else None)
        starts = int(np.count_nonzero(shard == bos_id))
        print(
            f"  {path.name}: version 1, {shard.size:,} tokens, {starts:,} documents, largest id {shard.max()}"
        )
        tokens, documents = tokens + shard.size, documents + starts
    print(f"  total: {len(paths)} shards, {tokens:,} tokens, {documents:,} documents (BOS {bos_id})")
    if not documents:
        print(f"  warning: no BOS (id {bos_id}); training needs one before each document")
    if tokenizer:
        print(f"  begins: {_first_text(read_shard(paths[0]), tokenizer)!r}")


def _first_text(shard: Tokens, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(shard[:64])[:160]


def _print_validation(folder: Path, tokenizer: Tokenizer | None) -> None:
    try:
        targets, size = validation_totals(folder, tokenizer=tokenizer)
    except FileNotFoundError as e:
        print(f"  bytes: unknown: {e}")
        return
    print(f"  {targets:,} targets, {size:,} bytes ({size / targets:.4f} bytes per target)")
    known = known_text(file_sha256(tokenizer.path), targets) if tokenizer else ""
    if known:
        print(f"  {known}")


def main(argv: list[str]) -> int:
    """Run `pgolf data VERB ...`."""
    job: TokenizerJob | ShardsJob | HeldOutJob | InspectJob | FetchJob = tyro.extras.subcommand_cli_from_dict(
        {
            "tokenizer": TokenizerJob,
            "shards": ShardsJob,
            "held-out": HeldOutJob,
            "inspect": InspectJob,
            "fetch": FetchJob,
        },
        prog="pgolf data",
        description="Train a tokenizer; make, inspect, hold out or download shards.",
        args=argv,
    )
    if isinstance(job, TokenizerJob):
        run_tokenizer(job)
    elif isinstance(job, ShardsJob):
        run_shards(job)
    elif isinstance(job, HeldOutJob):
        make_held_out(job, report=lambda line: print(line, flush=True))
    elif isinstance(job, FetchJob):
        run_fetch(job)
    else:
        run_inspect(job)
    return 0
