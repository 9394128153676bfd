"""Generation: logits equal those of whole passes, drawing follows its formulas, characters are whole."""

import lzma
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pgolf.data.text import sample_paths
from pgolf.data.tokenizer import Tokenizer, train_tokenizer
from pgolf.model.attention import attention_branch, sdpa_attention
from pgolf.model.generate import Decoder, Sampling, draw, generate, sample, text_pieces, window_start
from pgolf.model.gpt import GPT
from pgolf.model.heads import Heads
from pgolf.presets import pr1855
from tests.model.test_gpt import BOS, SWITCHES, label, packed, randomized, small


def whole(model: GPT, ids: list[int]) -> torch.Tensor:
    """Logits `(T, V)` of one forward pass over `ids`, as one segment, by the formula."""
    device = model.tok_emb.device
    cu = torch.tensor([0, len(ids)], dtype=torch.int32, device=device)
    with torch.no_grad():
        hidden, table = model.hidden(torch.tensor(ids, device=device), cu, max_seqlen=len(ids), loop=True)
    cap = model.config.softcap
    return cap * torch.tanh(F.linear(hidden, table).float() / cap)


def fed(model: GPT, ids: list[int], first: int = 1) -> torch.Tensor:
    """Logits after `ids[:first]`, fed together, and after each further token: `(T - first + 1, V)`."""
    decoder = Decoder(model)
    rows = [decoder.feed(ids[:first]), *(decoder.feed([i]) for i in ids[first:])]
    return torch.stack(rows)


@pytest.mark.parametrize("change", SWITCHES, ids=label)
def test_step_by_step_equals_one_forward(change):
    model = randomized(replace(small(), **change))
    ids = packed([24], 96)[0].tolist()
    expected = whole(model, ids)
    torch.testing.assert_close(fed(model, ids), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(fed(model, ids, first=9), expected[8:], atol=1e-5, rtol=0)


def test_every_part_of_the_record_is_exact_too():
    config = replace(pr1855().model, vocab_size=96, width=64, heads=4, kv_heads=2, rope_dims=8)
    model, ids = randomized(config), packed([40], 96)[0].tolist()
    torch.testing.assert_close(fed(model, ids, first=20), whole(model, ids)[19:], atol=1e-5, rtol=0)


def test_it_is_the_same_in_the_dtype_of_each_device(device):
    """On CUDA in bfloat16, where the kernels for one token and for many tokens round differently."""
    config = replace(small(), width=256, rope_dims=16, max_context=40)
    model, ids = randomized(config).prepare(device), packed([40], 96)[0].tolist()
    got, expected = (f(model, ids).float() for f in (fed, whole))
    assert got.device.type == device.type
    assert (got - expected).norm() < (1e-5 if device.type == "cpu" else 0.05) * expected.norm()
    text = [list(draw(model, ids[:5], Sampling(seed=2), tokens=50, stop_id=-1)) for _ in range(2)]
    assert text[0] == text[1] and len(text[0]) == 50


def test_a_branch_with_a_kernel_of_its_own_is_left_to_whole_passes(monkeypatch):
    """As `heads_branch` is, whose operators would not see the tokens that the decoder keeps."""

    def branch(config, _kernel, *args, **kwargs):
        return attention_branch(config, sdpa_attention, *args, **kwargs)

    def select(name, *_):
        return Heads(name, attention_branch if name == "composed" else branch, "")

    monkeypatch.setattr("pgolf.model.gpt.select_branch", select)
    model, ids = randomized(small()), packed([24], 96)[0].tolist()
    torch.testing.assert_close(fed(model, ids), whole(model, ids), atol=1e-5, rtol=0)


def test_several_tokens_at_once_are_as_one_by_one():
    model, ids = randomized(small()), packed([20], 96)[0].tolist()
    decoder = Decoder(model)
    got = [decoder.feed(ids[:7]), decoder.feed(ids[7:12]), decoder.feed(ids[12:])]
    torch.testing.assert_close(torch.stack(got), whole(model, ids)[[6, 11, 19]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", [1, 2, 7, 24])
def test_beyond_max_context_the_window_begins_anew(context):
    """At every length, the logits are those of a forward pass over the window alone."""
    model = randomized(replace(small(), max_context=context))
    ids = packed([60], 96)[0].tolist()
    expected = torch.stack([whole(model, ids[window_start(n, context) : n])[-1] for n in range(1, 61)])
    torch.testing.assert_close(fed(model, ids), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(fed(model, ids, first=50), expected[49:], atol=1e-5, rtol=0)


def test_the_window_holds_between_half_and_all_of_the_context():
    assert [window_start(n, 8) for n in (1, 8, 9, 12, 13)] == [0, 0, 4, 4, 8]
    for context in (1, 2, 5, 8):
        sizes = [n - window_start(n, context) for n in range(context, 50)]
        assert max(sizes) == context and min(sizes) == min(context // 2 + 1, context)


def test_more_tokens_than_the_first_room_are_kept():
    model = randomized(replace(small(), max_context=400))
    ids = packed([300], 96)[0].tolist()
    torch.testing.assert_close(fed(model, ids, first=250), whole(model, ids)[249:], atol=1e-5, rtol=0)


def test_a_decoder_leaves_the_model_as_it_was():
    model, ids = randomized(small()), packed([12], 96)[0].tolist()
    before, weights = whole(model, ids), {k: v.clone() for k, v in model.state_dict().items()}
    Decoder(model).feed(ids)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.equal(whole(model, ids), before) and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="at least one"):
        Decoder(model).feed([])


def frequencies(logits: torch.Tensor, draws: int = 1500, **settings) -> np.ndarray:
    rng, sampling = torch.Generator().manual_seed(1), Sampling(**settings)
    found = [sample(logits, sampling, rng) for _ in range(draws)]
    return np.bincount(found, minlength=logits.numel()) / draws


def test_drawing_follows_the_probabilities():
    p = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2])
    free = {"temperature": 1.0, "top_p": 1.0}
    assert frequencies(p.log(), **free) == pytest.approx(p.numpy(), abs=0.05)
    hot = p.sqrt() / p.sqrt().sum()
    assert frequencies(p.log(), **free | {"temperature": 2.0}) == pytest.approx(hot.numpy(), abs=0.05)
    two = frequencies(p.log(), **free, top_k=2)
    assert two == pytest.approx([0, 0.4 / 0.65, 0, 0.25 / 0.65, 0], abs=0.05)
    # 0.4 + 0.25 fall short of 0.7, with 0.2 they do not.
    assert (frequencies(p.log(), **free | {"top_p": 0.7}) > 0).tolist() == [False, True, False, True, True]
    # Of the two likeliest, the first alone has more than half.
    assert frequencies(p.log(), **free | {"top_p": 0.5}, top_k=2)[1] == 1


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-3])
def test_cold_drawing_takes_the_likeliest(temperature):
    assert frequencies(torch.tensor([1.0, 3.0, 2.0, -1e4]), 20, temperature=temperature)[1] == 1
    assert frequencies(torch.tensor([1.0, 3.0]), 20, top_p=1e-9)[1] == 1


