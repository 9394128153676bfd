"""One run from shards to a scored artifact: train -> average -> quantize -> write -> read back -> score.

The run folder holds config.json, metrics.jsonl, log.txt, raw.safetensors, ema.safetensors, model.pgolf,
code.br (the code that is counted with it), loss.png and summary.json; with train.quantize off, no model.pgolf
and no code.br. Everything up to the artifact is written before scoring starts, and the summary before the
further ways to score, so a late failure loses nothing.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pgolf.artifact.code import code_archive
from pgolf.artifact.fit import fit_artifact
from pgolf.artifact.read import read_artifact
from pgolf.artifact.size import Ledger
from pgolf.artifact.write import write_artifact
from pgolf.config import Config, TrainConfig, config_hash, to_dict
from pgolf.data.loader import TrainLoader
from pgolf.data.shards import atomic_file, find_shards
from pgolf.dist import Dist
from pgolf.env import commit_name
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.corpus import Corpus, score_as, score_model
from pgolf.log import RunLog
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.quant.calibrate import Calibration, calibrate, quantize_model
from pgolf.quant.state import QuantizedState
from pgolf.report.plots import plot_loss
from pgolf.train.budget import Clock
from pgolf.train.loop import Trainer, TrainResult, passes_per_step
from pgolf.train.rehearse import rehearse
from pgolf.train.state import (
    clone_parameters,
    copy_parameters,
    load_initial,
    save_weights,
    write_json,
)
from pgolf.train.timing import process_seconds

ARTIFACT = "model.pgolf"
PACKAGES = ("torch", "numpy", "brotli", "sentencepiece", "triton", "flash-attn-4")
"""What a run's speed, or reading its artifact, depends on."""


@dataclass
class Summary:
    """What a run found; written as summary.json."""

    name: str
    config_hash: str
    device: str
    world_size: int
    attention: str
    parameters: int
    scores: dict[str, Score] = field(default_factory=dict)
    """raw, ema, quantized, and what config.evaluate adds."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time of every phase, in order: start is the process until set_up (Python, imports, the ranks);
    clock, from the start of training to the last code, holds four; total is the process until the summary.
    start and total are missing where the system does not say when a process began."""
    train: dict[str, Any] = field(default_factory=dict)
    ledger: Ledger | None = None
    peak_mib: float = 0.0
    started: str = ""
    """When the run was set up, UTC."""
    commit: str = ""
    """Of the sources, with -dirty where files differ from it; empty where nobody knows."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of Python and the packages that are installed; cuda is what torch was built for."""


