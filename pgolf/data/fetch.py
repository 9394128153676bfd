"""Download the challenge's published shards and tokenizer, so that they can be continued and are checked.

A file is written next to its place as `NAME.part`. If the connection breaks, or the program is stopped, the
download goes on where it ended. A finished file has the length that the server announced and the SHA-256 that
is pinned in `challenge.py` or that the Hub states for large files; where neither is known, its hash is
recorded at the first download and later downloads must agree. `fetched.json` says of each file which it was.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from pgolf.data.challenge import VARIANTS
from pgolf.data.shards import MARKER_NAME, TOKENIZER_NAME, Tokens, read_shard
from pgolf.errors import RunError, UserError
from pgolf.files import file_sha256, write_json

Report = Callable[[str], None]

RECORD = "fetched.json"
ENDPOINT = "https://huggingface.co"
ROOT = "datasets"
"""Folder of the published files in their repository."""
DOCUMENTS = "docs_selected.jsonl"
"""The documents, one JSON object a line, those of the validation text first."""
FIRST_VALIDATION = "fineweb_val_000000.bin"
BEGINNINGS = {
    "sp1024": (1_040_298, "3fad60f7e717550f18ba7aa3a9f1d0cb14ded3e3823714488ecb1e2a7f6630df"),
    "sp8192": (679_222, "191b00e8856eef9ea60dbe783e620190b3fa53c8a37f1030d3cf4a42141a7622"),
}
"""Variant -> number and SHA-256 of the ids, as uint16, that its tokenizer makes of the first 902 documents of
the validation text. This project has these documents, normalized, and not the published shards."""
CHUNK = 1 << 20
TIMEOUT_S = 60.0
TRIES = 6
"""Attempts in a row that bring no byte before a download is given up."""
PAUSE_S = 1.0
"""Seconds before the second attempt; each further pause is twice as long."""
PROGRESS_S = 5.0
LINKED_HASH = "X-Linked-Etag"
"""Header in which the Hub states the SHA-256 of a large file, before it redirects to where the file is. Of a
file that is stored in git it is the SHA-1 of git's object (`hf_hub_url` of huggingface_hub 2.4.0)."""


def stated_hash(headers: Any) -> str:
    """Return the SHA-256 that the headers of an answer state; empty if they state none."""
    stated = str(headers.get(LINKED_HASH, "")).removeprefix("W/").strip('"')
    return stated if re.fullmatch("[0-9a-f]{64}", stated) else ""


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects and keep the hash that a redirecting server states."""

    def __init__(self) -> None:
        self.stated = ""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """Note the stated hash; the rest is the library's."""
        self.stated = stated_hash(headers) or self.stated
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@dataclass
class Download:
    """One file on its way from `url` to `path`.

    Attributes:
        stated: SHA-256 that the server stated; empty if it stated none.
    """

    url: str
    path: Path
    report: Report
    sleep: Callable[[float], None] = time.sleep
    stated: str = ""
    _spoke: float = field(default_factory=time.monotonic)

    @property
    def part(self) -> Path:
        """The file while it is not complete."""
        return self.path.with_name(f"{self.path.name}.part")

    def run(self) -> None:
        """Download until the file is complete, and put it in its place.

        Raises:
            FileNotFoundError: the server does not have it. RunError: no byte came in several attempts.
        """
        failures = 0
        while True:
            before = self._size()
            try:
                if self._attempt():
                    self.part.replace(self.path)
                    return
                why = "the connection ended early"
            except urllib.error.HTTPError as e:
                if e.code in (401, 403, 404):
                    raise FileNotFoundError(f"{self.url}: the server answers {e.code} {e.reason}") from e
                why = f"{e.code} {e.reason}"
            except (OSError, http.client.HTTPException) as e:
                why = str(e) or type(e).__name__
            failures = 0 if self._size() > before else failures + 1
            if failures == TRIES:
                raise RunError(
                    f"{self.url}: {TRIES} attempts in a row brought nothing ({why}); run the same "
                    f"command again later, {self._size():,} bytes are kept"
                )
            self.report(f"{self.path.name}: {why}; going on from byte {self._size():,}")
            self.sleep(PAUSE_S * 2 ** max(0, failures - 1))

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _attempt(self) -> bool:
        """Read what is missing; return whether the file is complete."""
        have, redirects = self._size(), _Redirects()
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={have}-"} if have else {})
        try:
            answer = urllib.request.build_opener(redirects).open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as e:
            if e.code != 416:
                raise
            # The part is as long as the file, or longer: then it is of another file.
            whole = e.headers.get("Content-Range", "").rpartition("/")[2]
            if whole.isdigit() and int(whole) == have:
                return True
            self.part.unlink()
            return False
        with answer:
            self.stated = redirects.stated or stated_hash(answer.headers) or self.stated
            more = have if answer.status == 206 else 0
            length = answer.headers.get("Content-Length")
            total = more + int(length) if length is not None else None
            with self.part.open("ab" if more else "wb") as file:
                while block := answer.read(CHUNK):
                    file.write(block)
                    self._progress(file.tell(), total)
        return total is None or self._size() == total

    def _progress(self, done: int, total: int | None) -> None:
        if time.monotonic() - self._spoke < PROGRESS_S:
            return
        self._spoke = time.monotonic()
        share = f"{100 * done / total:.0f} % of {total / 1e6:,.0f} MB" if total else f"{done / 1e6:,.0f} MB"
        self.report(f"{self.path.name}: {share}")


