"""Checks of the documentation: snippets, command lines, links, names of files, figures."""

import ast
import importlib.util
import json
import re
import shlex
import shutil
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tyro

from pgolf import ops
from pgolf.artifact.code import EVALUATE, TRAIN, code_program
from pgolf.artifact.write import write_artifact
from pgolf.cli import main as cli
from pgolf.config import to_dict
from pgolf.data.text import iterate_documents, sample_paths
from pgolf.data.tokenizer import train_tokenizer
from pgolf.files import file_sha256
from pgolf.presets import tiny
from tests.artifact.artifact_helpers import FACTS, TOY, make_state

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "bench" / "results"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    DOCS.rglob("*.md")
)


CONSOLE = {"console", "bash", "sh", "shell"}
HARMLESS = {"cd", "git", "nvidia-smi", "unzip", "tar", "export", "."}
"""Programs in command lines that are not checked, because they are not part of this project."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, except for those below `<!-- not run: reason -->`."""
    found, fence, language, start, spared = [], "", "", 0, False
    body: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        opened = re.match(r"\s*(`{3,})\s*(\w*)", line)
        if fence:
            if line.strip() == fence:
                if not spared:
                    found.append(Block(page, start, language, "\n".join(body)))
                fence, spared = "", False
            else:
                body.append(line)
        elif opened:
            fence, language, start, body = opened[1], opened[2], number, []
        elif line.strip():
            spared = re.fullmatch(r"<!-- not run: .+ -->", line.strip()) is not None
    assert not fence, f"{page}: the block that starts in line {start} does not end"
    return found


def commands_of(block: Block) -> list[str]:
    """Return the command lines of a console block: lines after `$ `, or all lines if none begins so."""
    lines = block.text.replace("\\\n", " ").splitlines()
    asked = [line.strip()[2:] for line in lines if line.strip().startswith("$ ")]
    return asked or [line for line in lines if line.strip() and not line.strip().startswith("#")]


def is_console(block: Block) -> bool:
    """Return whether a block has command lines, by its language or because all lines start with `pgolf`."""
    lines = [line for line in block.text.splitlines() if line.strip()]
    return block.language in CONSOLE or (not block.language and all(x.startswith("pgolf ") for x in lines))


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
COMMANDS = [(block.name, c) for block in BLOCKS if is_console(block) for c in commands_of(block)]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    """A folder with an untrained model as `model.pgolf`, and its tokenizer next to it."""
    folder = tmp_path_factory.mktemp("model")
    texts = (document.text for document in iterate_documents(sample_paths().val))
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", vocab_size=512)
    config = replace(TOY, vocab_size=tokenizer.vocab_size)
    facts = FACTS | {"tokenizer_sha256": file_sha256(folder / "tokenizer.model")}
    write_artifact(folder / "model.pgolf", make_state(config), config, limit=1_000_000, quality=1, **facts)
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_blocks_run_as_printed(block, tmp_path, monkeypatch, request):
    place = tmp_path
    if "model.pgolf" in block.text:
        place = shutil.copytree(request.getfixturevalue("model_folder"), tmp_path / "model")
    monkeypatch.chdir(place)
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})


class Parsed(BaseException):
    """Raised when the real parser has accepted a command line, so that the command itself is not run."""


