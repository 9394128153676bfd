"""`pgolf ablate PLAN.json`: run every arm with every seed, and say which arm is better, if any is."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from pgolf.cli.overrides import base_note, load_base
from pgolf.cli.overrides import say as say_note
from pgolf.errors import RunError, UserError


@dataclass(frozen=True)
class Ablate:
    """Run every arm of a plan with every seed, then write report.md and report.html.

    A plan names a base configuration, and arms: the settings that are compared. Finished runs are kept and
    skipped, so you may stop with Ctrl-C or a signal at any time and start again. Only one process at a time
    can work on a plan's folder. docs/quickstart/screen.md explains plans and reports.
    """

    plan: tyro.conf.Positional[Path]
    """The plan, a JSON file; bench/ablations/example.json is one to start from."""
    out: Path | None = None
    """Folder of the results; without it, the one that the plan names."""
    data: Path | None = None
    """Data folder; without it, the one that the plan names."""
    report_only: bool = False
    """Run nothing; write the report of the results that are there."""
    gpus: int | None = None
    """GPUs to use; without it, all visible ones. 0: run on the device that the base configuration names."""
    per_gpu: int = 1
    """Runs that share one GPU. More than 1 is for small models, which leave most of a GPU idle, and needs a
    plan of fixed steps. The runs take turns unless NVIDIA's MPS is on (nvidia-cuda-mps-control -d)."""


def main(argv: list[str]) -> int:
    """Run the plan; return 0 when every cell has finished or diverged, 1 when some are open."""
    args = tyro.cli(Ablate, prog="pgolf ablate", args=argv)
    from pgolf.ablate.costs import measure, measured
    from pgolf.ablate.page import write_report
    from pgolf.ablate.plan import read_plan
    from pgolf.ablate.results import Ablation, gather
    from pgolf.ablate.run import run_plan, start_process
    from pgolf.ablate.tables import markdown
    from pgolf.env import commit_name, share_of_cores
    from pgolf.train.guard import HeldError, held

    say = functools.partial(print, flush=True)
    plan = read_plan(args.plan, load_base, out=args.out, data=args.data)
    say_note(base_note(plan.base))
    for warning in plan.warnings:
        print(f"warning: {warning}", file=sys.stderr)

    def report() -> Ablation:
        result = gather(plan, args.plan)
        paths = write_report(result, plan.out)
        print(f"\n{markdown(result)}\nreport: {paths[0]}, {paths[1]}")
        return result

    if not args.report_only:
        _check_data(plan.arms[plan.baseline].data.dir)
        gpus = _count_gpus(args.gpus, on_cpu=any(c.train.device == "cpu" for c in plan.arms.values()))
        processes = max(1, gpus) * args.per_gpu
        environment = share_of_cores(processes) if processes > 1 else None
        start = functools.partial(start_process, environment=environment)
        try:
            run_plan(plan, start, gpus=gpus, per_gpu=args.per_gpu, commit=commit_name(12), say=say)
            if plan.costs.steps and not measured(plan.out, plan.costs):
                with held(plan.out):
                    measure(plan.out, plan.costs, commit=commit_name(12), say=say)
        except HeldError:
            raise  # the process that holds the plan writes its report
        except BaseException:
            report()
            raise
    return 0 if report().complete else 1


def _check_data(folder: Path | None) -> None:
    """Refuse a plan whose cells would all end because there are no data.

    Raises:
        FileNotFoundError: no such folder.
    """
    if folder is None or not folder.is_dir():
        raise FileNotFoundError(
            f"no data folder at {folder}; make text to choose settings by from your shards with `pgolf data "
            "held-out SHARDS --out FOLDER`, and pass --data FOLDER"
        )


def _count_gpus(asked: int | None, *, on_cpu: bool) -> int:
    """Return the number of GPUs to use; 0 means one process at a time, on the configuration's device.

    Raises:
        RunError: started by torchrun. UserError: more GPUs are asked for than there are.
    """
    import torch

    from pgolf.env import launch

    if launch().distributed:
        raise RunError("ablate starts one process per GPU by itself; run it without torchrun")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked is not None and not 0 <= asked <= there:
        raise UserError(f"--gpus must be in [0, {there}] (the visible GPUs), got {asked}")
    return 0 if on_cpu else there if asked is None else asked
