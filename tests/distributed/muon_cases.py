"""What the tests of `pgolf.optim.Muon` on several ranks share: steps by hand, counts, comparisons."""

import torch

import pgolf.optim
from pgolf.optim import muon


def tensors(shapes, seed):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=rng) for shape in shapes]


def whole(tensor):
    """Return a tensor without its history, a DTensor as a whole."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def take_steps(params, groups, steps, gradient=lambda step, i, grad: grad, **settings):
    """Take steps on random gradients that are the same on every rank; return parameters and optimizer state.

    Args:
        gradient: what parameter i gets in a step in place of `grad`.
    """
    optimizer = pgolf.optim.Muon([group for group in groups if group["params"]], lr=0.02, **settings)
    for step in range(steps):
        for i, (p, grad) in enumerate(zip(params, tensors([p.shape for p in params], 1 + step), strict=True)):
            p.grad = gradient(step, i, grad)
        optimizer.step()
    found = {f"param{i}": whole(p) for i, p in enumerate(params)}
    states = [(i, key, t) for i, p in enumerate(params) for key, t in optimizer.state[p].items()]
    return found | {f"{key}{i}": whole(t) for i, key, t in states}


def iterated(run):
    """Return how many matrices this rank iterates in `run`, counted where the kernel is called."""
    original, seen = muon.newton_schulz, []

    def count(x, table, *, eps):
        seen.append(x.shape[0])
        return original(x, table, eps=eps)

    muon.newton_schulz = count
    try:
        run()
    finally:
        muon.newton_schulz = original
    return sum(seen)


def flat(cases):
    """Return the tensors of all cases as `CASE.NAME`."""
    return {f"{case}.{name}": t for case, named in cases.items() for name, t in named.items()}


def of_case(found, case):
    """Return the tensors of a case of `flat` by name."""
    return {name.removeprefix(f"{case}."): t for name, t in found.items() if name.startswith(f"{case}.")}


def assert_equal(found, wanted):
    """Compare tensors by name, bit for bit."""
    assert found.keys() == wanted.keys() and found
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
