"""`pgolf evaluate ARTIFACT --data DIR`: bits per byte of an artifact on a validation text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from pgolf.cli.overrides import check_output, say
from pgolf.config import (
    Config,
    EvaluateConfig,
    Method,
    PhasesConfig,
    SgdConfig,
    SlotConfig,
    TiltConfig,
    TttConfig,
    from_dict,
    read_json,
    to_dict,
)
from pgolf.errors import UserError

if TYPE_CHECKING:
    from pgolf.artifact.read import Artifact
    from pgolf.data.loader import ValidationText
    from pgolf.dist import Dist
    from pgolf.evaluate.bpb import Score
    from pgolf.evaluate.sums import Sums
    from pgolf.evaluate.validation import DataFolder
    from pgolf.model.gpt import GPT, CompileName

SHORT_TEXT = 200_000
"""Tokens up to which a model is not compiled for scoring."""
SHARED_GPU = 100 * 2**30
"""Bytes of a GPU's memory from which on three processes with adapters fit. On an H200 of 141 GB each held at
most 25 GiB, and PyTorch more for later."""
ALONE = ("plain", "sliding", "local", "ttt", "slot", "causal_slot")
"""Modes in which documents are scored on their own, so that any number of ranks can go on."""
SETTINGS = ("stride", "context", "sgd", "phases", "slot", "tilt")
"""What the JSON file names of the settings of scoring, next to "ttt"."""


CONFIG = "--config"
USERS = {"ttt": ("ttt",), "sgd": ("sgd",), "phases": ("phased",), "slot": ("slot", "causal_slot")}
"""The modes that use each section of settings."""


@dataclass(frozen=True)
class Evaluate:
    """Score an artifact on the validation text of a data folder, and print one line per mode."""

    artifact: tyro.conf.Positional[Path]
    """A file written by `pgolf train` or `pgolf quantize`."""
    data: Path
    """Folder of shards with the tokenizer that the model was trained with."""
    config: Path | None = None
    """The config.json of a run: score with its settings, but for what the command line says. They include its
    evaluate.context, which the run itself does not use for plain scores; --context 0 gives those."""
    mode: tuple[Method, ...] = ("plain",)
    """One or more ways to score. plain: documents in segments of context tokens. sliding: a window that moves
    over each document. local: documents as a whole, in which a token attends to the last context tokens, at
    the cost of plain. ttt: adapters that learn from each part of a document after it was scored. sgd: a
    sliding window over a model that learns from each chunk of the text after it was scored. phased: ttt on a
    model that learns from scored documents in pauses. slot: SLOT of PR #1298, which the challenge does not
    allow, because it learns from what it then scores. causal_slot: the same, learned from scored tokens only.
    docs/scoring.md describes all of them."""
    context: int = 0
    """Tokens of the longest window, and how far attention reaches in local; 0 = the model's max_context. It
    may be larger than that."""
    documents: int = 0
    """Score only the first n documents; 0 = all. Only a score of all documents is comparable."""
    stride: int = 64
    """Tokens that each window of all ways but plain, local, ttt and phased scores, 1 to context; a smaller
    stride is slower."""
    tokens: int = 98_304
    """Tokens per forward pass of all ways but ttt and phased; changes speed and memory, not the score."""
    ttt: TttConfig = field(default_factory=TttConfig)
    """Settings of `ttt`."""
    sgd: SgdConfig = field(default_factory=SgdConfig)
    """Settings of `sgd`."""
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    """Settings of `phased`, with its adapters."""
    slot: SlotConfig = field(default_factory=SlotConfig)
    """Settings of `slot` and `causal_slot`."""
    tilt: TiltConfig = field(default_factory=TiltConfig)
    """The n-gram tilt on top of every way to score."""
    sums: Path | None = None
    """Keep the summed loss of every document in this folder, so that the same command continues an evaluation
    that was interrupted, and gives the same score. Documents that are in the folder are not scored again."""
    json: Path | None = None
    """Also write the results to this file, as JSON."""
    legality: bool = False
    """Also test each way on a sample of the text, as `pgolf legality` does; the exit status is 1 if one
    of the conditions fails."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Device to run on; auto uses the GPU if there is one."""

    @property
    def settings(self) -> EvaluateConfig:
        """All settings of the ways to score."""
        return EvaluateConfig(adapters=self.ttt, **{name: getattr(self, name) for name in SETTINGS})


