"""`pgolf legality RUN`: test the conditions of a valid submission on an artifact and the way it is scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pgolf.config import LOOSE, Config, EvaluateConfig, Method, from_dict, read_json
from pgolf.errors import UserError

if TYPE_CHECKING:
    from pgolf.data.loader import ValidationText
    from pgolf.evaluate.legality import Make, Tested
    from pgolf.evaluate.validation import DataFolder
    from pgolf.model.gpt import GPT


@dataclass(frozen=True)
class Legality:
    """Test on a sample of the validation text whether a way to score meets the conditions of a submission.

    C1: no score knows a later token. C2: probabilities sum to 1. C3: tokens are scored before they are
    learned. C4: each is scored once. The exit status is 1 if one fails.
    """

    run: tyro.conf.Positional[Path]
    """A run's folder, or a file model.pgolf; settings are those of the config.json in its folder."""
    data: Path | None = None
    """Folder of shards with the tokenizer; without it that of config.json."""
    mode: Method | None = None
    """The way to score; without it the one of the run's headline."""
    sample: int = 2048
    """Tokens of the sample, at least 256: the beginnings of the first documents. The whole way to score runs
    on it 20 to 30 times, in float32, so a GPU helps. Chunks and phases are made small enough for it."""
    out: Path | None = None
    """The report, JSON; without it legality.json in the run's folder."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses the GPU if there is one."""


def main(argv: list[str]) -> int:
    """Test, print one line per condition, and write the report."""
    args = tyro.cli(Legality, prog="pgolf legality", args=argv)
    from pgolf.artifact.read import build_model, read_artifact
    from pgolf.cli.overrides import check_output
    from pgolf.dist import Dist
    from pgolf.evaluate.validation import DataFolder
    from pgolf.files import file_sha256, write_json
    from pgolf.report.legality_report import NAME

    if args.sample < 256:
        raise UserError(f"--sample must be at least 256 tokens, got {args.sample}")
    path = args.run / "model.pgolf" if args.run.is_dir() else args.run
    out = args.out or path.with_name(NAME)
    check_output(out, "--out")
    artifact, config = read_artifact(path), _config(path)
    way = args.mode or config.evaluate.headline
    dist = Dist.start(args.device)
    if dist.world_size > 1:
        raise UserError("pgolf legality runs on one rank; start it without torchrun")
    folder = DataFolder.open(args.data or config.data.dir, vocab_size=artifact.header.model.vocab_size)
    if artifact.header.tokenizer_sha256 != folder.sha256:
        raise UserError(f"{path} was trained with another tokenizer than the one in {folder.folder}")
    model = build_model(artifact, dist.device).prepare(dist.device, attention="sdpa").exact()
    found = _test(way, model, folder, config.evaluate, args.sample, dist)
    for tested in found:
        print(f"{tested.verdict:<10}{tested.condition}  {tested.test:<8}{tested.text}")
    report = {
        "artifact": file_sha256(path),
        "mode": way,
        "settings": config.evaluate.settings_of(way),
        "sample": args.sample,
        "legal": all(tested.verdict != "fails" for tested in found),
        "remark": config.evaluate.remark(way),
        "conditions": [asdict(tested) for tested in found],
    }
    write_json(out, report)
    print(f"{out}: {way}: {'no condition fails' if report['legal'] else 'NOT LEGAL'}")
    return 0 if report["legal"] else 1


def _config(path: Path) -> Config:
    """Return the configuration next to an artifact; the defaults if there is none."""
    file = path.with_name("config.json")
    return from_dict(Config, read_json(file), where=str(file)) if file.is_file() else Config()


def _test(
    way: Method, model: GPT, folder: DataFolder, settings: EvaluateConfig, sample: int, dist: Any
) -> list[Tested]:
    from pgolf.evaluate.legality import check_way, sample_text
    from pgolf.evaluate.validation import start_pass, widened

    bos_id = folder.tokenizer.bos_id
    text = sample_text(folder.validation(), bos_id, sample)
    small = small_settings(settings, text, bos_id)

    def make(part: ValidationText) -> Any:
        return start_pass(
            way,
            model,
            part,
            dist,
            bos_id=bos_id,
            batch_tokens=max(sample, model.config.max_context),
            settings=small,
            whole=text.tokens.size,
        )

    evaluator: Make = make
    with widened(model, small.context):
        return check_way(
            evaluator,
            text,
            bos_id=bos_id,
            vocab_size=model.config.vocab_size,
            dist=dist,
            loose=settings.remark(way) == LOOSE,
            tilted=settings.tilt.on,
        )


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
