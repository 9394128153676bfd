"""The report of an ablation: verdicts, tables, and a page that needs nothing else."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

from pgolf.ablate.compare import compare_arms
from pgolf.ablate.page import html_page, write_report
from pgolf.ablate.results import Ablation, CellResult, TrunkResult
from pgolf.ablate.tables import markdown

NOISE = (0.0, 0.0004, -0.0003, 0.0006, -0.0005, 0.0002)


def make_ablation(folder: Path, **changes) -> Ablation:
    """Six seeds: `good` is 0.01 better with a spread, `same` differs by noise, `twin` not at all."""
    shifts = {"base": 0.0, "good": -0.01, "same": 0.0, "twin": 0.0}
    cells = []
    for arm, shift in shifts.items():
        for seed, noise in enumerate(NOISE):
            own = 0.0 if arm in ("base", "twin") else noise * (1 if arm == "good" else -1)
            bpb = 1.1 + 0.01 * seed + shift + own
            values = {"raw": bpb, "ema": bpb, "quantized": bpb, "bytes": 1e7, "steps": 9.0, "ms": 12.5}
            metrics = folder / f"{arm}{seed}.jsonl"
            rows = [{"step": i, "elapsed": i / 10, "loss": 5 - i / 10} for i in range(9)]
            metrics.write_text("\n".join(json.dumps(row) for row in rows))
            cells.append(CellResult(arm, seed, "finished", values, metrics, "", "abc", "CPU"))
    facts = {"name": "t<&>", "comment": "", "base": "tiny", "length": "9 steps", "plan_file": "plan.json"}
    facts |= {"metric": "quantized", "effect": 0.0005, "baseline": "base", "seeds": tuple(range(6))}
    arms = {"base": {}, "good": {"optim.muon.lr": 0.1}, "same": {"a.b": "x|y"}, "twin": {}}
    return Ablation(**{**facts, "arms": arms, "cells": tuple(cells), **changes})


def with_status(ablation: Ablation, arm: str, seeds: set[int], status: str) -> tuple[CellResult, ...]:
    return tuple(
        CellResult(c.arm, c.seed, status, message="why") if c.arm == arm and c.seed in seeds else c
        for c in ablation.cells
    )


def test_verdicts_separate_a_change_from_noise_and_from_nothing(tmp_path):
    good, same, twin = compare_arms(make_ablation(tmp_path))
    assert (good.verdict, same.verdict, twin.verdict) == ("better", "not separable", "not separable")
    assert good.pairs.p_flip == 2 / 64 and abs(good.pairs.mean + 0.01) < 1e-4
    assert good.p_adjusted == 3 * good.pairs.p_t  # Holm over three arms
    assert "same score" in twin.note and twin.p_adjusted == 1.0


def test_a_diverged_seed_leaves_the_pair_out_and_forbids_better(tmp_path):
    whole = make_ablation(tmp_path)
    good = compare_arms(make_ablation(tmp_path, cells=with_status(whole, "good", {4}, "diverged")))[0]
    assert good.seeds == (0, 1, 2, 3, 5) and good.p_adjusted < 0.01
    assert good.verdict == "not separable" and "diverged at seeds [4]" in good.note


def test_two_pairs_claim_nothing_however_large(tmp_path):
    whole = make_ablation(tmp_path)
    some = make_ablation(tmp_path, cells=with_status(whole, "good", {0, 1, 2, 3}, "missing"))
    good = compare_arms(some)[0]
    assert good.pairs.n == 2 and good.verdict == "not separable" and good.needed is None
    text = markdown(some)
    assert "INTERIM: 20 of 24 cells" in text and "2 pairs are no evidence" in text
    assert "| good | 0 | missing | why |" in text


def test_no_results_at_all_still_make_a_report(tmp_path):
    whole = make_ablation(tmp_path)
    cells = tuple(CellResult(c.arm, c.seed, "missing") for c in whole.cells)
    assert "INTERIM: 0 of 24" in html_page(make_ablation(tmp_path, cells=cells))


def test_markdown_tables_have_equal_columns_and_escape_bars(tmp_path):
    text = markdown(make_ablation(tmp_path, warnings=("careful",)))
    assert "x\\|y" in text and "WARNING: careful" in text
    for block in text.split("\n## ")[1:]:
        rows = [line.replace("\\|", "") for line in block.splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1


def test_gaps_show_where_in_the_run_pairs_part(tmp_path):
    whole = make_ablation(tmp_path)
    for c in whole.cells:
        late = {"base": 0.0, "twin": 0.0, "same": 0.0, "good": 0.5 + 0.1 * c.seed}[c.arm]
        rows = [{"step": i, "elapsed": i, "loss": 5 + (late if i >= 18 else 0.0)} for i in range(20)]
        c.metrics.write_text("\n".join(json.dumps(row) for row in rows))
    part = markdown(whole).split("## Training loss less that of base")[1].split("\n## ")[0]
    rows = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in part.splitlines()[2:]}
    assert rows["good"][1:] == ["6", *["+0.0000"] * 9, "+0.7500"]
    # 0.1 x seeds 0 to 5 about their mean: squares sum to 0.175; three arms of six pairs leave 15.
    assert rows["scatter of pairs"][1:] == ["15 free", *["0.0000"] * 9, f"{(0.175 / 15) ** 0.5:.4f}"]


def test_what_the_arms_start_from_is_said_and_is_no_arm(tmp_path):
    common = {"train.init": "runs/one/raw.safetensors"}
    one = markdown(make_ablation(tmp_path, common=common))
    assert "Every run starts from the weights of runs/one/raw.safetensors: seeds change the order" in one
    values = {"raw": 1.5, "ema": 1.4, "steps": 3000.0, "last_loss": 3.25}
    cells = (CellResult("trunk", 0, "finished", values, None, "", "old", "GPU"),)
    cells += (CellResult("trunk", 1, "crashed", message="no space"),)
    text = markdown(make_ablation(tmp_path, trunk=TrunkResult(3000, {"optim.warmdown": 0.0}, cells)))
    assert "a trunk of 3,000 steps of base with optim.warmdown = 0.0" in text
    assert "Last loss of the trunks, nats per token: seed 0 3.2500." in text
    assert "| 0 | finished | 3,000 | 3.2500 | 1.50000 |  |" in text
    assert "| 1 | crashed | - | - | - | no space |" in text
    assert "Code: abc, old. Device: CPU, GPU." in text  # trunks are part of what the cells are made of
    verdicts = text.split("## Verdicts")[1].split("## Trunks")[0]
    assert verdicts == markdown(make_ablation(tmp_path)).split("## Verdicts")[1] + "\n"


def test_page_is_well_formed_and_needs_nothing_else(tmp_path):
    _, path = write_report(make_ablation(tmp_path), tmp_path / "out")
    page = path.read_text()
    root = ET.fromstring(page)
    sources = [e.get("src") for e in root.iter() if e.get("src") is not None]
    assert len(sources) == 5 and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert not re.search(r"<(script|link|iframe)|@import|url\(|href=", page)
    assert "t&lt;&amp;&gt;" in page
    assert sorted(p.name for p in path.parent.iterdir()) == ["report.html", "report.md"]


def test_results_on_data_without_a_manifest_are_said_to_be_so(tmp_path):
    whole = make_ablation(tmp_path)
    assert "manifest" not in markdown(whole)
    cells = [replace(c, manifest=None if c.arm == "good" else "ab" * 32) for c in whole.cells]
    page = markdown(make_ablation(tmp_path, cells=tuple(cells)))
    assert (
        "WARNING: 6 of 24 runs rested on data without a manifest: the data folder has no manifest.json"
        in page
    )
    assert "different manifests" not in page
    cells[0] = replace(cells[0], manifest="cd" * 32)
    page = html_page(make_ablation(tmp_path, cells=tuple(cells)))
    assert '<li class="warn">WARNING: cells rested on data of different manifests.' in page
