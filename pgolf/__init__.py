"""pgolf: the best language model that fits in 16,000,000 bytes after 600 seconds of training.

`pgolf.optim` and `pgolf.ops` are the operators for other trainers; `pgolf.load` returns a trained model and
its tokenizer, and `pgolf.generate` lets it write. They are imported when they are first asked for, so that
`import pgolf` costs nothing and needs no torch.
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