@dataclass(frozen=True, kw_only=True)
class FetchJob:
    """Download the challenge's shards and tokenizer into a folder that `pgolf train --data` takes."""

    variant: str
    """Tokenization: sp1024, sp4096, sp8192 or sp8192_caseops; with --repository any that is there."""
    out: Path
    """The folder; files that are there already are kept, and a file that was cut off is continued."""
    train_shards: int = 40
    """Shards of training text, >= 0, of 100 million tokens and 200 MB each. A run of 600 s on 8 H100 reads
    39 of them."""
    documents: bool = False
    """Also download the documents from which the shards were made, as docs_selected.jsonl (48 GB): the
    validation text is the first 50,000 of them. The repository of sp1024 publishes them."""
    repository: str = ""
    """Dataset repository of the Hugging Face Hub; empty: where the variant was published."""
    endpoint: str = ENDPOINT
    """Address of the Hub or of a mirror."""

    def __post_init__(self) -> None:
        if not self.repository:
            if self.variant not in VARIANTS:
                names = ", ".join(VARIANTS)
                raise UserError(
                    f"variant must be one of {names}, got {self.variant!r}; or name its --repository"
                )
            object.__setattr__(self, "repository", VARIANTS[self.variant].repository)

    @property
    def command(self) -> str:
        """The command line that does this job."""
        words = ["pgolf", "data", "fetch"]
        for item in fields(self):
            name, value = item.name.replace("_", "-"), getattr(self, item.name)
            flag = isinstance(value, bool)
            words += [f"--{'' if value else 'no-'}{name}"] if flag else [f"--{name}", str(value)]
        return shlex.join(words)


def fetch(job: FetchJob, report: Report, *, sleep: Callable[[float], None] = time.sleep) -> dict[str, Any]:
    """Download what is missing, check every file, and return the record that is written to `fetched.json`.

    Raises:
        UserError: the repository has no such variant or fewer shards, or a file has another hash than it must
            have. FileNotFoundError, RunError: as `Download.run`.
    """
    job.out.mkdir(parents=True, exist_ok=True)
    # Every reader refuses a folder with this file and names the command in it.
    (job.out / MARKER_NAME).write_text(job.command)
    base = f"{job.endpoint.rstrip('/')}/datasets/{job.repository}/resolve/main/{ROOT}"
    listing = job.out / "published.json"
    Download(f"{base}/manifest.json", listing, report, sleep).run()
    wanted = files_of(json.loads(listing.read_text()), job)
    path = job.out / RECORD
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"files": {}}
    source = {"repository": job.repository, "variant": job.variant}
    if record.get("source", source) != source:
        raise UserError(f"{job.out} holds files of {record['source']}; choose another --out for {source}")
    record["source"] = source
    for number, (name, remote) in enumerate(wanted.items(), 1):
        known = record["files"].get(name)
        target = job.out / name
        if known is not None and target.is_file() and target.stat().st_size == known["bytes"]:
            continue
        report(f"{name}: file {number} of {len(wanted)}")
        download = Download(f"{base}/{remote}", target, report, sleep)
        try:
            download.run()
        except FileNotFoundError as e:
            if name != DOCUMENTS:
                raise
            raise FileNotFoundError(
                f"{e}; run again without --documents and, for the documents, with --variant sp1024 "
                "--train-shards 0 and another --out"
            ) from e
        record["files"][name] = checked(target, download.stated, job, known)
        write_json(path, record)
    (job.out / MARKER_NAME).unlink()
    return record


