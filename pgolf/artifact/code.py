"""The counted code: one program that reads an artifact and scores it, with all it needs of pgolf.

The program, `evaluate_gpt.py`, or `train_gpt.py`, which trains as well, carries modules of the package in
compressed form and unpacks them into a temporary folder. It needs Python with torch, numpy, sentencepiece and
brotli (and flash-attn-4 where its attention is used), and a C++20 compiler for the coder, `g++` unless CXX
names another. It does not need pgolf: `portable.py` replaces what the compiled extension has. The modules are
picked by a rule that follows imports from the program's entry, those inside of functions too, and works on
syntax trees, so that what is left behaves as the whole does:

1. Comments, docstrings and other bare strings are left out, and what only a type checker sees: the body of
   `if TYPE_CHECKING`, and the types of parameters, results and variables of functions, and of attributes of
   classes that are no fields.
2. A function, class or constant of a module, or a method of a class without bases, is left out if
   nothing that stays names it: as a name, an attribute, an import or in a string without spaces. Decorated
   functions (except for `WRAPPERS`) and values that are computed by a call stay as they are, because they may
   register something; methods of classes with bases stay because a base may call them.
3. Imports of what is left out are left out too, so that modules which nothing imports are not followed; so
   are imports of other packages that a module does not use.
4. The rest is one text, with a line `# path` before each module and before the coder's C++ source. It is
   compressed with brotli 11 and stands in the program in base 85, which makes it 25 % longer: a program that
   is plain text passes through every tool.

The program for artifacts whose codes are written with a general compressor has no range coder, and so needs
no C++ compiler.

Everything in the program's file counts. Not counted, as in the challenge: installed packages and the
tokenizer file. A few bytes depend on how the running Python spells a syntax tree.
"""

from __future__ import annotations

import ast
import re
from base64 import b85encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pgolf
from pgolf.artifact.code_rule import CODE_NAME, CODE_RULE, FORMER_NAME, TRAIN_NAME
from pgolf.artifact.codec import compress
from pgolf.artifact.portable import references, without_extension
from pgolf.config import Coder, Counted

__all__ = [
    "CODE_NAME",
    "CODE_RULE",
    "EVALUATE",
    "EVALUATE_GENERAL",
    "FORMER_NAME",
    "TRAIN",
    "Program",
    "code_bytes",
    "code_name",
    "code_program",
    "code_text",
    "counted_code",
    "evaluate",
    "reader_code",
    "unpack_code",
]

_ROOT = Path(pgolf.__file__).parent.parent

SCRIPT = "pgolf/report/alone_script.py"
"""The program around the modules."""
SWAPPED = {
    "pgolf.artifact.code": "pgolf/artifact/own_code.py",
    "pgolf.model.heads": "pgolf/model/_no_heads.py",
    "pgolf.model.own_attention": "pgolf/model/_no_own_attention.py",
}
"""Modules that every program has in another form."""
SCORES = {"pgolf.model.threads": "pgolf/model/_no_threads.py"}
"""The same of a program that scores and does not train."""
NO_CODER = {"pgolf.ops.range_coder": "pgolf/ops/_no_coder.py"}
"""The same of one without the range coder."""
ENCODER = {"pgolf.ops._trellis_path": "pgolf/ops/_trellis_compiled.py"}
"""The same of a program that writes, whose C++ source rounds along the trellis, too."""


@dataclass(frozen=True)
class Program:
    """One program, which stands alone."""

    name: str
    """Name of its file."""
    entry: str
    """The module whose function `main` it calls; what that needs is carried."""
    coder: str
    """The C++ source of the range coder that it carries; "" for none."""


EVALUATE = Program(CODE_NAME, "pgolf.report.alone", "pgolf/ops/range_decoder.cpp")
"""Reads and scores an artifact."""
EVALUATE_GENERAL = Program(CODE_NAME, "pgolf.report.alone", "")
"""The same for an artifact whose codes are written with a general compressor: it needs no C++ compiler."""
TRAIN = Program(TRAIN_NAME, "pgolf.train.alone", "pgolf/ops/range_coder.cpp")
"""Trains, quantizes and writes as well."""
WRAPPERS = {"property", "classmethod", "staticmethod", "contextmanager", "cache"}
"""Decorators that register nothing."""


