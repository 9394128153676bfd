"""Hooks of the site's build: patterns in the navigation are replaced by the files that match them."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any


def pages(config: Any) -> list[str]:
    """Return the Markdown files of the docs folder, by the names that the navigation uses."""
    docs = Path(config["docs_dir"])
    return sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))


def named(nav: Any) -> set[str]:
    """Return the files in a navigation that are named without a pattern."""
    if isinstance(nav, str):
        return set() if "*" in nav else {nav}
    values = nav.values() if isinstance(nav, dict) else nav
    return set().union(*(named(value) for value in values))


def expand(nav: Any, free: list[str]) -> Any:
    """Return a navigation in which each pattern is replaced by the files of `free` that match it."""
    out: list[Any] = []
    for entry in nav:
        title, value = next(iter(entry.items())) if isinstance(entry, dict) else (None, entry)
        if isinstance(value, list):
            inner: Any = expand(value, free)
        elif "*" in value:
            found = [page for page in free if fnmatchcase(page, value)]
            inner = found[0] if title and len(found) == 1 else found
        else:
            inner = value
        if not inner:
            continue
        if title:
            out.append({title: inner})
        else:
            out.extend(inner if isinstance(inner, list) else [inner])
    return out


def on_config(config: Any) -> Any:
    """Expand the patterns of the navigation, and remove those that match no file."""
    taken = named(config["nav"])
    config["nav"] = expand(config["nav"], [page for page in pages(config) if page not in taken])
    return config
