"""Groups of `pgolf.optim.Muon` that are cut into heads, its options, its counter, and compiled steps."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import pgolf.optim
from pgolf.ops import newton_schulz_ref
from pgolf.optim.muon_settings import boxes, matrices
from pgolf.optim.polar import JORDAN

LR = 0.05


def parameters(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def give_gradients(params, seed):
    for p, grad in zip(params, parameters([p.shape for p in params], seed), strict=True):
        p.grad = grad.detach()


def polar(direction):
    """Return the update of one matrix, with its factor, in float64."""
    rows, cols = direction.shape
    return max(1, rows / cols) ** 0.5 * newton_schulz_ref(direction.double(), (JORDAN,) * 5)


def by_hand(direction, heads, along, sizes):
    """Return the update of a matrix that is cut into heads and then into parts, and joined again."""
    joined = []
    for head in direction.tensor_split(heads, dim=("rows", "columns").index(along)):
        joined.append(torch.cat([polar(part) for part in head.split(sizes or [head.shape[0]])]))
    return torch.cat(joined, dim=("rows", "columns").index(along))


@pytest.mark.parametrize(
    ("shape", "group"),
    [
        ((12, 7), {"num_heads": 3}),
        ((12, 7), {"num_heads": 12}),
        ((7, 12), {"num_heads": 3, "heads_along": "columns"}),
        ((15, 4), {"num_heads": 3, "split_sizes": (1, 3, 1)}),
        ((5, 8), {"num_heads": 2, "heads_along": "columns", "split_sizes": (2, 3)}),
        ((2, 6, 5), {"num_heads": 2}),
        ((2, 5, 6), {"num_heads": 3, "heads_along": "columns"}),
        ((6, 2, 3, 1), {"num_heads": 2}),
        ((6, 5), {"num_heads": 1}),
    ],
    ids=str,
)
def test_each_head_is_iterated_separately(shape, group):
    (p,) = parameters([shape])
    start = p.detach().clone()
    optimizer = pgolf.optim.Muon([{"params": [p], **group}], lr=LR, weight_decay=0.0, momentum=0.5)
    give_gradients([p], 1)
    optimizer.step()
    stack = p.grad if p.dim() == 3 else p.grad.flatten(1).unsqueeze(0)
    heads, along = group["num_heads"], group.get("heads_along", "rows")
    direction = 0.75 * stack  # of the first step: mu (1 - mu) g + (1 - mu) g
    wanted = torch.stack([by_hand(m, heads, along, group.get("split_sizes")) for m in direction])
    moved = (start - p.detach()).double().view(wanted.shape)
    assert (moved - LR * wanted).norm() < 2e-4 * moved.norm()
    assert optimizer.orthogonalized == len(stack) * heads * len(group.get("split_sizes", (0,)))


@pytest.mark.parametrize("group", [{}, {"num_heads": 3}, {"num_heads": 2, "heads_along": "columns"}], ids=str)
@pytest.mark.parametrize("split_sizes", [None, (1, 1)])
@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8)])
def test_boxes_are_where_the_matrices_are(shape, group, split_sizes):
    rows = 6 if group.get("num_heads") != 3 else 2
    sizes = split_sizes and (1, rows - 1)
    full = {"num_heads": None, "heads_along": "rows", **group, "split_sizes": sizes}
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    stack = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    found, places = matrices(tensor, full), boxes(shape, full)
    assert len(found) == len(places)
    for matrix, box in zip(found, places, strict=True):
        assert torch.equal(stack[box.b0, box.r0 : box.r1, box.c0 : box.c1], matrix)


@pytest.mark.parametrize(
    ("shape", "group", "message"),
    [
        (
            (7, 4),
            {"num_heads": 2},
            r"parameter 0 of shape \(7, 4\) has 7 rows; num_heads must divide",
        ),
        ((4, 7), {"num_heads": 2, "heads_along": "columns"}, "has 7 columns; num_heads must divide"),
        ((4, 2, 2, 2), {"num_heads": 2, "heads_along": "columns"}, "is a convolution, .* heads_along='rows'"),
        (
            (8, 4),
            {"num_heads": 2, "split_sizes": (4, 4)},
            r"each head of parameter 0 .* has 4 rows; split",
        ),
        ((8, 4), {"num_heads": 0}, "num_heads must be a whole number >= 1 or None, got 0"),
        ((8, 4), {"num_heads": 2.0}, r"num_heads must be a whole number >= 1 or None, got 2\.0"),
        ((8, 4), {"heads_along": "cols"}, r"heads_along must be one of \('rows', 'columns'\), got 'cols'"),
        (
            (8, 4),
            {"differentiable": True},
            "differentiable is not supported; the iteration has no derivative",
        ),
        ((8, 4), {"foreach": True, "fused": True}, "foreach and fused cannot both be True"),
    ],
    ids=str,
)
def test_groups_that_cannot_be_cut_are_refused(shape, group, message):
    with pytest.raises(ValueError, match=message):
        pgolf.optim.Muon([{"params": parameters([shape]), **group}])


@pytest.mark.parametrize("options", [{"differentiable": True}, {"foreach": True, "fused": True}], ids=str)
def test_options_that_cannot_be_used_are_refused(options):
    with pytest.raises(ValueError, match=r"differentiable is not|cannot both be True"):
        pgolf.optim.Muon(parameters([(4, 4)]), **options)


def stepped(steps=3, tensor_lr=False, **options):
    """Return the parameters after some steps of a Muon and an AdamW group."""
    params = parameters([(5, 12), (5, 12), (2, 4, 3), (7,)])
    groups = [{"params": params[:3]}, {"params": params[3:], "use_muon": False}]
    lr = torch.tensor(LR, dtype=torch.float64) if tensor_lr else LR
    optimizer = pgolf.optim.Muon(groups, lr=lr, **options)
    for step in range(steps):
        give_gradients(params, 1 + step)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_foreach_and_fused_change_no_more_than_the_last_bits(options):
    for p, q in zip(stepped()[0], stepped(**options)[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_fused_reaches_the_operator_of_adamw(monkeypatch):
    seen = []
    original = torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: (seen.append(1), original(*a, **k)))
    stepped(steps=2)
    assert not seen
    stepped(steps=2, fused=True)
    assert len(seen) == 2


def test_a_capturable_step_reads_a_tensor_learning_rate_without_the_host():
    params = parameters([(5, 12), (2, 4, 3)])
    others = [nn.Parameter(p.detach().clone()) for p in params]
    lr = torch.tensor([LR])
    ours = pgolf.optim.Muon(params, lr=lr, capturable=True)
    plain = pgolf.optim.Muon(others, lr=LR)
    for step in range(3):
        plain.param_groups[0]["lr"] = lr.fill_(LR / (1 + step)).item()
        for tensors in (params, others):
            give_gradients(tensors, step)
        ours.step()
        plain.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_the_counter_says_what_the_last_step_iterated():
    params, optimizer = stepped(steps=0)
    assert optimizer.orthogonalized == 0
    give_gradients(params, 1)
    optimizer.step()
    assert optimizer.orthogonalized == 4
    assert copy.deepcopy(optimizer).orthogonalized == 4
    params[0].grad = None
    optimizer.step()
    assert optimizer.orthogonalized == 3
    for p in params[:3]:
        p.grad = None
    optimizer.step()
    assert optimizer.orthogonalized == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tensor_lr": True, "capturable": True},
        {"normalize": 0.9, "cautious": True},
        {"update_floor": 0.5},
    ],
    ids=str,
)
def test_a_compiled_step_is_one_graph(options):
    torch._dynamo.reset()  # what other cases compiled makes some numbers dynamic, which is one more graph
    compiled = CompileCounterWithBackend("aot_eager")
    settings = {
        key: value for key, value in options.items() if key in ("normalize", "cautious", "update_floor")
    }
    groups = {"ns_coefficients": "polar_express_golf", **settings}
    muon_only = options.get("capturable")  # torch's AdamW refuses capturable on the CPU
    found = []
    for wrap in (lambda step: step, lambda step: torch.compile(step, backend=compiled, fullgraph=True)):
        params = parameters([(5, 12), (5, 12), (2, 4, 3), (7,)])
        given = [{"params": params[:3], **groups}]
        if not muon_only:
            given.append({"params": params[3:], "use_muon": False})
        lr = torch.tensor(LR) if options.get("tensor_lr") else LR
        optimizer = pgolf.optim.Muon(given, lr=lr, capturable=bool(options.get("capturable")))
        step = wrap(optimizer.step)
        for i in range(3):
            give_gradients(params, 1 + i)
            if options.get("tensor_lr"):
                optimizer.param_groups[0]["lr"].mul_(0.5)
            step()
        assert optimizer.orthogonalized == 4
        found.append(params)
    # One for the first step, which makes the state, and one for all later steps.
    assert compiled.frame_count == 2
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
