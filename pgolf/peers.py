"""Optional packages: whether they can be used here, and if not, why.

Importing an optional package may raise any exception (an ImportError, a TypeError of a package that does not
fit its dependencies, an OSError for a missing library). Every such exception is recorded as the reason.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Peer:
    """The result of looking for an optional package."""

    package: str
    """Its name in the package index."""
    version: str
    """Installed version; empty if it is not installed or its version is unknown."""
    found: Any
    """The module or attribute that was asked for; None if it cannot be used."""
    problem: str
    """Why it cannot be used, "not installed" or "not usable: ..."; empty if it can."""

    @property
    def usable(self) -> bool:
        """Whether `found` can be used."""
        return not self.problem


def installed_version(package: str) -> str:
    """Return the installed version of a package; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def find_peer(package: str, module: str, attribute: str | None = None) -> Peer:
    """Import `module` of an optional package; the result has it (or its `attribute`), or why that failed.

    No exception is raised, except for KeyboardInterrupt.
    """

    def load() -> Any:
        found = importlib.import_module(module)
        return found if attribute is None else getattr(found, attribute)

    return try_peer(package, load)


def try_peer(package: str, load: Callable[[], Any]) -> Peer:
    """Do the same as `find_peer` with a function that imports, where the counted code must see the import."""
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
    """Return an exception as one line: its type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
