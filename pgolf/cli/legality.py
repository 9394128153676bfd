"""`pgolf legality RUN`: test the conditions of a valid submission on an artifact and the way it is scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pgolf.config import LOOSE, Config, EvaluateConfig, Method, from_dict, read_json
from pgolf.errors import UserError

if TYPE_CHECKING:
    from pgolf.artifact.read import Artifact
    from pgolf.data.loader import ValidationText
    from pgolf.dist import Dist
    from pgolf.evaluate.legality import Tested
    from pgolf.evaluate.predictor import Pass
    from pgolf.evaluate.rounding import Limit
    from pgolf.evaluate.validation import DataFolder
    from pgolf.model.gpt import GPT

SAMPLE = 2048
"""Tokens of the sample."""


@dataclass(frozen=True)
class Legality:
    """Test on a sample of the validation text whether a way to score meets the conditions of a submission.

    C1: no score knows a later token, and the counted program next to the file gives the same score alone. C2:
    probabilities sum to 1. C3: tokens are scored before they are learned. C4: each is scored once, on two
    ranks too. By how much losses may differ is measured. The exit status is 1 if one fails.
    """

    run: tyro.conf.Positional[Path]
    """A run's folder, or a file model.pgolf; settings are those of the config.json in its folder."""
    data: Path | None = None
    """Folder of shards with the tokenizer; without it that of config.json."""
    mode: Method | None = None
    """The way to score; without it the one of the run's headline."""
    sample: int = SAMPLE
    """Tokens of the sample, at least 256: the beginnings of the first documents. The whole way to score runs
    on it 25 to 40 times, in float32, so a GPU helps. Chunks and phases are made small enough for it."""
    out: Path | None = None
    """The report, JSON; without it legality.json in the run's folder."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses the GPU if there is one."""


def main(argv: list[str]) -> int:
    """Test, print one line per condition, and write the report."""
    args = tyro.cli(Legality, prog="pgolf legality", args=argv)
    from pgolf.artifact.read import read_artifact
    from pgolf.cli.overrides import check_output
    from pgolf.dist import Dist
    from pgolf.evaluate.validation import DataFolder
    from pgolf.files import write_json
    from pgolf.report.legality_report import NAME

    if args.sample < 256:
        raise UserError(f"--sample must be at least 256 tokens, got {args.sample}")
    path = args.run / "model.pgolf" if args.run.is_dir() else args.run
    out = args.out or path.with_name(NAME)
    check_output(out, "--out")
    artifact, config = read_artifact(path), config_of(path)
    way = args.mode or config.evaluate.headline
    dist = Dist.start(args.device)
    if dist.world_size > 1:
        raise UserError("pgolf legality runs on one rank; start it without torchrun")
    folder = DataFolder.open(args.data or config.data.dir, vocab_size=artifact.header.model.vocab_size)
    if artifact.header.tokenizer_sha256 != folder.sha256:
        raise UserError(f"{path} was trained with another tokenizer than the one in {folder.folder}")
    report = examine(path, artifact, folder, config, way=way, sample=args.sample, dist=dist)
    write_json(out, report)
    print(f"{out}: {verdict_line(report)}")
    return 0 if report["legal"] else 1