def code_bytes(coder: Coder = "range", program: Counted = "evaluate") -> int:
    """Return the bytes that the counted code weighs: those of `counted_code`."""
    return len(counted_code(coder, program))


def counted_code(coder: Coder = "range", program: Counted = "evaluate") -> bytes:
    """Return the program that is counted with an artifact whose codes are written with `coder`."""
    return code_program(evaluate(coder) if program == "evaluate" else TRAIN)


def code_name(program: Counted = "evaluate") -> str:
    """Return the name of its file."""
    return EVALUATE.name if program == "evaluate" else TRAIN.name


def evaluate(coder: Coder) -> Program:
    """Return the program that reads and scores artifacts whose codes are written with `coder`."""
    return EVALUATE if coder == "range" else EVALUATE_GENERAL


@cache
def code_program(program: Program = EVALUATE) -> bytes:
    """Return the file of a program, as it ships."""
    archive = compress(code_text(program).encode(), quality=11)
    tree: ast.Module = _Strip().visit(ast.parse((_ROOT / SCRIPT).read_text(encoding="utf-8")))
    filled: dict[str, str | bytes] = {"ARCHIVE": b85encode(archive), "ENTRY": program.entry}
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in filled:
            node.value = ast.Constant(filled[ast.unparse(node.targets[0])])
    return ast.unparse(tree).encode() + b"\n"


def code_text(program: Program = EVALUATE) -> str:
    """Return the sources of a program as one text, which `unpack_code` and the program take apart."""
    sources = reader_code(program)
    if program.coder:
        sources[program.coder] = (_ROOT / program.coder).read_text(encoding="utf-8").strip()
    return "".join(f"# {path}\n{source}\n" for path, source in sources.items())


