"""Compare a preset with the script of its pull request: one step of each from the same weights and batch.

    python -m bench.published records/2026-04-27_.../train_gpt.py pr1855

The script is a `train_gpt.py` of github.com/openai/parameter-golf with its log next to it
(`published_script.py`). Compared are

- initial values: the root mean square of each parameter;
- the tables of RoPE at the length of training;
- the loss and the gradient of every parameter on packed documents, with depth recurrence off and on: in
  float32, and in bfloat16 as trained, where each side is compared with the script in float32;
- optimizer steps from identical gradients, with the script's bfloat16 as float64: the clip, Muon with its
  iteration, AdamW, rates and weight decays per parameter;
- schedules at fractions of the clock: learning rate, momentum, weight average, start of the recurrence.

Some logs do not print the settings: --set names those that the command in the pull request's README sets.

Weights are random in every part, because gates and projections that are zero pass no gradient. Errors are
|ours - theirs| / |theirs| in parts per million of the norm. The exit status is 1 if something differs by more
than rounding explains; schedules that count steps are compared at the pace of the published log.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.common import RESULTS, Recorder, Sample
from bench.published_script import Script, exact, load_script
from pgolf.config import Config
from pgolf.data.loader import padded_cu_seqlens
from pgolf.data.stream import cut_segments, document_starts
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import train_tokenizer
from pgolf.dist import Dist
from pgolf.errors import UserError
from pgolf.model import gpt
from pgolf.model.gpt import GPT
from pgolf.model.parameters import initial_parameters, parameter_shapes
from pgolf.model.rope import rope_tables
from pgolf.ops.linear_softcap_ce import linear_softcap_ce_ref
from pgolf.ops.newton_schulz import newton_schulz_ref
from pgolf.optim.groups import split_parameters
from pgolf.optim.polar import coefficients
from pgolf.optim.schedule import context_at, ema_decay, lr_multiplier, muon_momentum
from pgolf.optim.step import Optimizer
from pgolf.presets import PRESETS

BOS = 1
LENGTHS = (120, 61, 1, 74)
"""Tokens of the packed documents; a document of one token is its BOS alone."""
ROWS = 2
"""Rows of the batch for scripts that take rows."""
CUT = 32
"""Longest segment, tokens, of the batch on which the cutting of documents is compared."""
FRACTIONS = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95)
"""Of the clock, at which schedules are compared."""
MATRIX_STD, VECTOR_STD = 0.03, 0.2
"""Standard deviation of what is added to initial matrices and embeddings, and to all other parameters."""

NARROW = 192
"""Width at which optimizer steps are compared: Muon's rule depends on the ratio of a matrix's sides only. It
is not that of a table, whose projection a script may leave out then."""

FLOAT32_LIMIT = 200.0
"""Largest error of a gradient in float32, ppm: rounding through up to 17 layers."""
BFLOAT16_FACTOR, BFLOAT16_FLOOR = 2.0, 2000.0
"""In bfloat16 our error may be this multiple of the script's own, plus this many ppm."""
FEW = 8
"""Gradients of fewer numbers are not judged in bfloat16: the error of one sum is one draw, large or small."""
UPDATE_LIMIT = 500.0
"""Largest error of the change of a parameter by optimizer steps in float32 against float64, ppm."""
SCHEDULE_LIMIT = 0.005
"""Largest difference of a learning-rate factor or a momentum; a log gives its pace to about 0.002."""
DECAY_LIMIT = 0.1
"""Largest relative difference of the length of the weight average at the end of a run."""
INITIAL_LIMIT = 0.02
"""Largest relative difference of the root mean square of an initial parameter."""