class Run:
    """The phases of one run, in order; `execute` calls them."""

    def __init__(self, config: Config, dist: Dist, folder: Path) -> None:
        before, began = process_seconds(), time.perf_counter()
        self._config, self._dist, self._folder = config, dist, folder
        self._corpus = Corpus.open(config.data.dir, vocab_size=config.model.vocab_size)
        self._corpus.validation(documents=1)  # raises now what scoring would raise after the run
        find_shards(self._corpus.folder, "train")
        passes_per_step(config.data, dist.world_size)
        self._model = GPT(config.model, seed=config.train.seed).prepare(
            dist.device,
            attention=config.train.attention,
            compile=config.train.compile if dist.device.type == "cuda" else "off",
        )
        if config.train.init is not None:
            load_initial(config.train.init, self._model, config, tokenizer_sha256=self._corpus.sha256)
        parameters = dict(self._model.named_parameters())
        self._ema = Ema(parameters) if config.optim.ema_horizon else None
        self._optimizer = Optimizer(self._model, config.optim, dist, ema=self._ema)
        self._summary = Summary(
            name=config.name,
            config_hash=config_hash(config),
            device=_device_name(dist.device),
            world_size=dist.world_size,
            attention=self._model.attention_name,
            parameters=sum(p.numel() for p in parameters.values()),
            started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            commit=commit_name(),
            versions=_versions(),
        )
        if before is not None:
            self._summary.seconds["start"] = before
        self._summary.seconds["set_up"] = time.perf_counter() - began

    def execute(self) -> Summary:
        """Run every phase and return the summary (scores on every rank, files from the main rank)."""
        config, dist = self._config, self._dist
        self._folder = make_folder(self._folder, dist)
        self._log = log = RunLog(self._folder, is_main=dist.is_main)
        if dist.is_main:
            write_json(self._folder / "config.json", to_dict(config))
        s = self._summary
        log.line(
            f"run {self._folder} | {s.device} x{s.world_size} | {s.parameters:,} parameters | {s.attention}"
        )
        if self._model.attention_note:
            log.line(self._model.attention_note)
        if config.train.init is not None:
            dist.assert_replicas_equal(dict(self._model.named_parameters()))
            log.line(f"starts from the weights of {config.train.init}")
        with open_loader(config, self._corpus, dist) as loader:
            trainer = Trainer(config, self._model, self._optimizer, self._ema, loader, dist)
            s.seconds["warm_up"] = trainer.warm_up(log)
            clock = Clock(self._with_reserve(loader), dist)
            clock.start()
            result = self._train(trainer, clock)
            self._record_training(result)
            raw, best = self._timed("save", lambda: self._save(result))
            calibration = self._calibrate(loader) if config.train.quantize else None
        dist.assert_replicas_equal(raw)
        if calibration is not None:
            s.ledger = self._write(best, calibration, clock)
        self._score(raw, best)
        self._write_summary()
        self._score_otherwise()
        self._write_summary()
        if dist.is_main:
            self._timed("plot", self._plot)
            total = process_seconds()
            if total is not None:
                s.seconds["total"] = total
            self._write_summary()
            log.line(format_table(s))
        return s

    def _plot(self) -> None:
        if plot_loss(self._folder / "metrics.jsonl", self._folder / "loss.png"):
            self._log.line(f"loss plot: {self._folder / 'loss.png'}")

    def _with_reserve(self, loader: TrainLoader) -> TrainConfig:
        """Return the clock's settings with the seconds that a rehearsal says quantization needs."""
        train = self._config.train
        if train.quantize_reserve is None and not train.quantize:
            train = replace(train, quantize_reserve=0.0)
        if train.quantize_reserve is None and train.seconds:
            reserve = self._timed(
                "rehearse",
                lambda: rehearse(
                    self._model, loader, self._config.quant, self._dist, save=self._rehearse_saving
                ),
            )
            train = replace(train, quantize_reserve=reserve)
            self._log.line(f"rehearsal: {reserve:.2f} s of the clock are kept for quantization")
        self._summary.seconds["reserve"] = train.quantize_reserve or 0.0
        return train

    def _rehearse_saving(self) -> None:
        """Write two checkpoints, as after training, to a file that does not stay."""
        if self._dist.is_main:
            path, weights = self._folder / "rehearsal.safetensors", clone_parameters(self._model)
            try:
                for _ in range(2):
                    save_weights(path, weights, self._config)
            finally:
                path.unlink(missing_ok=True)

    def _train(self, trainer: Trainer, clock: Clock) -> TrainResult:
        """Run the loop; when interrupted, keep the weights that there are."""
        result = TrainResult()
        try:
            trainer.run(clock, self._log, result)
        except KeyboardInterrupt:
            self._save(result)
            self._log.line(f"interrupted after {result.steps} steps; the weights are in {self._folder}")
            raise
        return result

    def _record_training(self, result: TrainResult) -> None:
        s = self._summary
        s.seconds["train"] = result.seconds
        times = {**result.step_ms, "optimizer": result.optimizer_ms}
        median = {k: float(torch.tensor(v).median()) if v else None for k, v in times.items()}
        s.train = {
            "steps": result.steps,
            "tokens": result.tokens,
            "loop_step": result.loop_step,
            "last_loss": result.last_loss,
            "skipped_steps": result.skipped,
            "ms_loop_off": median["loop_off"],
            "ms_loop_on": median["loop_on"],
            "ms_optimizer": median["optimizer"],
            "tokens_per_s": result.tokens / max(result.seconds, 1e-9),
        }
        if self._dist.device.type == "cuda":
            s.peak_mib = torch.cuda.max_memory_allocated(self._dist.device) / 2**20

    def _save(self, result: TrainResult) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep raw and averaged weights in memory and on disk; leave the averaged ones in the model."""
        raw = clone_parameters(self._model)
        best = self._ema.state_dict() if self._ema is not None else raw
        copy_parameters(self._model, best)
        if self._dist.is_main:
            facts = {"steps": result.steps, "tokenizer_sha256": self._corpus.sha256}
            save_weights(self._folder / "raw.safetensors", raw, self._config, **facts)
            save_weights(self._folder / "ema.safetensors", best, self._config, **facts)
        return raw, best

    def _calibrate(self, loader: TrainLoader) -> Calibration:
        """Measure what quantization needs to know, with the weights that are in the model."""
        batches = iter(loader.next, None)
        return self._timed(  # type: ignore[no-any-return]
            "calibrate", lambda: calibrate(self._model, batches, self._config.quant, self._dist)
        )

    def _write(self, best: dict[str, Tensor], calibration: Calibration, clock: Clock) -> Ledger | None:
        """Quantize (inside the clock), compress and write, all on rank 0; a failure reaches every rank."""
        config, s = self._config, self._summary
        inputs = self._model.quant_inputs()
        began = time.perf_counter()

        def quantize(clip_scale: float) -> QuantizedState:
            state = quantize_model(
                best,
                inputs,
                calibration.hessians,
                config.quant,
                clip_scale=clip_scale,
                curvature=calibration.curvature,
            )
            if "clock" not in s.seconds:
                s.seconds["quantize"] = time.perf_counter() - began
                s.seconds["clock"] = clock.elapsed
                self._log.line(f"quantized at {clock.elapsed:.1f} s of {config.train.seconds:g} s")
            return state

        compressing = time.perf_counter()
        ledger: Ledger | None = None
        error: str | None = None
        if self._dist.is_main:
            try:
                ledger = write_quantized(
                    self._folder / ARTIFACT, quantize, config, tokenizer_sha256=self._corpus.sha256
                )
                with atomic_file(self._folder / "code.br") as file:
                    file.write(code_archive())
            except (ValueError, OSError, RuntimeError) as e:
                error = str(e)
        self._dist.check(error)
        s.seconds["write"] = time.perf_counter() - compressing - s.seconds.get("quantize", 0.0)
        return ledger

    def _score(self, raw: dict[str, Tensor], best: dict[str, Tensor]) -> None:
        """Score raw, averaged and quantized weights, where there are, over the whole validation set."""
        candidates = {"raw": raw}
        if self._ema is not None:
            candidates["ema"] = best
        if self._config.train.quantize:
            artifact = self._timed("read", lambda: read_artifact(self._folder / ARTIFACT))
            candidates["quantized"] = artifact.state
        for name, tensors in candidates.items():
            copy_parameters(self._model, tensors)
            score = score_model(self._model, self._corpus, self._config.data.micro_tokens, self._dist)
            self._add_score(name, score)

    def _score_otherwise(self) -> None:
        """Score the quantized weights, which are in the model, in the further ways that are asked for."""
        config = self._config.evaluate
        wanted: dict[Literal["sliding", "ttt"], bool] = {"sliding": config.sliding, "ttt": config.ttt}
        modes = [mode for mode, asked in wanted.items() if asked]
        text = self._corpus.validation() if modes else None
        for mode in modes:
            assert text is not None
            score = score_as(
                mode,
                self._model,
                self._corpus,
                text,
                self._dist,
                batch_tokens=self._config.data.micro_tokens,
                stride=config.stride,
                ttt=config.adapters,
            )
            self._add_score(mode, score)

    def _write_summary(self) -> None:
        if self._dist.is_main:
            write_json(self._folder / "summary.json", summary_dict(self._summary))

    def _add_score(self, name: str, score: Score) -> None:
        self._summary.scores[name] = score
        self._summary.seconds[f"score_{name}"] = score.seconds
        self._log.line(f"{name}: {score.bpb:.4f} bpb over {score.tokens:,} tokens in {score.seconds:.1f} s")

    def _timed(self, phase: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        self._summary.seconds[phase] = time.perf_counter() - began
        return result


def make_folder(wanted: Path, dist: Dist) -> Path:
    """Make the folder `wanted` and return it; where another run has it, `wanted-2`, `wanted-3`, ...

    Every rank calls it and gets the path that rank 0 made.

    Raises:
        RuntimeError: the folder cannot be made (on every rank).
    """
    number, error = 1, None
    if dist.is_main:
        try:
            while not _make_new(_numbered(wanted, number)):
                number += 1
        except OSError as e:
            error = f"cannot make {wanted}: {e.strerror}; choose another --train.out"
    dist.check(error)
    return _numbered(wanted, int(dist.share([number])[0]))


def _numbered(path: Path, number: int) -> Path:
    return path if number == 1 else path.with_name(f"{path.name}-{number}")


def _make_new(path: Path) -> bool:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        return False
    return True


def open_loader(config: Config, corpus: Corpus, dist: Dist) -> TrainLoader:
    """Return this rank's training loader."""
    return TrainLoader(
        config.data,
        vocab_size=config.model.vocab_size,
        bos_id=corpus.tokenizer.bos_id,
        max_context=config.model.max_context,
        seed=config.train.seed,
        rank=dist.rank,
        world_size=dist.world_size,
        device=dist.device,
    )


