"""A published training script as objects: its settings, its model, its optimizers, its schedules.

The script is a `train_gpt.py` of github.com/openai/parameter-golf that the user has; nothing of it is part of
this project. Its definitions are executed, its training is not: packed scripts are unpacked by parsing, and
what is defined inside of its training function (schedules; in early scripts the optimizers) is executed by
itself, from its syntax tree. The settings are those that the log next to the script prints, and those that
its command sets, which the caller has to name where the log prints none.

The module flash_attn_interface is replaced by masked attention of torch, or by flash-attn-4 for a bench of
the script as it trains on a GPU; triton, where it is not installed, by names without a function. On the CPU
the model takes its own plain form of what Triton fuses, which these scripts use outside of training. Triton
reads the source of a kernel through `inspect`, so the source is registered with `linecache`, under a name of
its own: that of a packed script is in no file.
"""

from __future__ import annotations

import ast
import base64
import copy
import importlib.util
import inspect
import linecache
import lzma
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.errors import UserError
from pgolf.model.attention import find_fa4

RAW = {"format": lzma.FORMAT_RAW, "filters": [{"id": lzma.FILTER_LZMA2}]}
MODULE = "published_script"
"""Name of a script as a module."""
LARGEST_SOURCE = 1 << 22
"""Bytes of an unpacked script, above which it is refused."""
OF_THE_MACHINE = (
    r"rank|local_rank|world_size|distributed|is_main_process|grad_accum_steps|logfile|run_id"
    r"|\w+_(dir|path|files)"
)
"""Settings in a log that say where it ran."""


def read_source(path: Path) -> str:
    """Return the text of a script; one that is packed, as `exec(decompress(b85decode(...)))`, is unpacked.

    Raises:
        UserError: a packed script is in a form that is not known, or larger than `LARGEST_SOURCE`.
    """
    text = path.read_text(encoding="utf-8")
    for node in parse(text).body:
        if isinstance(node, ast.Expr) and ast.unparse(node).startswith("exec("):
            words = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            packed = max((w for w in words if isinstance(w, str | bytes)), key=len, default="")
            return _unpack(base64.b85decode(packed), path)
    return text


def _unpack(packed: bytes, path: Path) -> str:
    for form in (RAW, {}):
        try:
            text = lzma.LZMADecompressor(**form).decompress(packed, LARGEST_SOURCE)
        except lzma.LZMAError:
            continue
        if len(text) < LARGEST_SOURCE:
            return text.decode()
    raise UserError(f"{path}: expected a script, or one that is packed with lzma and base85, below 4 MiB")


def parse(source: str, name: str = "") -> ast.Module:
    """Return the syntax tree of a script, without the definitions that this Python cannot parse.

    Some scripts need Python 3.12 for a line of their quantizer. Such a definition is left out, with a line
    that says so. With a `name`, `inspect` finds the source of what is compiled under this name.
    """
    while True:
        try:
            tree = ast.parse(source)
            if name:
                linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
            return tree
        except SyntaxError as error:
            lines = source.splitlines(keepends=True)
            at = (error.lineno or 1) - 1
            # A definition begins, and the next statement follows it, at the left margin.
            first = next((i for i in range(at, -1, -1) if lines[i][:1].strip(" \t)")), 0)
            last = next((i for i in range(at + 1, len(lines)) if lines[i][:1].strip()), len(lines))
            print(f"left out, line {at + 1}, {error.msg}: {lines[first].strip()[:60]}", file=sys.stderr)
            source = "".join(lines[:first] + lines[last:])


class Log(NamedTuple):
    """What the log of a published run says."""

    settings: dict[str, str]
    """As printed below "Hyperparameters:"; early scripts print none and ran with their defaults."""
    parameters: int
    pace: list[tuple[int, float]]
    """Steps done, and milliseconds of training until then; the first is (0, 0), the last the end."""


