"""The `pgolf` command apart from its verbs: versions, closed pipes, console encodings, bad files."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pgolf.cli.main import main

FULL = Path("/dev/full")


def shell(command, **variables):
    """Run a shell line in which `pgolf` is the command; return the finished process."""
    line = f'pgolf() {{ "{sys.executable}" -m pgolf "$@"; }}; {command}'
    environment = {**os.environ, **variables}
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, env=environment, check=False, timeout=300
    )


def test_version_names_package_commit_and_torch(capsys):
    for word in ("--version", "-V"):
        assert main([word]) == 0
        said = capsys.readouterr().out
        assert re.fullmatch(r"pgolf \d+\.\d+\.\d+, commit ([0-9a-f]{12}(-dirty)?|unknown), torch \S+\n", said)


def test_a_reader_that_goes_away_is_no_error():
    """This is also true if the whole text fits into one buffer, which Python would write only at exit."""
    for command in ("pgolf --help", "pgolf train --help"):
        done = shell(f"{command} | true; echo ${{PIPESTATUS[0]}}")
        assert done.stdout in (b"0\n", b"141\n") and done.stderr == b""
    done = shell("{ sleep 3; pgolf --help; echo $? >&2; } | true")
    assert done.stderr in (b"0\n", b"141\n")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    done = shell("pgolf --help > /dev/full")
    assert done.returncode == 2
    assert b"No space left on device" in done.stderr and done.stderr.count(b"\n") == 1


def test_closed_streams_are_no_traceback():
    done = shell("pgolf --help >&-")
    assert done.returncode == 0
    assert done.stderr == b"pgolf: standard output is closed, so nothing will be printed\n"
    done = shell("pgolf nonsense 2>&-")
    assert (done.returncode, done.stdout) == (2, b"")
    assert shell("pgolf --help <&- | tail -1").stdout.startswith(b"`pgolf VERB ... --debug`")


def test_what_is_opened_does_not_become_a_stream_that_was_closed(tmp_path):
    """A file with the number of standard output would receive the output of native code."""
    program = (
        "import sys; from pgolf.cli import main; main._open_closed_streams(); "
        f"file = open({str(tmp_path / 'data')!r}, 'wb'); file.flush(); import os; os.write(1, b'x'); "
        "os.write(2, b'x'); sys.exit(file.fileno() < 3)"
    )
    done = subprocess.run(["bash", "-c", f'"{sys.executable}" -c "{program}" <&- >&- 2>&-'], check=False)
    assert done.returncode == 0
    assert (tmp_path / "data").read_bytes() == b""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_letters_that_the_console_lacks_are_escaped(encoding):
    name = "l\xe4ufe-\u0434.json"
    done = shell(f"pgolf config '{name}'", PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    expected = name.encode(encoding, "backslashreplace")
    assert done.returncode == 2 and done.stderr.startswith(b"pgolf config: '" + expected + b"' is neither")
    program = (
        "import sys; from pgolf.log import RunLog; from pathlib import Path; "
        f"log = RunLog(Path(sys.argv[1]), is_main=True); log.line({name!r})"
    )
    # A library's user has not reconfigured the console.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", program, folder]
        environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
        done = subprocess.run(command, capture_output=True, env=environment, check=True)
        assert (Path(folder) / "log.txt").read_text(encoding="utf-8") == name + "\n"
    assert (done.stdout, done.stderr) == (expected + b"\n", b"")


def test_files_that_are_no_settings_are_one_sentence(tmp_path, capsys):
    file = tmp_path / "config.json"
    marked = b'\xef\xbb\xbf{"name": "marked"}'
    deep = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for verb in ("config", "ablate"):
        for data, message in (
            (deep, "nested more than 64 levels deep"),
            (b'{"a":' * 500 + b"1" + b"}" * 500, "nested more than 64 levels deep"),
            (b"[" * 100 + b"]" * 100, "nested more than 64 levels deep"),
            ('{"name": "x"}'.encode("utf-16"), "is not UTF-8 text"),
            (b"", "is not JSON"),
            (b"{'a': 1}", "is not JSON"),
            (b"5", "expected an object, got int"),
            (b'{"name": "x", "name": "y"}', "given twice: 'name'; give every key once"),
            (b'{"train": {"seed": 1, "steps": 2, "seed": 3}}', "given twice: 'seed'"),
            (b'{"name": ' + b"7" * 5_000 + b"}", "a number in it cannot be read"),
        ):
            file.write_bytes(data)
            assert main([verb, str(file)]) == 2
            said = capsys.readouterr().err
            assert message in said.replace("it is", "is") and len(said.splitlines()) == 1, (verb, said)
    file.write_bytes(marked)
    assert main(["config", str(file), "--model.layers", "12"]) == 0
    assert '"name": "marked"' in capsys.readouterr().out


def test_a_missing_data_folder_is_named(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert main(["train", "tiny", "--data", nowhere]) == 2
    assert f"no data folder at {nowhere}; make one with `pgolf data shards`" in capsys.readouterr().err


def test_an_unknown_table_of_coefficients_is_refused_before_anything_runs(capsys):
    assert main(["config", "tiny", "--optim.muon.coefficients", "jordn"]) == 2
    assert "'jordn'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "pgolf config: there is not enough memory for it; use smaller settings"),
        (MemoryError("Unable to allocate 7 TiB"), "for it (Unable to allocate 7 TiB); use smaller settings"),
        (
            OverflowError("int too big to convert"),
            "a number is too large (int too big to convert); use smaller",
        ),
    ],
)
def test_what_is_too_large_for_the_machine_is_one_sentence(monkeypatch, capsys, error, message):
    def fail(argv):
        raise error

    monkeypatch.setattr("pgolf.cli.config.main", fail)
    assert main(["config", "tiny"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_old_names_work_and_say_what_the_new_ones_are(capsys, tmp_path):
    assert main(["config", "record"]) == 0
    shown = capsys.readouterr()
    assert "the preset record is now called pr1855" in shown.err and "35,945,671" in shown.out
    assert main(["train", "record", "--data", str(tmp_path / "none")]) == 2
    assert "no data folder at" in capsys.readouterr().err
    assert main(["record", str(tmp_path / "none"), "--out", str(tmp_path / "x")]) == 2
    assert "pgolf record is now called pgolf submit" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "config", "size"])
def test_the_usage_of_a_verb_names_the_uses_of_this_verb(verb, capsys):
    try:
        code: object = main([verb, "--help"])
    except SystemExit as e:
        code = e.code
    assert code == 0
    uses = re.findall(r"^(?:usage:|      ) pgolf (\w+) (\S+)", capsys.readouterr().out, flags=re.M)
    assert {name for name, _ in uses} == {verb}
    assert len(uses) >= 2


def test_help_of_a_check_needs_no_folder(capsys):
    with pytest.raises(SystemExit) as done:
        main(["submit", "--check", "--help"])
    assert done.value.code == 0
    assert "--against" in capsys.readouterr().out
