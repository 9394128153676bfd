"""The fused loss in causal language models of Hugging Face Transformers.

In a training step with labels, the model's own `forward` runs as it is, but its head returns a stand-in
without a vocabulary, and its loss function computes the loss from the hidden states that the head was given.
So router losses, `num_items_in_batch` and hooks of the modules stay what they are. The first stand-in has
numbers in it, which show whether the model does anything to its logits that the fused loss does not.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pgolf.ops import linear_softcap_ce

Model = TypeVar("Model", bound=torch.nn.Module)

_PROBE = (-50.0, -1.0, 0.5, 20.0)


@dataclass
class _Call:
    """One training step of a patched model."""

    hidden: Tensor | None = None
    """What the head was given."""
    compute: Callable[..., Tensor] | None = None
    """Computes the loss from hidden states, weight and bias."""
    probe: bool = False
    """Whether the head's stand-in has numbers in it."""


def patch(model: Model, *, memory: Literal["fast", "low"] = "low") -> Model:
    """Let a causal language model of Transformers train with `linear_softcap_ce`, and return it.

    Nothing changes but the training step: `model.train()` and `labels=` passed by name. There the loss is
    that of `transformers.loss.loss_utils.ForCausalLMLoss` (labels shifted by one or `shift_labels`,
    `ignore_index` -100, divided by `num_items_in_batch` if that is given), of logits with the model's soft
    cap (`final_logit_softcapping`), scale and bias of the head. Logits are not stored, and `output.logits` is
    None. Without labels and after `model.eval()` the model returns logits, and its loss, as before.

    The loss is computed in float32 from products in the dtype of the hidden states; if all labels are
    ignored, it is 0, where Transformers gives NaN. The first training step in eager mode checks what the
    model does to its logits; a model that is compiled before is not checked.

    Args:
        model: a model whose `forward` calls a `torch.nn.Linear` head and `self.loss_function`, as those of
            Llama, Qwen, Mistral, Gemma, Granite, Cohere and Mixtral do. It is changed: its class and the
            class of its head become subclasses with the same names. Patch before `torch.compile`.
        memory: see `linear_softcap_ce`.

    Raises:
        ImportError: transformers is not installed.
        TypeError: `model` is not a model of Transformers with a linear head and a loss function.
        ValueError: the model is patched already, or its loss is not the one of causal language models.
        RuntimeError: in the first training step, the model does something else to its logits; or its head is
            split over ranks by tensor parallelism. (FSDP gathers it, and works.)
    """
    try:
        from transformers import PreTrainedModel
    except ImportError as error:
        raise ImportError(
            f"pgolf.integrations.transformers needs transformers ({error}): pip install 'pgolf[transformers]'"
        ) from error
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"patch: model must be a PreTrainedModel of transformers, got {type(model).__name__}; pass "
            "the model inside a wrapper, for example peft_model.get_base_model()"
        )
    base, head = type(model), model.get_output_embeddings()
    if hasattr(model, "_pgolf_memory"):
        raise ValueError(f"patch: this {base.__name__} is patched already")
    if type(head) is not torch.nn.Linear:
        raise TypeError(f"patch: the head must be a torch.nn.Linear, got {type(head).__name__}")
    if "loss_function" not in inspect.unwrap(base.forward).__code__.co_names:
        raise TypeError(f"patch: {base.__name__}.forward does not call self.loss_function")
    _check_loss(base.__name__, model.loss_function)
    model._pgolf_memory, model._pgolf_checked = memory, False
    members = {"forward": _forward(base), "loss_function": _loss_property(base)}
    model.__class__ = _subclass(base, members)
    head.__class__ = _subclass(torch.nn.Linear, {"forward": _head_forward, "_pgolf_call": None})
    return model


def _subclass(base: type, members: dict[str, Any]) -> type:
    return type(base.__name__, (base,), {"__module__": base.__module__, "__doc__": base.__doc__, **members})