def read_log(path: Path) -> Log:
    """Read the log of a training run.

    Raises:
        UserError: it does not say how many parameters there were, or how long the steps took.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    block = re.search(r"^Hyperparameters:\n((?:  \w+: .*\n)+)", text, re.M)
    settings = dict(re.findall(r"^  (\w+): (.*)$", block[1], re.M)) if block else {}
    parameters = re.search(r"^model_params:(\d+)", text, re.M)
    end = re.search(r"wallclock_cap train_time: ?(\d+)ms step: ?(\d+)/", text)
    if parameters is None or end is None:
        raise UserError(f"{path}: expected the log of a whole run, with model_params and wallclock_cap")
    pace = {
        int(s): float(ms)
        for s, ms in re.findall(r"^step:(\d+)/\d+ train_loss:.*train_time:(\d+)ms", text, re.M)
    }
    batch = int(settings.get("train_batch_tokens", 0))
    for step, rate in re.findall(r"^(\d+)/\d+ train_loss: .* tok/s: (\d+)", text, re.M):
        pace[int(step)] = 1e3 * int(step) * batch / int(rate)
    pace = {
        step: ms for step, ms in pace.items() if step >= 100
    }  # the first steps are not of the usual length
    pace[int(end[2])] = float(end[1])
    return Log(settings, int(parameters[1]), [(0, 0.0), *sorted(pace.items())])


class _Anything(types.ModuleType):
    """A module whose every name can be called and used as a decorator; what it makes does nothing."""

    def __init__(self, name: str = "stand_in") -> None:
        super().__init__(name)

    def __getattr__(self, name: str) -> _Anything:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *_args: object, **_names: object) -> _Anything:
        return _Anything()


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attend with one mask over all tokens; `q` `(B, T, H, K)`, `k` and `v` `(B, T, G, K)`, G divides H."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=allowed, enable_gqa=True).transpose(1, 2)


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Stand in for FlashAttention 3: causal attention within each row of the batch."""
    assert causal
    size = q.shape[1]
    return masked_attention(q, k, v, torch.ones(size, size, dtype=torch.bool, device=q.device).tril())


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, causal: bool, **_others: object
) -> Tensor:
    """Stand in for FlashAttention 3 on packed segments, `q` `(T, H, K)`: a mask that keeps them apart."""
    assert causal
    position = torch.arange(q.shape[0], device=q.device)
    segment = torch.bucketize(position, cu_seqlens_q, right=True)
    allowed = (segment[:, None] == segment) & (position[:, None] >= position)
    return masked_attention(q[None], k[None], v[None], allowed)[0]


class FlashAttention(NamedTuple):
    """What a script imports from the module of FlashAttention 3."""

    flash_attn_func: Callable[..., Tensor] = flash_attn_func
    flash_attn_varlen_func: Callable[..., Tensor] = flash_attn_varlen_func


def flash_attention_4() -> FlashAttention:
    """Return flash-attn-4, which scripts do not know, under the names of FlashAttention 3.

    flash-attn-4 has a `flash_attn_varlen_func` of its own, but that returns a pair, and torch.compile would
    have to break its graph at it, which a script that compiles its whole model as one graph forbids. So this
    is the operator of `pgolf.model.fa4`, which calls the same two kernels.

    Raises:
        UserError: it is not installed, or cannot be used.
    """
    peer = find_fa4()
    if peer.problem:
        raise UserError(
            f"the script attends with flash-attn-4, which is {peer.problem}; pip install 'pgolf[fa4]', on a "
            "machine with a Hopper GPU"
        )
    kernel = peer.found

    def packed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        same = cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        if not (same and causal and window_size == (-1, -1)):
            raise NotImplementedError("only causal attention within whole segments stands in here")
        out: Tensor = kernel(q, k, v, cu_seqlens_q, max_seqlen_q)
        return out

    def rows(*_tensors: Tensor, **_settings: object) -> Tensor:
        raise NotImplementedError("only packed documents stand in here, not rows of tokens")

    return FlashAttention(rows, packed)


