"""The batch that a preset gets on the GPUs at hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pgolf.cli.main import main
from pgolf.cli.overrides import is_preset, sets
from pgolf.presets import naive, pr1855, tiny
from pgolf.train.fitting import fit_batch, fit_to_gpus
from pgolf.train.memory import MARGIN, estimate_memory

GIB = 2**30


def gpus(monkeypatch, count: int, memory: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    found = SimpleNamespace(total_memory=int(memory * GIB))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i=None: (8, 0))


@pytest.mark.parametrize(
    ("make", "batches"),
    [
        (pr1855, {1: 196_608, 2: 196_608, 3: 294_912, 4: 393_216, 8: 786_432, 16: 786_432}),
        (naive, {1: 131_072, 2: 131_072, 4: 262_144, 8: 524_288}),
        (tiny, {1: 2048, 2: 2048}),
    ],
)
def test_a_step_has_two_micro_batches_on_one_gpu_and_one_per_gpu_on_several(make, batches):
    for world_size, tokens in batches.items():
        config = make()
        fitted = fit_batch(config, world_size, config.data.micro_tokens)
        assert fitted.data.batch_tokens == tokens
        assert replace(fitted, data=config.data) == config


def test_a_gpu_with_room_changes_the_step_and_says_so(monkeypatch):
    gpus(monkeypatch, 1, 80)
    config, note = fit_to_gpus(pr1855(), 1, per_gpu=98_304, micro=True)
    assert (config.data.batch_tokens, config.data.micro_tokens) == (196_608, 98_304)
    assert note == (
        "on 1 GPU data.batch_tokens is 196,608 (the preset has 786,432); set them to choose other values"
    )
    gpus(monkeypatch, 8, 80)
    assert fit_to_gpus(pr1855(), 8, per_gpu=98_304, micro=True) == (pr1855(), "")


def test_a_small_gpu_gets_smaller_micro_batches_that_fit(monkeypatch):
    gpus(monkeypatch, 2, 24)
    config, note = fit_to_gpus(pr1855(), 2, per_gpu=98_304, micro=True)
    data = config.data
    assert data.batch_tokens == 196_608 and "data.micro_tokens is" in note and "on 2 GPUs" in note
    assert data.batch_tokens % (2 * data.micro_tokens) == 0 and data.micro_tokens < 98_304
    found = estimate_memory(config, device_type="cuda", world_size=2, attention="auto")
    assert MARGIN * found.total <= 24 * GIB


def test_what_the_user_set_stays(monkeypatch):
    gpus(monkeypatch, 1, 24)
    assert fit_to_gpus(pr1855(), 1, per_gpu=None, micro=False) == (pr1855(), "")
    config, _ = fit_to_gpus(pr1855(), 1, per_gpu=98_304, micro=False)
    assert (config.data.batch_tokens, config.data.micro_tokens) == (196_608, 98_304)


def test_without_a_gpu_nothing_changes(monkeypatch):
    gpus(monkeypatch, 0, 0)
    assert fit_to_gpus(pr1855(), 1, per_gpu=98_304, micro=True) == (pr1855(), "")
    gpus(monkeypatch, 1, 80)
    on_cpu = replace(pr1855(), train=replace(pr1855().train, device="cpu"))
    assert fit_to_gpus(on_cpu, 1, per_gpu=98_304, micro=True) == (on_cpu, "")


def test_words_that_set_a_setting_are_found_in_both_spellings(tmp_path, monkeypatch):
    for word in ("--data.batch-tokens=4", "--data.batch_tokens", "--data.batch-tokens"):
        assert sets(["pr1855", word, "4"], "data.batch_tokens")
    assert not sets(["pr1855", "--data.micro-tokens=4"], "data.batch_tokens")
    monkeypatch.chdir(tmp_path)
    assert is_preset("pr1855") and is_preset("record") and not is_preset("config.json")
    (tmp_path / "pr1855").touch()
    assert not is_preset("pr1855")


def test_training_without_a_preset_is_best_1gpu(capsys):
    assert main(["train", "--data", "/nowhere", "--train.device=cpu"]) == 2
    assert "/nowhere" in capsys.readouterr().err
    assert main(["config", "--data", "/nowhere"]) == 2
    assert "name a preset first\n" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "name a preset first, or pass --data DIR to train best_1gpu" in capsys.readouterr().err
