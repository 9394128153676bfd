"""The submission folder of finished runs: everything that checks, scores or repeats them, written as a whole.

    README.md  submission.json  config.json  train_seed<seed>.log  loss_seed<seed>.png  model_seed<seed>.pgolf
    train_gpt.py or evaluate_gpt.py (the counted program)  requirements.txt  tokenizer.model

The challenge asks for train_gpt.py, which a run counts with artifact.program=train.
Older runs have code.br (the code that they counted) and score.py (which unpacks and calls it) in its place.

Owns the files; what the first two say is in `submission.py`, what a run must be in `finished_runs.py`.
Source: the folders below records/track_10min_16mb of the parameter-golf repository, PR #1855's among them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pgolf.artifact.code_rule import FORMER_NAME, TRAIN_NAME
from pgolf.artifact.codec import compress
from pgolf.data.manifest import verify_folder
from pgolf.data.shards import MANIFEST_NAME, TOKENIZER_NAME, Manifest
from pgolf.errors import UserError
from pgolf.files import file_sha256
from pgolf.report.finished_runs import FinishedRun, read_runs
from pgolf.report.legality_report import checked_reports
from pgolf.report.submission import Entry, challenge_lines, readme, submission, text_differs

OURS = re.compile(
    r"README\.md|submission\.json|config\.json|(evaluate|train)_gpt\.py|code\.br|score\.py|requirements\.txt|tokenizer\.model"
    r"|(train_seed\d+\.log|loss_seed\d+\.png|model_seed\d+\.pgolf|legality_seed\d+\.json)"
)
"""Names of the files that a submission holds: only these are replaced."""

LIBRARIES = ("torch", "numpy", "brotli", "sentencepiece")
"""Packages that the counted code imports; flash-attn-4 joins them where attention uses it."""


def write_submission(
    folders: Sequence[Path],
    out: Path,
    entry: Entry,
    *,
    data: Path | None = None,
    overwrite: bool = False,
    although_illegal: bool = False,
) -> list[FinishedRun]:
    """Write the submission folder of runs of one configuration, one per seed, and return the runs.

    Args:
        folders: run folders. out: the folder to make; it appears when it is complete, or not at all.
        data: folder of the runs' shards, for tokenizer and manifest; None looks where the runs found them,
            and for the tokenizer in the runs' folders too.
        overwrite: replace an older submission folder.
        although_illegal: write it even if the legality report of a run says that a condition fails.
    Raises:
        FileExistsError: `out` holds something, and `overwrite` is off or it is not a submission folder or
            holds more than a submission's files.
        FileNotFoundError, ValueError: see `read_runs`; the shards are not as their manifest says.
            ValueError: `data` has another tokenizer, another manifest or another validation text; the
            legality report of a run is not of its headline, or says that a condition fails.
        OSError: a file cannot be written; nothing is left of the folder, an older one stays.
    """
    _check_out(out, folders, overwrite=overwrite)
    runs = read_runs(folders)
    shards = _shards(runs, data)
    manifest = _manifest(shards, runs, asked=data is not None)
    reports = checked_reports(runs, illegal=although_illegal)
    with _whole_folder(out) as folder:
        files = _write_files(runs, folder, shards, manifest)
        files |= _add_reports(reports, folder)
        _write(folder / "submission.json", json.dumps(submission(runs, entry, manifest), indent=2) + "\n")
        _write(folder / "README.md", readme(runs, entry, files, manifest))
    return runs


def _write_files(
    runs: Sequence[FinishedRun], folder: Path, shards: Path | None, manifest: Manifest | None
) -> dict[str, str]:
    """Write all but README and submission.json; return name -> description, in order."""
    files = {
        "submission.json": "the figures, by the keys of the challenge",
        "config.json": f"every setting, of seed {runs[0].seed}; the other seeds differ in train.seed alone",
    }
    shutil.copyfile(runs[0].folder / "config.json", folder / "config.json")
    for run in runs:
        names = f"model_seed{run.seed}.pgolf", f"train_seed{run.seed}.log", f"loss_seed{run.seed}.png"
        shutil.copyfile(run.folder / "model.pgolf", folder / names[0])
        log = (run.folder / "log.txt").read_text(encoding="utf-8")
        _write(folder / names[1], log + challenge_lines(run, manifest))
        size, digest = run.ledger.model_bytes, file_sha256(folder / names[0])
        files |= {
            names[0]: f"the artifact, {size:,} bytes, SHA-256 {digest}",
            names[1]: "log of the run, and its figures in the form of the challenge's logs",
        }
        if (run.folder / "loss.png").is_file():
            shutil.copyfile(run.folder / "loss.png", folder / names[2])
            files[names[2]] = "training loss"
    files |= _add_code(runs, folder)
    _write(folder / "requirements.txt", requirements(runs[0]))
    tokenizer = _tokenizer(runs, shards)
    if tokenizer is not None:
        shutil.copyfile(tokenizer, folder / TOKENIZER_NAME)
        files[TOKENIZER_NAME] = "the tokenizer, not counted"
    return files


def _add_reports(reports: dict[int, tuple[Path, str]], folder: Path) -> dict[str, str]:
    """Copy the legality reports; return what the README says of them."""
    files = {}
    for seed, (path, said) in reports.items():
        name = f"legality_seed{seed}.json"
        shutil.copyfile(path, folder / name)
        files[name] = f"tests of the headline's way to score on the artifact: {said}"
    return files


def _add_code(runs: Sequence[FinishedRun], folder: Path) -> dict[str, str]:
    """Write the counted code; return what the README says of it and of the libraries that it needs."""
    code, name = runs[0].code, runs[0].code_name
    (folder / name).write_bytes(code)
    if name != FORMER_NAME:
        compiler = "; it needs g++ 10 or newer too" if runs[0].config.artifact.coder == "range" else ""
        does = "it scores the artifacts"
        if name == TRAIN_NAME:
            does = "with PyTorch's operators it trains, quantizes and writes, and it scores with --evaluate"
        return {
            name: f"the counted program, {len(code):,} bytes: {does}, without pgolf",
            "requirements.txt": f"the libraries that {name} imports{compiler}",
        }
    return {
        name: f"the counted code, {len(code):,} bytes: modules after lines `# path`, in brotli",
        "score.py": _add_score(runs, folder),
        "requirements.txt": f"the libraries that {name} imports; pgolf's compiled extension is needed too",
    }


def _add_score(runs: Sequence[FinishedRun], folder: Path) -> str:
    """Copy score.py and return what the README says of it."""
    source = Path(__file__).with_name("score.py")
    shutil.copyfile(source, folder / "score.py")
    size = len(compress(source.read_bytes(), quality=11))
    total, limit = max(run.ledger.total for run in runs), runs[0].config.artifact.limit
    with_it = f"{total + size:,} bytes, {'within' if total + size <= limit else 'above'} the limit"
    return f"unpacks code.br and calls it; not counted ({size:,} bytes in brotli: with it {with_it})"


def requirements(run: FinishedRun) -> str:
    """Return requirements.txt: what the counted code imports, in the run's versions where it says them."""
    found = run.summary.versions
    names = [*LIBRARIES, *(["flash-attn-4"] if run.summary.attention == "fa4" else [])]
    # A local version ("2.11.0+cu130") is on no index.
    lines = [f"{name}=={found[name].split('+')[0]}" if name in found else name for name in names]
    return "\n".join(lines) + "\n"


