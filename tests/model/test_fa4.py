"""The wrapper of flash-attn-4, on a fake package and, on a Hopper GPU, on the installed package."""

import os
import sys
import warnings

import pytest
import torch

from bench.published_script import flash_attention_4
from pgolf.artifact.code import reader_code
from pgolf.model import attention, gpt, own_attention
from pgolf.model.attention import fa4_problem, find_fa4, sdpa_attention, select_attention, varlen_attention
from pgolf.presets import tiny
from tests.conftest import requires_hopper
from tests.model.conftest import SOURCE


def tensors(tokens=40, heads=4, kv_heads=2, dim=8):
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(tokens, h, dim, generator=rng) for h in (heads, kv_heads, kv_heads, heads)]


CU = torch.tensor([0, 1, 17, 40, 40], dtype=torch.int32)


def gradients(kernel):
    q, k, v, grad = tensors()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = kernel(*leaves, CU, 23)
    return [out, *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("extra", [0, 2, 3, 7], ids=["b18", "b22", "b36", "later"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_number_of_results_of_the_private_function_does_not_matter(stand_in, extra, compiled):
    stand_in(extra)
    peer = find_fa4()
    assert peer.usable, peer.problem
    kernel = peer.found
    if compiled:
        torch.compiler.reset()
        kernel = torch.compile(kernel, backend="aot_eager", fullgraph=True)
    for got, want in zip(gradients(kernel), gradients(sdpa_attention), strict=True):
        torch.testing.assert_close(got, want)


def test_published_scripts_call_it_as_flash_attention_3(stand_in):
    stand_in()
    function = flash_attention_4().flash_attn_varlen_func

    def of_a_script(q, k, v, cu, longest, **others):
        given = {"max_seqlen_q": longest, "max_seqlen_k": longest, "cu_seqlens_q": cu, "cu_seqlens_k": cu}
        return function(q, k, v, **{**given, "causal": True, "window_size": (-1, -1), **others})

    torch.compiler.reset()
    for kernel in (of_a_script, torch.compile(of_a_script, backend="aot_eager", fullgraph=True)):
        for got, want in zip(gradients(kernel), gradients(sdpa_attention), strict=True):
            torch.testing.assert_close(got, want)
    q, k, v, _ = tensors()
    for others in ({"window_size": (4, 0)}, {"causal": False}, {"cu_seqlens_k": CU.clone()}):
        with pytest.raises(NotImplementedError, match="only causal attention within whole segments"):
            of_a_script(q, k, v, CU, 23, **others)
    with pytest.raises(NotImplementedError, match="only packed documents"):
        flash_attention_4().flash_attn_func(q, k, v, causal=True)


def test_its_compiled_kernels_stay_on_disk_for_later_processes(stand_in, monkeypatch):
    """The package reads the variable when it is imported."""
    variable = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
    monkeypatch.delenv(variable, raising=False)
    stand_in(source=f"import os\nassert os.environ['{variable}'] == '1'\n" + SOURCE)
    assert find_fa4().usable
    monkeypatch.setenv(variable, "0")
    find_fa4()
    assert os.environ[variable] == "0"


def test_derivatives_that_it_does_not_have_are_errors(stand_in):
    stand_in()
    q, k, v, grad = tensors()
    kernel, leaf = find_fa4().found, q.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"fa4_attention: forward-mode .* use sdpa_attention"):
        torch.func.jvp(lambda x: kernel(x, k, v, CU, 23), (q,), (q,))
    with pytest.raises(RuntimeError, match=r"fa4_attention: forward-mode .* use sdpa_attention"):
        torch.func.grad(lambda x: kernel(x, k, v, CU, 23).sum())(q)
    (first,) = torch.autograd.grad(kernel(leaf, k, v, CU, 23), leaf, grad, create_graph=True)
    with pytest.raises(RuntimeError, match=r"fa4_backward.* no autograd formula"):
        torch.autograd.grad(first.sum(), leaf)


def test_a_version_without_the_arguments_is_not_usable_and_says_so(stand_in):
    stand_in(named=", result=None, lse=None")
    assert find_fa4().problem == (
        "not usable: ImportError: _flash_attn_fwd of this flash-attn-4 has no argument out; "
        "install a version that has it: pip install 'pgolf[fa4]'"
    )


def test_the_counted_code_of_an_artifact_holds_the_wrapper():
    found = reader_code()
    assert {"pgolf/model/fa4.py", "pgolf/peers.py", "pgolf/ops/_derivatives.py"} <= found.keys()
    assert "def fa4_attention" in found["pgolf/model/fa4.py"]


@pytest.fixture
def hopper(monkeypatch):
    """A device that looks like a Hopper GPU without pgolf's kernels to the choice of the attention kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(own_attention, "has_kernels", lambda *_: False)
    return torch.device("cuda")


def test_auto_falls_back_with_one_sentence_and_fa4_says_why(stand_in, hopper):
    stand_in(source="raise TypeError('not for this Python')")
    sentence = "attention is varlen, because flash-attn-4 is not usable: TypeError: not for this Python"
    with pytest.warns(UserWarning) as caught:
        chosen = select_attention("auto", hopper)
    assert [str(w.message) for w in caught] == [sentence]
    assert (chosen.name, chosen.kernel, chosen.note) == ("varlen", varlen_attention, sentence)
    with pytest.raises(RuntimeError, match=r"attention=fa4 needs .*here: not usable: TypeError.*fa4\]'"):
        select_attention("fa4", hopper)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_attention("varlen", hopper).note == ""


def test_a_model_keeps_the_sentence_for_the_log(monkeypatch):
    why = "attention is varlen, because flash-attn-4 is not usable: TypeError: no"
    chosen = attention.Attention("varlen", sdpa_attention, why)
    monkeypatch.setattr(gpt, "select_attention", lambda *_, **__: chosen)
    model = gpt.GPT(tiny().model).prepare(torch.device("cpu"))
    assert (model.attention_name, model.attention_note) == ("varlen", why)
    monkeypatch.undo()
    assert gpt.GPT(tiny().model).prepare(torch.device("cpu")).attention_note == ""


def test_a_package_that_is_not_there_is_no_news(hopper, monkeypatch):
    monkeypatch.setattr(attention, "fa4_problem", lambda *_: "not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert select_attention("auto", hopper)[::2] == ("varlen", "")


def test_a_kernel_that_fails_or_is_wrong_in_its_trial_is_not_used(monkeypatch):
    monkeypatch.setattr(attention, "varlen_attention", sdpa_attention)
    cpu = torch.device("cpu")

    def wrong(q, k, v, cu, longest):
        return sdpa_attention(q, k, 1.2 * v, cu, longest)

    def raises(*_):
        raise ValueError("the compiler of kernels says no\nat length")

    def forgets(q, k, v, cu, longest):
        return sdpa_attention(q, k.detach(), v, cu, longest)

    assert attention._trial(sdpa_attention, cpu, 4, 2, 16) == ""
    with torch.inference_mode():
        assert attention._trial(sdpa_attention, cpu, 4, 2, 16) == ""
    assert attention._trial(wrong, cpu, 4, 2, 16).startswith(
        "not usable: its output differs from torch's by 2."
    )
    assert attention._trial(raises, cpu, 4, 2, 16) == (
        "not usable: a trial raised ValueError: the compiler of kernels says no"
    )
    assert attention._trial(forgets, cpu, 4, 2, 16).startswith("not usable: a trial raised RuntimeError")


@requires_hopper
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 4, 64), (4, 4, 64), (8, 2, 128)])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_installed_flash_attn_4_equals_torchs_varlen(heads, kv_heads, dim, compiled):
    device = torch.device("cuda")
    sys.modules.pop("pgolf.model.fa4", None)
    peer = find_fa4()
    if peer.problem == "not installed":
        pytest.skip("flash-attn-4 is not installed: pip install 'pgolf[fa4]'")
    assert peer.usable, f"flash-attn-4 {peer.version} is {peer.problem}"
    fa4_problem.cache_clear()
    assert fa4_problem(device, heads, kv_heads, dim) == ""
    sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    assert select_attention("fa4", device, **sizes).name == "fa4"
    assert select_attention("auto", device, **sizes).name == ("doc" if dim == 64 else "fa4")
    cu = torch.tensor([0, 1, 130, 700, 3000, 4096, 4096], dtype=torch.int32, device=device)
    inputs = [t.to(device, torch.bfloat16) for t in tensors(4096, heads, kv_heads, dim)]

    def run(kernel, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in inputs[:3]]
        out = kernel(*leaves, cu, 2304)
        return [out, *torch.autograd.grad(out, leaves, inputs[3].to(dtype))]

    torch.compiler.reset()
    kernel = torch.compile(peer.found, fullgraph=True, dynamic=False) if compiled else peer.found
    truth = run(sdpa_attention, torch.float32)
    ours, theirs = run(kernel, torch.bfloat16), run(varlen_attention, torch.bfloat16)
    for exact, got, peers in zip(truth, ours, theirs, strict=True):
        error, bound = ((t.float() - exact).norm() / exact.norm() for t in (got, peers))
        assert error < 1.5 * bound + 1e-3
