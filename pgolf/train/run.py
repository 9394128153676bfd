"""One run from shards to a scored artifact: train -> average -> quantize -> write -> read back -> score.

The run folder holds config.json, metrics.jsonl, log.txt, raw.safetensors, ema.safetensors, model.pgolf,
code.br (the code that is counted with it), tokenizer.model (a copy), loss.png, summary.json and report.html;
with train.quantize off, no model.pgolf and no code.br. Everything up to the artifact is written before
scoring starts, and the summary before the further ways to score, so a late failure loses nothing. While a run
is under way its folder also holds what another process needs to go on (`pgolf.train.progress`): whatever ends
a process, a signal, a crash or a lost rank, `train_run(..., resume=folder)` continues, and its reason is a
line of log.txt.
"""

from __future__ import annotations

import contextlib
import math
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pgolf.artifact.code import code_archive
from pgolf.artifact.fit import write_quantized
from pgolf.artifact.read import read_artifact
from pgolf.artifact.size import Ledger, check_limit
from pgolf.config import Config, TrainConfig, run_hash
from pgolf.data.loader import TrainLoader
from pgolf.data.shards import TOKENIZER_NAME, find_shards
from pgolf.dist import Dist
from pgolf.env import commit_name, threads_note
from pgolf.errors import RanksFailed
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.validation import DataFolder, score_as, score_model
from pgolf.files import atomic_file
from pgolf.model.gpt import GPT
from pgolf.optim.ema import Ema
from pgolf.optim.step import Optimizer
from pgolf.quant.pipeline import Quantizer
from pgolf.report.plots import plot_loss, run_title
from pgolf.report.summary import Summary, device_name, format_table, versions
from pgolf.report.watched_page import report_note
from pgolf.track import check_tracker
from pgolf.train.budget import Clock, Tick
from pgolf.train.checkpoint import FOLDER as CHECKPOINTS
from pgolf.train.checkpoint import Checkpointer, remove_after
from pgolf.train.memory import check_memory
from pgolf.train.progress import Past, keep_metrics, read_past, utc
from pgolf.train.rehearse import rehearse
from pgolf.train.saver import Saver
from pgolf.train.session import Around, Session, take_folder
from pgolf.train.signals import Signals, Stopped
from pgolf.train.timing import process_seconds
from pgolf.train.trainer import Position, Trainer, TrainResult, open_loader, passes_per_step
from pgolf.train.weights import (
    ARTIFACT,
    AVERAGED,
    RAW,
    clone_parameters,
    copy_parameters,
    load_facts,
    load_initial,
    load_weights,
    save_weights,
)


