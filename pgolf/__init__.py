"""pgolf: train the best language model that fits in 16,000,000 bytes, in 600 seconds.

`pgolf.optim` and `pgolf.ops` are the optimizer and the operators for other training programs. `pgolf.load`
returns a trained model and its tokenizer, and `pgolf.generate` generates text with them. All of them are
imported at their first use, so that `import pgolf` is fast and does not import torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgolf import ops as ops
    from pgolf import optim as optim
    from pgolf.model.generate import generate as generate
    from pgolf.train.load import load as load

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Return a part of the package that is imported on first use (PEP 562)."""
    import importlib

    if name in ("ops", "optim"):
        return importlib.import_module(f"pgolf.{name}")
    homes = {"load": "pgolf.train.load", "generate": "pgolf.model.generate"}
    if name not in homes:
        raise AttributeError(f"module 'pgolf' has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), "generate", "load", "ops", "optim"])