def _check_loss(name: str, function: Any) -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    if function is not ForCausalLMLoss:
        raise ValueError(
            f"patch: the loss of {name} is {getattr(function, '__name__', function)}; only ForCausalLMLoss, "
            "the cross-entropy of causal language models, can be replaced"
        )


def _forward(base: Any) -> Callable[..., Any]:
    @functools.wraps(base.forward)  # the Trainer reads the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training or kwargs.get("labels") is None:
            return base.forward(self, *args, **kwargs)
        head = self.get_output_embeddings()
        call = _Call(probe=not (self._pgolf_checked or torch.compiler.is_compiling()))
        head._pgolf_call = call
        try:
            out = base.forward(self, *args, **kwargs)
        finally:
            head._pgolf_call = None
        if isinstance(out, tuple):
            return out[0], *out[2:]
        out.logits = None
        return out

    return forward


def _loss_property(base: Any) -> property:
    usual = base.loss_function.fget

    def loss_function(self: Any) -> Any:
        function = usual(self)
        call = self.get_output_embeddings()._pgolf_call
        if call is None:
            return function
        _check_loss(base.__name__, function)
        return functools.partial(_loss, self, call)

    return property(loss_function, base.loss_function.fset)


def _head_forward(self: Any, hidden: Tensor) -> Tensor:
    """Return logits; or, in a training step, first a stand-in for them and then the loss.

    The loss is computed in here so that hooks of the module that gather its weight have run.
    """
    call = self._pgolf_call
    if call is None:
        return torch.nn.functional.linear(hidden, self.weight, self.bias)
    if call.compute is not None:
        return call.compute(hidden, self.weight, self.bias)  # type: ignore[no-any-return]
    call.hidden = hidden
    if call.probe:
        return torch.tensor(_PROBE, device=hidden.device).expand(*hidden.shape[:-1], -1)
    return hidden.new_empty(*hidden.shape[:-1], 0)


def _loss(
    model: Any,
    call: _Call,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,  # noqa: ARG001  (the head knows)
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_others: Any,
) -> Tensor:
    """Compute `ForCausalLMLoss` from the hidden states that the head was given; `logits` is its stand-in."""
    cap, scale = _cap_and_scale(model)
    if call.probe:
        _check_probe(type(model).__name__, logits, cap, scale)
        model._pgolf_checked = True
    if shift_labels is None:
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    hidden = call.hidden
    assert hidden is not None
    target = shift_labels.to(hidden.device)

    def compute(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return linear_softcap_ce(
            hidden,
            weight,
            target,
            cap,
            bias=bias,
            logit_scale=scale,
            ignore_index=ignore_index,
            reduction="mean" if num_items_in_batch is None else "sum",
            memory=model._pgolf_memory,
        )

    call.compute = compute
    loss: Tensor = model.get_output_embeddings()(hidden)
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _cap_and_scale(model: Any) -> tuple[float | None, float]:
    """Return the soft cap of the logits and their factor before it, under the names that models give them."""
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    divisor, factor = getattr(config, "logits_scaling", None), getattr(model, "logit_scale", None)
    scale = 1.0 / divisor if divisor else factor if isinstance(factor, float | int) else 1.0
    return cap, float(scale)


def _check_probe(name: str, received: Tensor, cap: float | None, scale: float) -> None:
    """Raise RuntimeError unless the model did to the probe what the fused loss does to logits."""
    want = [scale * x if cap is None else cap * math.tanh(scale * x / cap) for x in _PROBE]
    got = received.detach().reshape(-1, received.shape[-1])[:1].flatten().tolist()
    # As near as bfloat16 is, because the model may do this in its dtype.
    if len(got) != len(want) or any(abs(g - w) > 0.02 * abs(w) for g, w in zip(got, want, strict=True)):
        raise RuntimeError(
            f"patch: {name} does something to its logits that the fused loss does not: of {list(_PROBE)} "
            f"it made {got}, and soft cap {cap} with scale {scale} make {want}; train it without patch"
        )
