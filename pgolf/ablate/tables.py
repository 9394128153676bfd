"""The report of an ablation in words and tables, for Markdown and for the HTML page."""

from __future__ import annotations

from collections.abc import Callable

from pgolf.ablate.compare import PARTS, Comparison, arm_mean, compare_arms, training_gaps
from pgolf.ablate.ladder import compare_ladders
from pgolf.ablate.net import DROP, net_of_costs
from pgolf.ablate.results import DONE, WEIGHTS, Ablation
from pgolf.data.manifest import NO_MANIFEST
from pgolf.report.page import Table
from pgolf.stats import ALPHA, MIN_PAIRS, Mean

TRUNK_FIGURES = (("steps", 0), ("last_loss", 4), ("raw", 5))
"""Values of a trunk that the report shows, with their digits."""


def tables(ablation: Ablation) -> list[Table]:
    """Return the verdicts, the arms' means, what each arm changes, and the cells that did not finish."""
    head: tuple[str, ...] = ("arm", "verdict", "pairs", "mean difference", "95 % interval", "p (t, Holm)")
    head += ("p (t)", "p (sign flip)", "sd of differences", f"pairs to see {ablation.effect:g}", "note")
    title = f"Difference from {ablation.baseline} by seed, bpb {ablation.metric} (negative is better)"
    compared = compare_arms(ablation)
    found = [
        Table("Verdicts", ("arm", "verdict", "in words"), [_words(c, ablation) for c in compared]),
        Table(title, head, [_comparison_row(c) for c in compared]),
        *_ladders(ablation),
        *_nets(ablation),
        _means(ablation),
        *_gaps(ablation),
        Table("What each arm sets", ("arm", "overrides"), _changes(ablation)),
        *_trunks(ablation),
    ]
    # A cell that diverged is a result too, but of no number: it is listed with its reason.
    open_cells = [c for c in ablation.cells if c.status != "finished"]
    if open_cells:
        rows: list[tuple[str, ...]] = [(c.arm, str(c.seed), c.status, c.message) for c in open_cells]
        found.append(Table("Cells without a result", ("arm", "seed", "state", "message"), rows))
    return found


def facts(ablation: Ablation) -> list[str]:
    """Return the lines above the tables: the plan, the code, what to be careful about."""
    done = [c for c in ablation.cells if c.status in DONE]
    ran = [*done, *(ablation.trunk.cells if ablation.trunk else ())]
    commits = sorted({c.commit for c in ran if c.commit})
    devices = sorted({c.device for c in ran if c.device})
    lines = [ablation.comment] if ablation.comment else []
    lines += [
        f"Plan {ablation.plan_file}: base {ablation.base}, {ablation.length} per run, "
        f"{len(ablation.arms)} arms x seeds {', '.join(map(str, ablation.seeds))}, "
        f"baseline {ablation.baseline}.",
        *_start(ablation),
        f"Code: {', '.join(commits) or 'unknown'}. Device: {', '.join(devices) or 'unknown'}.",
        f"Decided by bpb {ablation.metric}, paired t test at {ALPHA:g}, Holm over the arms; intervals "
        "are each arm's own 95 %. Other columns are described, not tested.",
        *_cost_words(ablation),
    ]
    if ablation.held_out:
        lines.append("Scored on the end of the training text, which no run was trained on.")
    elif ablation.held_out is False:
        lines.append(
            "WARNING: scored on the validation text, on which a setting that is chosen here is tuned; choose "
            "on the folder that `pgolf data held-out` makes, and confirm once on the validation text."
        )
    if not ablation.complete:
        lines.append(
            f"INTERIM: {len(done)} of {len(ablation.cells)} cells are done. A verdict read before the end of "
            "the plan, or seeds added after a look at it, claim more than the error rate allows."
        )
    if len(commits) > 1 or any(c.endswith("-dirty") for c in commits):
        lines.append("WARNING: cells ran code of more than one commit, or code that is in no commit.")
    if len(devices) > 1:
        lines.append("WARNING: cells ran on different devices.")
    if bare := sum(c.manifest is None for c in ran):
        lines.append(f"WARNING: {bare} of {len(ran)} runs rested on data without a manifest: {NO_MANIFEST}.")
    if len({c.manifest for c in ran if c.manifest}) > 1:
        lines.append("WARNING: cells rested on data of different manifests.")
    return lines + [f"WARNING: {text}" for text in ablation.warnings]


