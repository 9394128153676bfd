"""Which attention kernel is chosen, and pgolf's own one as a kernel of the model."""

import warnings

import pytest
import torch

from pgolf.artifact.code import EVALUATE, EVALUATE_GENERAL, TRAIN, reader_code
from pgolf.model import _no_own_attention, attention, own_attention
from pgolf.model.attention import sdpa_attention, select_attention, varlen_attention
from pgolf.model.own_attention import doc_kernel
from tests.conftest import requires_hopper
from tests.model.test_fa4 import gradients, tensors

CUDA = torch.device("cuda")


def fa4_kernel(*_):
    """Stand for flash-attn-4, which is only named."""


class Facts:
    """What the choice asks about a machine: a Hopper GPU with everything that passes its trial."""

    def __init__(self):
        self.capability, self.built, self.trial, self.fa4 = (9, 0), True, "", ""
        self.looked_for_fa4 = 0

    def fa4_problem(self, *_):
        self.looked_for_fa4 += 1
        return self.fa4


@pytest.fixture
def facts(monkeypatch):
    found = Facts()
    peer = attention.Peer("flash-attn-4", "4", fa4_kernel, "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: found.capability)
    monkeypatch.setattr(own_attention, "has_kernels", lambda *_: found.built)
    monkeypatch.setattr(attention, "_trial", lambda *_: found.trial)
    monkeypatch.setattr(attention, "fa4_problem", found.fa4_problem)
    monkeypatch.setattr(attention, "find_fa4", lambda: peer)
    return found


def chosen(name="auto", heads=8, kv_heads=4, head_dim=64):
    """The name and the note of a choice that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = select_attention(name, CUDA, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    kernels = {"doc": doc_kernel, "fa4": fa4_kernel, "varlen": varlen_attention, "sdpa": sdpa_attention}
    assert found.kernel is kernels[found.name] and found.note == ""
    return found.name


def test_auto_takes_pgolfs_own_attention_first_and_does_not_look_for_another_one(facts):
    for heads, kv_heads in ((8, 8), (8, 4), (8, 2), (1, 1)):
        assert chosen(heads=heads, kv_heads=kv_heads) == "doc"
    assert chosen("doc") == "doc"
    assert facts.looked_for_fa4 == 0


def test_what_its_kernels_do_not_take_goes_to_the_next_kernel_without_a_word(facts):
    others = ({"head_dim": 128}, {"head_dim": 32}, {"kv_heads": 1}, {"heads": 12, "kv_heads": 4})
    assert [chosen(**sizes) for sizes in others] == ["fa4"] * 4
    facts.fa4 = "not installed"
    assert [chosen(**sizes) for sizes in others] == ["varlen"] * 4
    assert chosen() == "doc"
    facts.built = False
    assert chosen() == "varlen"
    facts.fa4 = ""
    assert chosen() == "fa4"
    for capability, best in (((10, 0), "varlen"), ((8, 0), "varlen"), ((7, 5), "sdpa")):
        facts.built, facts.capability = True, capability
        assert chosen() == best


def test_other_kernels_are_there_by_name(facts):
    for name in ("fa4", "varlen", "sdpa"):
        assert chosen(name) == name


@pytest.mark.parametrize(
    ("fa4", "best", "also"),
    [("", "fa4", ""), ("not installed", "varlen", ""), ("old", "varlen", " and flash-attn-4 is old")],
)
def test_a_trial_that_fails_gives_a_warning_and_the_next_kernel(facts, monkeypatch, fa4, best, also):
    facts.trial, facts.fa4 = "not usable: its dq is wrong", fa4
    sentence = f"attention is {best}, because pgolf's own is not usable: its dq is wrong{also}"
    with pytest.warns(UserWarning) as caught:
        found = select_attention("auto", CUDA)
    assert [str(w.message) for w in caught] == [sentence]
    assert (found.name, found.note) == (best, sentence)
    # Another rank says nothing.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_attention("auto", CUDA).note == sentence


def test_where_it_cannot_run_it_is_refused_by_name_and_the_error_says_what_it_needs(facts):
    def refused(here, **sizes):
        needs = (
            "train.attention=doc needs a Hopper GPU, a pgolf built with nvcc, heads of 64 columns, and "
            r"1, 2 or 4 of them per kv head \(here: "
        )
        with pytest.raises(RuntimeError, match=needs + here + r".*\); use train.attention=auto"):
            select_attention("doc", CUDA, **sizes)

    refused("4 heads of 128 columns and 2 kv heads", heads=4, kv_heads=2, head_dim=128)
    refused("8 heads of 64 columns and 1 kv heads", kv_heads=1)
    facts.trial = "not usable: its dk is wrong"
    refused("not usable: its dk is wrong")
    facts.built = False
    refused("pgolf has no CUDA kernels; build it with nvcc")
    facts.capability = (8, 0)
    refused("no Hopper GPU")
    assert facts.looked_for_fa4 == 0


def test_a_device_and_sizes_are_tried_once(facts, monkeypatch):
    tried = []
    monkeypatch.setattr(attention, "_trial", lambda kernel, *of: tried.append((kernel, *of)) or "")
    for kv_heads in (4, 4, 2, 4):
        assert chosen(kv_heads=kv_heads) == "doc"
    assert tried == [(doc_kernel, CUDA, 8, 4, 64), (doc_kernel, CUDA, 8, 2, 64)]


def test_as_a_kernel_it_computes_causal_attention_within_segments():
    for got, want in zip(gradients(doc_kernel), gradients(sdpa_attention), strict=True):
        torch.testing.assert_close(got, want)


def test_a_program_without_the_extension_takes_another_kernel(facts, monkeypatch):
    for program in (EVALUATE, EVALUATE_GENERAL, TRAIN):
        code = reader_code(program)
        assert "doc_kernel" not in code["pgolf/model/own_attention.py"]
        assert "pgolf/ops/doc_attention.py" not in code
    monkeypatch.setattr(attention, "choose_own", _no_own_attention.choose_own)
    assert [chosen("doc"), chosen("auto"), chosen("varlen")] == ["fa4", "fa4", "varlen"]
    facts.fa4 = "not installed"
    assert [chosen("doc"), chosen("auto")] == ["varlen", "varlen"]
    assert select_attention("doc", torch.device("cpu"))[::2] == ("sdpa", "")


@requires_hopper
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 4), (8, 2)])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_gpu_it_is_the_default_and_no_less_exact_than_torchs_varlen(heads, kv_heads, compiled):
    found = select_attention("auto", CUDA, heads=heads, kv_heads=kv_heads)
    assert (found.name, found.kernel, found.note) == ("doc", doc_kernel, "")
    cu = torch.tensor([0, 1, 130, 700, 3000, 4096, 4096], dtype=torch.int32, device=CUDA)
    inputs = [t.to(CUDA, torch.bfloat16) for t in tensors(4096, heads, kv_heads, 64)]

    def run(kernel, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs[:3]]
        out = kernel(*leaves, cu, 2304)
        return [out, *torch.autograd.grad(out, leaves, inputs[3].to(dtype))]

    torch.compiler.reset()
    kernel = torch.compile(doc_kernel, fullgraph=True, dynamic=False) if compiled else doc_kernel
    truth = run(sdpa_attention, torch.float32)
    ours, theirs = run(kernel, torch.bfloat16), run(varlen_attention, torch.bfloat16)
    for exact, got, peers in zip(truth, ours, theirs, strict=True):
        error, bound = ((t.float() - exact).norm() / exact.norm() for t in (got, peers))
        assert error < 1.5 * bound + 1e-3