def parse(argv: list[str]) -> tuple[Evaluate, Evaluate]:
    """Return what the words ask for, and what settings are that they leave out: with --config the run's."""
    default = Evaluate(artifact=tyro.MISSING, data=tyro.MISSING)
    # A word that tyro would refuse is left to it.
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith(CONFIG) else [word])]
    if CONFIG in words[:-1]:
        path = Path(words[words.index(CONFIG) + 1])
        run = from_dict(Config, read_json(path), where=str(path)).evaluate
        settings = {name: getattr(run, name) for name in SETTINGS}
        default = dataclasses.replace(default, mode=("plain", *run.ways), ttt=run.adapters, **settings)
    return tyro.cli(Evaluate, prog="pgolf evaluate", args=argv, default=default), default


def main(argv: list[str]) -> int:
    """Read the artifact, score it and print the results."""
    args, default = parse(argv)
    from pgolf.env import launch
    from pgolf.train.signals import Signals, Stopped

    if args.json is not None:
        check_output(args.json, "--json")
    check_kind(args.artifact)
    if args.legality and launch().world_size > 1:
        raise UserError(
            "--legality runs on one rank; score without torchrun, or run `pgolf legality` after it"
        )
    try:
        with Signals():
            return _evaluate(args, default)
    except Stopped as stop:
        if args.sums is None:
            advice = "nothing is kept; with --sums DIR, the same command would go on"
        else:
            advice = f"the same command goes on with the sums in {args.sums}"
        stop.args = (f"{stop}; {advice}",)
        raise


def _unused(args: Evaluate, default: Evaluate) -> Iterator[str]:
    """Yield what was set and has no effect on any mode that was asked for."""
    sections = {name: getattr(args, name) for name in USERS}
    for name, section in sections.items():
        if section != getattr(default, name) and not set(USERS[name]) & set(args.mode):
            advice = "; its adapters are --phases.adapters" if name == "ttt" and "phased" in args.mode else ""
            yield f"--{name} has no effect on {', '.join(args.mode)}{advice}"
    if args.tilt != default.tilt and not args.tilt.on:
        yield "--tilt has no effect without --tilt.on"


def _wider(args: Evaluate, max_context: int) -> str:
    """Return what to say where plain scores have other windows than those of the run; empty if not so."""
    if args.config is None or "plain" not in args.mode or args.context in (0, max_context):
        return ""
    return (
        f"plain has windows of {args.context:,} tokens; the run itself scores plainly in windows of "
        f"{max_context:,}, as --context 0 does"
    )


def _evaluate(args: Evaluate, default: Evaluate) -> int:
    from pgolf.artifact.read import read_artifact
    from pgolf.dist import Dist
    from pgolf.env import launch
    from pgolf.log import Progress

    main_rank = launch().rank == 0
    for line in _unused(args, default):
        say(line)
    with Progress("evaluate", 1, is_main=main_rank) as progress:
        progress.doing = f"decoding the weights of {args.artifact.name}"
        artifact = read_artifact(args.artifact)
    _check_windows(args, artifact.header.model.max_context)
    say(_wider(args, artifact.header.model.max_context))
    with Progress("evaluate", 1, is_main=main_rank) as progress:
        progress.doing = "starting the device and the ranks"
        dist = Dist.start(args.device, share_gpus=True)
    with dist.closing():
        with Progress("evaluate", 1, is_main=main_rank) as progress:
            progress.doing = f"reading and checking {args.data}"
            data_folder = _open(args, artifact)
            text, documents = _text(args.documents, data_folder)
        scores = _score(args, artifact, data_folder, text, documents, dist)
        keep = partial(_write, args, data_folder, documents, scores) if dist.is_main and args.json else None
        if keep is not None:
            keep({})  # the tests of legality take minutes, and may fail
        reports = _legality(args, artifact, data_folder, dist) if args.legality else {}
        if keep is not None and reports:
            keep(reports)
    return 0 if all(report["legal"] for report in reports.values()) else 1


def _check_windows(args: Evaluate, max_context: int) -> None:
    """Raise UserError if some way has windows that do not fit, before another way takes its time."""
    longest, what = max_context, "the model's max_context"
    if args.context:
        longest, what = args.context, "--context"
    windows = set(args.mode) - {"local", "ttt", "phased"}
    if windows and args.tokens < longest:
        raise UserError(f"--tokens must be at least {what}, {longest:,}, got {args.tokens:,}")
    if "local" in args.mode and args.tokens < 1:
        raise UserError(f"--tokens must be at least 1, got {args.tokens:,}")
    if windows - {"plain"} and not 1 <= args.stride <= longest:
        raise UserError(f"--stride must be in [1, {longest:,}] ({what}), got {args.stride:,}")