def _start(ablation: Ablation) -> list[str]:
    """Say what the arms start from, where it is not random weights."""
    for key, what in (("train.init", "starts from the weights of"), ("train.start", "continues from")):
        if origin := ablation.common.get(key):
            return [f"Every run {what} {origin}: seeds change the order of the data alone."]
    if ablation.trunk is None:
        return []
    losses = [f"seed {c.seed} {c.values['last_loss']:.4f}" for c in ablation.trunk.cells if c.values]
    if ablation.trunk.until < 1:
        share = f"{100 * ablation.trunk.until:g} %"
        return [
            f"The arms of a seed continue one trunk, with its optimizer's state, through the rest of the "
            f"schedules: {ablation.trunk.steps:,} steps of {ablation.baseline}, the first {share}, with "
            f"{_settings(ablation.trunk.overrides)}. Last loss of the trunks, nats per token: "
            f"{', '.join(losses) or 'none yet'}."
        ]
    return [
        f"The arms of a seed start from the same weights: a trunk of {ablation.trunk.steps:,} steps of "
        f"{ablation.baseline} with {_settings(ablation.trunk.overrides)}. Last loss of the trunks, nats per "
        f"token: {', '.join(losses) or 'none yet'}."
    ]


def markdown(ablation: Ablation) -> str:
    """Return the report as Markdown."""
    parts = [f"# Ablation {ablation.name}", "", *(f"- {line}" for line in facts(ablation))]
    for table in tables(ablation):
        parts += ["", f"## {table.title}", "", _row(table.head), _row(tuple("---" for _ in table.head))]
        parts += [_row(row) for row in table.rows]
    return "\n".join(parts) + "\n"


def _row(cells: tuple[str, ...]) -> str:
    safe = (" ".join(c.replace("|", "\\|").split()) for c in cells)
    return "| " + " | ".join(safe) + " |"


def _words(c: Comparison, ablation: Ablation) -> tuple[str, ...]:
    low, high, n = c.pairs.low, c.pairs.high, c.pairs.n
    if n < MIN_PAIRS:
        text = f"{n} pairs are no evidence; {MIN_PAIRS} are the least"
    elif c.verdict == "not separable":
        text = f"anything from {low:+.5f} to {high:+.5f} bpb remains possible"
        if c.needed is not None and c.needed > n:
            text += f"; about {c.needed} pairs would show {ablation.effect:g}"
    else:
        text = f"{c.verdict} by {abs(c.pairs.mean):.5f} bpb ({low:+.5f} to {high:+.5f}), {n} pairs"
    return c.arm, c.verdict, text


def _comparison_row(c: Comparison) -> tuple[str, ...]:
    p = c.pairs
    interval = f"{p.low:+.5f} to {p.high:+.5f}" if p.n >= 2 else "-"
    return (
        c.arm,
        c.verdict,
        str(p.n),
        _figure(p.mean, lambda v: f"{v:+.5f}"),
        interval,
        *(_figure(v, lambda v: f"{v:.4f}") for v in (c.p_adjusted, p.p_t, p.p_flip)),
        _figure(p.sd, lambda v: f"{v:.5f}"),
        "-" if c.needed is None else f"{c.needed:,}",
        c.note,
    )


def _nets(ablation: Ablation) -> list[Table]:
    """Return the table of what each arm brings after its costs; none where nothing is known of them."""
    costs = ablation.costs
    if costs is None:
        return []
    rows: list[tuple[str, ...]] = []
    for net in net_of_costs(ablation):
        interval = (
            f"{net.low:+.5f} to {net.high:+.5f}"
            if net.compared.pairs.n >= 2 and net.charge == net.charge
            else "-"
        )
        rows.append(
            (
                net.compared.arm,
                _figure(net.compared.pairs.mean, lambda v: f"{v:+.5f}"),
                _figure(net.ms, lambda v: f"{v:.2f}"),
                _figure(net.time_percent, lambda v: f"{v:+.2f}"),
                f"{net.bytes:,.0f}" if net.bytes else "as baseline",
                f"{net.bytes_percent:+.2f}",
                _figure(net.charge, lambda v: f"{v:+.5f}"),
                _figure(net.mean, lambda v: f"{v:+.5f}"),
                interval,
                net.decision,
            )
        )
    head: tuple[str, ...] = (
        "arm",
        "difference",
        "ms per step",
        "% of time",
        "bytes",
        "% of bytes",
        "cost in bpb",
    )
    head += ("net difference", "95 % interval", "decision")
    title = f"Net at equal seconds and equal bytes, bpb {ablation.metric} (negative is better)"
    return [Table(title, head, rows)]


