"""One run from shards to a scored artifact, as a list of phases: `Run.execute`.

    before the clock    set up (`setup.py`), warm up, rehearse quantization
    inside the clock    train, save, calibrate, quantize
    after the clock     write, read back, score, plot

The run folder holds config.json, metrics.jsonl, log.txt, raw.safetensors, ema.safetensors, model.pgolf,
evaluate_gpt.py (the code that is counted with it), tokenizer.model (a copy), loss.png, summary.json and
report.html; with train.quantize off, no model.pgolf and no evaluate_gpt.py. Each phase writes what it made
before the next one begins, so a late failure loses nothing. While a run is under way its folder also holds
what another process needs to go on (`pgolf.train.progress`): whatever ends a process, a signal, a crash or a
lost rank, `train_run(..., resume=folder)` continues, and the reason is a line of log.txt.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf.artifact.code import code_name, counted_code
from pgolf.artifact.fit import write_quantized
from pgolf.artifact.read import read_artifact
from pgolf.artifact.size import Ledger
from pgolf.config import Config, TrainConfig
from pgolf.data.loader import TrainLoader
from pgolf.data.shards import TOKENIZER_NAME, Tokens
from pgolf.dist import Dist
from pgolf.env import threads_note
from pgolf.errors import MemoryAdvice, RanksFailed, UserError
from pgolf.evaluate.bpb import Score
from pgolf.evaluate.validation import score_as, score_model
from pgolf.files import atomic_file
from pgolf.quant.cap import Fit, fit_quantized
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import QuantizedState
from pgolf.report.plots import plot_loss, run_title
from pgolf.report.summary import Summary, format_table
from pgolf.report.watched_page import report_note
from pgolf.train.budget import Clock, Tick
from pgolf.train.checkpoint import FOLDER as CHECKPOINTS
from pgolf.train.checkpoint import INDEX, SNAPSHOTS, Checkpointer, remove_after
from pgolf.train.origin import Origin
from pgolf.train.position import Position, TrainResult
from pgolf.train.progress import Past, keep_metrics
from pgolf.train.rehearse import rehearse
from pgolf.train.saver import Saver
from pgolf.train.session import Around, Session, take_folder
from pgolf.train.setup import LESS_MEMORY, SetUp, set_up
from pgolf.train.signals import Signals, Stopped
from pgolf.train.snapshot import Snapshot, Snapshots, discard_later, snapshot_name
from pgolf.train.timing import process_seconds
from pgolf.train.trace import Traces
from pgolf.train.trainer import Trainer, open_loader
from pgolf.train.weights import (
    ARTIFACT,
    RAW,
    Weights,
    clone_parameters,
    copy_parameters,
    load_pair,
    pair_steps,
    save_pair,
    save_weights,
)


class Run:
    """The phases of a run that is set up; `execute` is their list.

    A run that goes on enters the list where the process before it left: with a checkpoint it goes on to
    train, with trained weights it calibrates, with an artifact it scores.
    """

    def __init__(self, config: Config, around: Around, folder: Path, made: SetUp) -> None:
        self._config, self._around, self._dist, self._past = config, around, around.dist, made.past
        self._data, self._model, self._ema, self._optimizer = made.data, made.model, made.ema, made.optimizer
        self._summary, self._trains, self._start = made.summary, made.trains, made.start
        self._origin = Origin.from_dict(made.summary.origin)
        self._notes = (*around.notes, made.model.attention_note, threads_note(torch.get_num_threads()))
        self._notes += (made.data.checked, made.memory, config.model.illegal, made.added)
        self._result = TrainResult()
        self._validation_s = 0.0
        self._session = Session(
            config,
            around,
            folder,
            made.summary,
            past=made.past,
            steps=self._steps,
            keep_weights=self._keep_weights,
        )
        self._folder, self._log = self._session.folder, self._session.log

    def execute(self) -> Summary:
        """Run every phase and return the summary (scores on every rank, files from the main rank).

        Raises:
            Stopped: a signal asked the run to end; it is saved. RanksFailed: what ended the run is known to
            every rank. Anything else that ended it is raised on the rank where it happened.
        """
        # Inside the session, which then tells every rank what takes less memory.
        with self._session, MemoryAdvice(LESS_MEMORY):
            self._introduce()
            if self._session.stage == "written":
                raw, best = self._load_trained()
            else:
                raw, best = self._train_and_write()
            self._score(raw, best)
            # Here and again below: a failure in a further way to score must not take these scores with it.
            self._session.write_summary()
            self._score_otherwise()
            self._session.write_summary()
            if self._dist.is_main:
                self._finish()
        return self._summary

    def _introduce(self) -> None:
        """Say in the log what runs, on what and from what."""
        config, s = self._config, self._summary
        self._log.line(
            f"run {self._folder} | {s.device} x{s.world_size} | {s.parameters:,} parameters | {s.attention}"
        )
        for note in filter(None, self._notes):
            self._log.line(note)
        if self._dist.is_main:  # so that the folder is all that reading and writing text with the model needs
            with atomic_file(self._folder / TOKENIZER_NAME) as file:
                file.write(self._data.tokenizer.path.read_bytes())
        if config.train.init is not None and self._past is None:
            # Each rank has read the file by itself, maybe on another host.
            self._dist.assert_replicas_equal(dict(self._model.named_parameters()))
            self._log.line(f"starts from the weights of {config.train.init}")

    def _train_and_write(self) -> Weights:
        """Train, or take up what an earlier process trained; then quantize and write. Return the weights."""
        config, s = self._config, self._summary
        with open_loader(config, self._data, self._dist) as loader:
            trainer = Trainer(
                config, self._model, self._optimizer, self._ema, loader, self._dist, self._origin
            )
            # Calibration runs the compiled passes too, so a process that only quantizes warms up as well.
            if self._trains or config.train.quantize:
                with s.phase("warm_up"):
                    trainer.warm_up(self._log, capture=self._trains)
            if self._trains:
                raw, best = self._train(trainer, loader)
            else:
                raw, best = self._take_up(trainer)
                self._session.reach("trained", self._session.clock.elapsed)
            self._session.leave_if_asked()
            quantizer = self._calibrate(loader, best) if config.train.quantize else None
        self._dist.assert_replicas_equal(raw)
        if quantizer is not None:
            s.ledger = self._write(quantizer, loader.left_out)
            self._session.reach("written", s.clock or 0.0)
        else:
            self._stop_clock()
        return Weights(raw, best)

    def _train(self, trainer: Trainer, loader: TrainLoader) -> Weights:
        """Run the loop from the beginning or from a checkpoint, and save; leave if a signal asks for it."""
        past, result = self._past, self._result
        clock = Clock(self._with_reserve(loader), self._dist, origin=self._origin)
        position = self._restore(trainer, past) if past is not None else None
        if position is None and self._start is not None:
            position = self._continue(trainer, self._start)
        used = past.clock if past is not None else 0.0
        self._summary.under_way = "train"
        self._writer = Checkpointer(
            self._folder, self._dist, trainer.parts(), identity=self._session.identity
        )
        saver = Saver(
            self._writer,
            self._around.signals,
            self._log,
            every_s=self._config.train.checkpoint_every,
            began=used,
            snapshots=self._snapshots(),
        )
        # Everything that is slow and not training (compiling, rehearsing, allocating) is behind us.
        with self._around.signals.deferred():
            self._session.start_clock(clock, at=used)
            traced = self._folder if self._config.train.profile and self._dist.is_main else None
            stopped_by = trainer.run(
                clock,
                self._log,
                result,
                saver,
                traces=Traces(traced, cuda=self._dist.device.type == "cuda", log=self._log),
                start=position,
                validate=self._validate,
            )
            self._record_training()
            if stopped_by:
                # The last checkpoint holds them too; this is for people who want the weights now.
                self._keep_weights()
                raise Stopped(stopped_by)
            with self._summary.phase("save"):
                weights = self._save()
            # Until here a signal only leaves a note: what was trained must be on disk before it is answered.
            self._session.reach("trained", clock.elapsed)
        return weights

    def _with_reserve(self, loader: TrainLoader) -> TrainConfig:
        """Return the clock's settings with the seconds that a rehearsal says quantization needs."""
        train = self._config.train
        if train.quantize_reserve is None and not train.quantize:
            train = replace(train, quantize_reserve=0.0)
        if train.quantize_reserve is None and train.seconds:
            with self._summary.phase("rehearse"):
                reserve = rehearse(
                    self._model,
                    loader,
                    self._config.quant,
                    self._dist,
                    save=self._rehearse_saving,
                    fit=partial(self._fit_cap, loader.left_out) if loader.left_out else None,
                )
            train = replace(train, quantize_reserve=reserve)
            self._log.line(f"rehearsal: {reserve:.2f} s of the clock are kept for quantization")
        self._summary.reserve = train.quantize_reserve or 0.0
        return train

    def _rehearse_saving(self) -> None:
        """Write two files of weights, as after training, under a name that does not stay."""
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
        # All ranks decide by the same tick and by rank 0's seconds, so all of them score or none does. A
        # validation may take a little longer than the one before it: 1.2 keeps it off the reserve.
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
        # Set, not added up: the clock, which holds the training of earlier processes too, gave the seconds.
        s.put("train", result.seconds)
        s.train = result.training()
        if self._dist.device.type == "cuda":
            s.peak_mib = torch.cuda.max_memory_allocated(self._dist.device) / 2**20

    def _save(self) -> Weights:
        """Keep raw and averaged weights in memory and on disk; leave the averaged ones in the model."""
        self._optimizer.settle()
        raw = clone_parameters(self._model)
        weights = Weights(raw, self._ema.state_dict() if self._ema is not None else raw)
        copy_parameters(self._model, weights.best)
        if self._dist.is_main:
            self._save_files(weights)
        return weights

    def _save_files(self, weights: Weights, **more: Any) -> None:
        facts = {"steps": self._result.steps, "tokenizer_sha256": self._data.sha256, **more}
        save_pair(self._folder, weights, self._config, **facts)

    # A run that continues another one, or itself: what was left is put in place.

    def _continue(self, trainer: Trainer, snapshot: Snapshot) -> Position:
        """Put the state of a snapshot in place; return the position at which the run begins."""
        origin, error, notes = self._origin, None, list[str]()
        position = Position.beginning(origin)
        try:
            tensors, notes = snapshot.state(trainer.parts())
            trainer.restore(tensors, position)
        except (OSError, ValueError) as e:
            error = UserError(f"train.start={origin.snapshot}: {e}; use a snapshot that this code wrote")
        self._dist.check(error)
        self._dist.assert_replicas_equal(dict(self._model.named_parameters()))
        self._result.take_up(position, [])
        self._log.line(
            f"continues from {origin.snapshot}: {origin.steps:,} steps and {origin.tokens:,} tokens are "
            f"done, the schedules are at {float(origin.frac):g} and go to {self._config.train.until:g}"
        )
        for note in (*notes, *snapshot.notes):
            self._log.line(note)
        return position

    def _snapshots(self) -> Snapshots:
        """Return the snapshots that are still to be written."""
        wanted = [snapshot_name(f) for f in self._config.train.snapshot_fractions]
        # Rank 0's look at the folder: all ranks must take the same ones.
        there = self._dist.share([float((self._folder / SNAPSHOTS / n / INDEX).is_file()) for n in wanted])
        written = [name for name, found in zip(wanted, there, strict=True) if found]
        return Snapshots(self._config, self._origin, self._data, written=written)

    def _restore(self, trainer: Trainer, past: Past) -> Position | None:
        """Put the newest checkpoint's state in place, and cut the metrics there; None where there is none."""
        error: Exception | None = None
        position = None
        try:
            if past.checkpoint is not None:
                position = Position.from_facts(past.checkpoint.facts)
                trainer.restore(past.checkpoint.load(), position)
        except (OSError, UserError) as e:
            error = e
        except ValueError as e:  # whole, but not what this code would have written
            error = UserError(
                f"the checkpoint in {self._folder} does not fit this run: {e}; resume it with the pgolf that "
                f"wrote it (commit {past.summary.commit or 'unknown'})"
            )
        self._dist.check(error)
        # Each rank has read the shards by itself: a stale copy on one host would spoil the run unseen.
        self._dist.assert_replicas_equal(dict(self._model.named_parameters()))
        steps = 0 if position is None else position.steps
        if self._dist.is_main:
            remove_after(self._folder, steps)
            discard_later(self._folder, steps)
            # The line of the last step waits in the checkpoint for its gradient norm.
            rows = keep_metrics(self._folder / "metrics.jsonl", max(0, steps - 1))
            if position is not None:
                self._result.take_up(position, rows)
        elif position is not None:
            self._result.take_up(position, [])
        return position

    def _take_up(self, trainer: Trainer) -> Weights:
        """Put trained weights in place without training, with the loader behind the text they have seen."""
        past = self._past
        assert past is not None
        trained = past.stage == "trained"
        weights = self._load_trained() if trained else self._take_up_unfinished(trainer, past)
        # Calibration then reads the batches that it would have read in one process.
        trainer.seek(self._summary.trained.steps)
        self._session.start_clock(Clock(self._config.train, self._dist), at=past.clock)
        return weights

    def _take_up_unfinished(self, trainer: Trainer, past: Past) -> Weights:
        """Take the newest of a stopped run: its last checkpoint, or the weights that rank 0 kept."""
        kept = pair_steps(self._folder)
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

    def _load_trained(self) -> Weights:
        """Return the raw and the averaged weights from the folder; leave the averaged ones in the model."""
        names = [name for name, _ in self._model.named_parameters()]
        weights = load_pair(self._folder, names, self._dist.device)
        copy_parameters(self._model, weights.best)
        return weights

    def _steps(self) -> int:
        """Return the training steps that are done, in this process or before it."""
        train = self._summary.train
        return self._result.steps or (train.steps if train is not None else 0)

    def _keep_weights(self) -> None:
        """Write what training had reached, on the main rank alone and without waiting for any other."""
        if not self._dist.is_main or not self._result.steps:
            return
        averages = self._ema.tensors if self._ema is not None else None
        cuda = self._dist.device.type == "cuda"
        # On CUDA in another stream than the main one, which may wait for a rank that is gone.
        with torch.cuda.stream(torch.cuda.Stream(self._dist.device)) if cuda else contextlib.nullcontext():  # type: ignore[no-untyped-call]
            live = {**dict(self._model.named_parameters()), **self._optimizer.weights()}
            raw = {n: p.detach().to("cpu", copy=True) for n, p in live.items()}
            best = raw if averages is None else {n: t.to("cpu", copy=True) for n, t in averages.items()}
        self._save_files(Weights(raw, best), interrupted=True)
        self._log.line(f"the weights after {self._result.steps} steps are in {self._folder / RAW}")

    # Quantization, whose first part is the end of the clock.

    def _calibrate(self, loader: TrainLoader, best: dict[str, Tensor]) -> Quantizer:
        """Measure what quantization needs to know of `best`, the weights that are in the model."""
        batches = iter(loader.next, None)
        with self._summary.phase("calibrate"):
            return Quantizer.calibrated(self._model, batches, self._config.quant, self._dist, weights=best)

    def _fit_cap(self, documents: Sequence[Tokens], state: QuantizedState) -> Fit:
        """Fit the cap of the model with quantized weights; every rank calls it."""
        bos_id, tokens = self._data.tokenizer.bos_id, self._config.data.micro_tokens
        return fit_quantized(self._model, state, documents, self._dist, bos_id=bos_id, tokens=tokens)

    def _write(self, quantizer: Quantizer, documents: Sequence[Tokens]) -> Ledger | None:
        """Quantize (inside the clock), compress and write, all on rank 0; a failure reaches every rank.

        With `documents`, every rank quantizes, and then all fit the cap to them together.
        """
        config, s = self._config, self._summary
        first, fit = None, None
        if documents:
            with s.phase("quantize"):
                first = quantizer.quantize()
            with s.phase("fit_cap"):
                fit = self._fit_cap(documents, first)
            self._log.line(str(fit))
        s.under_way = "quantize"
        began = time.perf_counter()
        quantize_seconds = 0.0
        budget = f" of {config.train.seconds:g} s" if config.train.seconds else ""
        ledger: Ledger | None = None
        error: Exception | None = None
        if self._dist.is_main:
            try:
                if first is None:
                    first = quantizer.quantize()
                    quantize_seconds = time.perf_counter() - began
                    s.add("quantize", quantize_seconds)
                self._stop_clock()
                self._log.line(f"quantized at {s.clock:.1f} s{budget}")
                ledger = write_quantized(
                    self._folder / ARTIFACT,
                    quantizer,
                    config,
                    tokenizer_sha256=self._data.sha256,
                    first=first,
                    fit=fit,
                )
                counted = config.artifact.program
                with atomic_file(self._folder / code_name(counted)) as file:
                    file.write(counted_code(config.artifact.coder, counted))
            except Exception as e:
                error = e
        self._dist.check(error)
        if not self._dist.is_main:
            self._stop_clock()
        s.add("write", time.perf_counter() - began - quantize_seconds)
        return ledger

    def _stop_clock(self) -> None:
        """Read the clock for the last time."""
        self._summary.stop_clock(self._session.stop_clock(), self._config.train.seconds)

    # Scores, which are not on the clock.

    def _score(self, raw: dict[str, Tensor], best: dict[str, Tensor]) -> None:
        """Score raw, averaged and quantized weights, as far as asked for, over the whole validation text."""
        s, wanted = self._summary, self._config.evaluate
        s.under_way = "score"
        candidates: dict[str, dict[str, Tensor]] = {}
        if wanted.raw:
            candidates["raw"] = raw
        if self._ema is not None and wanted.ema:
            candidates["ema"] = best
        if self._config.train.quantize:  # last: the further ways to score find it in the model
            # From the file, so that what is scored is what anyone else who has the file scores.
            with s.phase("read"):
                artifact = read_artifact(self._folder / ARTIFACT)
            candidates["quantized"] = artifact.state
        for name, tensors in candidates.items():
            s.under_way = f"score_{name}"
            copy_parameters(self._model, tensors)
            if name == "quantized":
                self._model.config = artifact.header.model  # its cap may have been fitted
            score = score_model(self._model, self._data, self._config.data.micro_tokens, self._dist)
            self._add_score(name, score)

    def _score_otherwise(self) -> None:
        """Score the quantized weights, which are in the model, in the further ways that are asked for."""
        config = self._config.evaluate
        text = self._data.validation() if config.ways else None
        for way in config.ways:
            assert text is not None
            self._summary.under_way = f"score_{way}"
            batch_tokens = self._config.data.micro_tokens
            score = score_as(
                way, self._model, self._data, text, self._dist, batch_tokens=batch_tokens, settings=config
            )
            tilt = "with the n-gram tilt" if config.tilt.on else ""
            self._add_score(way, score, "; ".join(filter(None, (tilt, config.remark(way)))))

    def _add_score(self, name: str, score: Score, remark: str = "") -> None:
        self._summary.scores[name] = score
        self._summary.put(f"score_{name}", score.seconds)
        note = f" ({remark})" if remark else ""
        self._log.line(
            f"{name}: {score.bpb:.4f} bpb over {score.tokens:,} tokens in {score.seconds:.1f} s{note}"
        )

    def _finish(self) -> None:
        """Draw the plot, write the last summary, and remove what only an unfinished run needs."""
        s = self._summary
        with s.phase("plot"):
            self._plot()
        total = process_seconds()
        # Of several processes the last one knows its own time only.
        if total is not None and self._past is None:
            s.total = total
        self._session.finish()
        self._log.line(report_note(self._folder))
        self._log.line(format_table(s))
        # Its thread may still be at work in the folder that is removed next.
        if self._trains:
            self._writer.close()
        shutil.rmtree(self._folder / CHECKPOINTS, ignore_errors=True)

    def _plot(self) -> None:
        title = run_title(self._folder.name, {k: score.bpb for k, score in self._summary.scores.items()})
        why = plot_loss(self._folder / "metrics.jsonl", self._folder / "loss.png", title=title)
        self._log.line(f"no loss plot: {why}" if why else f"loss plot: {self._folder / 'loss.png'}")


def train_run(
    config: Config, *, resume: Path | None = None, train: bool = True, notes: Sequence[str] = ()
) -> Summary:
    """Make a run folder and run `config` in it; under torchrun every rank calls this.

    Args:
        config: the run's settings; with `resume` those of its config.json, except for settings that may
            change (`MAY_CHANGE`).
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
            around = Around(dist, signals, tuple(notes), files)
            # Rank 0's second, or two ranks would name the folder by two.
            stamp = time.gmtime(int(dist.share([time.time()])[0]))
            folder = resume or config.train.out / f"{time.strftime('%Y%m%d-%H%M%S', stamp)}-{config.name}"
            if resume is not None:
                # Before anything is read: what another process writes there now would be taken for its last.
                take_folder(resume, dist, files)
            made = set_up(config, dist, resume=resume, train=train)
            summary = Run(config, around, folder, made).execute()
            ended = True
            return summary
        finally:
            dist.watch.leave()
            # Leaving the group waits for the others; after a failure some of them may never come.
            if ended or dist.world_size == 1:
                dist.close()
