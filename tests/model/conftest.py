"""A fake flash-attn-4 for the tests of the model, with the arguments of the real one."""

import sys

import pytest

from pgolf.model.attention import fa4_problem, find_fa4

VARLEN = "cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, causal=False"
# The private functions by what the wheels of the versions have, computed by torch here.
SOURCE = """
import torch

def weights(q, k, cu):
    at = torch.arange(len(q))
    segment = torch.searchsorted(cu, at, right=True)
    scores = torch.einsum("thk,shk->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    scores /= q.shape[2] ** 0.5
    allowed = (segment[:, None] == segment) & (at[:, None] >= at)
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1)

def _flash_attn_fwd(q, k, v, {varlen}, return_lse=False{named}):
    assert causal and return_lse and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k
    group = q.shape[1] // k.shape[1]
    out.copy_(torch.einsum("hts,shk->thk", weights(q, k, cu_seqlens_q), v.repeat_interleave(group, 1)))
    lse.zero_()
    return out, lse, *[None] * {extra}

def _flash_attn_bwd(q, k, v, out, dout, lse, {varlen}, dq=None, dk=None, dv=None):
    p, group = weights(q, k, cu_seqlens_q), q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    dp = torch.einsum("thk,shk->hts", dout, v)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
    dq.copy_(torch.einsum("hts,shk->thk", ds, k))
    dk.copy_(torch.einsum("hts,thk->shk", ds, q).unflatten(1, (-1, group)).sum(2))
    dv.copy_(torch.einsum("hts,thk->shk", p, dout).unflatten(1, (-1, group)).sum(2))
    return dq, dk, dv
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Return a function that installs a fake flash_attn and removes the imported modules of another one."""

    def install(extra=0, named=", out=None, lse=None", source=SOURCE):
        for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "pgolf.model.fa4", raising=False)
        (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
        for folder in ("flash_attn", "flash_attn/cute"):
            (tmp_path / folder / "__init__.py").write_text("")
        code = source.format(varlen=VARLEN, extra=extra, named=named)
        (tmp_path / "flash_attn" / "cute" / "interface.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        fa4_problem.cache_clear()

    yield install
    fa4_problem.cache_clear()
    for name in [n for n in sys.modules if n.split(".")[0] == "flash_attn" or n == "pgolf.model.fa4"]:
        del sys.modules[name]
    monkeypatch.undo()
    find_fa4()  # the real one, where there is one, registers its operators again
