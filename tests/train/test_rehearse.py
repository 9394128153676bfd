"""The reserve of the clock: the rehearsal does the work once, leaves no trace, and counts batches right."""

from dataclasses import replace

import pytest
import torch

from pgolf.config import QuantConfig, TrainConfig
from pgolf.train import rehearse as module
from pgolf.train.budget import training_seconds
from pgolf.train.rehearse import rehearse
from tests.quant.test_calibrate import FakeDist, trained_like_model
from tests.quant.test_sensitivity import batches


class FakeLoader:
    def __init__(self):
        self.restarts, self.taken = 0, 0

    def next(self):
        self.taken += 1
        return next(iter(batches(1)))

    def restart(self):
        self.restarts += 1


class SharingDist(FakeDist):
    def share(self, values):
        return values


def reserve(monkeypatch, config):
    """Let each timed piece take one second and return the reserve."""

    def one_second(work, dist):
        work()
        return 1.0

    monkeypatch.setattr(module, "_seconds", one_second)
    loader = FakeLoader()
    model = trained_like_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    saved: list[int] = []
    seconds = rehearse(model, loader, config, SharingDist(), save=lambda: saved.append(1))
    assert saved == [1]
    assert loader.restarts == 1 and loader.taken >= 2
    assert all(torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters())
    return seconds


def test_reserve_counts_batches_one_quantization_and_saving(monkeypatch):
    config = QuantConfig(calibration_batches=16, gradient_batches=8, row_scales="spread")
    assert reserve(monkeypatch, config) == pytest.approx(1.15 * (16 + 1 + 1))
    assert reserve(monkeypatch, replace(config, row_scales="loss")) == pytest.approx(1.15 * (16 + 8 + 1 + 1))
    # With drift: as many batches again, and one quantization before them.
    assert reserve(monkeypatch, replace(config, drift=0.5)) == pytest.approx(1.15 * (2 * 16 + 2 + 1))


def test_a_reserve_longer_than_the_run_is_explained():
    config = replace(TrainConfig(seconds=5.0), quantize_reserve=None)
    with pytest.raises(ValueError, match="not set; measure it"):
        training_seconds(config)
    object.__setattr__(config, "quantize_reserve", 6.0)
    with pytest.raises(ValueError, match=r"need 6\.0 s, no time is left.*lower quant\.calibration_batches"):
        training_seconds(config)
