"""The check of submission folders: a good one, and one that breaks each rule."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pgolf.cli.main import main
from pgolf.report.check import LEAKY_SHARDS, check_folder, welch

SCORES = {"42": 1.06012, "0": 1.06104, "1234": 1.06201}


def log(
    score: float,
    *,
    total: int = 15_900_000,
    shards: int = 80,
    tokens: int = 40_540_160,
    train: float = 599.4,
    scored: float = 480.2,
) -> str:
    return (
        f"train_shards: {shards}\nval_tokens: {tokens}\n0/20000 val_loss: 9.0090 val_bpb: 4.1166\n"
        f"stopping_early: wallclock_cap train_time: {1000 * train:.0f}ms step: 4950/20000\n"
        f"Code size (uncompressed): 150000 bytes\nCode size (compressed): 32000 bytes\n"
        f"Total submission size quantized+brotli: {total} bytes\n"
        f"quantized_ttt_phased val_loss:2.33 val_bpb:{score + 3e-9:.8f} eval_time:480200ms\n"
        f"total_eval_time:{scored}s\n"
    )


def folder(path: Path, scores: dict[str, float] = SCORES, code: int = 32_000, **claims) -> Path:
    """Make a good folder, with `claims` in place of what submission.json says."""
    path.mkdir(parents=True)
    (path / "train_gpt.py").write_text("#" * code)
    for seed, score in scores.items():
        (path / f"train_seed{seed}.log").write_text(log(score))
    size = {"artifact_bytes": 15_900_000}
    results = {s: {"val_bpb": v, "val_loss": 2.19 * v, **size} for s, v in scores.items()}
    mean = sum(scores.values()) / len(scores)
    data = {"name": "a submission", "date": "2026-04-30", "val_bpb": mean, "seed_results": results} | claims
    (path / "submission.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return path


def found(path: Path, against: Path | None = None) -> dict[str, tuple[str, str]]:
    return {finding.rule: (finding.verdict, finding.text) for finding in check_folder(path, against)}


def test_a_good_folder_has_nothing_that_fails(tmp_path):
    results = found(folder(tmp_path / "good"))
    assert {rule for rule, (verdict, _) in results.items() if verdict == "fails"} == set()
    assert {rule for rule, (verdict, _) in results.items() if verdict == "unknown"} == {"overlap"}
    assert "the whole text with sp8192" in results["text"][1]
    assert results["bytes"] == ("ok", "15,900,000 of 16,000,000 bytes at most")


BROKEN = [
    ("files", lambda p: (p / "train_gpt.py").unlink(), "train_gpt.py is missing"),
    ("logs", lambda p: (p / "train_seed0.log").unlink(), "2 logs with scores for 3 seeds"),
    ("seed 42", lambda p: (p / "train_seed42.log").write_text(log(1.07)), "no log has it"),
    ("training", lambda p: (p / "train_seed0.log").write_text(log(1.06104, train=600.5)), "600.5 s at most"),
    ("scoring", lambda p: (p / "train_seed0.log").write_text(log(1.06104, scored=612)), "612.0 s at most"),
    ("overlap", lambda p: (p / "train_seed0.log").write_text(log(1.06104, shards=LEAKY_SHARDS)), "40,000 of"),
    ("bytes", lambda p: (p / "train_seed0.log").write_text(log(1.06104, total=16_024_128)), "16,024,128"),
    ("text", lambda p: (p / "train_seed0.log").write_text(log(1.06104, tokens=8_000_000)), "different"),
]


@pytest.mark.parametrize(("rule", "harm", "told"), BROKEN, ids=[rule for rule, _, _ in BROKEN])
def test_each_rule_that_is_broken_is_named(tmp_path, rule, harm, told):
    path = folder(tmp_path / "bad")
    harm(path)
    verdict, text = found(path)[rule]
    assert verdict == "fails" and told in text


CLAIMED = [
    ("val_bpb", {"val_bpb": None}, "fails", "lacks val_bpb or mean_val_bpb"),
    ("val_bpb", {"val_bpb": "1.06"}, "fails", "lacks"),
    ("name", {"name": "", "run_name": None}, "fails", "lacks name or run_name"),
    ("date", {"date": None}, "fails", "lacks date"),
    ("mean", {"val_bpb": 1.0599}, "fails", "the headline 1.0599"),
    ("mean", {"val_bpb_std": 0.0001}, "fails", "submission.json says 0.0001"),
    ("mean", {"val_bpb_std": 0.00094}, "ok", "standard deviation 0.00095"),
    ("seeds", {"seed_results": {"42": {"val_bpb": 1.06012}}}, "fails", "1 seeds"),
    ("seeds", {"seed_results": None}, "unknown", "none is named"),
]


@pytest.mark.parametrize(("rule", "claims", "verdict", "told"), CLAIMED)
def test_what_the_json_says_is_compared(tmp_path, rule, claims, verdict, told):
    result = found(folder(tmp_path / "claims", **claims))[rule]
    assert result[0] == verdict and told in result[1], result


def test_code_that_was_counted_in_another_form_is_pointed_out(tmp_path):
    verdict, text = found(folder(tmp_path / "plain", code=150_000))["bytes"]
    assert verdict == "unknown" and "16,018,000 unless the packed form is what is run" in text
    results = found(folder(tmp_path / "small", code=32_002))
    assert results["bytes"][0] == "ok", "a line's end more is no other form"


def test_an_improvement_needs_its_size_and_its_certainty(tmp_path):
    before = folder(tmp_path / "before", {s: v + 0.004 for s, v in SCORES.items()})
    assert found(folder(tmp_path / "better"), before)["improves"][0] == "ok"
    little = folder(tmp_path / "little", {s: v + 0.003 for s, v in SCORES.items()})
    verdict, text = found(little, before)["improves"]
    assert verdict == "fails" and "on before by +0.00219 nats per token" in text
    assert "3 seeds in common" in text
    noisy = folder(tmp_path / "noisy", {"1": 1.02, "2": 1.05, "3": 1.09})
    assert found(noisy, before)["improves"][0] == "fails"
    one = folder(tmp_path / "one", {"42": 1.05})
    assert found(one, before)["improves"][0] == "unknown"


def test_welch_follows_its_formula():
    a, b = [27.5, 21.0, 19.0, 23.6, 17.0, 17.9], [27.1, 22.0, 20.8, 23.4, 23.4, 23.5, 25.8]
    t, df = welch(a, b)
    va, vb = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    assert t == pytest.approx(abs(np.mean(a) - np.mean(b)) / math.sqrt(va + vb))
    assert df == pytest.approx((va + vb) ** 2 / (va**2 / 5 + vb**2 / 6))
    assert welch([1.0, 1.0], [2.0, 2.0]) == (math.inf, 2.0) and welch([1.0, 1.0], [1.0, 1.0])[0] == 0


def test_the_command_prints_every_rule_and_fails_with_one(tmp_path, capsys):
    path = folder(tmp_path / "good")
    assert main(["submit", "--check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "0 fail, 1 unknown" in out and "seed 1234" in out
    (path / "train_gpt.py").unlink()
    assert main(["submit", "--check", str(path), "--against", str(folder(tmp_path / "before"))]) == 1
    assert "train_gpt.py is missing" in capsys.readouterr().out


def test_what_is_no_submission_is_said(tmp_path, capsys):
    assert main(["submit", "--check", str(tmp_path / "nothing")]) == 2
    assert "no folder" in capsys.readouterr().err
    assert main(["submit", f"--check={tmp_path}"]) == 2
    assert "holds no submission.json" in capsys.readouterr().err
    wrong = {"{": "is not JSON", "[1]": "must hold a JSON object, got list", "[" * 100_000: "JSON"}
    for text, told in wrong.items():
        (tmp_path / "submission.json").write_text(text)
        assert main(["submit", "--check", str(tmp_path)]) == 2
        assert told in capsys.readouterr().err
