"""What each way to quantize a checkpoint costs in bytes and in bits per byte: a table and a result file.

`python -m bench.quantize RUN_FOLDER --data SHARDS` calibrates once, then quantizes the averaged weights of
the run in each way of `SETTINGS`, codes them with the range coder and scores them over the whole validation
text. Every way is scaled to the bytes of `--match`: its quantization scales are multiplied by one factor, and
the codes are made again, so that the rows of the table compare at equal bytes. `bytes` are those of the whole
file. `bpb_loss` is the difference to the unquantized weights in bits per byte; `predicted` is the same
difference as the calibration foresees it, 1/2 sum g_r e_r H e_r. `against_first` is the difference to the
first setting of the table, with a 95 % interval over the documents. `python -m bench.figures` draws the
points. `kl` is the mean Kullback-Leibler divergence of the unquantized from the quantized model's predictions
on the first tokens of the text, in bits per byte: what would be lost if the unquantized model were right. Its
differences between settings have far less noise than those of `bpb_loss`.

`--blend L ...` also scores the unquantized weights (1 - L) raw + L averaged. Of the first setting the gain of
every matrix is written, tr(W H W'^T) / tr(W' H W'^T): above 1 where the outputs of the quantized matrix W'
are too small.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.common import RESULTS, Recorder, Sample
from bench.documents import Documents
from pgolf.artifact.write import Facts, build_file
from pgolf.config import Config, DataConfig, ModelConfig, QuantConfig
from pgolf.data.loader import Batch
from pgolf.dist import Dist
from pgolf.evaluate.validation import DataFolder
from pgolf.model.gpt import GPT
from pgolf.quant.calibrate import Drift, collect_hessians
from pgolf.quant.gptq import row_errors
from pgolf.quant.pipeline import Quantizer
from pgolf.quant.quantized import QuantizedState, dequantize_state
from pgolf.quant.sensitivity import collect_curvature, unit_trace
from pgolf.stats import Paired, compare_paired
from pgolf.train.trainer import open_loader
from pgolf.train.weights import copy_parameters, load_weights


@dataclass(frozen=True)
class Setting:
    """One way to quantize."""

    name: str
    quant: dict[str, Any] = field(default_factory=dict)
    """Fields of QuantConfig that differ from the run's."""
    size: float = 1.0
    """Bytes wanted, as a multiple of those of `--match`; 0 takes the configured clips as they are."""


SPREAD = {
    "row_scales": "spread",
    "column_scales": False,
    "matrix_bits": 6,
    "embed_bits": 7,
    "rate": 0.0,
    "trellis": False,
}
LOSS = SPREAD | {"row_scales": "loss", "column_scales": True, "matrix_bits": 8, "embed_bits": 8}
TRELLIS = LOSS | {"trellis": True}
DEFAULT = TRELLIS | {"rate": 1 / 12}
SETTINGS = [
    Setting("gptq", SPREAD, size=0.0),
    Setting("rows+columns", LOSS),
    Setting("trellis", TRELLIS),
    Setting("trellis rate 1/12", DEFAULT),
    Setting("trellis rate 1/6", TRELLIS | {"rate": 1 / 6}),
    Setting("trellis rate 1/3", TRELLIS | {"rate": 1 / 3}),
    Setting("rows+columns rate 1/12", LOSS | {"rate": 1 / 12}),
    Setting("rows+columns rate 1/6", LOSS | {"rate": 1 / 6}),
    Setting("gptq lqer asym", SPREAD | {"lqer": "asym"}),
    Setting("gptq lqer sym", SPREAD | {"lqer": "sym"}),
    Setting("trellis lqer sym", TRELLIS | {"lqer": "sym"}),
    Setting("trellis -4 %", TRELLIS, size=0.96),
    Setting("trellis +4 %", TRELLIS, size=1.04),
    Setting("gains", DEFAULT | {"gains": True}),
    Setting("drift 1", DEFAULT | {"drift": 1.0}),
    Setting("drift 0.7", DEFAULT | {"drift": 0.7}),
    Setting("drift 0.4", DEFAULT | {"drift": 0.4}),
    Setting("drift 1 gains", DEFAULT | {"drift": 1.0, "gains": True}),
    Setting("drift 0.7 gains", DEFAULT | {"drift": 0.7, "gains": True}),
    Setting("drift 0.4 gains", DEFAULT | {"drift": 0.4, "gains": True}),
]
"""The ways that docs/findings.md and docs/benchmarks.md report; their names are those of the result lines."""
KL_SEGMENTS = 96
"""Segments of model.max_context tokens on which predictions are compared."""
TOLERANCE, ATTEMPTS = 2e-4, 5
"""Relative difference to the wanted bytes at which the search for a scale ends; its most quantizations."""


