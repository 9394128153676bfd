"""A data folder for choosing settings: the end of the training text takes the place of the validation text.

Settings that are chosen by the validation text are tuned on it. So they are chosen by held-out text: the last
documents of the last training shard, which become the validation text of a new folder and are taken out of
its training text. All other shards are links to those of the source folder (copies on another disk).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from numpy.typing import NDArray

from pgolf.data.manifest import verify_folder
from pgolf.data.shards import (
    TOKENIZER_NAME,
    Manifest,
    ShardInfo,
    Tokens,
    find_shards,
    read_shard,
    sidecar_path,
    write_manifest,
    write_shard,
)
from pgolf.data.tokenizer import Tokenizer, find_tokenizer
from pgolf.errors import UserError
from pgolf.files import file_sha256

NAME = "heldout"
"""Prefix of the names of the shards in such a folder."""


@dataclass(frozen=True, kw_only=True)
class HeldOutJob:
    """Make a data folder whose validation text is the end of the training text, to choose settings with."""

    source: tyro.conf.Positional[Path]
    """Data folder with training shards and a tokenizer. Its validation text is not used."""
    out: Path
    """Folder to make; it must not exist."""
    tokens: int = 2_000_000
    """Least number of tokens of the new validation text, which begins with a whole document."""


def make_held_out(job: HeldOutJob, *, report: Callable[[str], None]) -> Manifest | None:
    """Make the folder `job.out`; it is there completely or not at all.

    Documents of the held-out text that are in the rest of the training text too are not scored.

    Returns:
        Its manifest; None if the source has none, because another tool made it.

    Raises:
        FileNotFoundError: the source lacks shards or a tokenizer. FileExistsError: the new folder is there.
        UserError: the last shard is too short, or the bytes of its tokens cannot be counted.
    """
    if job.out.exists():
        raise FileExistsError(f"{job.out} is there already; name another --out, or remove it")
    manifest, tokenizer = verify_folder(job.source), find_tokenizer(job.source)
    paths = find_shards(job.source, "train")
    last = read_shard(paths[-1], vocab_size=tokenizer.vocab_size)
    cut = _cut(last, tokenizer.bos_id, job.tokens, paths[-1])
    held = _documents(last[cut:], tokenizer.bos_id)
    rest: list[Path | Tokens] = [*paths[:-1], last[:cut]]
    report(f"comparing {len(held):,} documents with the rest of the training text")
    twice = _repeated(held, rest, tokenizer)
    held = [ids for ids in held if ids.tobytes() not in twice]
    if not held:
        raise UserError(
            f"every document at the end of {paths[-1]} is in the rest of the text too; ask for more"
        )
    new = job.out.with_name(f".{job.out.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    shutil.copyfile(tokenizer.path, new / TOKENIZER_NAME)
    files = _write_training(new, paths, last[:cut], manifest, tokenizer.bos_id)
    files |= _write_held(new, held, tokenizer)
    made = None
    if manifest is not None:
        made = Manifest(
            name=NAME,
            tokenizer_sha256=file_sha256(new / TOKENIZER_NAME),
            vocab_size=tokenizer.vocab_size,
            bos_id=tokenizer.bos_id,
            lossless=tokenizer.lossless,
            files=files,
            caseops=tokenizer.caseops,
        )
        write_manifest(new, made)
    new.rename(job.out)
    report(
        f"{job.out}: {len(held):,} documents of {sum(map(len, held)):,} tokens to score"
        + (f", {len(twice):,} repeated ones left out" if twice else "")
    )
    return made


def _cut(tokens: Tokens, bos_id: int, wanted: int, path: Path) -> int:
    """Return the start of the last document from which on there are at least `wanted` tokens."""
    starts = np.flatnonzero(tokens == bos_id)
    # At least one document stays in the shard, which must not be empty.
    possible = starts[(starts > 0) & (tokens.size - starts >= wanted)]
    if wanted < 1 or possible.size == 0:
        most = tokens.size - int(starts[starts > 0].min(initial=tokens.size))
        raise UserError(f"{path}, the last training shard, has room for 1 to {most:,} tokens, got {wanted:,}")
    return int(possible[-1])


def _documents(tokens: Tokens, bos_id: int) -> list[Tokens]:
    """Return the documents, each with its BOS; what is before the first BOS belongs to another shard."""
    starts = np.flatnonzero(tokens == bos_id)
    return np.split(tokens, starts)[1:] if starts.size else []


def _repeated(held: list[Tokens], rest: list[Path | Tokens], tokenizer: Tokenizer) -> set[bytes]:
    """Return the documents of `held`, as bytes, that `rest` has too."""
    wanted = {ids.tobytes() for ids in held}
    lengths = {len(ids) for ids in held}
    found: set[bytes] = set()
    for piece in rest:
        tokens = read_shard(piece, vocab_size=tokenizer.vocab_size) if isinstance(piece, Path) else piece
        for ids in _documents(tokens, tokenizer.bos_id):
            if len(ids) in lengths and (text := ids.tobytes()) in wanted:
                found.add(text)
    return found


def _write_training(
    folder: Path, paths: list[Path], last: Tokens, manifest: Manifest | None, bos_id: int
) -> dict[str, ShardInfo]:
    """Link all shards but the last one, of which the beginning is written; return their entries."""
    files: dict[str, ShardInfo] = {}
    for number, path in enumerate(paths[:-1]):
        target = folder / f"{NAME}_train_{number:06d}.bin"
        try:
            os.link(path.resolve(), target)
        except OSError:  # another disk
            shutil.copyfile(path, target)
        if manifest is not None:
            files[target.name] = manifest.files[path.name]
    target = folder / f"{NAME}_train_{len(paths) - 1:06d}.bin"
    digest = write_shard(target, last)
    # Nothing reads the bytes of the training text; those of a cut shard are in proportion.
    known = None if manifest is None else manifest.files[paths[-1].name]
    size = 0 if known is None else round(known.bytes * last.size / known.tokens)
    documents = int(np.count_nonzero(last == bos_id))
    files[target.name] = ShardInfo("train", last.size, documents, size, digest)
    return files


def _write_held(folder: Path, held: list[Tokens], tokenizer: Tokenizer) -> dict[str, ShardInfo]:
    """Write the validation shard, and its sidecar where the tokenizer counts bytes by itself."""
    path = folder / f"{NAME}_val_000000.bin"
    counts = list(_byte_counts(held, tokenizer))
    total = sum(int(c.sum()) for c in counts)
    tokens = np.concatenate(held)
    digest = write_shard(path, tokens)
    files = {path.name: ShardInfo("val", tokens.size, len(held), total, digest)}
    side = sidecar_path(path)
    digest = write_shard(side, np.concatenate(counts))
    files[side.name] = ShardInfo("val_bytes", tokens.size, len(held), total, digest)
    return files


def _byte_counts(held: list[Tokens], tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    """Yield the bytes that each token of each document stands for; 0 for BOS.

    A lossless tokenizer counts as it encodes, any other one by the challenge's table.
    """
    table = None if tokenizer.lossless else tokenizer.byte_table()
    for ids in held:
        if table is not None:
            yield np.concatenate(([0], table.target_bytes(ids[:-1], ids[1:])))
            continue
        again, counts = tokenizer.encode(tokenizer.decode(ids[1:]))
        if not np.array_equal(again, ids[1:]):
            raise UserError(
                f"a document at the end of the training text does not encode to its own tokens with "
                f"{tokenizer.path}; the shards were made with another tokenizer or another version of it"
            )
        yield np.concatenate(([0], counts))