def _print(args: Evaluate, data_folder: DataFolder, documents: int, mode: Method, score: Score) -> None:
    """Print the line of a mode."""
    note = f"  (first {documents:,} documents only)" if documents else ""
    note += f"  ({data_folder.checked})" if data_folder.manifest is None else ""
    remark = args.settings.remark(mode)
    said = f"{mode}{' with tilt' if args.tilt.on else ''}{note}" + (f"  ({remark})" if remark else "")
    counts = f"{score.tokens:,} tokens  {score.bytes:,} B"
    counts += f" ({score.kept:,} of them scored before)" if score.kept else ""
    line = f"{score.bpb:.4f} bpb  {score.loss:.4f} nats/token  {counts}  {score.seconds:.1f} s  {said}"
    print(line, flush=True)


def _open(args: Evaluate, artifact: Artifact) -> DataFolder:
    """Return the data folder, checked against its manifest and the artifact."""
    from pgolf.data.foreign import check_foreign
    from pgolf.evaluate.validation import DataFolder

    header = artifact.header
    data_folder = DataFolder.open(args.data, vocab_size=header.model.vocab_size)
    if header.tokenizer_sha256 != data_folder.sha256:
        theirs, ours = header.tokenizer_sha256[:16], data_folder.sha256[:16]
        raise UserError(
            f"{args.artifact} was trained with another tokenizer (sha256 {theirs}...) than the one in "
            f"{args.data} ({ours}...); use a folder with the tokenizer.model of the run"
        )
    check_foreign(data_folder.folder)
    return data_folder


def check_kind(path: Path) -> None:
    """Raise UserError with advice for a path that is not an artifact, but a run folder or a checkpoint."""
    if path.is_dir():
        inside = path / "model.pgolf"
        hint = f"pass {inside}" if inside.is_file() else "pass the file model.pgolf that a run wrote"
        raise UserError(f"{path} is a folder, expected an artifact; {hint}")
    if path.suffix == ".safetensors":
        raise UserError(
            f"{path} is a checkpoint, expected an artifact; pass the model.pgolf next to it, or make one: "
            f"pgolf quantize {path} --data DIR --out FILE"
        )


def _text(documents: int, data_folder: DataFolder) -> tuple[ValidationText, int]:
    """Return the text to score and its number of documents, which is 0 if it is the whole text."""
    from pgolf.evaluate.documents import document_bounds

    whole = data_folder.validation()
    if not documents:
        return whole, 0
    text = data_folder.validation(documents=documents)
    if text.tokens.size == whole.tokens.size:
        return text, 0
    return text, len(document_bounds(text, data_folder.tokenizer.bos_id)[0])


def _score(
    args: Evaluate,
    artifact: Artifact,
    data_folder: DataFolder,
    text: ValidationText,
    documents: int,
    dist: Dist,
) -> dict[str, Score]:
    """Return the scores of all modes that were asked for; print each as soon as it is known."""
    import torch

    from pgolf.artifact.read import build_model
    from pgolf.evaluate.validation import score_as
    from pgolf.log import Progress
    from pgolf.model.agree import agree_on_kernels

    # Compiling takes longer than a short text.
    worth = dist.device.type == "cuda" and text.tokens.size > SHORT_TEXT
    with Progress("evaluate", 1, is_main=dist.is_main) as progress:
        progress.doing = "choosing and compiling the attention"
        model = build_model(artifact, dist.device)
        compile: CompileName = "blocks" if worth else "off"
        agree_on_kernels(model.prepare(dist.device, compile=compile), dist, compile=compile)
    settings = args.settings
    scores: dict[str, Score] = {}
    memory = torch.cuda.get_device_properties(dist.device).total_memory if worth else 0
    for mode in dict.fromkeys(args.mode):
        say(sharing_note(mode, dist.world_size, memory))
        adapters = _compiled(args, text, data_folder, model, dist) if mode == "ttt" else None
        compiled = worth if adapters is None else adapters
        facts = _facts(args, mode, model, text, dist, compiled=compiled)
        more: dict[str, Any] = {"batch_tokens": args.tokens, "settings": settings, "compiled": adapters}
        with _sums(args, mode, facts, text, dist) as sums:
            scores[mode] = score_as(mode, model, data_folder, text, dist, sums=sums, **more)
        if dist.is_main:
            _print(args, data_folder, documents, mode, scores[mode])
    return scores


def sharing_note(mode: Method, processes: int, memory: int) -> str:
    """Return the advice to let processes share a GPU of `memory` bytes; empty if it does not help."""
    if mode != "ttt" or processes > 1 or memory < SHARED_GPU:
        return ""
    return (
        "ttt waits for the host where windows are short; three processes that share this GPU may be faster: "
        "torchrun --standalone --nproc_per_node=3 -m pgolf evaluate ..."
    )


