"""The report of `pgolf legality` in a run's folder, and whether a submission may rest on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf.config import ILLEGAL, Method
from pgolf.errors import UserError
from pgolf.files import file_sha256
from pgolf.report.finished_runs import FinishedRun

NAME = "legality.json"
"""Name of the report in a run's folder."""


def read_report(path: Path) -> dict[str, Any]:
    """Return a report.

    Raises:
        UserError: the file is no report.
    """
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {"artifact", "mode", "settings", "legal", "remark", "conditions"} <= report.keys()
        failed = [c["condition"] for c in report["conditions"] if c["verdict"] == "fails"] if known else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is no report of `pgolf legality` ({type(e).__name__}: {e})") from e
    if not known or bool(failed) == report["legal"]:
        raise UserError(f"{path} is no report of `pgolf legality`; make it again")
    return report


def verdict_of(report: dict[str, Any]) -> str:
    """Return what a report says, in a sentence without its end."""
    failed = sorted({c["condition"] for c in report["conditions"] if c["verdict"] == "fails"})
    if failed:
        return f"{' and '.join(failed)} FAIL of the conditions of issue 1017"
    said = "none of the four conditions of issue 1017 fails"
    said += "".join(f"; not tested: {c['test']}" for c in report["conditions"] if c["verdict"] == "untested")
    return f"{said} ({report['remark']})" if report["remark"] else said


def checked_reports(runs: Sequence[FinishedRun], *, illegal: bool) -> dict[int, tuple[Path, str]]:
    """Return the reports of those runs that have one: seed -> file, and what it says.

    Args:
        runs: finished runs.
        illegal: accept reports in which a condition fails.

    Raises:
        UserError: a report is of another artifact, another program, another way to score or other settings
            than the run's headline; or a condition fails; or the headline is of a way that is not allowed.
    """
    found = {}
    for run in runs:
        path, settings = run.folder / NAME, run.config.evaluate
        headline = run.summary.headline
        way: Method = next((way for way in settings.ways if way == headline), "plain")
        if settings.remark(way) == ILLEGAL and not illegal:
            raise UserError(
                f"{run.folder}: the headline score is {way}, {ILLEGAL}; the challenge does not accept it. "
                "Score the run in another way, or write the folder all the same with --although-illegal"
            )
        if not path.is_file():
            continue
        report = read_report(path)
        again = f"run `pgolf legality {run.folder}` again"
        if report["artifact"] != file_sha256(run.folder / "model.pgolf"):
            raise UserError(f"{path} is of another file than {run.folder / 'model.pgolf'}; {again}")
        if report["mode"] != way:
            raise UserError(f"{path} tested {report['mode']}, the run's headline is {way}; {again}")
        if report["settings"] != settings.settings_of(way):
            raise UserError(f"{path} tested other settings than the run's config.json has; {again}")
        code = report.get("code")  # reports of older versions have none
        if code is not None and code != hashlib.sha256(run.code).hexdigest():
            raise UserError(f"{path} tested another program than the run's {run.code_name}; {again}")
        if not report["legal"] and not illegal:
            raise UserError(
                f"{path}: {verdict_of(report)}, so the challenge does not accept this submission; mend the "
                "evaluator, or write the folder all the same with --although-illegal"
            )
        found[run.seed] = path, verdict_of(report)
    return found
