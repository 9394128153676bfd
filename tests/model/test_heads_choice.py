"""Which branch a model's heads get: by attention and sizes, and by a trial."""

import sys
from dataclasses import replace

import pytest
import torch

from pgolf.model import heads
from pgolf.model.attention import attention_branch, find_fa4, sdpa_attention
from pgolf.model.heads import doc_branch, heads_branch
from tests.model.test_gpt import small
from tests.model.test_heads import (
    BRANCHES,
    FORMS,
    GATES,
    fa4,  # noqa: F401
)

CPU = torch.device("cpu")


def test_other_attention_and_sizes_that_the_kernels_do_not_take_have_the_composed_operators(monkeypatch):
    monkeypatch.setattr(heads, "has_kernels", lambda *_, **__: True)
    monkeypatch.setattr(heads, "_problem", lambda *_: "")
    config = replace(small(), width=512, heads=8, kv_heads=4, rope_dims=16)

    def select(name, kernel, config):
        chosen = heads.select_branch(name, kernel, sdpa_attention, config, CPU)
        assert chosen.name == ("composed" if chosen.branch is attention_branch else name)
        return chosen.branch

    for kernel, branch in heads.PLAIN.items():
        assert select("plain", kernel, config) is branch
        assert select("auto", kernel, config) is heads.WITH_PRODUCT[kernel]
        odd, wide = {"width": 256, "heads": 4, "kv_heads": 1}, {"width": 1024, "heads": 16}
        for sizes in ({"rope_dims": 8}, odd, wide):
            assert select("auto", kernel, replace(config, **sizes)) is branch
        assert select("composed", kernel, config) is attention_branch
        for name in ("auto", "plain"):
            for sizes in ({"heads": 16}, {"kv_heads": 1}):
                assert select(name, kernel, replace(config, **sizes)) is attention_branch
    for kernel in ("varlen", "sdpa"):
        for name in ("auto", "plain"):
            assert select(name, kernel, config) is attention_branch
    assert select("auto", "fa4", replace(config, width=1024)) is heads_branch  # heads of 128 columns
    for missing in ("qk_norm_rope", "head_mix", "qkv_rope"):
        monkeypatch.setattr(heads, "has_kernels", lambda op, *_, absent=missing, **__: op != absent)
        for kernel, branch in heads.PLAIN.items():
            wanted = branch if missing == "qkv_rope" else attention_branch
            assert select("auto", kernel, config) is wanted


@pytest.mark.usefixtures("fa4")
@FORMS
@pytest.mark.parametrize("gate", GATES)
def test_a_trial_accepts_operators_that_are_right(gate, form):
    heads._problem.cache_clear()
    assert heads._problem(BRANCHES[form], find_fa4().found, small(head_gate=gate), CPU) == ""


@pytest.mark.usefixtures("fa4")
def test_a_trial_refuses_operators_that_are_wrong_or_fail(monkeypatch):
    config, kernel = small(), find_fa4().found
    monkeypatch.setattr(heads, "_values", lambda qkv, k: qkv[:, : k.shape[1] * k.shape[2]].view(k.shape))
    heads._problem.cache_clear()
    with pytest.warns(UserWarning, match="the output of pgolf's operators differs by .* of the norm"):
        assert heads.select_branch("auto", "fa4", kernel, config, CPU).branch is attention_branch
    monkeypatch.setattr(heads, "_values", lambda qkv, k: qkv.nonsense)
    heads._problem.cache_clear()
    with pytest.warns(UserWarning, match="a trial of pgolf's operators raised AttributeError"):
        assert heads.select_branch("auto", "fa4", kernel, config, CPU).branch is attention_branch
    heads._problem.cache_clear()


@pytest.mark.usefixtures("fa4")
def test_where_a_trial_refuses_the_product_alone_the_plain_node_computes(monkeypatch):
    def fail(*_, **__):
        raise ValueError("no product")

    monkeypatch.setattr(heads, "_takes_product", lambda _: True)
    monkeypatch.setattr(heads, "WITH_PRODUCT", {"doc": fail})
    arguments = "doc", sdpa_attention, small(), CPU
    heads._problem.cache_clear()
    with pytest.warns(UserWarning) as warned:
        chosen = heads.select_branch("auto", *arguments)
    why = "a trial of pgolf's operators raised ValueError: no product"
    assert chosen == ("plain", doc_branch, f"torch computes the product of q, k and v, because {why}")
    assert [str(w.message) for w in warned] == [chosen.note]
    assert heads.select_branch("plain", *arguments) == ("plain", doc_branch, "")
    monkeypatch.setattr(heads, "PLAIN", {"doc": fail})
    heads._problem.cache_clear()
    with pytest.warns(UserWarning) as warned:
        chosen = heads.select_branch("auto", *arguments)
    assert chosen[:2] == ("composed", attention_branch)
    assert chosen.note.startswith("torch computes what is next to attention, because a trial")
    assert [str(w.message) for w in warned] == [chosen.note]
    heads._problem.cache_clear()


@pytest.mark.usefixtures("fa4")
def test_a_trial_tries_the_attention_that_was_chosen(monkeypatch):
    def fail(**_):
        raise ValueError("no flash-attn-4")

    monkeypatch.setattr(sys.modules["pgolf.model.fa4"], "_flash_attn_fwd", fail)
    heads._problem.cache_clear()
    arguments = sdpa_attention, small(), CPU
    assert heads.select_branch("auto", "doc", *arguments) == ("auto", doc_branch, "")
    with pytest.warns(UserWarning, match="a trial of pgolf's operators raised ValueError: no flash-attn-4"):
        name, branch, note = heads.select_branch("auto", "fa4", *arguments)
    assert (name, branch) == ("composed", attention_branch)
    assert note.endswith("a trial of pgolf's operators raised ValueError: no flash-attn-4")
    heads._problem.cache_clear()