def _ladders(ablation: Ablation) -> list[Table]:
    """Return the table of the ladders at their best rates; none in a plan without ladders."""
    if ablation.ladders is None:
        return []
    rows: list[tuple[str, ...]] = []
    for r in compare_ladders(ablation, ablation.ladders):
        p, is_base = r.pairs, r.ladder == ablation.ladders.baseline
        rows.append(
            (
                r.ladder,
                _figure(r.best, lambda v: f"{v:.4g}"),
                "at its end: extend the ladder" if r.at_end else "inside",
                "baseline" if is_base else r.verdict,
                str(p.n),
                _figure(p.mean, lambda v: f"{v:+.5f}"),
                f"{p.low:+.5f} to {p.high:+.5f}" if p.n >= 2 and not is_base else "-",
                _figure(r.p_adjusted, lambda v: f"{v:.4f}"),
            )
        )
    setting = ablation.ladders.setting
    head: tuple[str, ...] = ("ladder", f"best {setting}", "where", "verdict", "pairs", "mean difference")
    head += ("95 % interval", "p (t, Holm)")
    title = f"Each ladder at its best {setting}, bpb {ablation.metric} (negative is better)"
    return [Table(title, head, rows)]


def _cost_words(ablation: Ablation) -> list[str]:
    """Say where the costs are from, what they are worth, and what the decisions mean."""
    costs = ablation.costs
    if costs is None:
        return []
    time = f"1 % of time counts {costs.rates.time:g} bpb" if costs.charges_time else "time is not charged: "
    time += "" if costs.charges_time else "runs of equal seconds have paid for it"
    size = f"1 % of bytes {costs.rates.bytes:g} bpb" if costs.charges_bytes else "bytes are not charged: "
    size += "" if costs.charges_bytes else "every file fills the limit"
    ms = costs.ms_from if costs.ms else "not known: no arm was timed, and the runs shared a GPU"
    base = f"{costs.ms[ablation.baseline]:.2f} ms of the baseline, " if costs.ms else ""
    return [
        f"Costs: {time}; {size}. Milliseconds: {base}{ms}. Bytes: {costs.bytes_from}.",
        "Decisions: adopt, better at equal steps and by more than it costs; drop, the interval of the net "
        f"difference leaves no gain of {DROP:g} bpb; park, neither; none, too few pairs or unknown costs.",
    ]


def _means(ablation: Ablation) -> Table:
    head = (
        "arm",
        "n",
        *(f"bpb {w}" for w in WEIGHTS),
        "bytes",
        "steps",
        "ms per step",
        "loop off",
        "loop on",
    )
    rows = []
    for arm in ablation.arms:
        cells = [_mean(arm_mean(ablation, arm, w), 5) for w in WEIGHTS]
        cells += [_mean(arm_mean(ablation, arm, v), 0) for v in ("bytes", "steps")]
        cells += [_mean(arm_mean(ablation, arm, v), 2) for v in ("ms", "ms_loop_off", "ms_loop_on")]
        rows.append((arm, str(len(ablation.of(arm))), *cells))
    return Table("Means over seeds, +- standard error", head, rows)


def _gaps(ablation: Ablation) -> list[Table]:
    """Return the table of where in the run pairs part; none without runs that are long enough."""
    gaps = training_gaps(ablation)
    if not gaps.means:
        return []
    rows = [
        (arm, str(gaps.pairs[arm]), *(f"{v:+.4f}" for v in gaps.means[arm]))
        for arm in ablation.arms
        if arm in gaps.means
    ]
    if gaps.scatter:
        rows.append(("scatter of pairs", f"{gaps.freedom} free", *(f"{v:.4f}" for v in gaps.scatter)))
    head = ("arm", "pairs", *(f"{100 * i // PARTS}-{100 * (i + 1) // PARTS} %" for i in range(PARTS)))
    title = f"Training loss less that of {ablation.baseline} by part of the run, nats per token"
    return [Table(title, head, rows)]


def _mean(m: Mean, digits: int) -> str:
    if not m.n:
        return "-"
    return f"{m.mean:,.{digits}f}" + (f" +- {m.se:,.{max(digits, 1)}f}" if m.n > 1 else "")


def _changes(ablation: Ablation) -> list[tuple[str, ...]]:
    sets = {"(all arms)": ablation.common, **ablation.arms}
    return [(arm, _settings(changes)) for arm, changes in sets.items()]


def _settings(changes: dict[str, object]) -> str:
    return ", ".join(f"{k} = {v}" for k, v in changes.items()) or "nothing"


def _trunks(ablation: Ablation) -> list[Table]:
    """Return the table of trunks, in a plan that has them."""
    if ablation.trunk is None:
        return []
    head = ("seed", "state", "steps", "last loss", "bpb raw", "message")
    rows = []
    for c in ablation.trunk.cells:
        figures = (f"{c.values[k]:,.{digits}f}" if k in c.values else "-" for k, digits in TRUNK_FIGURES)
        rows.append((str(c.seed), c.status, *figures, c.message))
    continued = ablation.trunk.until < 1
    what = "from whose snapshot the arms continue" if continued else "whose raw weights the arms start from"
    return [Table(f"Trunks, {what}", head, rows)]


def _figure(value: float, show: Callable[[float], str]) -> str:
    return "-" if value != value else show(value)
