"""Rewrite the package's modules so that they need no compiled extension, for the counted code.

What `pgolf._C` has comes from elsewhere, by the first three of these rules:

1. An operator's function (one that calls `torch.ops.pgolf` and has a reference `NAME_ref` in its module) is
   left out, and the reference takes its name: the same formula in PyTorch's own operators.
2. The range coder, whose reference takes 60 us per code, gets `pgolf.ops._coder` for `pgolf._C`.
3. What registers something for the compiled operators goes: `torch.library...` and `refuse_derivatives`; and
   then the private functions and classes that nothing in their module names any longer.
4. `pgolf.artifact.tensor_file` stands for safetensors, which is no package of the challenge.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

EXTENSION, CODER = "_C", "_coder"
LOADERS = {"pgolf.ops._extension", "pgolf.ops._smoothed_ce"}
"""Modules that are imported because they register operators."""
TENSOR_FILE = "pgolf.artifact.tensor_file"


def references(folder: Path) -> dict[str, str]:
    """Return NAME_ref -> NAME for every operator of the modules in `folder`, pgolf/ops, that has both."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        functions = {n.name: n for n in _functions(ast.parse(path.read_text(encoding="utf-8")))}
        for name, node in functions.items():
            if f"{name}_ref" in functions and "torch.ops.pgolf" in ast.unparse(node):
                found[f"{name}_ref"] = name
    return found


def without_extension(tree: ast.Module, names: dict[str, str], *, operators: bool) -> ast.Module:
    """Return a module that needs no `pgolf._C`.

    Args:
        tree: the module, which is changed.
        names: from `references`.
        operators: whether it is a module of `pgolf.ops`, which define and register operators.
    """
    if operators:
        there = {n.name for n in _functions(tree)}
        replaced = {name for ref, name in names.items() if ref in there}
        tree.body = [
            node
            for node in tree.body
            if not _registers(node) and not (isinstance(node, ast.FunctionDef) and node.name in replaced)
        ]
        tree.body = _still_named(tree.body)
    changed: ast.Module = _Names(names).visit(tree)
    return changed


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _still_named(body: list[ast.stmt]) -> list[ast.stmt]:
    """Leave out private functions and classes that no other statement of the module names."""
    names = {node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} for node in body}

    def named(node: ast.stmt) -> bool:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or not node.name.startswith("_"):
            return True
        return any(node.name in names[other] for other in body if other is not node)

    while len(kept := [node for node in body if named(node)]) < len(body):
        body = kept
    return body


def _registers(node: ast.stmt) -> bool:
    """Tell whether a statement does nothing but register something for a compiled operator."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    called = ast.unparse(node.value.func)
    return called.startswith("torch.library.") or called == "refuse_derivatives"


class _Names(ast.NodeTransformer):
    """Gives references the names of their operators, and imports the coder in place of the extension."""

    def __init__(self, names: dict[str, str]) -> None:
        self._names = names

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name = self._names.get(node.name, node.name)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._names.get(node.id, node.id)
        return node

    def visit_Import(self, node: ast.Import) -> ast.AST | None:
        node.names = [a for a in node.names if a.name not in LOADERS]
        return node if node.names else None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        if node.module in LOADERS:
            return None
        if (node.module or "").split(".")[0] == "safetensors":
            node.module = TENSOR_FILE
        if node.module == "pgolf" and [a.name for a in node.names] == [EXTENSION]:
            return ast.ImportFrom("pgolf.ops", [ast.alias(CODER, EXTENSION)], 0)
        once = {self._names.get(a.name, a.name): a for a in node.names}  # both forms may be imported
        node.names = [ast.alias(name, a.asname) for name, a in once.items()]
        return node