def test_broken_logits_are_an_error():
    for bad in (float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            sample(torch.tensor([0.0, bad]), Sampling(temperature=0), torch.Generator())


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"tokens": 0}, "tokens"),
        ({"prompt": "\ud800"}, "prompt is not Unicode"),
    ],
)
def test_settings_out_of_range_are_refused_at_once(setting, says, tokenizer):
    with pytest.raises(ValueError, match=says):
        generate(speaker(tokenizer), tokenizer, **setting)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    with lzma.open(sample_paths().val, "rt", encoding="utf-8") as lines:
        texts = [next(lines) for _ in range(20)]
    return train_tokenizer(texts, tmp_path_factory.mktemp("t") / "t.model", vocab_size=400, threads=1)


def speaker(tokenizer: Tokenizer) -> GPT:
    return randomized(replace(small(), vocab_size=tokenizer.vocab_size))


def test_a_seed_gives_one_text_and_the_pieces_are_the_ids_decoded(tokenizer):
    model = speaker(tokenizer)
    text = ["".join(generate(model, tokenizer, "A b", tokens=40, seed=s)) for s in (3, 3, 4)]
    assert text[0] == text[1] != text[2]
    ids = [tokenizer.bos_id, *map(int, tokenizer.encode_ids(["A b"])[0])]
    drawn = list(draw(model, ids, Sampling(seed=3), tokens=40, stop_id=tokenizer.bos_id))
    assert tokenizer.decode([*ids, *drawn]) == "A b" + text[0]


def test_the_end_of_the_document_ends_the_text():
    model = randomized(small())
    free = list(draw(model, [BOS], Sampling(seed=1), tokens=30, stop_id=-1))
    at = next(i for i, token in enumerate(free) if token not in free[:i] and i > 4)
    assert list(draw(model, [BOS], Sampling(seed=1), tokens=30, stop_id=free[at])) == free[:at]
    assert len(free) == 30


def test_another_vocabulary_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"400 tokens, the model has 96"):
        generate(randomized(small()), tokenizer)


def test_pieces_are_whole_characters(tokenizer):
    text = "caf\u00e9 \u20ac\u20ac \U0001f600 \u2581\0 end \uf8f0x \ufffd." * 40
    prompt, rest = text[:20], text[20:]
    bos = [tokenizer.bos_id]
    ids, more = ([int(i) for i in tokenizer.encode_ids([t])[0]] for t in (prompt, rest))
    pieces = list(text_pieces(tokenizer, bos + ids, iter(more)))
    assert "".join(pieces) == rest and len(pieces) > 200
    assert len(more) > 600, "long enough for what is forgotten"


def test_bytes_that_are_no_character_still_come_out(tokenizer):
    euro = [int(i) for i in tokenizer.encode_ids(["\u4e00"])[0]]
    assert len(euro) == 3, "three byte pieces"
    a = int(tokenizer.encode_ids(["a"])[0][0])
    for drawn in (euro[:2], [*euro[:2], a], euro[1:] * 5, [*euro, *euro[:1]]):
        found = "".join(text_pieces(tokenizer, [tokenizer.bos_id], drawn))
        assert found == tokenizer.decode(drawn)
    assert list(text_pieces(tokenizer, [tokenizer.bos_id], [*euro, a])) == ["\u4e00", "a"]
    assert list(text_pieces(tokenizer, [tokenizer.bos_id], [])) == []
