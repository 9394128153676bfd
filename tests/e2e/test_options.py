"""The bench of the options of scoring on a real artifact, with rows that are kept."""

import re

import pytest

from bench.documents import Documents
from bench.options import main


def test_rows_of_several_calls_are_compared_with_one_base(run, shards, tmp_path, capsys, monkeypatch):
    call = [str(run / "model.pgolf"), "--data", str(shards), "--device", "cpu", "--documents", "3"]
    call += ["--keep", str(tmp_path / "kept")]
    rows = ["small=ttt adapters.rank=4 adapters.lr=0.01", "plain"]
    for row in rows:
        main([*call, "--shared", "--rows", row])
    alone = capsys.readouterr().out
    monkeypatch.setattr(Documents, "score", None)
    main([*call, "--base", "plain", "--rows", "plain", "small=ttt adapters.rank=4 adapters.lr=0.01"])
    both = capsys.readouterr().out
    bpb = {
        name: [float(x) for x in re.findall(rf"{name} +pgolf, shared GPU +bpb +(\S+)", alone + both)]
        for name in ("plain", "small")
    }
    assert len(bpb["plain"]) == len(bpb["small"]) == 2
    assert bpb["plain"][0] == bpb["plain"][1] != bpb["small"][0] == bpb["small"][1]
    (difference,) = re.findall(r"small +pgolf, shared GPU +difference +(\S+)", both)
    assert float(difference) == pytest.approx(bpb["small"][0] - bpb["plain"][0], abs=2e-4)
