"""States that `pgolf.optim.Muon` loads, and states that it refuses without loading anything."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import pgolf.optim
from tests.conftest import requires_gpu


def parameters(shapes=((4, 3),), seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=rng)) for shape in shapes]


def stepped(make, shapes=((4, 3),), steps=2):
    """Return parameters and an optimizer that took some steps on them."""
    params = parameters(shapes)
    optimizer = make(params)
    for step in range(steps):
        for p, grad in zip(params, parameters(shapes, seed=10 + step), strict=True):
            p.grad = grad.detach()
        optimizer.step()
    return params, optimizer


def muon(params, **settings):
    return pgolf.optim.Muon(params, lr=0.02, **settings)


def adamw_groups(params, **settings):
    return pgolf.optim.Muon([{"params": params, "use_muon": False, **settings}], lr=1e-2, weight_decay=0.01)


def adamw(params, **settings):
    return torch.optim.AdamW(params, lr=1e-2, weight_decay=0.01, **settings)


FOREIGN = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-4),
    "Adam": lambda p: torch.optim.Adam(p, lr=3e-4),
    "SGD": lambda p: torch.optim.SGD(p, lr=3e-4, momentum=0.9),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=3e-4),
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "RMSprop": torch.optim.RMSprop,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": torch.optim.Adagrad,
}


def unchanged(optimizer, load, error, message):
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=message):
        load()
    after = optimizer.state_dict()
    assert repr(after) == repr(before)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("name", list(FOREIGN))
def test_states_of_other_optimizers_are_refused_for_muon_groups(name, fresh):
    saved = stepped(FOREIGN[name], steps=0 if fresh else 2)[1].state_dict()
    optimizer = stepped(muon)[1]
    message = (
        "was saved by AdamW, but uses Muon in this optimizer; set use_muon=False|belongs to another "
        "optimizer, with the settings|not"
    )
    unchanged(optimizer, lambda: optimizer.load_state_dict(saved), ValueError, f"Muon: group 0 .*({message})")
    assert optimizer.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize(
    "make",
    [
        torch.optim.Muon,
        torch.optim.SGD,
        torch.optim.NAdam,
        lambda p: torch.optim.Adam(p, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, amsgrad=True),
        lambda p: torch.optim.AdamW(p, maximize=True),
        muon,
    ],
    ids=["torch Muon", "SGD", "NAdam", "Adam with decay", "amsgrad", "maximize", "own Muon"],
)
def test_states_that_are_not_adamws_are_refused_for_adamw_groups(make):
    saved = stepped(make)[1].state_dict()
    optimizer = stepped(adamw_groups)[1]
    if saved["param_groups"][0].get("use_muon"):  # ours says its kind, but a group keeps its own
        unchanged(
            optimizer,
            lambda: optimizer.load_state_dict(saved),
            ValueError,
            "was saved by Muon, but uses AdamW in this",
        )
    else:
        unchanged(
            optimizer, lambda: optimizer.load_state_dict(saved), ValueError, r"group 0 (of the|was) saved"
        )


def damage(saved, how):
    how(saved["state"][0], saved["param_groups"][0])
    return saved


@pytest.mark.parametrize(
    ("make", "how", "error", "message"),
    [
        (
            muon,
            lambda s, g: s.update(momentum_buffer=torch.zeros(3, 4)),
            ValueError,
            r"is \(3, 4\) torch.float32",
        ),
        (
            muon,
            lambda s, g: s.update(momentum_buffer=[0.0]),
            ValueError,
            r"momentum_buffer is list, expected floats of shape \(4",
        ),
        (
            muon,
            lambda s, g: s.update(momentum_buffer=torch.zeros(4, 3).int()),
            ValueError,
            r"torch\.int32, exp",
        ),
        (
            muon,
            lambda s, g: s.update(extra=torch.zeros(4, 3)),
            ValueError,
            r"has the entries \['extra', 'momentum_buffer'\]",
        ),
        (
            muon,
            lambda s, g: s.update(update_square=torch.zeros(3)),
            ValueError,
            r"saved update_square is \(3,\) torch\.float32, expected floats of shape \(4,\)",
        ),
        (muon, lambda s, g: g.update(normalize=1.5), ValueError, r"normalize must be in \[0, 1\), got 1\.5"),
        (muon, lambda s, g: g.update(lr=float("nan")), ValueError, "lr must be >= 0, got nan"),
        (muon, lambda s, g: g.update(lr=torch.ones(2)), ValueError, r"tensor lr must have one element"),
        (muon, lambda s, g: g.update(ns_steps=99), ValueError, r"ns_steps must be in \[1, 10\]"),
        (muon, lambda s, g: g.update(momentum=2.0), ValueError, r"momentum must be in \[0, 1\]"),
        (muon, lambda s, g: g.update(split_sizes=(1, 1)), ValueError, "split_sizes must be .* add up to"),
        (
            adamw_groups,
            lambda s, g: s.pop("exp_avg_sq"),
            ValueError,
            r"has the entries \['exp_avg', 'step'\], expected those of AdamW",
        ),
        (adamw_groups, lambda s, g: s.update(step=torch.zeros(2)), ValueError, r"step is \(2,\) torch"),
        (adamw_groups, lambda s, g: g.update(betas=(0.9, 1.5)), ValueError, r"betas must be two numbers"),
    ],
)
def test_damaged_states_are_refused(make, how, error, message):
    saved = damage(copy.deepcopy(stepped(make)[1].state_dict()), how)
    optimizer = stepped(make)[1]
    unchanged(optimizer, lambda: optimizer.load_state_dict(saved), error, message)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({}, "with the keys 'state' and 'param_groups'"),
        (None, "with the keys 'state' and 'param_groups'"),
        (
            {"state": {}, "param_groups": []},
            r"has groups of \[\] parameters, this optimizer has groups of \[1\]",
        ),
    ],
)
def test_what_is_no_state_is_refused(saved, message):
    with pytest.raises(ValueError, match=message):
        muon(parameters()).load_state_dict(saved)
    state = muon(parameters()).state_dict()
    state["state"][7] = {"momentum_buffer": torch.zeros(4, 3)}
    with pytest.raises(ValueError, match=r"entries \['7'\] that belong to no parameter"):
        muon(parameters()).load_state_dict(state)


def continues(make_first, make_second, shapes=((4, 3), (5,))):
    """The second optimizer loads the state of the first one and continues like it, bit for bit."""
    params, first = stepped(make_first, shapes)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    second = make_second(others)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q, grad in zip(params, others, parameters(shapes, seed=30), strict=True):
        p.grad, q.grad = grad.detach(), grad.detach().clone()
    first.step()
    second.step()
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert first.state[p].keys() == second.state[q].keys()
        for key, value in first.state[p].items():
            other = second.state[q][key]
            assert torch.equal(value, other) and (value.dtype, value.device) == (other.dtype, other.device), (
                key
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mean_squares_of_the_update_go_on_in_float32(dtype):
    def make(params, **settings):
        for p in params:
            p.data = p.data.to(dtype)
            p.grad = None if p.grad is None else p.grad.to(dtype)
        groups = [{"params": params[:1], "split_sizes": (2, 5)}, {"params": params[1:]}]
        return pgolf.optim.Muon(groups, lr=0.02, cautious=True, **settings)

    shapes = ((3, 7, 4), (4, 9))
    params = parameters(shapes)
    first = make(params, normalize=0.9)
    others = parameters(shapes)
    second = make(others)
    for step in range(4):
        if step == 2:
            for p, q in zip(params, others, strict=True):
                q.data.copy_(p.data)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
        for p, q, grad in zip(params, others, parameters(shapes, seed=20 + step), strict=True):
            p.grad, q.grad = grad.detach().to(dtype), grad.detach().to(dtype)
        first.step()
        second.step()
    for p, q, size in zip(params, others, (3 * (4 + 5), 9), strict=True):
        mine, other = first.state[p]["update_square"], second.state[q]["update_square"]
        assert mine.shape == (size,) and mine.dtype == other.dtype == torch.float32
        assert torch.equal(mine, other) and torch.equal(p, q) and mine.min() > 0


def test_a_state_without_mean_squares_loads_and_they_start_at_0():
    params, first = stepped(torch.optim.Muon)
    (p,) = params
    second = muon(params, normalize=0.9)
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["normalize"] == 0.9 and second.state[p].keys() == {"momentum_buffer"}
    second.step()
    assert second.state[p]["update_square"].shape == (4,)
    torch.optim.Muon(params).load_state_dict(second.state_dict())


@pytest.mark.parametrize("way", [pickle, torch], ids=lambda way: way.__name__)
def test_an_optimizer_pickled_before_normalize_and_cautious_existed_steps_as_it_did(way):
    optimizer = stepped(muon)[1]
    for settings in (optimizer.defaults, *optimizer.param_groups):
        del settings["normalize"], settings["cautious"]
    file = io.BytesIO()
    way.save(optimizer, file) if way is torch else pickle.dump(optimizer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False) if way is torch else pickle.load(file)
    group = again.param_groups[0]
    assert (group["normalize"], group["cautious"]) == (0.0, False)
    wanted, never_pickled = stepped(muon)
    for p, each in ((group["params"][0], again), (wanted[0], never_pickled)):
        p.grad = torch.ones_like(p)
        each.step()
    assert torch.equal(group["params"][0], wanted[0])
    again.add_param_group({"params": parameters()})
    assert again.param_groups[1]["normalize"] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, r"num_heads=3, heads_along='rows' and split_sizes=None .* matrices with 12;"),
        ({"num_heads": 2, "heads_along": "columns"}, r"num_heads=2, heads_along='columns' .* with 12;"),
        ({"split_sizes": (1, 5)}, r"num_heads=None, .* split_sizes=\(1, 5\) cut it into matrices with 9;"),
    ],
    ids=str,
)
def test_other_matrices_in_a_live_group_with_normalize_are_refused_before_anything_changes(change, message):
    (p,), optimizer = stepped(lambda params: muon(params, normalize=0.9), ((6, 4),))
    optimizer.param_groups[0].update(change)
    before, weights = copy.deepcopy(optimizer.state_dict()), p.detach().clone()
    with pytest.raises(ValueError, match=f"parameter 0 of group 0 has 6 mean squares .*{message}"):
        optimizer.step()
    assert repr(optimizer.state_dict()) == repr(before) and torch.equal(p, weights)
    del optimizer.state[p]["update_square"]
    optimizer.step()
    assert not torch.equal(p, weights)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"capturable": True}], ids=str)
def test_adamw_states_move_both_ways(options):
    if options.get("capturable") and not torch.cuda.is_available():
        options = {}  # torch refuses it on a CPU
    continues(lambda p: adamw(p, **options), adamw_groups)
    continues(adamw_groups, lambda p: adamw(p, **options))


def test_adamw_states_of_fused_steps_load():
    continues(lambda p: adamw(p, fused=True), adamw_groups)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("fused", [False, True])
def test_the_step_of_adamw_groups_is_kept_where_torch_keeps_it(default, fused):
    torch.set_default_dtype(default)
    try:
        ours, theirs = (
            stepped(m, steps=1)
            for m in (lambda p: adamw_groups(p, fused=fused), lambda p: adamw(p, fused=fused))
        )
    finally:
        torch.set_default_dtype(torch.float32)
    got, want = (optimizer.state[params[0]]["step"] for params, optimizer in (ours, theirs))
    assert (got.shape, got.dtype, got.device, float(got)) == (
        want.shape,
        want.dtype,
        want.device,
        float(want),
    )


@requires_gpu
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_the_step_of_adamw_groups_on_cuda_is_kept_where_torch_keeps_it(options):
    found = []
    for make in (adamw_groups, adamw):
        p = nn.Parameter(torch.ones(4, 3, device="cuda"))
        p.grad = torch.full_like(p, 0.5)
        optimizer = make([p], **options)
        optimizer.step()
        again = make([nn.Parameter(p.detach().clone())], **options)
        again.load_state_dict(optimizer.state_dict())
        (state,) = again.state.values()
        found.append((p.detach().clone(), optimizer.state[p]["step"], state["step"]))
    (p, *ours), (q, *theirs) = found
    torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    for got, want in zip(ours, theirs, strict=True):
        assert (got.dtype, got.device, float(got)) == (want.dtype, want.device, float(want))


@pytest.mark.parametrize(
    ("params", "settings", "error", "message"),
    [
        (None, {"lr": torch.ones(2)}, ValueError, r"tensor lr must have one element, got shape \(2,\)"),
        (None, {}, TypeError, r"pass model.parameters\(\)"),
        (3, {}, TypeError, "params must be parameters"),
        (
            parameters(),
            {"lr": torch.ones(2)},
            ValueError,
            r"tensor lr must have one element, got shape \(2,\)",
        ),
        (parameters(), {"lr": torch.tensor(float("nan"))}, ValueError, "lr must be >= 0, got nan"),
        (parameters(), {"lr": torch.tensor(-1.0)}, ValueError, r"lr must be >= 0, got -1"),
        (parameters(), {"lr": torch.tensor(1j)}, TypeError, "lr must be a number >= 0"),
        (parameters(), {"lr": "0.02"}, TypeError, "lr must be a number >= 0, got '0.02'"),
        (parameters(), {"lr": None}, TypeError, "lr must be a number >= 0, got None"),
        (parameters(), {"lr": float("inf")}, ValueError, "lr must be >= 0, got inf"),
        (
            parameters(),
            {"weight_decay": torch.ones(3)},
            ValueError,
            "tensor weight_decay must have one element",
        ),
        (parameters(), {"momentum": float("nan")}, ValueError, "momentum must be"),
        (parameters(), {"momentum": None}, TypeError, "momentum must be a number"),
    ],
)
def test_settings_that_are_no_numbers_are_refused(params, settings, error, message):
    with pytest.raises(error, match=message):
        pgolf.optim.Muon(params, **settings)