@dataclass
class Outcome:
    """What a setting gave."""

    setting: Setting
    bytes: int
    parts: dict[str, int]
    bpb: float
    loss: float
    predicted: float
    scale: float
    seconds: dict[str, float]
    against: Paired
    """The difference to the first setting, bits per byte, over documents."""
    kl: float
    kl_against: Paired
    """The difference of the divergences, over segments."""
    gains: dict[str, float]
    """Of the first setting: kind and layer of a matrix's inputs, and rows -> gain."""


class Bench:
    """A checkpoint with its calibration; `measure` tries one setting."""

    def __init__(self, args: argparse.Namespace) -> None:
        folder, data, micro_tokens = args.folder, args.data, args.micro_tokens
        averaged, saved, _ = load_weights(folder / "ema.safetensors")
        batches = args.calibration_batches
        changes = {"calibration_batches": batches, "gradient_batches": (batches + 1) // 2} if batches else {}
        changes |= {"mean_bits": args.mean_bits} if args.mean_bits else {}
        saved = replace(saved, quant=replace(saved.quant, **changes))
        self.dist = Dist.start(args.device)
        micro = min(saved.data.micro_tokens, micro_tokens)
        self.config: Config = replace(saved, data=replace(saved.data, dir=data, micro_tokens=micro))
        self.data_folder = DataFolder.open(data, vocab_size=saved.model.vocab_size)
        self.model = GPT(saved.model).prepare(self.dist.device)
        self.weights = {k: v.to(self.dist.device) for k, v in averaged.items()}
        self.seconds: dict[str, float] = {}
        self.text = self.data_folder.validation()
        self.documents = Documents(self.data_folder, self.text, self.dist, micro)
        self._drifts: dict[QuantConfig, Drift] = {}
        self._first: tuple[NDArray[np.float64], NDArray[np.float64]] | None = None
        self._calibrate(saved.data)
        self.average = self.score(self.weights)
        self.unquantized = self.bpb(self.average)
        self.nats_per_bpb = self.documents.bits / (self.text.tokens.size - 1)

    def _calibrate(self, original: DataConfig) -> None:
        """Hessians and curvature on as many tokens as the run would take, in smaller batches if need be."""
        copy_parameters(self.model, self.weights)
        quant, dist = self.config.quant, self.dist
        times = max(1, original.micro_tokens // self.config.data.micro_tokens)
        with open_loader(self.config, self.data_folder, dist) as loader:
            self.model.eval()
            began = self._now()
            count = quant.calibration_batches * times
            self.batches: list[Batch] = [loader.next() for _ in range(count)]
            hessians = collect_hessians(self.model, self.batches, dist)
            self.seconds["hessians"] = self._now() - began
            began = self._now()
            batches = (loader.next() for _ in range(quant.gradient_batches * times))
            inputs = self.model.quant_inputs()
            self.curvature = collect_curvature(self.model, batches, inputs, dist)
            self.seconds["gradients"] = self._now() - began
        self.quantizer = Quantizer(self.weights, inputs, hessians, quant, self.curvature)

    def _now(self) -> float:
        if self.dist.device.type == "cuda":
            torch.cuda.synchronize(self.dist.device)
        return time.perf_counter()

    def score(self, state: dict[str, Tensor]) -> NDArray[np.float64]:
        """Return the sum of the losses of each document of the validation text, nats."""
        copy_parameters(self.model, state)
        return self.documents.score(self.model)[1]

    def bpb(self, nats: NDArray[np.float64]) -> float:
        """Return bits per byte of the whole text, from the losses of its documents."""
        return float(nats.sum()) / self.documents.bits

    def quantize(self, setting: Setting, scale: float) -> QuantizedState:
        """Return the setting's codes with all its scales times `scale`."""
        config = replace(self.config.quant, **setting.quant)
        quantizer = replace(self.quantizer, config=config)
        if config.drift:
            # Neither the blend nor the gains change the codes that cause the drift.
            key = replace(config, drift=1.0, gains=False)
            if key not in self._drifts:
                copy_parameters(self.model, self.weights)
                began = self._now()
                found = replace(quantizer, config=key).with_drift(self.model, self.batches, self.dist).drift
                self.seconds["drift"] = self._now() - began
                assert found is not None
                self._drifts[key] = found
            quantizer = replace(quantizer, drift=self._drifts[key])
        return quantizer.quantize(scale)

    def measure(self, setting: Setting, wanted: int) -> Outcome:
        """Quantize, scale to the wanted bytes, code and score."""
        seconds, scale = {}, 1.0
        for attempt in range(ATTEMPTS):
            began = self._now()
            state = self.quantize(setting, scale)
            seconds["quantize"] = self._now() - began
            began = time.perf_counter()
            parts = count_bytes(state, self.config.model)
            seconds["code"] = time.perf_counter() - began
            total = sum(parts.values())
            if not setting.size or abs(total / (wanted * setting.size) - 1) < TOLERANCE:
                break
            if attempt == ATTEMPTS - 1:
                break
            weights = sum(t.codes.numel() for t in state.quantized.values())
            scale *= 2.0 ** (8 * (total - wanted * setting.size) / weights)
        began = self._now()
        tensors = dequantize_state(state)
        nats = self.score(tensors)
        seconds["score"] = self._now() - began
        kl, bpb = self.divergence(tensors), self.bpb(nats)
        gains = {} if self._first else self.gains(tensors)
        self._first = self._first or (nats, kl)
        against, kl_against = self.documents.against(nats, self._first[0]), compare_paired(kl, self._first[1])
        loss, predicted = bpb - self.unquantized, self.predict(tensors) / self.nats_per_bpb
        return Outcome(
            *(setting, total, parts, bpb, loss, predicted, scale, seconds),
            *(against, float(kl.mean()), kl_against, gains),
        )

    @torch.no_grad()
    def divergence(self, tensors: dict[str, Tensor]) -> NDArray[np.float64]:
        """Return sum_v p(v) log(p(v) / q(v)) of each segment, its mean over tokens in bits per byte."""
        c, found = self.config.model, []
        length = min(c.max_context, self.text.tokens.size - 1)
        cu = torch.tensor([0, length], dtype=torch.int32, device=self.dist.device)
        for i in range(min(KL_SEGMENTS, (self.text.tokens.size - 1) // length)):
            ids = torch.from_numpy(self.text.tokens[i * length : (i + 1) * length].astype(np.int64))
            both = []
            for weights in (self.weights, tensors):
                copy_parameters(self.model, weights)
                hidden, table = self.model.hidden(
                    ids.to(self.dist.device), cu, max_seqlen=c.max_context, loop=True
                )
                logits = c.softcap * torch.tanh((hidden @ table.mT).float() / c.softcap)
                both.append(logits.log_softmax(-1))
            p, q = both
            found.append(float((p.exp() * (p - q)).sum(-1).double().mean()) / self.nats_per_bpb)
        return np.array(found)

    def gains(self, tensors: dict[str, Tensor]) -> dict[str, float]:
        """Return tr(W H W'^T) / tr(W' H W'^T) of every matrix of attention and MLP."""
        gains: dict[str, float] = {}
        for name in self.model.bank_names:
            keys = self.quantizer.inputs[name]
            for i, (kind, layer) in enumerate(keys):
                weight, mine = (t[name][i].to(self.dist.device).double() for t in (self.weights, tensors))
                moved = mine @ self.quantizer.hessians[kind, layer].double()
                again, power = keys[:i].count((kind, layer)), float((moved * mine).sum())
                if power:  # a layer may be at 0
                    gains[f"{name} {kind} {layer}{' v' * again}"] = float((moved * weight).sum()) / power
        return gains

    def predict(self, tensors: dict[str, Tensor]) -> float:
        """Return the loss that calibration foresees from the errors of the matrices, nats per token."""
        total, hessians = 0.0, self.quantizer.hessians
        for name, keys in self.quantizer.inputs.items():
            c = self.curvature[name]
            h = unit_trace(c.gram if name == "tok_emb" else torch.stack([hessians[key] for key in keys]))
            shape = (len(keys), -1, h.shape[-1])
            before = self.weights[name].reshape(shape)
            errors = row_errors(before, tensors[name].to(before.device).reshape(shape), h)
            total += 0.5 * float((c.rows.double() * errors).sum())
        return total


def count_bytes(state: QuantizedState, model: ModelConfig) -> dict[str, int]:
    """Return the bytes of every part of the file that would be written."""
    facts = Facts("0" * 64, "0" * 16, limit=16_000_000, clip_scale=1.0)
    return dict(build_file(state, model, facts, quality=11)[1].parts)


def table(outcomes: list[Outcome]) -> str:
    """Return the outcomes as text, in the order in which they were measured."""
    lines = [
        f"{'setting':<26}{'bytes':>12}{'bpb':>9}{'loss':>9}{'predicted':>11}{'scale':>8}"
        f"{'quantize s':>12}{'code s':>8}  against the first, kl"
    ]
    lines += [
        f"{o.setting.name:<26}{o.bytes:>12,}{o.bpb:>9.5f}{o.loss:>9.5f}{o.predicted:>11.5f}{o.scale:>8.4f}"
        f"{o.seconds['quantize']:>12.2f}{o.seconds['code']:>8.2f}  "
        f"{o.against.mean:+.5f} [{o.against.low:+.5f}, {o.against.high:+.5f}]"
        f" {o.kl:.6f} {o.kl_against.mean:+.6f} [{o.kl_against.low:+.6f}, {o.kl_against.high:+.6f}]"
        for o in outcomes
    ]
    return "\n".join(lines)


def measure_blends(bench: Bench, folder: Path, shares: list[float]) -> dict[float, tuple[float, Paired]]:
    """Score (1 - share) raw + share averaged weights; return bpb and the difference to the average."""
    if not shares:
        return {}
    raw, _, _ = load_weights(folder / "raw.safetensors")
    found = {}
    for share in shares:
        mixed = {n: torch.lerp(raw[n].to(w.device), w, share) for n, w in bench.weights.items()}
        nats = bench.score(mixed)
        found[share] = bench.bpb(nats), bench.documents.against(nats, bench.average)
        print(f"blend {share:g}: {found[share][0]:.5f} {found[share][1].mean:+.5f}", flush=True)
    return found


def record(
    bench: Bench, outcomes: list[Outcome], blends: dict[float, tuple[float, Paired]], out: Path
) -> None:
    """Write the measurements as a result file."""
    recorder = Recorder("quantize", bench.dist.device, out)
    for name, value in bench.seconds.items():
        recorder.add("calibrate", "pgolf", f"seconds_{name}", Sample(value, 0.0, 1), "s")
    recorder.add("ema", "pgolf", "bpb", Sample(bench.unquantized, 0.0, 1), "bits/byte")
    for share, (bpb, against) in blends.items():
        recorder.add(f"blend {share:g}", "pgolf", "bpb", Sample(bpb, 0.0, 1), "bits/byte")
        add_difference(recorder, f"blend {share:g}", "against_average", against)
    for o in outcomes:
        values = {
            "bytes": (float(o.bytes), "bytes"),
            "bpb": (o.bpb, "bits/byte"),
            "bpb_loss": (o.loss, "bits/byte"),
            "kl": (o.kl, "bits/byte"),
        }
        values |= {f"bytes_{part}": (float(size), "bytes") for part, size in o.parts.items()}
        values |= {"bpb_loss_predicted": (o.predicted, "bits/byte"), "scale": (o.scale, "1")}
        values |= {f"seconds_{phase}": (value, "s") for phase, value in o.seconds.items()}
        values |= {f"gain {matrix}": (gain, "1") for matrix, gain in o.gains.items()}
        for metric, (value, unit) in values.items():
            recorder.add(o.setting.name, "pgolf", metric, Sample(value, 0.0, 1), unit)
        if o is not outcomes[0]:
            add_difference(recorder, o.setting.name, "against_first", o.against)
            add_difference(recorder, o.setting.name, "kl_against_first", o.kl_against)
    recorder.write()


def add_difference(recorder: Recorder, case: str, name: str, found: Paired) -> None:
    """Write a mean difference over documents, and the ends of its 95 % interval."""
    for metric, value in ((name, found.mean), (f"{name}_low", found.low), (f"{name}_high", found.high)):
        recorder.add(case, "pgolf", metric, Sample(value, 0.0, found.n), "bits/byte")


def main() -> None:
    """Parse arguments, calibrate, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="run folder with ema.safetensors")
    parser.add_argument("--data", type=Path, required=True, help="shards of the run, with their tokenizer")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "cpu"))
    parser.add_argument(
        "--match", type=int, default=0, help="model bytes; default: those of the first setting"
    )
    parser.add_argument(
        "--settings", nargs="+", default=[s.name for s in SETTINGS], help="names of SETTINGS, in order"
    )
    parser.add_argument("--seconds", type=float, default=140.0, help="start no setting after this time")
    parser.add_argument(
        "--micro-tokens", type=int, default=32_768, help="largest batch of calibration and scoring"
    )
    parser.add_argument(
        "--calibration-batches",
        type=int,
        default=0,
        help="micro-batches for Hessians, half as many for gradients; default: those of the run",
    )
    parser.add_argument(
        "--mean-bits", type=float, default=0.0, help="bits per code of the first setting; default: the run's"
    )
    parser.add_argument(
        "--blend",
        type=float,
        nargs="+",
        default=[],
        help="shares of the average; the rest is raw.safetensors",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    unknown = sorted(set(args.settings) - {s.name for s in SETTINGS})
    if unknown:
        parser.error(f"unknown settings {unknown}; expected some of {[s.name for s in SETTINGS]}")
    began = time.perf_counter()
    bench = Bench(args)
    print(
        "seconds",
        {k: round(v, 2) for k, v in bench.seconds.items()},
        "unquantized",
        bench.unquantized,
        flush=True,
    )
    outcomes: list[Outcome] = []
    named = {s.name: s for s in SETTINGS}
    for setting in (named[name] for name in args.settings):
        if time.perf_counter() - began > args.seconds:
            print(f"out of time before {setting.name!r}; raise --seconds")
            break
        wanted = args.match or (outcomes[0].bytes if outcomes else 0)
        try:
            outcomes.append(bench.measure(setting if wanted else replace(setting, size=0.0), wanted))
        except (RuntimeError, ValueError) as e:
            print(f"{setting.name}: {type(e).__name__}: {e}", flush=True)
            continue
        print(table(outcomes[-1:]).splitlines()[-1], f"{time.perf_counter() - began:8.1f}", flush=True)
    print(table(outcomes))
    blends = measure_blends(bench, args.folder, args.blend)
    args.out.mkdir(parents=True, exist_ok=True)
    record(bench, outcomes, blends, args.out)
    bench.dist.close()


if __name__ == "__main__":
    main()