def _stand_ins(attention: FlashAttention) -> dict[str, types.ModuleType]:
    """Return replacements by name for modules of the scripts; FlashAttention 3 has no float32."""
    flash = types.ModuleType("flash_attn_interface")
    vars(flash).update(attention._asdict())
    found: dict[str, types.ModuleType] = {"flash_attn_interface": flash}
    if importlib.util.find_spec("triton") is None:
        for name in ("triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor"):
            found[name] = _Anything(name)
    return found


@contextmanager
def replaced_modules(modules: Mapping[str, types.ModuleType]) -> Iterator[None]:
    """Let `import` find these modules.

    What else is imported meanwhile stays imported: `mock.patch.dict` would forget it, and triton cannot be
    imported twice.
    """
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


def _uncompiled(function: Any = None, **_settings: object) -> Any:
    return (lambda f: f) if function is None else function


@contextmanager
def exact() -> Iterator[None]:
    """Compute in float64 what a script computes in bfloat16, as long as it asks for that dtype by name."""
    with (
        mock.patch.object(torch, "bfloat16", torch.float64),
        mock.patch.object(Tensor, "bfloat16", Tensor.double),
    ):
        yield


@dataclass(frozen=True)
class Script:
    """The definitions of a published script, with the settings of its published run."""

    names: dict[str, Any]
    """What it defines."""
    tree: ast.Module
    settings: Any
    """Its own object of settings."""
    log: Log
    environment: Mapping[str, str]
    """Its settings as environment variables, some of which its model reads by itself."""

    @property
    def packs_documents(self) -> bool:
        """Whether its model takes packed documents; earlier ones take rows of tokens."""
        return "cu_seqlens" in inspect.signature(self.names["GPT"].forward).parameters

    @property
    def clock_ms(self) -> float:
        """Length of the training, milliseconds, to which its fractions refer."""
        reserve = getattr(self.settings, "gptq_reserve_seconds", 0.0)
        return 1e3 * float(self.settings.max_wallclock_seconds - reserve)

    def step_at(self, frac: float) -> int:
        """Return the number of steps that the published run had done at `frac` of the clock."""
        steps, ms = zip(*self.log.pace, strict=True)
        return round(float(np.interp(frac * self.clock_ms, ms, steps)))

    def last_step(self) -> float:
        """Return how much of the clock a step took at the end of the published run."""
        (before, at), (steps, ms) = self.log.pace[-2:]
        return (ms - at) / (steps - before) / self.clock_ms

    @property
    def polar(self) -> Callable[..., Tensor]:
        """The polar iteration that its Muon calls; some scripts have two."""
        other = bool(getattr(self.settings, "use_polar_express", False))
        function: Callable[..., Tensor] = self.names[
            "zeropower_via_polar_express" if other else "zeropower_via_newtonschulz5"
        ]
        return function

    def model(self) -> nn.Module:
        """Return its model in float32, with the weights that it starts from."""
        kind = self.names["GPT"]
        wanted = list(inspect.signature(kind).parameters)
        with mock.patch.dict(os.environ, self.environment):
            if wanted == ["h"]:
                model = kind(self.settings)
            else:
                given = {n: getattr(self.settings, n) for n in wanted if hasattr(self.settings, n)}
                model = kind(**given)
        model.float()
        return model

    def narrowed(self, width: int) -> Script:
        """Return the same script with a narrower model."""
        settings = copy.copy(self.settings)
        settings.model_dim = settings.embedding_dim = width
        return replace(self, settings=settings)

    def as_trained(self, model: nn.Module) -> nn.Module:
        """Give the parameters of `model` the dtypes that they have in its training; return it."""
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, self.names["CastedLinear"]):
                module.float()
        for name, p in model.named_parameters():
            if name.endswith("_bank"):  # #549 does so in its training function
                p.data = p.data.float()
        restore = ("restore_fp32_params", "restore_low_dim_params_to_fp32")
        next(self.names[name] for name in restore if name in self.names)(model)
        return model

    def loss(self, model: nn.Module, ids: Tensor, targets: Tensor, cu: Tensor, *, loop: bool) -> Tensor:
        """Return its loss, nats per token, on segments that begin at `cu`, of one length if it takes rows."""
        if hasattr(model, "looping_active"):
            model.looping_active = loop
        if self.packs_documents:
            longest = int(cu.diff().max())
            result = model(ids[None], targets[None], cu_seqlens=cu, max_seqlen=longest)
        else:
            length = int(cu[1] - cu[0])
            with self._rows_of(length, model):
                result = model(ids.view(-1, length), targets.view(-1, length))
        assert isinstance(result, Tensor)
        return result

    @contextmanager
    def _rows_of(self, length: int, model: nn.Module) -> Iterator[None]:
        """Rotate rows of `length` as those of training: some scripts stretch the rotation by the length."""
        rotary = [m for m in model.modules() if hasattr(m, "_cos_cached") and hasattr(m, "train_seq_len")]
        before = [m.train_seq_len for m in rotary]
        for m in rotary:
            m.train_seq_len *= length / self.settings.train_seq_len
        yield
        for m, value in zip(rotary, before, strict=True):
            m.train_seq_len = value

    def rope(self, model: nn.Module, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the cosines and sines `(tokens, rotated pairs)` by which its first layer rotates."""
        rotary = next(m for m in model.modules() if hasattr(m, "_cos_cached"))
        cos, sin = rotary(tokens, next(model.parameters()).device, torch.float32)
        return cos.reshape(tokens, -1), sin.reshape(tokens, -1)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Return its optimizers of `model`, which stays on its device."""
        if "Optimizers" in self.names:
            return list(self._together(model))
        body = next(f.body for f in _functions(self.tree) if _stored(f.body, "optimizers"))
        groups = ("matrix_params", "block_named_params")
        first = next(i for i, n in enumerate(body) if any(_stored([n], group) for group in groups))
        last = max(i for i, n in enumerate(body) if _stored([n], "optimizers"))
        found = self._run(body[first : last + 1], base_model=model)
        return list(found["optimizers"])

    def _together(self, model: nn.Module) -> Any:
        """Return its object of all optimizers, which newer scripts have."""
        if torch.cuda.is_available():
            return self.names["Optimizers"](self.settings, model)
        with mock.patch.object(torch.cuda, "Stream", _Anything):
            return self.names["Optimizers"](self.settings, model)

    def optimizer_step(self, model: nn.Module, frac: float) -> Callable[[], None]:
        """Return its optimizer step at `frac` of the clock in one process: clip, update, no gradients after.

        Its object of all optimizers runs AdamW next to Muon, on a stream of its own.
        """
        together = self._together(model) if "Optimizers" in self.names and torch.cuda.is_available() else None
        optimizers = self.optimizers(model) if together is None else list(together)
        rate, momentum = self.lr_multiplier(frac), self.muon_momentum(frac)
        parameters, clip = list(model.parameters()), float(self.settings.grad_clip_norm)

        def step() -> None:
            for group in (g for o in optimizers for g in o.param_groups):
                group["lr"] = group["base_lr"] * rate
                if "momentum" in group:
                    group["momentum"] = momentum
            if clip > 0:
                nn.utils.clip_grad_norm_(parameters, clip)
            if together is not None:
                together.step(distributed=False)
                return
            for optimizer in optimizers:
                optimizer.step()
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)

        return step

    def lr_multiplier(self, frac: float) -> float:
        """Return its factor on the learning rates at `frac` of the clock."""
        node = next(f for f in _functions(self.tree) if f.name == "lr_mul")
        function: Callable[..., float] = self._run([node], max_wallclock_ms=self.clock_ms)["lr_mul"]
        given = {"step": self.step_at(frac), "elapsed_ms": frac * self.clock_ms, "frac": frac}
        return function(**{name: given[name] for name in inspect.signature(function).parameters})

    @property
    def ema_decay(self) -> float:
        """The decay of its weight average per step; 0: it has none."""
        if hasattr(self.settings, "ema_decay"):
            return float(self.settings.ema_decay)
        bodies = [f.body for f in _functions(self.tree)]
        found = [n for body in bodies for n in body if _stored([n], "ema_decay")]
        return float(self._run(found)["ema_decay"]) if found else 0.0

    def muon_momentum(self, frac: float) -> float:
        """Return its momentum at `frac` of the clock; it counts steps, so the pace of the run matters."""
        blocks = [b for n in ast.walk(self.tree) for _, b in ast.iter_fields(n) if isinstance(b, list)]
        block = next(b for b in blocks if _stored(b, "muon_momentum") and _stored(b, "frac"))
        wanted = [n for n in block if _stored([n], "muon_momentum") or _stored([n], "frac")]
        return float(self._run(wanted, step=self.step_at(frac))["muon_momentum"])

    def _run(self, statements: list[ast.stmt], **given: object) -> dict[str, Any]:
        """Execute statements of the script, with names of its training function; return all names."""
        names = {**self.names, "h": self.settings, "args": self.settings, **given}
        exec(compile(ast.Module(statements, []), "published script", "exec"), names)
        return names


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))


