"""Saved configurations keep the meaning that they had for the code that wrote them."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import save_file

from pgolf.ablate.plan import read_plan
from pgolf.artifact.header import (
    LATER,
    ArtifactError,
    Header,
    encode_header,
    parse_header,
    place_sections,
    plan_sections,
)
from pgolf.cli.main import main
from pgolf.cli.overrides import load_base
from pgolf.cli.quantize import parse as parse_quantize
from pgolf.config import Config, from_dict, to_dict
from pgolf.config_versions import CHANGES, REMOVED, RENAMED, VERSION, missing_note, present, writer_version
from pgolf.errors import UserError
from pgolf.presets import PRESETS
from pgolf.train.weights import load_weights

ROOT = Path(__file__).resolve().parents[1]
SAVED = sorted((ROOT / "bench" / "results").glob("*/config.json"))
FIRST = [
    "name",
    "model.vocab_size",
    "model.layers",
    "model.width",
    "model.heads",
    "model.kv_heads",
    "model.mlp_mult",
    "model.activation",
    "model.max_context",
    "model.rope_dims",
    "model.rope_base",
    "model.qk_gain",
    "model.xsa_layers",
    "model.head_gate",
    "model.gate_window",
    "model.sparse_gate_scale",
    "model.smear_gate",
    "model.ln_scale",
    "model.resid_mix",
    "model.skip",
    "model.parallel_from",
    "model.loop_start",
    "model.loop_end",
    "model.loops",
    "model.softcap",
    "model.embed_init_std",
    "data.dir",
    "data.batch_tokens",
    "data.micro_tokens",
    "data.shuffle",
    "data.prefetch",
    "optim.muon.lr",
    "optim.muon.weight_decay",
    "optim.muon.momentum",
    "optim.muon.momentum_start",
    "optim.muon.momentum_warmup",
    "optim.muon.nesterov",
    "optim.muon.row_normalize",
    "optim.muon.ns_steps",
    "optim.muon.coefficients",
    "optim.adam.embed_lr",
    "optim.adam.embed_weight_decay",
    "optim.adam.scalar_lr",
    "optim.adam.scalar_weight_decay",
    "optim.adam.beta1",
    "optim.adam.beta2",
    "optim.adam.eps",
    "optim.grad_clip",
    "optim.warmdown",
    "optim.min_lr",
    "optim.ema_horizon",
    "optim.loop_at",
    "train.seconds",
    "train.steps",
    "train.quantize_reserve",
    "train.seed",
    "train.device",
    "train.compile",
    "train.attention",
    "train.warmup_steps",
    "train.out",
    "quant.matrix_bits",
    "quant.embed_bits",
    "quant.mlp_clip",
    "quant.attn_clip",
    "quant.embed_clip",
    "quant.damp",
    "quant.block",
    "quant.calibration_batches",
    "artifact.limit",
    "artifact.fit",
]
"""Settings of version 0, which every saved configuration has."""


def leaves(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def without(data, dotted):
    data = copy.deepcopy(data)
    *sections, last = dotted.split(".")
    node = data
    for section in sections:
        node = node[section]
    del node[last]
    return data


def test_every_setting_is_in_the_table_or_of_the_first_version():
    """A new setting needs a `Change` with the value that corresponds to the behaviour before."""
    now = {key for key, _ in leaves(to_dict(Config()))} - {"version"}
    added = [key for change in CHANGES for key in change.added]
    assert len(added) == len(set(added))
    assert REMOVED.keys() | RENAMED.keys() <= {*FIRST, *added}
    assert now == {RENAMED.get(key, key) for key in {*FIRST, *added} - REMOVED.keys()}
    for change in CHANGES:
        assert {RENAMED.get(key, key) for key in change.defaults} <= now


def test_later_settings_of_the_model_are_those_that_format_4_does_not_know():
    """What they are in a file that does not name them is what they were before they existed."""
    format_4 = [change.commit for change in CHANGES].index("63c4ef4") + 1
    added = {key: value for change in CHANGES[format_4:] for key, value in change.added.items()}
    assert {f"model.{key}": value for key, value in LATER.items()} == {
        key: value for key, value in added.items() if key.startswith("model.")
    }


def test_what_is_saved_says_its_version_and_loads_as_it_was():
    for make in PRESETS.values():
        saved = json.loads(json.dumps(to_dict(make())))
        assert next(iter(saved.items())) == ("version", VERSION)
        assert from_dict(Config, saved) == make()
        assert missing_note(saved, to_dict(make()), "x") == ""


@pytest.mark.parametrize("path", SAVED, ids=lambda p: p.parent.name)
def test_committed_configurations_load_with_what_they_have(path):
    saved = json.loads(path.read_text())
    loaded = dict(leaves(to_dict(from_dict(Config, saved))))
    assert loaded.pop("version") == VERSION
    for key, value in leaves(saved):
        if key == "version":
            continue
        if key in REMOVED:
            assert key not in loaded and value == REMOVED[key]
        else:
            meant = "blocks" if value is True and key == "train.compile" else value
            assert loaded[RENAMED.get(key, key)] == meant, key


MEANT = {
    "20261122_record_120s_1gpu": {"quant.row_scales": "spread", "quant.trellis": False, "quant.rate": 0.0},
    "20261123_record_600s_1gpu_196k": {
        "quant.row_scales": "spread",
        "quant.column_scales": False,
        "quant.trellis": False,
        "quant.rate": 0.0,
        "quant.lqer": "off",
        "train.quantize": True,
        "evaluate.ttt": False,
    },
    "20261124_record_600s_1gpu_196k": {"optim.muon.algorithm": "auto", "quant.trellis": True},
}


@pytest.mark.parametrize("name", MEANT)
def test_what_old_files_lack_is_what_their_code_did(name):
    """Before, missing settings had today's defaults, which changed the meaning of older configurations."""
    saved = json.loads((ROOT / "bench" / "results" / name / "config.json").read_text())
    loaded = dict(leaves(to_dict(from_dict(Config, saved))))
    assert {key: loaded[key] for key in MEANT[name]} == MEANT[name]
    note = missing_note(saved, to_dict(from_dict(Config, saved)), "config.json")
    assert note.startswith("config.json lacks ") and "model.leaky_slope=0.5" in note
    version = writer_version(saved, "config.json")
    assert f"they have the defaults of version {version} (pr1855's), which wrote it: " in note
    by_hand = missing_note({"name": "x"}, to_dict(Config()), "config.json")
    assert f"they have the defaults of version {VERSION} (pr1855's), today's: " in by_hand