def _compiled(
    args: Evaluate, text: ValidationText, data_folder: DataFolder, model: GPT, dist: Dist
) -> bool | None:
    """Return whether `ttt` is to compile; None without --sums: the pass decides.

    Sums that are kept decide, because compiled kernels round differently, and what is worth compiling
    depends on the number of GPUs.
    """
    from pgolf.evaluate.documents import document_bounds
    from pgolf.evaluate.sums import kept_facts
    from pgolf.evaluate.ttt import plan_batches, worth_compiling

    if args.sums is None:
        return None
    kept = kept_facts(args.sums, "ttt").get("compiled")
    if isinstance(kept, bool) and not args.ttt.warm_a:
        return kept
    lengths = document_bounds(text, data_folder.tokenizer.bos_id)[1]
    batches = plan_batches(lengths, args.context or model.config.max_context, args.ttt, dist.world_size)
    return worth_compiling(batches, model, dist)


def _facts(
    args: Evaluate, mode: Method, model: GPT, text: ValidationText, dist: Dist, *, compiled: bool
) -> dict[str, Any]:
    """Return all on which the losses of a mode depend to the last bit; nothing without --sums."""
    import torch

    import pgolf
    from pgolf.env import commit_name
    from pgolf.evaluate.sums import text_sha256
    from pgolf.files import file_sha256

    if args.sums is None:
        return {}
    cuda = dist.device.type == "cuda"
    return {
        "way": mode,
        "artifact": file_sha256(args.artifact),
        "text": text_sha256(text),
        **args.settings.settings_of(mode),
        **({} if mode in ("ttt", "phased") else {"tokens": args.tokens}),
        # What is learned on several ranks is a sum over them, whose rounding depends on their number.
        "ranks": "any" if mode in ALONE else dist.world_size,
        "device": torch.cuda.get_device_name(dist.device) if cuda else "cpu",
        "attention": model.attention_name,
        "heads": model.heads_name,
        "compiled": compiled,
        "torch": torch.__version__,
        "pgolf": f"{pgolf.__version__} {commit_name(12) or ''}".strip(),
    }


def _legality(
    args: Evaluate, artifact: Artifact, data_folder: DataFolder, dist: Dist
) -> dict[str, dict[str, Any]]:
    """Return what the tests say of every way that was asked for, and print it."""
    from pgolf.cli.legality import config_of, examine, verdict_line

    config = dataclasses.replace(config_of(args.artifact), evaluate=args.settings)
    reports: dict[str, dict[str, Any]] = {}
    for way in dict.fromkeys(args.mode):
        reports[way] = examine(args.artifact, artifact, data_folder, config, way=way, dist=dist)
        print(verdict_line(reports[way]))
    return reports


@contextmanager
def _sums(
    args: Evaluate, mode: Method, facts: dict[str, Any], text: ValidationText, dist: Dist
) -> Iterator[Sums | None]:
    """Open the sums of a mode, if there is --sums, and say how much is in them."""
    from pgolf.evaluate.sums import open_sums

    if args.sums is None:
        yield None
        return
    fresh = {"ttt": args.ttt.warm_a, "phased": args.phases.adapters.warm_a}.get(mode, False)
    with open_sums(args.sums, facts, dist, fresh=fresh) as sums:
        if fresh:
            say(f"{mode} begins anew: what it has learned from earlier documents is not kept in {args.sums}")
        if sums.tokens:
            total = text.tokens.size - 1
            say(f"{mode} goes on: {args.sums} has {sums.tokens:,} of {total:,} tokens")
        yield sums


def _write(
    args: Evaluate,
    data_folder: DataFolder,
    documents: int,
    scores: dict[str, Score],
    reports: dict[str, dict[str, Any]],
) -> None:
    """Write the scores as JSON, with the data, the number of documents (0 means all) and the settings."""
    from pgolf.files import atomic_file

    assert args.json is not None
    data: dict[str, Any] = {
        "artifact": str(args.artifact),
        "data": {**data_folder.facts(), "checked": data_folder.checked},
        "documents": documents or "all",
        **{key: value for key, value in to_dict(args.settings).items() if key in SETTINGS},
        "ttt": to_dict(args.ttt),
        "scores": {
            mode: dataclasses.asdict(score) | {"remark": args.settings.remark(mode)}
            for mode, score in scores.items()
        },
        **({"legality": reports} if reports else {}),
    }
    with atomic_file(args.json) as file:
        file.write(json.dumps(data, indent=2).encode() + b"\n")