ALTERNATIVES: dict[str, tuple[tuple[str, ...], ...]] = {
    "tok_emb": (("tok_emb.weight",),),
    "qo_bank": (("qo_bank",), ("blocks.{}.attn.c_q.weight", "blocks.{}.attn.proj.weight")),
    "kv_bank": (("kv_bank",), ("blocks.{}.attn.c_k.weight", "blocks.{}.attn.c_v.weight")),
    "mlp_up_bank": (("mlp_up_bank",), ("blocks.{}.mlp.fc.weight",)),
    "mlp_down_bank": (("mlp_down_bank",), ("blocks.{}.mlp.proj.weight",)),
    "q_gain": (("blocks.{}.attn.q_gain",),),
    "attn_scale": (("blocks.{}.attn_scale",),),
    "mlp_scale": (("blocks.{}.mlp_scale",),),
    "resid_mix": (("blocks.{}.resid_mix",),),
    "head_gate": (("blocks.{}.attn.attn_gate_w",), ("blocks.{}.attn.attn_gate_proj.weight",)),
    "skip_weights": (("skip_weights",),),
    "skip_gates": (("skip_gates",),),
    "lane_post": (("parallel_post_lambdas",),),
    "lane_resid": (("parallel_resid_lambdas",),),
    "smear_weight": (("smear_gate.weight",),),
    "smear_lambda": (("smear_lambda",),),
    "smear_logit": (("smear.gate",),),
    "bigram_table": (("bigram.embed.weight",),),
    "bigram_proj": (("bigram.proj.weight",),),
    "bigram_scale": (("bigram.scale",),),
    "value_table": (("ve_shared.embed.weight",),),
    "value_proj": (("ve_shared.proj.weight",),),
    "value_scale": (("ve_shared.scale",),),
    "value_layer_scale": (("ve_layer_scales.{}",),),
}
"""Our parameter -> the forms in which scripts have it: one tensor, or one per layer ({}) to be stacked."""
EVALUATION_ONLY = ("softcap_pos", "softcap_neg")
"""Parameters of scripts that no pass of the training reads; test-time training learns them."""
LEAKY = ("pr1874", "pr2135")
"""Presets whose scripts let the smear gate reach over a BOS that starts a segment. The preset stops there,
so it is compared with model.smear_over_bos. (Rows of tokens, as in pr549, have a BOS anywhere.)"""


class Mapped(NamedTuple):
    """One of our parameters, and the tensors of a script that it consists of."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    """Their names, in the order in which they are stacked."""

    def gather(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the script's values in our shape."""
        tensors = [values[name] for name in self.parts]
        return (tensors[0] if len(tensors) == 1 else torch.stack(tensors)).reshape(self.shape)

    @torch.no_grad()
    def scatter(self, value: Tensor, into: Mapping[str, Tensor]) -> None:
        """Write a value in our shape into the script's tensors: `gather` returns it."""
        for name, part in zip(self.parts, value.reshape(len(self.parts), -1), strict=True):
            into[name].copy_(part.view(into[name].shape))


def map_parameters(config: Config, theirs: Mapping[str, Tensor]) -> dict[str, Mapped]:
    """Return, for each of our parameters, the script's tensors, each of which is used once.

    Raises:
        UserError: a parameter of one side has no counterpart, or has another number of elements.
    """
    found: dict[str, Mapped] = {}
    for name, shape in parameter_shapes(config.model).items():
        for patterns in ALTERNATIVES.get(name, ()):
            every = (p.format(i) for p in patterns for i in range(config.model.layers if "{}" in p else 1))
            parts = tuple(part for part in every if part in theirs)
            if parts and sum(theirs[part].numel() for part in parts) == math.prod(shape):
                found[name] = Mapped(shape, parts)
                break
        else:
            raise UserError(f"the script has nothing for {name} {shape}; it has {', '.join(theirs)}")
    used = {part for mapped in found.values() for part in mapped.parts}
    left = theirs.keys() - used - set(EVALUATION_ONLY)
    if left:
        raise UserError(f"the preset has nothing for {', '.join(sorted(left))} of the script")
    return found


class Batch(NamedTuple):
    """Real tokens in segments."""

    ids: Tensor  # (T,)
    targets: Tensor  # (T,)
    cu: Tensor  # (S + 1,) or more int32, padded with T


def make_batch(config: Config, *, packed: bool, cut: int = 0) -> Batch:
    """Return a batch from the sample's text, with a tokenizer of the preset's vocabulary.

    Args:
        packed: documents of `LENGTHS`; otherwise `ROWS` rows of equal length, which ignore documents.
        cut: longest segment, tokens; 0: no document is cut.
    """
    sample = sample_paths()
    with tempfile.TemporaryDirectory() as folder:
        texts = (document.text for document in iterate_documents(sample.train))
        path = Path(folder) / "t.model"
        tokenizer = train_tokenizer(texts, path, vocab_size=config.model.vocab_size, threads=1)
    rows = tokenizer.encode_ids([document.text for document in iterate_documents(sample.val)])
    long = [row for row in rows if len(row) >= max(LENGTHS)]
    pieces = [np.concatenate(([BOS], row))[:size] for row, size in zip(long, LENGTHS, strict=False)]
    tokens = np.concatenate([*pieces, [BOS]]).astype(np.int64)
    total = sum(LENGTHS)
    if packed:
        starts = cut_segments(document_starts(tokens[:-1], BOS), total, cut or total)
        cu = padded_cu_seqlens(starts, total)
    else:
        cu = torch.arange(0, total + 1, total // ROWS, dtype=torch.int32)
    return Batch(torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:]), cu)


