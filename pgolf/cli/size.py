"""`pgolf size PRESET|config.json|CHECKPOINT [--section.key VALUE ...]`: an artifact's bytes by section."""

from __future__ import annotations

import time
from pathlib import Path

from pgolf.cli.overrides import override, parse_config
from pgolf.presets import PRESETS


def main(argv: list[str]) -> int:
    """Print the ledger; 0 when it is within artifact.limit, 1 when not."""
    checkpoint = _checkpoint(argv[0]) if argv else None
    began = time.perf_counter()
    if checkpoint is None:
        config = parse_config("size", argv)
        from pgolf.artifact.predict import predict_ledger

        ledger = predict_ledger(config.model, config.quant, limit=config.artifact.limit)
        print("predicted from shapes, bits and clips (within 0.5 % for a fully trained model)")
    else:
        from pgolf.artifact.predict import nearest_ledger
        from pgolf.train.state import load_weights

        tensors, saved, _ = load_weights(checkpoint)
        config = override("size", argv[0], argv[1:], saved)
        ledger = nearest_ledger(tensors, config.model, config.quant, limit=config.artifact.limit)
        print(f"{checkpoint}: rounded to nearest and coded in {time.perf_counter() - began:.1f} s")
    print(ledger.text())
    return 0 if ledger.total <= ledger.limit else 1


def _checkpoint(name: str) -> Path | None:
    """Return the weights that `name` means: a .safetensors file, or a run folder's averaged weights.

    A preset goes before a folder of its name, as it does for the other verbs.
    """
    path = Path(name)
    if path.is_dir() and name not in PRESETS:
        return path / "ema.safetensors"
    return path if path.suffix == ".safetensors" else None
