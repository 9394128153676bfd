"""Weight averaging compared with its formula."""

import pytest
import torch

from pgolf.optim.ema import Ema


def tensors(seed):
    rng = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(3, 5, generator=rng), "b": torch.randn((), generator=rng)}


def test_update_follows_the_recurrence():
    live = tensors(0)
    ema = Ema(live)
    expected = {k: v.double() for k, v in live.items()}
    for step, decay in enumerate((0.9, 0.0, 0.5, 1.0)):
        for name, value in tensors(1 + step).items():
            live[name].copy_(value)
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
        ema.update(decay)
        for name in live:
            torch.testing.assert_close(ema.tensors[name].double(), expected[name], rtol=1e-6, atol=1e-7)


def test_averages_are_float32_copies_of_bfloat16_tensors():
    live = {"w": torch.full((3,), 1.0, dtype=torch.bfloat16)}
    ema = Ema(live)
    live["w"].fill_(2.0)
    assert ema.tensors["w"].tolist() == [1, 1, 1]
    ema.update(0.999)  # a step that bfloat16 could not hold
    torch.testing.assert_close(ema.tensors["w"], torch.full((3,), 1.001))


def test_restart_forgets_the_past():
    live = {"w": torch.zeros(2)}
    ema = Ema(live)
    live["w"].fill_(3.0)
    ema.restart()
    assert ema.tensors["w"].tolist() == [3, 3]


def test_state_round_trip_and_copy_to_keep_the_bits():
    live = tensors(3)
    ema = Ema(live)
    live["w"].mul_(2)
    ema.update(0.3)
    state = ema.state_dict()
    ema.update(0.3)
    assert not torch.equal(state["w"], ema.tensors["w"]), "state_dict must be a copy"
    other = Ema(tensors(4))
    other.load_state_dict(state)
    target = {k: torch.zeros_like(v) for k, v in live.items()}
    other.copy_to(target)
    for name in live:
        assert torch.equal(target[name], state[name])


def test_errors_name_what_differs():
    ema = Ema(tensors(0))
    with pytest.raises(ValueError, match=r"copy_to: .* names .*; missing \['b'\], unknown \['x'\]"):
        ema.copy_to({"w": torch.zeros(3, 5), "x": torch.zeros(())})
    with pytest.raises(ValueError, match=r"load_state_dict: w must have shape \(3, 5\), got \(5, 3\)"):
        ema.load_state_dict({"w": torch.zeros(5, 3), "b": torch.zeros(())})
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        ema.update(1.5)
