"""Optional packages: whether they can be used here, and why not.

Importing somebody else's package may raise anything (an ImportError, a TypeError of a package that does not
fit its own dependencies, an OSError of a missing library): whatever it is, it is the reason, not a crash.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """What came of looking for a package."""

    package: str
    """Its name in the package index."""
    version: str
    """Installed version; empty where there is none, or nobody knows."""
    found: Any
    """The module, or the attribute that was asked for; None where it is not usable."""
    problem: str
    """Empty, or the reason: "not installed" or "not usable: ..."."""

    @property
    def usable(self) -> bool:
        """Whether `found` can be used."""
        return not self.problem


def installed_version(package: str) -> str:
    """Return the installed version of a package, empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_peer(package: str, module: str, attribute: str | None = None) -> Peer:
    """Import `module` of an optional package and return it, or its `attribute`, or why that does not work.

    Never raises but for KeyboardInterrupt.
    """

    def load() -> Any:
        found = importlib.import_module(module)
        return found if attribute is None else getattr(found, attribute)

    return try_peer(package, load)


def try_peer(package: str, load: Callable[[], Any]) -> Peer:
    """Do what `find_peer` does with a function that imports: what an artifact counts is found by imports."""
    version = installed_version(package)
    try:
        found = load()
    except KeyboardInterrupt:
        raise
    except BaseException as e:
        missing = isinstance(e, ModuleNotFoundError) and not version
        return Peer(package, version, None, "not installed" if missing else f"not usable: {describe(e)}")
    return Peer(package, version, found, "")


def describe(error: BaseException) -> str:
    """Return an exception as one line: its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