def _shards(runs: Sequence[FinishedRun], data: Path | None) -> Path | None:
    """Return the folder of the runs' shards if it is there and has their tokenizer."""
    asked = [data] if data is not None else [run.config.data.dir for run in runs]
    for folder in asked:
        if folder is not None and (folder / TOKENIZER_NAME).is_file():
            digest = file_sha256(folder / TOKENIZER_NAME)
            if digest == runs[0].tokenizer_sha256:
                return folder
            if data is not None:
                raise UserError(
                    f"{folder / TOKENIZER_NAME} has SHA-256 {digest[:16]}..., the runs' tokenizer "
                    f"{runs[0].tokenizer_sha256[:16]}...; give the folder they were trained on"
                )
    if data is not None:
        raise FileNotFoundError(f"no {TOKENIZER_NAME} in {data}; give the folder the runs were trained on")
    return None


def _tokenizer(runs: Sequence[FinishedRun], shards: Path | None) -> Path | None:
    """Return the runs' tokenizer: that of their shards, else the copy in a run's folder, if it is the one."""
    if shards is not None:
        return shards / TOKENIZER_NAME
    copies = (run.folder / TOKENIZER_NAME for run in runs)
    wanted = runs[0].tokenizer_sha256
    return next((file for file in copies if file.is_file() and file_sha256(file) == wanted), None)


def _manifest(shards: Path | None, runs: Sequence[FinishedRun], *, asked: bool) -> Manifest | None:
    """Return the manifest of the shards, checked, where it is there and the one that the runs rested on."""
    manifest = verify_folder(shards) if shards is not None else None
    if shards is None or manifest is None:
        return None
    digest = file_sha256(shards / MANIFEST_NAME)
    differs = text_differs(runs, manifest.total("val"))
    for run in runs:
        rested_on = run.summary.manifest
        if not differs and rested_on not in (None, digest):
            differs = f"its {MANIFEST_NAME} has SHA-256 {digest[:16]}..., {run.folder} rested on {rested_on}"
    if differs and asked:
        raise UserError(f"{shards}: {differs}; give the folder the runs were scored on")
    return None if differs or None in [run.summary.manifest for run in runs] else manifest


def _check_out(out: Path, folders: Sequence[Path], *, overwrite: bool) -> None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / "submission.json").is_file():
        raise FileExistsError(f"{out} is there and is not a submission folder; choose another --out")
    if not overwrite:
        raise FileExistsError(f"{out} already holds a submission; pass --overwrite to replace it")
    inside = [str(f) for f in folders if out.resolve() in (f.resolve(), *f.resolve().parents)]
    if inside:
        raise FileExistsError(
            f"{out} holds runs ({', '.join(inside)}), which would be lost; choose another --out"
        )
    others = sorted(p.name for p in out.iterdir() if not (OURS.fullmatch(p.name) and p.is_file()))
    if others:
        raise FileExistsError(
            f"{out} holds {', '.join(others)}, no part of a submission, which would be lost; move it "
            "or choose another --out"
        )


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder next to `out` that takes its place if the block succeeds, and is removed if not."""
    out = out.resolve()
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(new, ignore_errors=True)  # of a process of the same number that was killed
    new.mkdir()
    try:
        yield new
        # Two renames: between them there is no folder of that name, but a whole old one next to it.
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