def run_verb(words: list[str], monkeypatch) -> None:
    """Run `pgolf WORDS` up to its parser; raise AssertionError if the parser refuses the words."""
    for where, name in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
        parse = getattr(where, name)

        def parse_and_stop(*args, parse=parse, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        monkeypatch.setattr(where, name, parse_and_stop)
    try:
        code: object = cli.main(words)
    except Parsed:
        return
    except SystemExit as e:
        code = e.code
    assert code == 0, f"pgolf {shlex.join(words)}: exit code {code}"


def check_command(command: str, monkeypatch) -> None:
    """Check one command line; raise AssertionError or an error of the parser if it is not valid."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if program == "torchrun":
        assert "-m" in rest, command
        program, rest = "python", rest[rest.index("-m") :]
    if program in ("python", "python3") and rest[:2] == ["-m", "pgolf"]:
        program, rest = "pgolf", rest[2:]
    if program == "pgolf":
        if rest != ["info"]:
            run_verb(rest, monkeypatch)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
        assert set(rest) <= set(targets), f"{command}: the Makefile has {targets}"
    elif program in ("python", "python3") and rest[:1] == ["-m"]:
        assert importlib.util.find_spec(rest[1]) is not None, command
    elif program in ("python", "python3"):
        assert (ROOT / rest[0]).is_file(), f"{command}: no {rest[0]}"
    elif program == "pip":
        check_pip(command, rest)
    elif program == "pre-commit":
        assert rest == ["install"]
    elif "/" in program:
        assert (ROOT / program).is_file(), f"{command}: no {program}"
    else:
        assert program in HARMLESS, f"{command}: unknown program {program}"


def optional_dependencies() -> dict[str, list[str]]:
    tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def check_pip(command: str, rest: list[str]) -> None:
    assert rest[0] == "install", command
    extras = optional_dependencies()
    for asked in re.findall(r"(?:\.|pgolf)\[([\w,]+)\]", command):
        assert set(asked.split(",")) <= set(extras), f"{command}: the extras are {sorted(extras)}"


@pytest.fixture
def in_a_folder_of_runs(tmp_path, monkeypatch):
    """Change to a folder that contains a run, as the pages assume."""
    run = tmp_path / "runs" / "my-run"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(to_dict(tiny())))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=[f"{n} {c[:40]}" for n, c in COMMANDS])
def test_commands_are_taken_by_their_parsers(name, command, in_a_folder_of_runs, monkeypatch):
    check_command(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "pgolf trian pr1855",
        "pgolf train pr1855 --optim.muon.ns-stepz 4",
        "pgolf train pr1856",
        "pgolf evaluate model.pgolf --mode fast --data shards",
        "torchrun --nproc_per_node=8 -m pgolf train pr1855 --no-such-flag",
        "make dome",
        "python -m bench.no_such_bench",
        "torchrun --nproc_per_node=2 -m bench.no_such_bench",
        "python examples/none.py",
        "pip install -e '.[nonesuch]'",
        "bench/tailline.sh out",
        "frobnicate",
    ],
)
def test_the_check_of_commands_finds_mistakes(command, in_a_folder_of_runs, monkeypatch):
    with pytest.raises(AssertionError):
        check_command(command, monkeypatch)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as the site makes it."""
    text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"[-\s]+", "-", text)


def anchors(page: Path) -> set[str]:
    return {slug(h) for h in re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page to files or headings that do not exist."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.S)
    bad = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            bad.append(target)
    return bad


LINKED = [*PAGES, *sorted(RESULTS.glob("*.md")), *sorted(RESULTS.glob("*baseline*/*.md"))]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_internal_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_the_check_of_links_finds_mistakes(tmp_path):
    (tmp_path / "b.md").write_text("# One heading\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[1](b.md) [2](b.md#one-heading) [3](b.md#none) [4](c.md) [5](https://x.org) `[6](d.md)`\n"
    )
    assert broken_links(page) == ["b.md#none", "c.md"]


def named_files(page: Path) -> set[str]:
    """Return the paths below the folders of the repository that a page names in backticks."""
    words = re.findall(r"`([\w./*-]+)`", page.read_text())
    folders = ("bench/", "csrc/", "docs/", "examples/", "pgolf/", "tests/", ".ci/")
    return {word for word in words if word.startswith(folders)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    missing = sorted(f for f in named_files(page) if not list(ROOT.glob(f)))
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_verbs_and_targets_in_the_text_exist(page):
    text = page.read_text()
    verbs = set(re.findall(r"`pgolf (\w[\w-]*)", text))
    assert sorted(v for v in verbs if v not in cli.VERBS and v not in cli.OLD_VERBS) == []
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([\w-]+)`", text))
    assert sorted(t for t in targets if not re.search(rf"^{t}:", makefile, flags=re.M)) == []


def test_readme_is_short_and_its_snippets_too():
    readme = ROOT / "README.md"
    assert len(readme.read_text().splitlines()) <= 200
    snippets = [block for block in PYTHON if block.page == readme]
    assert len(snippets) >= 2
    for block in snippets:
        assert len(block.text.splitlines()) <= 12, block.name
        assert any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(block.text))), block.name


def test_sizes_of_the_counted_programs_are_those_of_the_sources():
    row = re.search(r"^\| size .*$", (DOCS / "file-format.md").read_text(), flags=re.M)
    stated = [1000 * float(size) for size in re.findall(r"([\d.]+) kB:", row[0])]
    measured = [len(code_program(program)) for program in (EVALUATE, TRAIN)]
    assert stated == pytest.approx(measured, rel=0.05), "write the sizes of `pgolf artifact code` into it"


def test_every_public_operator_has_an_api_page():
    documented = set(re.findall(r"^::: ([\w.]+)$", "".join(p.read_text() for p in DOCS.rglob("*.md")), re.M))
    names = {name.rpartition(".")[2] for name in documented}
    helpers = {"KernelRow", "kernel_table"}
    public = {name for name in ops.__all__ if not name.endswith("_ref")} - helpers
    assert public - names == set()
    assert "pgolf.optim.Muon" in documented


SECTION = re.compile(r"^\s*(Args|Returns|Raises|Source):", re.M)


@pytest.mark.parametrize("name", [n for n in ops.__all__ if callable(getattr(ops, n))])
def test_docstrings_of_operators_can_be_read_by_the_site(name):
    """A section needs an empty line before it, and each error its own line, for the site to show them."""
    text = getattr(ops, name).__doc__
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if SECTION.match(line):
            assert not lines[i - 1].strip(), f"{name}: no blank line before {line.strip()}"
        assert not re.search(r"\. [A-Z]\w*Error: ", line), f"{name}: two errors in {line.strip()!r}"


def test_index_of_results_is_complete():
    index = (RESULTS / "README.md").read_text()
    there = {path.name for path in RESULTS.iterdir()} - {"README.md"}
    assert sorted(name for name in there if name not in index) == []
    named = set(re.findall(r"\b(20\d{6}_[\w.-]+?)(?=[`/)\]])", index))
    assert sorted(named - there) == []