def write_quantized(
    path: Path, quantize: Callable[[float], QuantizedState], config: Config, *, tokenizer_sha256: str
) -> Ledger:
    """Quantize, compress and write the artifact; with artifact.fit, choose the clips that fill the limit.

    Raises:
        ArtifactError: above the limit; nothing is written.
    """
    limit, facts = config.artifact.limit, config_hash(config)
    if config.artifact.fit:
        return fit_artifact(
            path, quantize, config.model, tokenizer_sha256=tokenizer_sha256, config_hash=facts, limit=limit
        )
    return write_artifact(
        path, quantize(1.0), config.model, tokenizer_sha256=tokenizer_sha256, config_hash=facts, limit=limit
    )


def train_run(config: Config) -> Summary:
    """Make a run folder and run `config` in it; under torchrun every rank calls this.

    Raises:
        RuntimeError: a rank failed during set-up; every rank raises, naming the first.
    """
    dist = Dist.start(config.train.device)
    try:
        stamp = int(dist.share([time.time()])[0])
        folder = config.train.out / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(stamp))}-{config.name}"
        run, error = None, None
        try:
            run = Run(config, dist, folder)
        except (OSError, ValueError, TypeError, RuntimeError) as e:
            error = f"{type(e).__name__}: {e}"
        dist.check(error)
        assert run is not None
        return run.execute()
    finally:
        dist.close()


