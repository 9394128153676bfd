"""What a run makes before it has a folder: whatever can be refused is refused here, and leaves no trace."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pgolf.artifact.size import check_limit
from pgolf.config import Config, MuonConfig, run_hash
from pgolf.data.foreign import check_foreign
from pgolf.data.left_out import cut_documents
from pgolf.data.shards import find_shards
from pgolf.dist import Dist
from pgolf.env import commit_name
from pgolf.errors import MemoryAdvice, RanksFailed, RunError, UserError
from pgolf.evaluate.validation import DataFolder
from pgolf.model.agree import agree_on_kernels
from pgolf.model.gpt import GPT, CompileName
from pgolf.model.neutral import Added
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.report.summary import Summary, device_name, versions
from pgolf.track import check_tracker
from pgolf.train.memory import check_memory
from pgolf.train.progress import Past, read_past, utc
from pgolf.train.snapshot import Snapshot, open_snapshot
from pgolf.train.timing import process_seconds
from pgolf.train.trainer import passes_per_step
from pgolf.train.weights import load_initial

LESS_MEMORY = "pass a smaller --data.micro-tokens"
"""What takes less memory in a run."""


@dataclass
class SetUp:
    """What a run is made of, in every process."""

    data: DataFolder
    model: GPT
    ema: Ema | None
    """None where averaging is off."""
    optimizer: Optimizer
    summary: Summary
    past: Past | None
    """What an earlier process of the run left; None where the run begins."""
    trains: bool
    """Whether this process trains, or only quantizes and scores what an earlier one trained."""
    start: Snapshot | None = None
    """What training continues from; None where it does not, or where the run has a checkpoint of its own."""
    added: str = ""
    """The line of the log on parameters that train.init lacks."""
    memory: str = ""
    """The line of the log on what memory the run needs."""


def check_ready(config: Config, dist: Dist, past: Past | None) -> DataFolder:
    """Open the data, and raise now what the run would raise after hours of training.

    Raises:
        FileNotFoundError: no data folder, or no shards in it.
        UserError: the data are not as their manifest says, not those that `past` began with, or not fit to
            be trained on or scored; the limit leaves no room for a model; the batch does not divide into
            passes. RunError: the tracker or the algorithm that is asked for cannot be used here.
    """
    if dist.is_main:
        check_tracker(config.train.track)
    if config.train.quantize:
        check_limit(config.artifact)
    data = DataFolder.open(config.data.dir, vocab_size=config.model.vocab_size, verify=config.data.verify)
    check_foreign(data.folder, training=config.data.verify)
    if past is not None:
        past.check_data(data.folder, data.facts())
    # Called for what they raise. One document is enough to see that the validation text can be read, has
    # documents, and holds no token that the model does not know.
    data.validation(documents=1)
    bos_id = data.tokenizer.bos_id
    cut_documents(find_shards(data.folder, "train"), bos_id=bos_id, count=config.quant.cap_documents)
    passes_per_step(config.data, dist.world_size)
    _check_algorithm(config.optim.muon, dist.device)
    return data


def _check_algorithm(muon: MuonConfig, device: torch.device) -> None:
    """Refuse an algorithm that the device has no kernel for.

    Raises:
        RunError: it has none.
    """
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if muon.algorithm == "gram" and not hopper:
        raise RunError(
            "optim.muon.algorithm=gram needs a Hopper GPU (compute capability 9.0); use "
            "optim.muon.algorithm=auto, which takes what the device has"
        )


def set_up(config: Config, dist: Dist, *, resume: Path | None, train: bool) -> SetUp:
    """Check everything and make model, average, optimizer and summary, on every rank or on none.

    Args:
        resume: folder of the run to go on with, which this process holds; None: the run begins.
        train: False: train no further, even if training is not over.
    Raises:
        RanksFailed: some rank failed; from its error on that rank. With one process the error itself: see
            `check_ready`, `read_past`, `load_initial`, `open_snapshot` and `check_memory`.
    """
    before, began = process_seconds(), time.perf_counter()
    error: Exception | None = None
    made: SetUp | None = None
    try:
        with MemoryAdvice(LESS_MEMORY):
            past = read_past(resume) if resume is not None else None
            made = _make(config, dist, past, trains=train and (past is None or past.stage == "training"))
    except Exception as e:
        error = e
    # Up to here each rank was by itself, and one may have failed alone: a file may be missing on its host.
    # The next collective must not be entered before all ranks know that, or they would wait for that rank.
    dist.check(error)
    assert made is not None
    agree_on_kernels(made.model, dist, compile=_compiled(config, dist))
    if made.trains or made.past is None:  # else the summary is of the machine that trained
        made.summary.attention = made.model.attention_name
    try:
        made.memory = check_memory(config, dist, attention=made.model.attention_name)
    except UserError as e:  # by rank 0's figures, so all ranks have it; one of them is to print it
        raise RanksFailed(str(e)) from e
    if made.past is None and before is not None:
        made.summary.add("start", before)
    made.summary.add("set_up", time.perf_counter() - began)
    return made


def _make(config: Config, dist: Dist, past: Past | None, *, trains: bool) -> SetUp:
    """Make everything that a rank makes by itself."""
    data = check_ready(config, dist, past)
    model = GPT(config.model, seed=config.train.seed).prepare(
        dist.device,
        attention=config.train.attention,
        compile=_compiled(config, dist),
    )
    # A run that goes on has its weights in its checkpoint, and the initial ones may be gone by then.
    begins, added, start = trains and not (past and past.checkpoint), Added(), None
    if config.train.start is not None and begins:
        start = open_snapshot(config.train.start, config, data)
    if config.train.init is not None and begins:
        added = load_initial(config.train.init, model, config, tokenizer_sha256=data.sha256)
    # After the initial weights are in place: the average starts as a copy of them.
    ema = Ema(dict(model.named_parameters())) if config.optim.averages else None
    optimizer = Optimizer(model, config.optim, dist, ema=ema)
    summary = _summary(config, dist, model, data)
    if start is not None:
        summary.origin = start.origin.to_dict()
    if past is not None:
        summary = _taken_up(summary, past, config, trains=trains)
    new = str(added) if added.names else ""
    return SetUp(data, model, ema, optimizer, summary, past, trains, start, new)


def _compiled(config: Config, dist: Dist) -> CompileName:
    return config.train.compile if dist.device.type == "cuda" else "off"


def _summary(config: Config, dist: Dist, model: GPT, data: DataFolder) -> Summary:
    return Summary(
        name=config.name,
        config_hash=run_hash(config),
        device=device_name(dist.device),
        world_size=dist.world_size,
        attention=model.attention_name,
        parameters=sum(p.numel() for p in model.parameters()),
        started=utc(),
        commit=commit_name(),
        versions=versions(),
        data=data.facts(),
        overrun=0.0,
    )


def _taken_up(summary: Summary, past: Past, config: Config, *, trains: bool) -> Summary:
    """Return the summary of this process with what the run knew before it."""
    kept = ["phases", "reserve", "clock", "train", "ledger", "started", "origin"]
    if not trains:
        # The summary is of the machine that trained; the sessions tell which processes there were.
        kept += ["device", "world_size", "attention", "commit", "versions", "peak_mib"]
    if past.stage == "written":
        kept.append("config_hash")  # which the artifact holds; settings of scoring may have changed since
    known = replace(summary, **{key: getattr(past.summary, key) for key in kept})
    if known.clock is not None:
        known.stop_clock(known.clock, config.train.seconds)
    return known