class Run:
    """The phases of one run, in order; `execute` calls them."""

    def __init__(
        self,
        config: Config,
        around: Around,
        folder: Path,
        *,
        past: Past | None = None,
        train: bool = True,
    ) -> None:
        before, began = process_seconds(), time.perf_counter()
        dist = around.dist
        self._config, self._around, self._dist, self._folder = config, around, dist, folder
        self._past, self._train_more = past, train and (past is None or past.stage == "training")
        if dist.is_main:
            check_tracker(config.train.track)
        if config.train.quantize:
            check_limit(config.artifact.limit)
        self._data = DataFolder.open(
            config.data.dir, vocab_size=config.model.vocab_size, verify=config.data.verify
        )
        if past is not None:
            past.check_data(self._data.folder, self._data.facts())
        self._data.validation(documents=1)  # raises now what scoring would raise after the run
        find_shards(self._data.folder, "train")
        passes_per_step(config.data, dist.world_size)
        self._model = GPT(config.model, seed=config.train.seed).prepare(
            dist.device,
            attention=config.train.attention,
            compile=config.train.compile if dist.device.type == "cuda" else "off",
        )
        if config.train.init is not None and self._train_more and not (past and past.checkpoint):
            load_initial(config.train.init, self._model, config, tokenizer_sha256=self._data.sha256)
        parameters = dict(self._model.named_parameters())
        self._ema = Ema(parameters) if config.optim.ema_horizon else None
        self._optimizer = Optimizer(self._model, config.optim, dist, ema=self._ema)
        self._summary = Summary(
            name=config.name,
            config_hash=run_hash(config),
            device=device_name(dist.device),
            world_size=dist.world_size,
            attention=self._model.attention_name,
            parameters=sum(p.numel() for p in parameters.values()),
            started=utc(),
            commit=commit_name(),
            versions=versions(),
            data=self._data.facts(),
        )
        if past is not None:
            self._summary.seconds.update(past.summary.get("seconds", {}))
            self._summary.train = dict(past.summary.get("train", {}))
            if past.summary.get("bytes"):
                self._summary.ledger = Ledger.from_dict(past.summary["bytes"])
            self._summary.started = past.summary.get("started", self._summary.started)
            if not self._train_more:  # the summary is of those who trained; the sessions tell the rest
                for key in ("device", "world_size", "attention", "commit", "versions", "peak_mib"):
                    setattr(self._summary, key, past.summary.get(key, getattr(self._summary, key)))
            if past.stage == "written":
                self._summary.config_hash = past.summary["config_hash"]  # the artifact's
                self._see_overrun()
        elif before is not None:
            self._summary.seconds["start"] = before
        self._memory = check_memory(config, dist, attention=self._model.attention_name)
        self._add_seconds("set_up", time.perf_counter() - began)
        self._result = TrainResult()
        self._validation_s = 0.0

    def execute(self) -> Summary:
        """Run every phase and return the summary (scores on every rank, files from the main rank).

        Raises:
            Stopped: a signal asked the run to end; it is saved. RanksFailed: what ended the run is known to
            every rank. Anything else that ended it is raised on the rank where it happened.
        """
        self._session = Session(
            self._config,
            self._around,
            self._folder,
            self._summary,
            past=self._past,
            steps=lambda: self._result.steps or int(self._summary.train.get("steps", 0)),
            keep_weights=self._keep_weights,
        )
        self._folder, self._log = self._session.folder, self._session.log
        with self._session:
            self._phases()
        return self._summary

    def _phases(self) -> None:
        config, dist, log, s = self._config, self._dist, self._log, self._summary
        log.line(
            f"run {self._folder} | {s.device} x{s.world_size} | {s.parameters:,} parameters | {s.attention}"
        )
        for note in (
            *self._around.notes,
            self._model.attention_note,
            threads_note(torch.get_num_threads()),
            self._data.checked,
            self._memory,
        ):
            if note:
                log.line(note)
        if dist.is_main:  # so that the folder is all that reading and writing text with the model needs
            with atomic_file(self._folder / TOKENIZER_NAME) as file:
                file.write(self._data.tokenizer.path.read_bytes())
        if config.train.init is not None and self._past is None:
            dist.assert_replicas_equal(dict(self._model.named_parameters()))
            log.line(f"starts from the weights of {config.train.init}")
        if self._session.stage == "written":
            raw, best = self._load_trained()
        else:
            raw, best = self._train_and_write()
        self._score(raw, best)
        self._session.write_summary()
        self._score_otherwise()
        self._session.write_summary()
        if dist.is_main:
            self._finish()

    def _train_and_write(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Train, or take up what an earlier process trained; then quantize and write. Return the weights."""
        config, s = self._config, self._summary
        with open_loader(config, self._data, self._dist) as loader:
            trainer = Trainer(config, self._model, self._optimizer, self._ema, loader, self._dist)
            self._session.phase = "warm_up"
            if self._train_more or config.train.quantize:
                self._add_seconds("warm_up", trainer.warm_up(self._log))
            if self._train_more:
                raw, best = self._train(trainer, loader)
            else:
                raw, best = self._take_up(trainer, loader)
                self._session.reach("trained", self._session.clock.elapsed)
            self._session.leave_if_asked()
            quantizer = self._calibrate(loader, best) if config.train.quantize else None
        self._dist.assert_replicas_equal(raw)
        if quantizer is not None:
            s.ledger = self._write(quantizer)
            self._session.reach("written", s.seconds["clock"])
        else:
            self._stop_clock()
        return raw, best

    def _train(self, trainer: Trainer, loader: TrainLoader) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Run the loop from the beginning or from a checkpoint, and save; leave if a signal asks for it."""
        past, result = self._past, self._result
        clock = Clock(self._with_reserve(loader), self._dist)
        position = self._restore(trainer, past) if past is not None else None
        used = past.clock if past is not None else 0.0
        self._session.phase = "train"
        self._writer = Checkpointer(
            self._folder, self._dist, trainer.parts(), identity=self._session.identity
        )
        saver = Saver(
            self._writer,
            self._around.signals,
            self._log,
            every_s=self._config.train.checkpoint_every,
            began=used,
        )
        with self._around.signals.deferred():
            self._session.start_clock(clock, at=used)
            stopped_by = trainer.run(clock, self._log, result, saver, start=position, validate=self._validate)
            self._record_training()
            if stopped_by:
                self._keep_weights()
                raise Stopped(stopped_by)
            weights: tuple[dict[str, Tensor], dict[str, Tensor]] = self._timed("save", self._save)
            # Until here a signal only leaves a note: what was trained must be on disk before it is answered.
            self._session.reach("trained", clock.elapsed)
        return weights

    def _restore(self, trainer: Trainer, past: Past) -> Position | None:
        """Put the newest checkpoint's state in place, and cut the metrics there; None where there is none."""
        error: Exception | None = None
        position = None
        try:
            if past.checkpoint is not None:
                position = Position.from_facts(past.checkpoint.facts)
                trainer.restore(past.checkpoint.load(), position)
        except (OSError, ValueError) as e:
            error = e
        self._dist.check(error)
        self._dist.assert_replicas_equal(dict(self._model.named_parameters()))
        steps = 0 if position is None else position.steps
        if self._dist.is_main:
            remove_after(self._folder, steps)
            # The line of the last step waits in the checkpoint for its gradient norm.
            rows = keep_metrics(self._folder / "metrics.jsonl", max(0, steps - 1))
            if position is not None:
                self._result.take_up(position, rows)
        elif position is not None:
            self._result.take_up(position, [])
        return position

    def _take_up(self, trainer: Trainer, loader: TrainLoader) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Put trained weights in place without training, with the loader behind the text they have seen."""
        past = self._past
        assert past is not None
        if past.stage == "trained":
            raw, best = self._load_trained()
        else:
            raw, best = self._take_up_unfinished(trainer, past)
        loader.restart(
            at=self._summary.train["steps"] * passes_per_step(self._config.data, self._dist.world_size)
        )
        self._session.start_clock(Clock(self._config.train, self._dist), at=past.clock)
        return raw, best

    def _take_up_unfinished(
        self, trainer: Trainer, past: Past
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take the newest of a stopped run: its last checkpoint, or the weights that rank 0 kept."""
        kept = self._kept_steps()
        step = past.checkpoint.step if past.checkpoint is not None else 0
        if not max(kept, step):
            raise RanksFailed(f"{self._folder} holds no trained weights yet; go on with --resume")
        if kept <= step:
            position = self._restore(trainer, past)
            assert position is not None
            if position.row:  # no step follows that would write it
                norm, skipped = float(self._optimizer.grad_norm), position.skipped
                self._log.metric(**position.row, grad_norm=norm, skipped=skipped)
            self._result.seconds = past.clock
            self._record_training()
            return self._save()
        rows = keep_metrics(self._folder / "metrics.jsonl", kept) if self._dist.is_main else []
        self._result.take_up(
            Position(steps=kept, tokens=kept * self._config.data.batch_tokens, elapsed=past.clock), rows
        )
        self._record_training()
        return self._load_trained()

    def _kept_steps(self) -> int:
        """Return the steps of the raw and averaged weights in the folder; 0 if these are no pair."""
        try:
            raw, averaged = (load_facts(self._folder / name) for name in (RAW, AVERAGED))
        except (OSError, ValueError):
            return 0
        pair = raw.get("pair")
        return int(raw.get("steps", 0)) if pair is not None and pair == averaged.get("pair") else 0

    def _load_trained(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the raw and the averaged weights from the folder; leave the averaged ones in the model.

        In the model's order, which is the artifact's; a safetensors file has an order of its own.
        """
        files = (load_weights(self._folder / name)[0] for name in (RAW, AVERAGED))
        names = [name for name, _ in self._model.named_parameters()]
        raw, best = ({name: file[name].to(self._dist.device) for name in names} for file in files)
        copy_parameters(self._model, best)
        return raw, best

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

    def _validate(self, tick: Tick) -> float:
        """Score the present weights over the whole text, if it is time to and there is; return the seconds.

        The time is on the clock, so the last one is left out where it would not fit any more.
        """
        every, steps = self._config.evaluate.every, tick.step
        if not every or steps % every or tick.left < 1.2 * self._validation_s:
            return 0.0
        began = time.perf_counter()
        score = score_model(self._model, self._data, self._config.data.micro_tokens, self._dist)
        self._log.metric(
            step=steps - 1, elapsed=self._session.clock.elapsed, val_bpb=score.bpb, val_s=score.seconds
        )
        self._log.line(f"validation after {steps} steps: {score.bpb:.4f} bpb, {score.seconds:.1f} s")
        self._validation_s = self._dist.share([time.perf_counter() - began])[0]
        return self._validation_s

    def _record_training(self) -> None:
        s, result = self._summary, self._result
        s.seconds["train"] = result.seconds
        times = {**result.step_ms, "optimizer": result.optimizer_ms}
        median = {k: float(torch.tensor(v).median()) if v else None for k, v in times.items()}
        s.train = {
            "steps": result.steps,
            "tokens": result.tokens,
            "loop_step": result.loop_step,
            "last_loss": result.last_loss if math.isfinite(result.last_loss) else None,
            "skipped_steps": result.skipped,
            "ms_loop_off": median["loop_off"],
            "ms_loop_on": median["loop_on"],
            "ms_optimizer": median["optimizer"],
            "tokens_per_s": result.tokens / max(result.seconds, 1e-9),
        }
        if self._dist.device.type == "cuda":
            s.peak_mib = torch.cuda.max_memory_allocated(self._dist.device) / 2**20

    def _save(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Keep raw and averaged weights in memory and on disk; leave the averaged ones in the model."""
        raw = clone_parameters(self._model)
        best = self._ema.state_dict() if self._ema is not None else raw
        copy_parameters(self._model, best)
        if self._dist.is_main:
            self._save_files(raw, best)
        return raw, best

    def _save_files(self, raw: dict[str, Tensor], best: dict[str, Tensor], **more: Any) -> None:
        # The pair's number says that two files, each atomic, are of the same moment.
        pair = secrets.token_hex(8)
        facts = {
            "steps": self._result.steps,
            "tokenizer_sha256": self._data.sha256,
            "pair": pair,
            **more,
        }
        save_weights(self._folder / RAW, raw, self._config, **facts)
        save_weights(self._folder / AVERAGED, best, self._config, **facts)

    def _keep_weights(self) -> None:
        """Write what training had reached, on the main rank alone and without waiting for any other.

        On CUDA in a stream of its own: the main one may wait for a rank that is gone.
        """
        if not self._dist.is_main or not self._result.steps:
            return
        averages = self._ema.tensors if self._ema is not None else None
        cuda = self._dist.device.type == "cuda"
        with torch.cuda.stream(torch.cuda.Stream(self._dist.device)) if cuda else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            raw = {n: p.detach().to("cpu", copy=True) for n, p in self._model.named_parameters()}
            best = raw if averages is None else {n: t.to("cpu", copy=True) for n, t in averages.items()}
        self._save_files(raw, best, interrupted=True)
        self._log.line(f"the weights after {self._result.steps} steps are in {self._folder / RAW}")

    def _calibrate(self, loader: TrainLoader, best: dict[str, Tensor]) -> Quantizer:
        """Measure what quantization needs to know of `best`, the weights that are in the model."""
        model, quant, batches = self._model, self._config.quant, iter(loader.next, None)
        return self._timed(  # type: ignore[no-any-return]
            "calibrate", lambda: Quantizer.calibrated(model, batches, quant, self._dist, weights=best)
        )

    def _write(self, quantizer: Quantizer) -> Ledger | None:
        """Quantize (inside the clock), compress and write, all on rank 0; a failure reaches every rank."""
        config, s = self._config, self._summary
        self._session.phase = "quantize"
        began = time.perf_counter()
        quantize_seconds = 0.0
        budget = f" of {config.train.seconds:g} s" if config.train.seconds else ""
        ledger: Ledger | None = None
        error: Exception | None = None
        if self._dist.is_main:
            try:
                first = quantizer.quantize()
                quantize_seconds = time.perf_counter() - began
                self._add_seconds("quantize", quantize_seconds)
                self._stop_clock()
                self._log.line(f"quantized at {s.seconds['clock']:.1f} s{budget}")
                ledger = write_quantized(
                    self._folder / ARTIFACT,
                    quantizer,
                    config,
                    tokenizer_sha256=self._data.sha256,
                    first=first,
                )
                with atomic_file(self._folder / "code.br") as file:
                    file.write(code_archive())
            except Exception as e:
                error = e
        self._dist.check(error)
        if not self._dist.is_main:
            self._stop_clock()
        self._add_seconds("write", time.perf_counter() - began - quantize_seconds)
        return ledger

    def _stop_clock(self) -> None:
        """Read the clock for the last time, and see whether it was overrun."""
        self._summary.seconds["clock"] = self._session.stop_clock()
        self._see_overrun()

    def _see_overrun(self) -> None:
        s, budget = self._summary, self._config.train.seconds
        s.overrun = max(0.0, s.seconds["clock"] - budget) if budget else 0.0

    def _score(self, raw: dict[str, Tensor], best: dict[str, Tensor]) -> None:
        """Score raw, averaged and quantized weights, as far as asked for, over the whole validation text."""
        self._session.phase = "score"
        wanted = self._config.evaluate
        candidates: dict[str, dict[str, Tensor]] = {}
        if wanted.raw:
            candidates["raw"] = raw
        if self._ema is not None and wanted.ema:
            candidates["ema"] = best
        if self._config.train.quantize:  # last: the further ways to score find it in the model
            artifact = self._timed("read", lambda: read_artifact(self._folder / ARTIFACT))
            candidates["quantized"] = artifact.state
        for name, tensors in candidates.items():
            copy_parameters(self._model, tensors)
            score = score_model(self._model, self._data, self._config.data.micro_tokens, self._dist)
            self._add_score(name, score)

    def _score_otherwise(self) -> None:
        """Score the quantized weights, which are in the model, in the further ways that are asked for."""
        config = self._config.evaluate
        wanted: dict[Literal["sliding", "ttt"], bool] = {"sliding": config.sliding, "ttt": config.ttt}
        modes = [mode for mode, asked in wanted.items() if asked]
        text = self._data.validation() if modes else None
        for mode in modes:
            assert text is not None
            self._session.phase = f"score_{mode}"
            score = score_as(
                mode,
                self._model,
                self._data,
                text,
                self._dist,
                batch_tokens=self._config.data.micro_tokens,
                stride=config.stride,
                ttt=config.adapters,
            )
            self._add_score(mode, score)

    def _add_score(self, name: str, score: Score) -> None:
        self._summary.scores[name] = score
        self._summary.seconds[f"score_{name}"] = score.seconds
        self._log.line(f"{name}: {score.bpb:.4f} bpb over {score.tokens:,} tokens in {score.seconds:.1f} s")

    def _finish(self) -> None:
        """Draw the plot, write the last summary, and remove what only an unfinished run needs."""
        s = self._summary
        self._timed("plot", self._plot)
        total = process_seconds()
        if total is not None and self._past is None:
            s.seconds["total"] = total
        self._session.finish()
        self._log.line(report_note(self._folder))
        self._log.line(format_table(s))
        if self._train_more:
            self._writer.close()
        shutil.rmtree(self._folder / CHECKPOINTS, ignore_errors=True)

    def _plot(self) -> None:
        title = run_title(self._folder.name, {k: score.bpb for k, score in self._summary.scores.items()})
        why = plot_loss(self._folder / "metrics.jsonl", self._folder / "loss.png", title=title)
        self._log.line(f"no loss plot: {why}" if why else f"loss plot: {self._folder / 'loss.png'}")

    def _timed(self, phase: str, work: Any) -> Any:
        self._session.phase = phase
        began = time.perf_counter()
        result = work()
        self._add_seconds(phase, time.perf_counter() - began)
        return result

    def _add_seconds(self, phase: str, seconds: float) -> None:
        """Count time of a phase, to which an earlier process of this run may have contributed."""
        self._summary.seconds[phase] = self._summary.seconds.get(phase, 0.0) + seconds


def train_run(
    config: Config, *, resume: Path | None = None, train: bool = True, notes: Sequence[str] = ()
) -> Summary:
    """Make a run folder and run `config` in it; under torchrun every rank calls this.

    Args:
        config: the run's settings; with `resume` those of its config.json, but for settings that may change.
        resume: go on with the unfinished run in this folder, on any number of ranks.
        train: False: train no further, quantize and score what the run in `resume` has.
        notes: lines for the beginning of the log; empty ones are left out.
    Raises:
        RanksFailed: a rank failed during set-up, or what ended the run is known to every rank.
        Stopped: SIGTERM, SIGHUP or SIGINT; what was trained is saved.
    """
    with contextlib.ExitStack() as files, Signals() as signals:
        dist = Dist.start(config.train.device, rank_timeout_s=config.train.rank_timeout)
        ended = False
        try:
            stamp = int(dist.share([time.time()])[0])
            folder = config.train.out / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(stamp))}-{config.name}"
            run: Run | None = None
            error: Exception | None = None
            if resume is not None:
                # Before anything is read: what another process writes there now would be taken for its last.
                take_folder(resume, dist, files)
            try:
                around = Around(dist, signals, tuple(notes), files)
                past = read_past(resume) if resume is not None else None
                run = Run(config, around, resume or folder, past=past, train=train)
            except Exception as e:
                error = e
            dist.check(error)
            assert run is not None
            summary = run.execute()
            ended = True
            return summary
        finally:
            dist.watch.leave()
            # Leaving the group waits for the others; after a failure some of them may never come.
            if ended or dist.world_size == 1:
                dist.close()