def summary_dict(s: Summary) -> dict[str, Any]:
    """Return the summary as plain JSON data."""
    plain = {k: v for k, v in vars(s).items() if k not in ("scores", "ledger")}
    scores = {k: {**vars(v), "loss": v.loss, "bpb": v.bpb} for k, v in s.scores.items()}
    return {**plain, "scores": scores, "bytes": s.ledger and s.ledger.to_dict()}


def format_table(s: Summary) -> str:
    """Return the closing table: bits per byte, bytes and seconds."""
    lines = ["", f"{'weights':<12}{'bpb':>9}{'nats/token':>12}{'tokens':>12}{'text bytes':>13}{'seconds':>9}"]
    for name, score in s.scores.items():
        lines.append(
            f"{name:<12}{score.bpb:>9.4f}{score.loss:>12.4f}{score.tokens:>12,}{score.bytes:>13,}{score.seconds:>9.1f}"
        )
    t, off, on = s.train, s.train["ms_loop_off"], s.train["ms_loop_on"]
    ms = f"{off:.1f} ms" if off is not None else "-"
    ms += f" loop off, {on:.1f} ms loop on" if on is not None else ""
    ms += f", of them {t['ms_optimizer']:.2f} ms optimizer" if t["ms_optimizer"] is not None else ""
    lines += [
        "",
        f"{t['steps']} steps, {t['tokens']:,} tokens, {t['tokens_per_s'] / 1e3:.1f} ktok/s; a step {ms}",
    ]
    if s.ledger is not None:
        lines.append(f"artifact {s.ledger.total:,} bytes of {s.ledger.limit:,} (code {s.ledger.code:,})")
    lines.append("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in s.seconds.items()))
    if s.peak_mib:
        lines.append(f"peak GPU memory {s.peak_mib:,.0f} MiB")
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