def _stored(block: list[ast.stmt], name: str) -> bool:
    """Return whether a statement of a block assigns `name`, with or without a type."""
    single = [n.target for n in block if isinstance(n, ast.AnnAssign)]
    targets = [t for n in block if isinstance(n, ast.Assign) for t in n.targets] + single
    return any(isinstance(t, ast.Name) and t.id == name for t in targets)


def load_script(
    path: Path,
    log: Path | None = None,
    given: Mapping[str, str] | None = None,
    *,
    attention: FlashAttention | None = None,
) -> Script:
    """Execute the definitions of a script with the settings that its log prints.

    Args:
        path: a `train_gpt.py`.
        log: of a run of it; None takes the first `train*.log` next to the script.
        given: environment variables of the run that the log does not print.
        attention: what it attends with, for a script that is to run as it trains on a GPU: what it compiles
            is compiled then. None: masked attention of torch, and nothing is compiled.

    Raises:
        UserError: there is no log, or the script does not understand a setting that the log prints, or does
            not read a variable of `given`.
    """
    logs = sorted(path.parent.glob("train*.log")) if log is None else [log]
    if not logs:
        raise UserError(f"{path.parent}: expected a train*.log next to the script; name one with --log")
    found = read_log(logs[0])
    settings = {k: v for k, v in found.settings.items() if not re.fullmatch(OF_THE_MACHINE, k)}
    words = {"True": "1", "False": "0"}
    environment = {key.upper(): words.get(value, value) for key, value in settings.items()}
    environment |= given or {}
    source, name = read_source(path), f"<published {path}>"
    unread = [key for key in given or {} if f'"{key}"' not in source]
    if unread:
        raise UserError(
            f"{path}: the script does not read {', '.join(unread)}; expected names of its settings"
        )
    tree = parse(source, name)
    module = types.ModuleType(MODULE)
    module.__file__ = str(path)
    stand_ins = _stand_ins(attention or FlashAttention())
    jit = _uncompiled if attention is None else torch.compile
    with (
        replaced_modules({**stand_ins, MODULE: module}),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(torch, "compile", jit),
    ):
        exec(compile(tree, name, "exec"), module.__dict__)
        own = module.__dict__["Hyperparameters"]()
    if "BOS_ID" in module.__dict__:
        module.__dict__["BOS_ID"] = 1  # its loader sets it
    wrong = [f"{k}={v}" for k, v in settings.items() if str(getattr(own, k, "no such setting")) != v]
    if wrong:
        raise UserError(
            f"{path}: the script does not have these settings of {logs[0].name}: {', '.join(wrong)}"
        )
    return Script(module.__dict__, tree, own, found, environment)