def files_of(listing: dict[str, Any], job: FetchJob) -> dict[str, str]:
    """Return the files of a job, local name -> path below `ROOT`, in the order of their use.

    Args:
        listing: the repository's manifest.json.
    """
    name = f"fineweb10B_{job.variant}"
    sets = {entry.get("name"): entry for entry in listing.get("datasets", [])}
    if name not in sets:
        there = ", ".join(sorted(map(str, sets))) or "nothing"
        raise UserError(f"{job.repository} has no {name}; it has {there}")
    counts = sets[name].get("stats") or {}
    train, val = int(counts.get("files_train", 0)), int(counts.get("files_val", 0))
    if not 0 <= job.train_shards <= train:
        raise UserError(f"train_shards must be in [0, {train}] for {name}, got {job.train_shards}")
    made_with = sets[name].get("tokenizer_name")
    models = [t for t in listing.get("tokenizers", []) if t.get("name") == made_with]
    if not models or not models[0].get("model_path"):
        raise UserError(f"{job.repository} does not say where the tokenizer {made_with!r} of {name} is")
    wanted = {TOKENIZER_NAME: str(models[0]["model_path"])}
    # The sidecars say how many bytes of the original text each token of a CaseOps text stands for.
    sidecars = [("val_bytes", val)] if "caseops" in job.variant else []
    for split, count in (("val", val), *sidecars, ("train", job.train_shards)):
        names = [f"fineweb_{split}_{i:06d}.bin" for i in range(count)]
        wanted |= {shard: f"datasets/{name}/{shard}" for shard in names}
    return wanted | ({DOCUMENTS: DOCUMENTS} if job.documents else {})


def known_beginning(variant: str, tokens: Tokens) -> str:
    """Return whether the first documents of a validation text are those that this project has.

    Args:
        variant: for all but those of `BEGINNINGS` the answer is empty.
        tokens: `(n,)` uint16, the first shard of validation text.
    """
    if variant not in BEGINNINGS:
        return ""
    count, sha256 = BEGINNINGS[variant]
    same = hashlib.sha256(tokens[:count].tobytes()).hexdigest() == sha256
    return f"its first 902 documents are {'' if same else 'NOT '}those of the challenge's validation text"


def checked(path: Path, stated: str, job: FetchJob, known: dict[str, Any] | None) -> dict[str, Any]:
    """Return the entry of a downloaded file: its bytes, its SHA-256, and what that was compared with.

    Raises:
        UserError: it is not the file that it must be; it is removed.
    """
    found = file_sha256(path)
    pinned = VARIANTS[job.variant].tokenizer_sha256 if job.variant in VARIANTS else ""
    wanted, by = stated, "stated by the server"
    if pinned and path.name == TOKENIZER_NAME:
        wanted, by = pinned, "pinned"
    if not wanted and known is not None:
        wanted, by = known["sha256"], "first download"
    if wanted and found != wanted:
        path.unlink()
        raise UserError(
            f"{path.name}: SHA-256 {found}, expected {wanted} ({by}); it was removed, run the command again, "
            "and if that does not help, the published file has changed"
        )
    entry = {"bytes": path.stat().st_size, "sha256": found, "compared": by if wanted else "first download"}
    if path.name == FIRST_VALIDATION and (beginning := known_beginning(job.variant, read_shard(path))):
        entry["beginning"] = beginning
    return entry