def unpack_code(text: str, folder: Path) -> list[Path]:
    """Write the files of `code_text` below `folder` and return their paths.

    With `folder` first on Python's path they are pgolf, as far as reading and scoring need it.
    """
    parts = re.split(r"^# (pgolf/[\w/.]+)\n", text, flags=re.MULTILINE)
    paths = [folder / name for name in parts[1::2]]
    for path, source in zip(paths, parts[2::2], strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return paths


def reader_code(program: Program = EVALUATE) -> dict[str, str]:
    """Return the stripped modules that a program carries, by path ("pgolf/config.py"), in order."""
    return dict(_reader_code(program))


@cache
def _reader_code(program: Program) -> dict[str, str]:
    """Return what `reader_code` does, always the same object: this takes seconds."""
    others = ENCODER if program is TRAIN else SCORES if program.coder else SCORES | NO_CODER
    sources = _Sources(_ROOT, SWAPPED | others)
    names, modules = {"main"}, set(_packages(program.entry))
    # Names and modules only ever join, so this ends; a few rounds do.
    size = (0, 0)
    while size != (len(names), len(modules)):
        size = (len(names), len(modules))
        for module in sorted(modules):
            for node in sources.kept(module, names):
                names |= sources.mentioned(node)
                modules |= sources.imported(node)
    trees = {sources.path(module): sources.kept(module, names) for module in modules}
    return {path: ast.unparse(ast.Module(trees[path], [])) for path in sorted(trees)}


class _Sources:
    """The modules of the package as stripped trees, parsed when they are asked for."""

    def __init__(self, root: Path, swapped: dict[str, str]) -> None:
        self._root, self._swapped = root, swapped
        self._trees: dict[str, list[ast.stmt]] = {}
        # What was found of a node, which every round asks for again.
        self._mentioned: dict[ast.AST, frozenset[str]] = {}
        self._imported: dict[ast.AST, frozenset[str]] = {}
        self._stays: dict[ast.AST, bool] = {}
        self._has: dict[str, bool] = {}
        self._references = references(root / "pgolf" / "ops")

    def path(self, module: str) -> str:
        """Return the file of a module, relative to the package's parent."""
        name = module.replace(".", "/")
        return f"{name}/__init__.py" if (self._root / name).is_dir() else f"{name}.py"

    def has(self, module: str) -> bool:
        """Tell whether this is a module of the package, not a name in one or somebody else's."""
        if module not in self._has:
            self._has[module] = module.split(".")[0] == "pgolf" and (self._root / self.path(module)).is_file()
        return self._has[module]

    def kept(self, module: str, names: set[str]) -> list[ast.stmt]:
        """Return the statements of a module that stay if `names` are the names that are used."""
        if module not in self._trees:
            file = self._root / self._swapped.get(module, self.path(module))
            tree = ast.parse(file.read_text(encoding="utf-8"))
            operators = module.startswith("pgolf.ops.")
            tree = without_extension(tree, self._references, operators=operators)
            self._trees[module] = _Strip().visit(tree).body
        pruned = (self._prune(node, names) for node in self._trees[module])
        kept = [node for node in pruned if node is not None]
        here = {name for node in kept for name in self.mentioned(node)}
        return [node for node in (self._import(node, here) for node in kept) if node is not None]

    def mentioned(self, node: ast.stmt) -> frozenset[str]:
        """Return every identifier in a statement that could mean a function or class of another."""
        return frozenset().union(*(_remembered(self._mentioned, part, _mentioned) for part in _parts(node)))

    def imported(self, node: ast.stmt) -> frozenset[str]:
        """Return the modules of the package that a statement imports, with the packages around them."""

        def find(part: ast.AST) -> frozenset[str]:
            found = (name for name in _imported(part) if self.has(name))
            return frozenset(package for name in found for package in _packages(name))

        return frozenset().union(*(_remembered(self._imported, part, find) for part in _parts(node)))

    def _import(self, node: ast.stmt, here: set[str]) -> ast.stmt | None:
        """Return an import of another package without the names that nothing uses `here`."""
        if isinstance(node, ast.Import):
            used = [a for a in node.names if self.has(a.name) or (a.asname or a.name).split(".")[0] in here]
            return ast.Import(used) if used else None
        ours = ("__future__", "pgolf")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in ours:
            used = [a for a in node.names if (a.asname or a.name) in here]
            return ast.ImportFrom(node.module, used, node.level) if used else None
        return node

    def _prune(self, node: ast.stmt, names: set[str]) -> ast.stmt | None:
        if isinstance(node, ast.FunctionDef):
            return node if node.name in names or self._stays_unnamed(node) else None
        if isinstance(node, ast.ClassDef):
            return self._prune_class(node, names) if node.name in names else None
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            return node if node.targets[0].id in names or self._stays_unnamed(node) else None
        if isinstance(node, ast.ImportFrom) and self.has(node.module or ""):
            aliases = [a for a in node.names if (a.asname or a.name) in names]
            return ast.ImportFrom(node.module, aliases, node.level) if aliases else None
        return node

    def _prune_class(self, node: ast.ClassDef, names: set[str]) -> ast.ClassDef:
        """Return a class without the methods that nothing names; a class with bases stays whole."""
        if node.bases:
            return node

        def stays(part: ast.stmt) -> bool:
            if not isinstance(part, ast.FunctionDef) or part.name.startswith("__"):
                return True
            return part.name in names or self._stays_unnamed(part)

        body = [part for part in node.body if stays(part)]
        return ast.ClassDef(**{**dict(ast.iter_fields(node)), "body": body or [ast.Pass()]})

    def _stays_unnamed(self, node: ast.FunctionDef | ast.Assign) -> bool:
        """Tell whether a function or a value may register something, so that it stays if nothing names it."""
        if node not in self._stays:
            self._stays[node] = (
                any(isinstance(n, ast.Call) for n in ast.walk(node.value))
                if isinstance(node, ast.Assign)
                else not _only_wrapped(node)
            )
        return self._stays[node]


def _only_wrapped(node: ast.FunctionDef) -> bool:
    """Tell whether a function is known by its name only: no decorator registers it."""
    return all(ast.unparse(d).rpartition(".")[2] in WRAPPERS for d in node.decorator_list)


def _parts(node: ast.stmt) -> list[ast.AST]:
    """Return a statement, or the parts of a class: what is left of one is another class in every round."""
    return list(ast.iter_child_nodes(node)) if isinstance(node, ast.ClassDef) else [node]


def _remembered(
    known: dict[ast.AST, frozenset[str]], node: ast.AST, find: Callable[[ast.AST], frozenset[str]]
) -> frozenset[str]:
    """Return what `find` finds of a node, which it is asked once."""
    if node not in known:
        known[node] = find(node)
    return known[node]


def _without_inner_quotes(visitor: ast.NodeTransformer, node: ast.JoinedStr) -> ast.AST:
    """Return an f-string, or a call of str.format in place of one that has strings within its braces.

    From Python 3.12 on, `ast.unparse` gives those strings the quotes of the f-string itself, which older
    versions cannot read.
    """
    text, arguments = "", list[ast.expr]()

    def add(parts: list[ast.expr], *, outer: bool) -> None:
        nonlocal text
        for part in parts:
            if not isinstance(part, ast.FormattedValue):
                assert isinstance(part, ast.Constant)
                literal = str(part.value)
                text += literal.replace("{", "{{").replace("}", "}}") if outer else literal
                continue
            part.value = visitor.visit(part.value)
            arguments.append(part.value)
            text += "{" + ("" if part.conversion < 0 else f"!{chr(part.conversion)}")
            if part.format_spec is not None:
                assert isinstance(part.format_spec, ast.JoinedStr)
                text += ":"
                add(part.format_spec.values, outer=False)
            text += "}"

    add(node.values, outer=True)
    strings = (str, bytes)
    if not any(isinstance(getattr(n, "value", None), strings) for a in arguments for n in ast.walk(a)):
        return node
    return ast.Call(ast.Attribute(ast.Constant(text), "format", ast.Load()), arguments, [])


class _Strip(ast.NodeTransformer):
    """Removes bare strings and what only a type checker sees; leaves f-strings that Python 3.10 reads."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if _only_wrapped(node):  # others may be registered with their types
            a = node.args
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
                argument.annotation = None
            node.returns = None
            node.body = [part for n in node.body if (part := _Untype().visit(n)) is not None]
        return self.generic_visit(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        if not node.decorator_list and "NamedTuple" not in map(ast.unparse, node.bases):
            # Not fields, which are those of dataclasses and named tuples.
            node.body = [n for n in node.body if not isinstance(n, ast.AnnAssign) or n.value is not None]
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        bare = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if bare else self.generic_visit(node)

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return _without_inner_quotes(self, node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        node = self.generic_visit(node)  # type: ignore[assignment]
        return node.orelse if ast.unparse(node.test) == "TYPE_CHECKING" else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        node = super().generic_visit(node)
        if getattr(node, "body", None) == [] and not isinstance(node, ast.Module):
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
        return node


class _Untype(ast.NodeTransformer):
    """Removes the types of variables in a function."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        return None if node.value is None else ast.Assign([node.target], node.value, lineno=node.lineno)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return node  # the types of a class may be its fields


def _packages(module: str) -> list[str]:
    """Return a module and the packages around it, which are run before it."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _mentioned(node: ast.AST) -> frozenset[str]:
    """Return every identifier in a node that could mean a function or class of another."""
    found: set[str] = set()
    top = isinstance(node, ast.Import | ast.ImportFrom)  # says what may be used, not that it is
    for n in () if top else ast.walk(node):
        if isinstance(n, ast.Name):
            found.add(n.id)
        elif isinstance(n, ast.Attribute):
            found.add(n.attr)
        elif isinstance(n, ast.alias):
            found.add(n.name.rpartition(".")[2])
        elif isinstance(n, ast.Constant) and isinstance(n.value, str) and " " not in n.value:
            found.update(re.findall(r"\w+", n.value))
    return frozenset(found)


def _imported(node: ast.AST) -> Iterator[str]:
    """Yield every dotted name that a statement imports, at any depth; `from a import b` gives a and a.b."""
    for n in ast.walk(node):
        if isinstance(n, ast.Import):
            yield from (alias.name for alias in n.names)
        elif isinstance(n, ast.ImportFrom):
            yield n.module or ""
            yield from (f"{n.module}.{alias.name}" for alias in n.names)