def test_a_key_taken_out_has_the_default_of_the_version_that_wrote_the_file():
    now = to_dict(Config())
    assert from_dict(Config, without(now, "quant.trellis")).quant.trellis is True
    # The same without a version field: the file has newer settings, so its writer knew the trellis.
    unversioned = {k: v for k, v in now.items() if k != "version"}
    assert from_dict(Config, without(unversioned, "quant.trellis")).quant.trellis is True
    # Before the change of a default: its writer's.
    older = {**now, "version": [change.commit for change in CHANGES].index("feb67c9")}
    assert from_dict(Config, without(older, "quant.rate")).quant.rate == 0.0
    assert from_dict(Config, without(now, "quant.rate")).quant.rate == 1 / 12
    older = {**now, "version": 7}
    assert from_dict(Config, without(older, "quant.trellis")).quant.trellis is False
    assert from_dict(Config, {**older, "evaluate": {}}) == from_dict(Config, older)


@pytest.mark.parametrize("version", [VERSION - 1, VERSION, 5, None])
def test_a_setting_that_is_gone_is_read_where_it_asked_for_what_is_done_now(version):
    now = {k: v for k, v in to_dict(Config()).items() if k != "version"}
    file = now if version is None else {"version": version, **now}
    before = {**now["quant"], "act_order": True, "block": 128, "embed_gram": 1.0, "matrix_gram": 0}
    assert from_dict(Config, {**file, "quant": before}).quant == from_dict(Config, file).quant
    with pytest.raises(
        UserError, match=r"old\.json: the setting quant\.act_order does not exist .* value False .*'?True"
    ):
        from_dict(Config, {**file, "quant": {**before, "act_order": False}}, where="old.json")
    assert from_dict(Config, {"quant": {"block": 128}}) == Config()
    with pytest.raises(UserError, match=r"quant\.block does not exist any more"):
        from_dict(Config, {"quant": {"block": 64}})