def randomize(model: nn.Module) -> None:
    """Move every initial weight of a published model by random numbers, in place."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            matrix = p.dim() > 1 and min(p.shape[-2:]) > 16
            p.add_(torch.randn(p.shape, generator=rng).to(p), alpha=MATRIX_STD if matrix else VECTOR_STD)


def error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted| in ppm; of two zeros it is 0."""
    difference, size = (float(t.double().norm()) for t in (found.double() - wanted.double(), wanted))
    return 0.0 if difference == 0 else 1e6 * difference / max(size, 1e-12)


class WideProducts(TorchDispatchMode):
    """Compute products of bfloat16 matrices in float32 and round the result, as a GPU does.

    Without it a CPU that has no instructions for bfloat16 needs minutes for what takes it seconds.
    """

    PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the products, and pass everything else on."""
        if func in self.PRODUCTS and args[0].dtype == args[1].dtype == torch.bfloat16:
            return func(args[0].float(), args[1].float()).bfloat16()
        return func(*args, **(kwargs or {}))


class Pass(NamedTuple):
    """The result of a forward and a backward pass."""

    loss: float
    grads: dict[str, Tensor]
    """Float32, under our names and in our shapes."""


@dataclass
class Comparison:
    """One script and one preset; each part of the comparison records lines and adds what is wrong."""

    script: Script
    config: Config
    recorder: Recorder
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        if self.config.name in LEAKY:
            self.config = replace(self.config, model=replace(self.config.model, smear_over_bos=True))
        self.theirs = self.script.model()
        self.map = map_parameters(self.config, dict(self.theirs.named_parameters()))
        self.initial = self.gathered(self.theirs)
        randomize(self.theirs)
        self.device = self.recorder.device

    def gathered(self, model: nn.Module, *, grads: bool = False) -> dict[str, Tensor]:
        """Return copies of the script's parameters, or of their gradients, under our names."""
        named = dict(model.named_parameters())
        if grads:
            empty = {n: torch.zeros_like(p) for n, p in named.items()}
            values = {n: empty[n] if p.grad is None else p.grad for n, p in named.items()}
        else:
            values = {n: p.detach() for n, p in named.items()}
        return {name: m.gather(values).detach().float().cpu().clone() for name, m in self.map.items()}

    def note(self, case: str, impl: str, metric: str, value: float, unit: str) -> None:
        """Record one number."""
        self.recorder.add(case, impl, metric, Sample(value, 0.0, 1), unit)

    def check(self, case: str, metric: str, value: float, limit: float, unit: str) -> None:
        """Record a number of ours that must not be above `limit`."""
        self.note(case, "pgolf", metric, value, unit)
        if not value <= limit:
            self.problems.append(f"{case}, {metric}: {value:.6g} {unit}, expected at most {limit:.6g}")

    def initial_values(self) -> None:
        """Compare the root mean square of the initial parameters."""
        ours = initial_parameters(self.config.model, seed=0)
        for name, theirs in self.initial.items():
            sizes = [float(t.square().mean().sqrt()) for t in (ours[name], theirs)]
            self.check(
                "initial values",
                name,
                abs(sizes[0] - sizes[1]) / max(*sizes, 1e-30),
                INITIAL_LIMIT,
                "of its RMS",
            )

    def rotation(self) -> None:
        """Compare the tables of RoPE at the length of training in float32; record those `as_trained`."""
        model = self.config.model
        ours = rope_tables(
            model.max_context, model.rope_dims, base=model.rope_base, device=torch.device("cpu")
        )
        for trained in (False, True):
            theirs = copy.deepcopy(self.theirs)
            if trained:
                self.script.as_trained(theirs)
            for name, mine, its in zip(
                ("cos", "sin"), ours, self.script.rope(theirs, model.max_context), strict=True
            ):
                found = error(mine.reshape(its.shape), its)
                if trained:
                    self.note("rotation, as trained", "published", name, found, "ppm")
                else:
                    self.check("rotation, float32", name, found, FLOAT32_LIMIT, "ppm")

    def gradients(self, batch: Batch, case: str, *, loop: bool) -> None:
        """Compare loss and gradients of one batch in float32, then in bfloat16 as trained."""
        wanted = self.their_pass(batch, loop=loop, trained=False)
        found = self.our_pass(batch, loop=loop, dtype=torch.float32)
        self.check(f"{case}, float32", "loss", 1e6 * abs(found.loss / wanted.loss - 1), FLOAT32_LIMIT, "ppm")
        for name, grad in wanted.grads.items():
            self.check(f"{case}, float32", name, error(found.grads[name], grad), FLOAT32_LIMIT, "ppm")
        case = f"{case}, bfloat16"
        trained = self.their_pass(batch, loop=loop, trained=True)
        ours = self.our_pass(batch, loop=loop, dtype=torch.bfloat16)
        for name in ("loss", *wanted.grads):
            if name == "loss":
                pair = [1e6 * abs(run.loss / wanted.loss - 1) for run in (trained, ours)]
            else:
                pair = [error(run.grads[name], wanted.grads[name]) for run in (trained, ours)]
            self.note(case, "published", name, pair[0], "ppm")
            judged = name == "loss" or wanted.grads[name].numel() >= FEW
            limit = BFLOAT16_FACTOR * pair[0] + BFLOAT16_FLOOR if judged else math.inf
            self.check(case, name, pair[1], limit, "ppm")

    def cuts(self) -> None:
        """Compare how documents are cut, and the loss on cut ones.

        Our smear gate stops at every segment, that of the scripts at a BOS only. So with a smear gate the
        losses are recorded and may differ.
        """
        batch = make_batch(self.config, packed=True, cut=CUT)
        starts = torch.nonzero(batch.ids == BOS)[:, 0].tolist()
        build = self.script.names["_build_cu_seqlens"]
        theirs, _ = build(starts, len(batch.ids), torch.device("cpu"), CUT, 64)
        self.check(
            "cut documents", "segments not as in the script", float(not theirs.equal(batch.cu)), 0.0, "1"
        )
        losses = [
            self.our_pass(batch, loop=False, dtype=torch.float32).loss,
            self.their_pass(batch, loop=False, trained=False).loss,
        ]
        limit = math.inf if self.config.model.smear_gate else FLOAT32_LIMIT
        self.check("cut documents, float32", "loss", 1e6 * abs(losses[0] / losses[1] - 1), limit, "ppm")

    def their_pass(self, batch: Batch, *, loop: bool, trained: bool) -> Pass:
        """Run the script's model in float32, or `trained`: in the dtypes of its training."""
        model = copy.deepcopy(self.theirs).to(self.device)
        if trained:
            self.script.as_trained(model)
            with torch.no_grad():  # weights that it keeps in float32 are not rounded in the middle of a run
                for p, full in zip(model.parameters(), self.theirs.parameters(), strict=True):
                    p.copy_(full)
        fused = trained and self.device.type == "cuda"
        model.train(fused)
        if hasattr(model, "fused_ce_enabled"):
            model.fused_ce_enabled = fused
        ids, targets, cu = (t.to(self.device) for t in batch)
        with self.wide_products():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=trained):
                loss = self.script.loss(model, ids, targets, cu, loop=loop)
            loss.backward()
        return Pass(loss.item(), self.gathered(model, grads=True))

    @contextmanager
    def wide_products(self) -> Iterator[None]:
        """On the CPU, use `WideProducts`, and the reference of our loss, which consists of such products."""
        if self.device.type != "cpu":
            yield
            return
        with WideProducts(), mock.patch.object(gpt, "linear_softcap_ce", linear_softcap_ce_ref):
            yield

    def our_model(self, dtype: torch.dtype = torch.float32) -> GPT:
        """Return our model with the script's weights, which computes in `dtype`."""
        model = GPT(self.config.model)
        model.load_state_dict(self.gathered(self.theirs))
        model.prepare(self.device, attention="sdpa" if dtype == torch.float32 else "auto")
        model.compute_dtype = dtype
        return model

    def our_pass(self, batch: Batch, *, loop: bool, dtype: torch.dtype) -> Pass:
        """Run our model in `dtype`."""
        model = self.our_model(dtype)
        ids, targets, cu = (t.to(self.device) for t in batch)
        with self.wide_products():
            loss = model(ids, targets, cu, max_seqlen=int(cu.diff().max()), loop=loop).mean()
            loss.backward()
        return Pass(loss.item(), self.gathered_ours(model))

    @staticmethod
    def gathered_ours(model: GPT) -> dict[str, Tensor]:
        """Return copies of our gradients; a part that the pass did not use has zeros."""
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        return {name: grad.float().cpu() for name, grad in grads.items()}

    def iteration(self) -> None:
        """Compare the polar iteration, in float64, on a random matrix of every bank's shape."""
        rng = torch.Generator().manual_seed(1)
        muon = self.config.optim.muon
        table = coefficients(muon.coefficients, muon.ns_steps)
        steps = self.script.settings.muon_backend_steps
        for name in GPT.bank_names:
            x = torch.randn(parameter_shapes(self.config.model)[name][1:], generator=rng, dtype=torch.float64)
            with exact():
                theirs = self.script.polar(x.clone(), steps=steps)
            self.check(
                "polar iteration, float64", name, error(newton_schulz_ref(x, table), theirs), 1.0, "ppm"
            )

    def updates(self) -> None:
        """Compare what three steps of the optimizers change, from the same gradients, rates and momentum."""
        ours, theirs = self.our_model().cpu(), copy.deepcopy(self.theirs).cpu().double()
        optim, clip = self.config.optim, float(self.script.settings.grad_clip_norm)
        optimizer = Optimizer(ours, optim, Dist.start("cpu"))
        optimizers = self.script.optimizers(theirs)
        before, rng = self.gathered(theirs), torch.Generator().manual_seed(2)
        for frac in (0.05, 0.5, 0.9):
            for p in theirs.parameters():
                p.grad = torch.randn(p.shape, generator=rng).double() * 1e-3
            for name, grad in self.gathered(theirs, grads=True).items():
                ours.get_parameter(name).grad.copy_(grad)
            with exact():
                for group in (g for o in optimizers for g in o.param_groups):
                    group["lr"] = group["base_lr"] * lr_multiplier(frac, optim)
                    if "momentum" in group:
                        group["momentum"] = muon_momentum(frac, optim.muon)
                if clip > 0:
                    torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
                for o in optimizers:
                    o.step()
            optimizer.step(frac)
        after = dict(ours.named_parameters())
        for name, wanted in self.gathered(theirs).items():
            change = error(after[name].detach() - before[name], wanted - before[name])
            self.check("change by three steps", name, change, UPDATE_LIMIT, "ppm")

    def rates(self) -> None:
        """Compare optimizer, rate and weight decay of every parameter, which must be equal.

        What else a rule consists of (Nesterov's form, row normalization) shows in `updates`.
        """
        by_id = {id(p): n for n, p in self.theirs.named_parameters()}
        theirs = {
            by_id[id(p)]: _their_rule(optimizer, group)
            for optimizer in self.script.optimizers(self.theirs)
            for group in optimizer.param_groups
            for p in group["params"]
        }
        groups, ours = split_parameters(self.our_model()), _our_rules(self.config)
        rows = [["parameter", *ours["scalars"], "the script"]]
        equal = 0
        for name, mapped in self.map.items():
            kind = next(k for k in ("banks", "embed", "scalars") if name in getattr(groups, k))
            different = [r for r in (theirs.get(part, {}) for part in mapped.parts) if r != ours[kind]]
            equal += not different
            rows.append([name, *map(str, ours[kind].values()), str(different[0]) if different else "same"])
            if different:
                self.problems.append(f"rates, {name}: {ours[kind]}, but the script has {different[0]}")
        print("\n".join(" ".join(f"{cell:<14}" for cell in row).rstrip() for row in rows))
        self.note("rates", "pgolf", "as in the script", equal, f"of {len(self.map)} parameters")

    def schedules(self) -> None:
        """Compare schedules at fractions of the clock, and settings that nothing else shows."""
        optim, script = self.config.optim, self.script
        for frac in FRACTIONS:
            for what, mine, its in (
                ("learning rate", lr_multiplier(frac, optim), script.lr_multiplier(frac)),
                ("momentum", muon_momentum(frac, optim.muon), script.muon_momentum(frac)),
            ):
                case = f"{what} at {frac:.0%}"
                self.note(case, "published", "factor", its, "1")
                self.note(case, "pgolf", "factor", mine, "1")
                if abs(mine - its) > SCHEDULE_LIMIT:
                    self.problems.append(f"{case} of the clock: {mine:.4f}, but the script has {its:.4f}")
        self.average()
        self.contexts()
        config = self.config
        for name, value in (
            ("train_batch_tokens", config.data.batch_tokens),
            ("grad_clip_norm", optim.grad_clip),
            ("enable_looping_at", optim.recurrence_at if config.model.recurrence_repeats else None),
        ):
            its = getattr(script.settings, name, None)
            if its != value:
                self.problems.append(f"{name} of the script is {its}, of the preset {value}")

    def contexts(self) -> None:
        """Compare the longest segment at fractions of the clock; some scripts have a schedule for it."""
        settings, config = self.script.settings, self.config
        stages = (s.split("@") for s in (getattr(settings, "train_seq_schedule", "") or "").split(",") if s)
        theirs = [(int(length), float(end)) for length, end in stages]
        for frac in FRACTIONS:
            its = next((length for length, end in theirs if frac < end), settings.train_seq_len)
            mine = context_at(frac, config.train) or config.model.max_context
            if mine != its:
                self.problems.append(
                    f"longest segment at {frac:.0%} of the clock: {mine}, the script has {its}"
                )

    def average(self) -> None:
        """Compare how many steps the average of the weights reaches back at the end of the run."""
        decay = self.script.ema_decay
        ours = ema_decay(self.script.last_step(), self.config.optim)
        lengths = [1 / -math.log(d) if d else 0.0 for d in (decay, ours)]
        self.note("weight average", "published", "length at the end", lengths[0], "steps")
        self.note("weight average", "pgolf", "length at the end", lengths[1], "steps")
        if abs(lengths[1] - lengths[0]) > DECAY_LIMIT * lengths[0]:
            self.problems.append(
                f"the weight average reaches {lengths[1]:.0f} steps back, not {lengths[0]:.0f}"
            )

    def run(self) -> None:
        """Compare everything."""
        packed = self.script.packs_documents
        batch = make_batch(self.config, packed=packed)
        parameters = sum(p.numel() for p in self.theirs.parameters())
        if parameters != self.script.log.parameters:
            self.problems.append(f"{parameters} parameters, but the log says {self.script.log.parameters}")
        self.initial_values()
        self.rotation()
        for loop in (False, True) if self.config.model.recurrence_repeats else (False,):
            self.gradients(batch, f"loop {'on' if loop else 'off'}", loop=loop)
        if packed:
            self.cuts()
        self.optimizer_steps()
        self.rates()
        self.schedules()

    def optimizer_steps(self) -> None:
        """Compare the optimizers on the same model at a smaller width."""
        full = self.config.model
        model = replace(full, width=NARROW, rope_dims=min(full.rope_dims, NARROW // full.heads))
        narrow = replace(self.config, model=model)
        small = Comparison(self.script.narrowed(NARROW), narrow, self.recorder, self.problems)
        small.iteration()
        small.updates()


def _their_rule(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, object]:
    """Return what a group of a script's optimizer does, in the words of `_our_rules`."""
    rule = {"lr": group["lr"], "decay": float(group.get("weight_decay", 0.0))}
    if "betas" in group:
        return {"by": "AdamW", **rule, "betas": tuple(group["betas"]), "eps": group["eps"]}
    return {"by": type(optimizer).__name__, **rule}


def _our_rules(config: Config) -> dict[str, dict[str, object]]:
    """Return what is done to each group of our parameters."""
    muon, adam = config.optim.muon, config.optim.adam
    rest = {"betas": (adam.beta1, adam.beta2), "eps": adam.eps}
    return {
        "banks": {"by": "Muon", "lr": muon.lr, "decay": muon.weight_decay},
        "embed": {"by": "AdamW", "lr": adam.embed_lr, "decay": adam.embed_weight_decay, **rest},
        "scalars": {"by": "AdamW", "lr": adam.scalar_lr, "decay": adam.scalar_weight_decay, **rest},
    }


def main() -> int:
    """Compare and print; see the top of the file. Returns 1 if something differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "script", type=Path, help="a published train_gpt.py; it is executed, so read it first"
    )
    parser.add_argument("preset", choices=list(PRESETS), help="the preset that it is compared with")
    parser.add_argument("--log", type=Path, help="of a run of the script; default: train*.log next to it")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="environment variables of that run which its log does not print; see the command in its README",
    )
    where = "where passes run; cuda is written and was not tried"
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help=where)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args()
    script = load_script(args.script, args.log, dict(text.partition("=")[::2] for text in args.set))
    recorder = Recorder("published", torch.device(args.device), args.out, file=f"published-{args.preset}")
    comparison = Comparison(script, PRESETS[args.preset](), recorder)
    comparison.run()
    recorder.write()
    for problem in comparison.problems:
        print(f"differs: {problem}")
    print(f"{args.preset}: {len(comparison.problems) or 'no'} differences from {args.script}")
    return 1 if comparison.problems else 0


if __name__ == "__main__":
    sys.exit(main())