def examine(
    path: Path,
    artifact: Artifact,
    folder: DataFolder,
    config: Config,
    *,
    way: Method,
    sample: int = SAMPLE,
    dist: Dist,
) -> dict[str, Any]:
    """Test a way to score on an artifact, print one line per condition, and return the report.

    Args:
        path: of the artifact; the counted program is looked for next to it.
        artifact: what was read from there.
        folder: the data.
        config: with the settings of scoring.
        way: the way to score.
        sample: tokens of the sample.
        dist: the device; one rank.
    """
    from pgolf.artifact.read import build_model
    from pgolf.evaluate.legality import sample_text
    from pgolf.files import file_sha256
    from pgolf.report.reproduced import check_code, find_program

    settings = config.evaluate
    model = build_model(artifact, dist.device).prepare(dist.device, attention="sdpa").exact()
    text = sample_text(folder.validation(), folder.tokenizer.bos_id, sample)
    limit, found = _test(way, model, text, folder.tokenizer.bos_id, settings, dist)
    found += [check_code(path, text, way=way, folder=folder, config=config, dist=dist, limit=limit.nats)]
    print(f"rounding: {limit.text}")
    for tested in found:
        print(f"{tested.verdict:<10}{tested.condition}  {tested.test:<8}{tested.text}")
    program = find_program(path)
    return {
        "artifact": file_sha256(path),
        "code": None if program is None else file_sha256(program),
        "mode": way,
        "settings": settings.settings_of(way),
        "sample": sample,
        "limit": limit._asdict(),
        "legal": all(tested.verdict != "fails" for tested in found),
        "remark": settings.remark(way),
        "conditions": [asdict(tested) for tested in found],
    }


def verdict_line(report: dict[str, Any]) -> str:
    """Return what a report says of a way, in a line."""
    verdict = "no condition fails" if report["legal"] else "NOT LEGAL"
    remark = f" ({report['remark']})" if report["remark"] else ""
    return f"{report['mode']}: {verdict}{remark}"


def config_of(path: Path) -> Config:
    """Return the configuration next to an artifact; the defaults if there is none."""
    file = path.with_name("config.json")
    return from_dict(Config, read_json(file), where=str(file)) if file.is_file() else Config()


def _test(
    way: Method, model: GPT, text: ValidationText, bos_id: int, settings: EvaluateConfig, dist: Dist
) -> tuple[Limit, list[Tested]]:
    """Return by how much losses may differ, and what was found about the way to score."""
    from pgolf.evaluate.legality import check_way
    from pgolf.evaluate.neighbours import check_neighbours
    from pgolf.evaluate.predictor import evaluating
    from pgolf.evaluate.rounding import measured_limit
    from pgolf.evaluate.validation import start_pass, widened

    small, loose = small_settings(settings, text, bos_id), settings.remark(way) == LOOSE
    # Small enough that two ranks have something to do.
    batch_tokens = max(text.tokens.size // 4, settings.context or model.config.max_context)

    def start(part: ValidationText, place: Dist) -> Pass:
        size = text.tokens.size
        return start_pass(
            way, model, part, place, bos_id=bos_id, batch_tokens=batch_tokens, settings=small, whole=size
        )

    def make(part: ValidationText) -> Pass:
        return start(part, dist)

    with evaluating(model), widened(model, small.context):
        limit = measured_limit(make, text, model, bos_id=bos_id, dist=dist)
        found = check_way(
            make,
            text,
            bos_id=bos_id,
            vocab_size=model.config.vocab_size,
            dist=dist,
            loose=loose,
            tilted=settings.tilt.on,
            limit=limit.nats,
        )
        found += check_neighbours(
            start,
            text,
            bos_id=bos_id,
            dist=dist,
            apart=settings.keeps_apart(way),
            limit=limit.nats,
            loose=loose,
        )
    return limit, found


def small_settings(settings: EvaluateConfig, text: ValidationText, bos_id: int) -> EvaluateConfig:
    """Return settings with which chunks of SGD, batches and phases occur in a short text.

    Their sizes do not depend on what is in the text, so this changes no condition.
    """
    inputs, documents = text.tokens.size - 1, int((text.tokens[:-1] == bos_id).sum())
    chunk, half, few = max(inputs // 8, 1), max(documents // 2, 1), max(documents // 4, 1)
    return replace(
        settings,
        adapters=replace(settings.adapters, batch_documents=few),
        sgd=replace(settings.sgd, chunk_tokens=min(settings.sgd.chunk_tokens, chunk)),
        phases=replace(
            settings.phases,
            adapters=replace(settings.phases.adapters, batch_documents=few),
            documents=min(settings.phases.documents, half),
            count=min(settings.phases.count, half),
            chunk_tokens=min(settings.phases.chunk_tokens, chunk),
        ),
    )
