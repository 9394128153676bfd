"""The losses beside tensors that are split over two ranks (gloo): FSDP2 under the patch, DTensors by hand.

Each rank runs this file as a program (FILE FOLDER), which writes rank<r>.txt in FOLDER.
"""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as td
from torch import Tensor

from pgolf.ops import linear_softcap_ce
from tests.ranks import run_ranks

HAS = importlib.util.find_spec("transformers") is not None


def by_hand(mesh) -> None:
    """The plain parts of DTensors, with a whole weight, have the gradients of one process."""
    from torch.distributed.tensor import Partial, Shard, distribute_tensor

    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 8, generator=g), torch.randn(9, 8, generator=g).requires_grad_()
    target = torch.randint(9, (6,), generator=g)
    want = linear_softcap_ce(hidden, weight, target, reduction="sum")
    (grad,) = torch.autograd.grad(want, weight)
    split = distribute_tensor(weight.detach(), mesh, [Shard(0)]).requires_grad_()
    rows, labels = (distribute_tensor(t, mesh, [Shard(0)]) for t in (hidden, target))
    whole = split.full_tensor(grad_placements=[Partial()])
    loss = linear_softcap_ce(rows.to_local(), whole, labels.to_local(), reduction="sum")
    loss.backward()
    total = loss.detach().clone()
    td.all_reduce(total)
    torch.testing.assert_close(total, want)
    torch.testing.assert_close(split.grad.full_tensor(), grad)


def gradients(model: torch.nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    for _ in range(2):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


def patched_under_fsdp(mesh, head_alone: bool) -> None:
    """A patched model that FSDP2 shards has the gradients of the unpatched one."""
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    from pgolf.integrations.transformers import patch

    sizes = {"vocab_size": 98, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    torch.manual_seed(1)
    usual = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).train()
    fused = patch(copy.deepcopy(usual))
    for part in (*fused.model.layers, *([fused.lm_head] if head_alone else []), fused):
        fully_shard(part, mesh=mesh)
    tokens = torch.randint(1, 98, (2, 16))
    want = gradients(usual, tokens)
    for name, grad in gradients(fused, tokens).items():
        torch.testing.assert_close(grad, want[name], rtol=1e-4, atol=1e-6)


def program(folder: Path) -> None:
    td.init_process_group("gloo")
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    done = ["by hand"]
    by_hand(mesh)
    if HAS:
        for alone in (False, True):
            patched_under_fsdp(mesh, alone)
            done.append(f"fsdp {alone}")
    (folder / f"rank{td.get_rank()}.txt").write_text(",".join(done))
    td.destroy_process_group()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(2, Path(__file__), str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [(folder / f"rank{r}.txt").read_text() for r in range(2)]


def test_parts_of_dtensors_and_a_gathered_weight_are_right(finished) -> None:
    assert all(text.startswith("by hand") for text in finished)


@pytest.mark.skipif(not HAS, reason="needs transformers: pip install 'pgolf[transformers]'")
def test_a_patched_model_trains_alike_under_fsdp2(finished) -> None:
    assert finished == ["by hand,fsdp False,fsdp True"] * 2


if __name__ == "__main__":
    program(Path(sys.argv[1]))