SHAPE = {"layers": 6, "parallel_from": 5, "xsa_layers": 6}
OLD = {
    "model": {**SHAPE, "loop_start": 1, "loop_end": 2, "loops": 3},
    "optim": {"loop_at": 0.5},
    "quant": {"row_steps": "spread", "column_steps": False},
}
"""Settings under the names that they had until version 16."""
NEW = {
    "model": {**SHAPE, "recurrence_start": 1, "recurrence_end": 2, "recurrence_repeats": 3},
    "optim": {"recurrence_at": 0.5},
    "quant": {"row_scales": "spread", "column_scales": False},
}


def old_file(**changes):
    """Return a complete configuration as version 16 saved it."""
    old_names = {new.split(".")[-1]: old.split(".")[-1] for old, new in RENAMED.items()}
    data = to_dict(from_dict(Config, NEW))
    for section in ("model", "optim", "quant"):
        data[section] = {old_names.get(key, key): value for key, value in data[section].items()}
    data["quant"] |= {"act_order": True, "block": 128, "embed_gram": 1.0, "matrix_gram": 0.0}
    return {**data, "version": 16, **changes}


def test_settings_under_old_names_are_read():
    assert {key for section in OLD for key in OLD[section]} >= {key.split(".")[1] for key in RENAMED}
    assert from_dict(Config, OLD) == from_dict(Config, NEW)
    saved = old_file()
    assert set(dict(leaves(saved))) >= {*RENAMED, *REMOVED}
    assert from_dict(Config, saved) == from_dict(Config, NEW)
    unversioned = {key: value for key, value in saved.items() if key != "version"}
    assert from_dict(Config, unversioned) == from_dict(Config, NEW)
    assert missing_note(saved, to_dict(from_dict(Config, saved)), "x") == ""
    # One that its writer left out means what it meant to the writer, under the new name.
    older = without({**saved, "version": 1}, "quant.row_steps")
    assert from_dict(Config, older).quant.row_scales == "spread"
    with pytest.raises(UserError, match=r"x: optim\.loop_at is the old name of optim\.recurrence_at, which"):
        from_dict(Config, {"optim": {"loop_at": 0.5, "recurrence_at": 0.4}}, where="x")


def test_a_checkpoint_with_old_names_is_read(tmp_path):
    path = tmp_path / "ema.safetensors"
    save_file({}, path, {"config": json.dumps(old_file())})
    _, config, facts = load_weights(path)
    assert config == from_dict(Config, NEW) and "note" not in facts


def test_a_plan_with_old_names_is_read(tmp_path):
    def plan(overrides, arms):
        words = {"name": "x", "base": "tiny", "data": "d", "steps": 5, "baseline": "a", "seeds": [1]}
        path = tmp_path / "plan.json"
        path.write_text(json.dumps({**words, "overrides": overrides, "arms": arms}))
        return read_plan(path, load_base)

    old = plan({"model.loops": 0, "quant.block": 128}, {"a": {}, "b": {"optim.loop_at": 0.5}})
    new = plan({"model.recurrence_repeats": 0}, {"a": {}, "b": {"optim.recurrence_at": 0.5}})
    assert old.arms == new.arms and old.arms["b"].optim.recurrence_at == 0.5
    assert old.arms["a"].model.recurrence_repeats == 0
    with pytest.raises(UserError, match=r"overrides: the setting quant\.block does not exist any more"):
        plan({"quant.block": 64}, {"a": {}, "b": {"train.steps": 6}})
    with pytest.raises(UserError, match=r"model\.loops is the old name of model\.recurrence_repeats"):
        present({"model.loops": 0, "model.recurrence_repeats": 0}, "x")