def text_chunks(png: bytes) -> dict[str, str]:
    """Return the tEXt chunks of a PNG file."""
    found, place = {}, 8
    while place < len(png):
        (length,) = struct.unpack(">I", png[place : place + 4])
        if png[place + 4 : place + 8] == b"tEXt":
            key, _, value = png[place + 8 : place + 8 + length].partition(b"\0")
            found[key.decode("latin-1")] = value.decode("latin-1")
        place += 12 + length
    return found


def test_figures_are_those_of_the_newest_results():
    pytest.importorskip("matplotlib")
    from bench.figures import FIGURES, source

    for name in FIGURES:
        made_from = text_chunks((DOCS / "figures" / name).read_bytes())["Source"]
        assert made_from == source(name), f"docs/figures/{name} is old; run `make figures`"


def test_a_panel_reads_the_newest_file_that_has_its_cases(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.figures import DEVICE, newest

    for day, cases in (("20260101", ["a", "b"]), ("20260102", ["a", "b", "c"]), ("20260103", ["c"])):
        lines = "\n".join(json.dumps({"case": case}) for case in cases)
        (tmp_path / f"{day}_{DEVICE}_kernel.jsonl").write_text(lines)
    (tmp_path / f"20260104_{DEVICE}_kernel-other.jsonl").write_text(json.dumps({"case": "a"}))
    assert newest("kernel", tmp_path, ["a", "b"]).name.startswith("20260102")
    assert newest("kernel", tmp_path, ["c"]).name.startswith("20260103")
    with pytest.raises(FileNotFoundError, match=r"no result of kernel on .* has the cases \['a', 'd'\]"):
        newest("kernel", tmp_path, ["a", "d"])


def test_figures_are_drawn_the_same_twice(tmp_path):
    pytest.importorskip("matplotlib")
    from bench.figures import write_figures

    first, second = (write_figures(tmp_path / folder) for folder in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_hooks_of_commits_have_the_pinned_tools():
    config = (ROOT / ".pre-commit-config.yaml").read_text()
    pins = dict(entry.split("==") for entry in optional_dependencies()["dev"] if "==" in entry)
    for tool, repo in (("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")):
        (rev,) = re.findall(rf"{repo}\n\s+rev: v(\S+)", config)
        assert rev == pins[tool]


def test_patterns_of_the_navigation():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    nav = [{"Home": "index.md"}, {"Ideas": "ideas/*.md"}, {"More": ["glossary*.md", {"Log": "findings*.md"}]}]
    assert hooks.named(nav) == {"index.md"}
    assert hooks.expand(nav, []) == [{"Home": "index.md"}]
    assert hooks.expand(nav, ["findings.md", "ideas/a.md", "ideas/b.md", "glossary.md"]) == [
        {"Home": "index.md"},
        {"Ideas": ["ideas/a.md", "ideas/b.md"]},
        {"More": ["glossary.md", {"Log": "findings.md"}]},
    ]
