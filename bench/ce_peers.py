"""Other implementations of (capped) cross-entropy, which are imported when a bench runs.

Each is a function that returns a mean loss; its name contains its version. The name of one without a soft cap
says so, because it does less work. An implementation that cannot be used is printed with the reason and left
out.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.peers import describe, find_peer

FromLogits = Callable[[Tensor, Tensor, float], Tensor]
"""(logits, target, cap) -> mean loss."""
FromHidden = Callable[[Tensor, Tensor, Tensor, float], Tensor]
"""(hidden, weight, target, cap) -> mean loss."""


def find(name: str, package: str, module: str, attribute: str) -> tuple[str, Any] | None:
    """Return (name with version, attribute of the module); if that fails, print why and return None."""
    peer = find_peer(package, module, attribute)
    name = f"{name} {peer.version}".strip()
    if peer.usable:
        return name, peer.found
    print(f"{name:<28} {peer.problem}")
    return None


def _triton_ce() -> tuple[str, Any] | None:
    return find("record form, triton", "triton", "bench.triton_softcap_ce", "softcap_ce_triton")


def from_logits() -> dict[str, FromLogits]:
    """Return the implementations that take logits."""
    peers: dict[str, FromLogits] = {}
    if triton := _triton_ce():
        name, triton_ce = triton
        peers[name] = lambda x, y, cap: triton_ce(x, y, cap).mean()
    if liger := find(
        "liger", "liger-kernel", "liger_kernel.transformers.cross_entropy", "LigerCrossEntropyLoss"
    ):
        name, liger_ce = liger
        # It overwrites its input. The bench gives it a new tensor, so that it need not pay for a clone.
        peers[name] = lambda x, y, cap: liger_ce(softcap=cap)(x, y)
    if quack := find("quack, no cap", "quack-kernels", "quack.cross_entropy", "cross_entropy"):
        name, quack_ce = quack
        peers[name] = lambda x, y, _cap: quack_ce(x, y, reduction="mean")
    return peers


def materialising() -> dict[str, FromHidden]:
    """Return the implementations from hidden states that hold all logits at once."""
    peers: dict[str, FromHidden] = {}
    if triton := _triton_ce():
        name, triton_ce = triton
        peers[name] = lambda x, w, y, cap: triton_ce(F.linear(x, w), y, cap).mean()
    # It writes all logits and overwrites them with their gradient.
    if liger := _liger_sm90("liger SM90, no cap", "linear"):
        name, liger_sm90 = liger
        peers[name] = lambda x, w, y, _cap: liger_sm90.apply(x, w, y)
    module = "quack.linear_cross_entropy"
    if quack := find("quack, no cap, all logits", "quack-kernels", module, "linear_cross_entropy_func"):
        name, quack_ce = quack
        peers[name] = lambda x, w, y, _cap: quack_ce(x, w, None, y)
    return peers


def chunked() -> dict[str, FromHidden]:
    """Return the implementations from hidden states that hold a part of the logits at a time."""
    peers: dict[str, FromHidden] = {}
    fused = "liger_kernel.transformers.fused_linear_cross_entropy"
    if liger := find("liger", "liger-kernel", fused, "LigerFusedLinearCrossEntropyLoss"):
        name, liger_ce = liger
        peers[name] = lambda x, w, y, cap: liger_ce(softcap=cap)(w, x, y)
    if cce := find("cut_cross_entropy", "cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy"):
        name, cce_loss = cce
        peers[name] = lambda x, w, y, cap: cce_loss(x, w, y, softcap=cap)
    # It returns the loss of each row and stores no logits in the forward pass.
    if liger := _liger_sm90("liger SM90 scaled, no cap", "scaled"):
        name, liger_scaled = liger
        peers[name] = lambda x, w, y, _cap: liger_scaled.apply(x, w, y).mean()
    peers |= _quack_chunked()
    if own := find("torch.linear_ce, no cap", "torch", "torch.nn.functional", "linear_cross_entropy"):
        name, torch_ce = own
        peers[name] = lambda x, w, y, _cap: torch_ce(x, w, y)
    return peers


def _liger_sm90(name: str, kind: str) -> tuple[str, Any] | None:
    """Return one of liger's two losses for Hopper; both need nvidia-cutlass-dsl and have no soft cap."""
    module = f"liger_kernel.ops.cutedsl.ops.fused_{kind}_cross_entropy_sm90"
    return find(name, "liger-kernel", module, f"LigerFused{kind.title()}CrossEntropySM90Function")


def _quack_chunked() -> dict[str, FromHidden]:
    """Return quack's two ways; versions before 0.6.4 have only the one that stores logits of 4,096 rows.

    Both run without autotuning, because the first call took more than 120 s on 16 cores to tune all shapes.
    """
    module = "quack.linear_cross_entropy"
    found = find("quack, no cap", "quack-kernels", module, "chunked_linear_cross_entropy")
    if found is None:
        return {}
    name, chunked_ce = found
    scaled = find("quack scaled-exp, no cap", "quack-kernels", module, "scaled_exp_linear_cross_entropy")
    plain = {} if scaled is None else {"use_scaled_exp": False}
    peers: dict[str, FromHidden] = {
        f"{name}, untuned": lambda x, w, y, _cap: chunked_ce(x, w, y, tuned=False, **plain)
    }
    if scaled is not None:
        peers[scaled[0]] = lambda x, w, y, _cap: scaled[1](x, w, y, chunk_size=scaled_chunk(x.shape[-1]))
    return peers


def scaled_chunk(width: int) -> int:
    """Return the rows of a chunk for quack's scaled-exp path: its own 4,096, or half if that is the width.

    Version 0.6.5 tells a vector per row from one per column by its length, and raises a ValueError ("row/col
    inference ambiguous") where both are equal.
    """
    return 2048 if width == 4096 else 4096


def working(
    peers: dict[str, Callable[[], object]], took: Callable[[str, float], object] = lambda *_: None
) -> dict[str, Callable[[], object]]:
    """Return the calls that run once without an error; print the others and their errors.

    `took` gets the name of each that works and the seconds of this call, which compiles, and tunes where the
    implementation does.
    """
    result = {}
    for name, call in peers.items():
        began = time.perf_counter()
        try:
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except Exception as e:
            if name.startswith("pgolf"):
                raise
            print(f"{name:<28} failed: {describe(e)}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        else:
            took(name, time.perf_counter() - began)
            result[name] = call
    return result
