"""One process of `bench/peers.sh`, which compiles for a bench and times nothing, or waits and then measures.

    python -m bench.peers_case compile MODULE ARGUMENTS
    python -m bench.peers_case TURN MODULE ARGUMENTS

TURN is the path of a file. The second form imports the bench and the packages that it compares, which takes
seconds but no GPU, and waits until TURN exists. The file holds the seconds after which the process is ended.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch._inductor import config as inductor

from bench import common
from pgolf.peers import find_peer

PACKAGES = (
    "gram_newton_schulz",
    "quack.gemm_interface",
    "quack.linear_cross_entropy",
    "dion",
    "emerging_optimizers.orthogonalized_optimizers",
    "liger_kernel.transformers",
)
"""What takes seconds to import."""


def call_once(contenders: Mapping[str, Callable[[], object]], *_: Any, **__: Any) -> dict[str, common.Sample]:
    """Stand in for `time_launched`: call everything once."""
    for call in contenders.values():
        call()
    return {}


def time_nothing() -> None:
    """Let the benches that are imported from now on call everything once, and write nothing."""

    def show(_: Any, case: str, name: str, metric: str, sample: common.Sample, unit: str) -> None:
        print(f"{case} {name} {metric} {sample.value:.1f} {unit}", flush=True)

    vars(common).update(time_launched=call_once, time_graph=call_once, peak_mib=lambda *_: None)
    recorder: Any = common.Recorder
    recorder.add, recorder.write = show, lambda _: None


def compile_all_configurations() -> None:
    """Let Triton compile all configurations among which it would choose, without launching or timing one.

    Some constants of a kernel, such as coefficients, do not make Triton choose again, but compile again. So
    each call compiles what it would need with any choice.
    """
    if not find_peer("triton", "triton").usable:
        return
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.autotuner import Autotuner

    def run(self: Any, *args: Any, grid: Any, **settings: Any) -> None:
        settings.pop("warmup", None)
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for configuration in self.prune_configs(settings):
            chosen = settings | configuration.all_kwargs()
            if configuration.pre_hook is not None:
                configuration.pre_hook(self.nargs | chosen)
            with contextlib.suppress(Exception):  # one that this GPU cannot run; tuning leaves it out, too
                self.fn.run(*args, grid=grid, warmup=True, **chosen)
        self.nargs = None

    Autotuner.run = run
    # torch.compile compiles them all by itself, and takes the first of equally fast ones.
    tuner: Any = CachingAutotuner
    tuner.benchmark_all_configs = lambda self, *_, **__: dict.fromkeys(self.launchers, 0.0)


def wait(turn: Path) -> None:
    """Return when it is this process's turn; then the system ends it after the seconds in the file."""
    parent = os.getppid()
    while not turn.exists():
        if os.getppid() != parent:
            sys.exit("the script that started this process has ended")
        time.sleep(0.02)
    signal.alarm(int(turn.read_text()))


def main() -> None:
    """Run the bench that the arguments name."""
    turn, name, *arguments = sys.argv[1:]
    # torch's cache of compiled code must not keep which kernel was the fastest: it is tuned when it is timed.
    inductor.autotune_local_cache = False
    if turn == "compile":
        time_nothing()
        compile_all_configurations()
    bench: ModuleType = importlib.import_module(name)
    if turn == "compile":
        vars(bench).update(singular_values=lambda _: (0.0, 0.0))
    else:
        for package in PACKAGES:
            find_peer(package, package)
        wait(Path(turn))
    sys.argv = [name, *arguments]
    bench.main()


if __name__ == "__main__":
    main()