def test_old_names_on_a_command_line_work_with_a_notice(capsys, tmp_path):
    words = ["--model.loop-start=1", "--model.loop_end", "1", "--optim.loop-at", "0.5", "--seed", "3"]
    assert main(["config", "tiny", *words, "--quant.no-column-steps", "--quant.row-steps=spread"]) == 0
    said = capsys.readouterr()
    shown = json.loads(said.out[: said.out.index("\n}\n") + 3])
    assert shown["model"]["recurrence_start"] == shown["model"]["recurrence_end"] == 1
    assert shown["optim"]["recurrence_at"] == 0.5 and shown["train"]["seed"] == 3
    assert shown["quant"]["column_scales"] is False and shown["quant"]["row_scales"] == "spread"
    for old, new in (
        ("--model.loop-start", "--model.recurrence-start"),
        ("--model.loop_end", "--model.recurrence-end"),
        ("--quant.no-column-steps", "--quant.no-column-scales"),
    ):
        notice = f"note: the setting {old} is now called {new}; the old name works until version 0.3"
        assert said.err.count(notice) == 1
    assert main(["config", "tiny", "--quant.block", "64"]) == 2
    assert "--quant.block does not exist any more" in capsys.readouterr().err
    path = tmp_path / "ema.safetensors"
    save_file({}, path, {"config": json.dumps(to_dict(Config()))})
    asked = parse_quantize([str(path), "--data", "d", "--quant.row-steps=spread", "--quant.no-column-steps"])
    assert asked.quant.row_scales == "spread" and not asked.quant.column_scales and str(asked.data) == "d"


def test_an_artifact_keeps_the_names_of_its_format():
    plans = plan_sections(())
    sections = place_sections(plans, [b""] * len(plans))
    header = Header(from_dict(Config, NEW).model, "0" * 64, "0" * 16, 10**6, (), (), sections)
    fields = json.loads(encode_header(header))
    assert {"loop_start", "loop_end", "loops"} < fields["model"].keys()
    assert parse_header(json.dumps(fields).encode()) == header
    assert not LATER.keys() & fields["model"].keys()
    later = replace(header.model, leaky_slope=0.3)
    named = json.loads(encode_header(replace(header, model=later)))
    assert named["model"]["leaky_slope"] == 0.3
    assert parse_header(json.dumps(named).encode()).model == later
    named["model"]["leaky_slope"] = 0.5
    with pytest.raises(ArtifactError, match=r"the model names leaky_slope, which is 0\.5 anyway"):
        parse_header(json.dumps(named).encode())
    fields["model"]["recurrence_start"] = 1
    with pytest.raises(ArtifactError, match="the model has the key recurrence_start, which format 4 has not"):
        parse_header(json.dumps(fields).encode())


def test_one_that_was_written_by_hand_has_todays_defaults():
    assert from_dict(Config, {"quant": {"matrix_bits": 6}}).quant == Config().quant.__class__(matrix_bits=6)
    assert writer_version({"model": {"width": 64}}, "x") is None


@pytest.mark.parametrize("version", [-1, "3", 1.0, True, None])
def test_a_version_that_is_none_is_refused(version):
    with pytest.raises(ValueError, match="x: version must be a whole number from 0"):
        from_dict(Config, {"version": version}, where="x")


def test_a_newer_file_asks_for_a_newer_pgolf():
    with pytest.raises(ValueError, match=r"x was written by a newer pgolf .*this one knows \d+\); update"):
        from_dict(Config, {"version": VERSION + 1}, where="x")


def test_what_was_missing_is_said_by_the_command_line_and_of_checkpoints(tmp_path, capsys):
    saved = {k: v for k, v in to_dict(PRESETS["tiny"]()).items() if k != "version"}
    old = tmp_path / "config.json"
    old.write_text(json.dumps(without(saved, "optim.muon.algorithm")))
    assert main(["config", str(old)]) == 0
    said = capsys.readouterr()
    assert f"note: {old} lacks 1 of the settings" in said.err and "optim.muon.algorithm=auto" in said.err
    json.loads(said.out[: said.out.index("\n}\n") + 3])
    assert main(["config", "tiny"]) == 0
    assert "note:" not in capsys.readouterr().err
    path = tmp_path / "raw.safetensors"
    save_file({}, path, {"config": old.read_text(), "steps": "3"})
    facts = load_weights(path)[2]
    assert facts["steps"] == 3 and "optim.muon.algorithm=auto" in facts["note"]
