"""Captured steps of test-time training: padded steps have the losses and adapters of those that are launched.

On the host there are no graphs. Two recorders stand in for them: one runs the work again, as it is; the other
runs again the operators that the work called when it was recorded, on the same tensors, as a graph does.
"""

from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pgolf.config import TttConfig
from pgolf.evaluate import replayed as module
from pgolf.evaluate import ttt
from pgolf.evaluate.ensemble import Ensemble
from pgolf.evaluate.legality import check_way
from pgolf.evaluate.phases import phased_pass
from pgolf.evaluate.predictor import Lesson, evaluating
from pgolf.evaluate.replayed import Replayed, Size, capture, plan_sizes, shares, step_sizes
from pgolf.evaluate.ttt import adapted_pass, batch_turns, plan_batches
from pgolf.model import attention
from tests.conftest import requires_gpu
from tests.evaluate.legal_helpers import (
    BOS,
    CONTEXT,
    PHASES,
    TTT,
    VOCAB,
    FakeDist,
    losses_of,
    make_text,
    random_documents,
    small_config,
    small_model,
)
from tests.model.test_adapted import FEW, masked_attention, small_like

LENGTHS = [5, 90, 9, 31, 60, 0, 17, 44, 33, 30]
SMOOTH = replace(TTT, eps=1e-2)
"""With a small eps, AdamW without momentum takes full steps on gradients that are nothing but rounding."""


class Again:
    """A replay is the work itself."""

    def __init__(self, device):
        self.recorded = 0

    def launch(self, work):
        work()

    def record(self, work):
        self.recorded += 1
        return work

    def held(self):
        return self.recorded << 20


class Tape(TorchDispatchMode):
    """Keeps the operators that run, and runs them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, old in self.calls:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif all(r.alias_info is None for r in func._schema.returns):
                new = func(*args, **kwargs)
                for to, what in zip(tree_leaves(old), tree_leaves(new), strict=True):
                    if isinstance(to, torch.Tensor):
                        to.copy_(what)


class Taped(Again):
    """A replay runs the operators that were recorded, so that it knows no number that changes on the host."""

    def record(self, work):
        self.recorded += 1
        with Tape() as tape:
            work()
        return tape.replay


@pytest.fixture
def few_sizes(monkeypatch):
    """Let at most two sizes be captured, so that most steps are padded."""
    monkeypatch.setattr(module, "CAPTURE_STEPS", 0.01)
    monkeypatch.setattr(module, "plan_sizes", partial(plan_sizes, most=2))


def both(model, text, config, *, start=Again, phases=None):
    """Return the losses and what the predictor has learned, launched and replayed, and what was captured."""
    found = []
    for replays in (False, True):
        where = {"bos_id": BOS, "context": CONTEXT}
        with evaluating(model):
            if phases is None:
                run = adapted_pass(model, text, FakeDist(), config=config, **where)
            else:
                run = phased_pass(model, text, FakeDist(), phases=replace(phases, adapters=config), **where)
            note = ""
            if replays:
                run, note = capture(run, start)
            losses = losses_of(run, text)[1:]
        found.append((losses, [t.clone() for t in run.predictor.state()], run.predictor))
    return *found, note


def check(model, text, config, **how):
    """Compare both forms, and return what `capture` said."""
    (losses, state, _), (replayed, other, predictor), note = both(model, text, config, **how)
    assert "are replayed as CUDA graphs of" in note, note
    np.testing.assert_allclose(replayed, losses, atol=2e-5, rtol=0)
    for t, want in zip(other, state, strict=True):
        torch.testing.assert_close(t, want, atol=2e-5, rtol=2e-5)
    still = replace(config, lr=0.0)
    unlearned = both(model, text, still, **how)[0][0]
    assert np.abs(unlearned - losses).max() > 1e-3, "it learns"
    return note, predictor


@pytest.mark.parametrize("start", [Again, Taped])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"on": "head"},
        {"on": "k,o,mlp,head"},
        {"on": "v"},
        {"first_chunks": "2,5"},
        {"members": 3},
        {"gradient": "chunk"},
        {"warm_a": True, "batch_documents": 3},
        {"batch_documents": 1},
    ],
    ids=str,
)
def test_padded_steps_have_the_losses_and_adapters_of_launched_ones(changes, start, few_sizes, monkeypatch):
    if start is Taped:
        monkeypatch.setattr(attention, "sdpa_attention", masked_attention)
    check(small_model(), make_text(random_documents(LENGTHS)), replace(SMOOTH, **changes), start=start)


# Two lanes with MUDD connections; value embeddings and bigrams; one stream with parallel branches.
@pytest.mark.parametrize("preset", ["mudd", "pr549", "pr1493"])
def test_networks_with_other_parts(preset, few_sizes):
    model = small_model(shape=replace(small_like(preset), smear_over_bos=False))
    check(model, make_text(random_documents([5, 60, 31, 44])), replace(SMOOTH, lr=1e-3))


def test_adapters_on_a_model_that_learns_in_phases(few_sizes):
    """The graphs read the weights where the phases change them."""
    phases = replace(PHASES, documents=6, two_caps=True)
    text = make_text(random_documents([5, 70, 31, 44, 9, 30, 12, 60]))
    check(small_model(), text, replace(SMOOTH, lr=5e-3, batch_documents=2), phases=phases)


@pytest.mark.parametrize("lengths", [[0], [0, 0, 40], [33], [1, 64, 1]])
def test_more_sizes_than_documents_and_documents_of_one_token(lengths, monkeypatch):
    monkeypatch.setattr(module, "CAPTURE_STEPS", 0)
    (losses, *_), (replayed, *_), note = both(small_model(), make_text(random_documents(lengths)), SMOOTH)
    assert "100% of the steps" in note and "with 0.0% more work" in note
    np.testing.assert_allclose(replayed, losses, atol=2e-5, rtol=0)


def test_steps_are_padded_in_documents_windows_and_chunks(few_sizes):
    text = make_text(random_documents(LENGTHS))
    (_, _, _), (_, _, predictor), note = both(small_model(), text, SMOOTH)
    assert isinstance(predictor, Replayed)
    pairs = predictor._plan.items()
    assert len({size for _, size in pairs}) == 2
    for name in Size._fields:
        assert any(getattr(a, name) < getattr(b, name) for a, b in pairs), name
        assert all(getattr(a, name) <= getattr(b, name) for a, b in pairs), name
    assert "of 2 sizes" in note


def test_documents_that_end_apart_from_the_others_are_launched(few_sizes, monkeypatch):
    """Their adapters are not those of the first documents, which the graphs read."""
    monkeypatch.setattr(ttt, "SPLIT_TOKENS", 1)
    text = make_text(random_documents([60, 60, 60, 43, 43, 43]))
    run = adapted_pass(small_model(), text, FakeDist(), bos_id=BOS, context=CONTEXT, config=SMOOTH)
    lanes = [question.lane for turn in run.turns for question in turn.questions]
    assert any(lanes)
    monkeypatch.setattr(module, "plan_sizes", lambda uses, **_: {size: max(uses) for size in all_sizes(run)})
    check(small_model(), text, SMOOTH)


def all_sizes(run):
    """Return the sizes of all questions, those in other lanes, too, that fit into the largest one."""
    questions = [question for turn in run.turns for question in turn.questions]
    sizes = {Size(len(q.windows), q.width, q.asked) for q in questions}
    largest = max(step_sizes(run.turns))
    return [size for size in sizes if all(a <= b for a, b in zip(size, largest, strict=True))]


def test_most_launches_are_gone(few_sizes):
    """Operators of one step that the host calls, without those that a graph would have."""
    model, text = small_model(shape=small_like("pr1855")), make_text(random_documents([60, 60, 60]))
    where = {"bos_id": BOS, "context": CONTEXT, "config": replace(TTT, chunk_growth=0)}
    counts = []
    for start in (None, Silent):
        run = adapted_pass(model, text, FakeDist(), **where)
        if start is not None:
            run, _ = capture(run, start)
        counts.append(operators(run, text))
    assert counts[0] > 1500 and counts[1] < 100, counts


class Silent(Again):
    """Replays nothing once everything was checked."""

    def record(self, work):
        runs = iter([work])
        return lambda: next(runs, lambda: None)()


def operators(run, text):
    """Return how many operators the host calls in the second step of a pass, without views."""
    with Tape() as tape:
        for turn in run.turns[:2]:
            tape.calls.clear()
            if turn.begins:
                run.predictor.begin()
            (question,) = turn.questions
            inputs, targets = question.tensors(text, torch.device("cpu"))
            tape.calls.clear()
            nats = run.predictor.predict(inputs).nats(targets)
            run.predictor.learn(Lesson(nats, turn.learners, []))
    return sum(f._schema.is_mutable or f._schema.returns[0].alias_info is None for f, *_ in tape.calls)


def test_a_captured_pass_meets_the_conditions_of_a_valid_submission(few_sizes):
    model = small_model()

    def make(text):
        run = adapted_pass(model, text, FakeDist(), bos_id=BOS, context=CONTEXT, config=TTT)
        return capture(run, Again)[0]

    with evaluating(model):
        text = make_text(random_documents([5, 90, 17, 40]))
        tested = check_way(make, text, bos_id=BOS, vocab_size=VOCAB, dist=FakeDist())
    assert [t.verdict for t in tested] == ["ok"] * 5, tested


def test_losses_are_pure_until_the_predictor_is_asked_again(few_sizes):
    """Other targets in between change neither losses nor gradients; old distributions refuse to answer."""
    model, text = small_model(), make_text(random_documents([60, 60]))
    run = adapted_pass(model, text, FakeDist(), bos_id=BOS, context=CONTEXT, config=TTT)
    before = [t.clone() for t in run.predictor.state()]
    replayed, _ = capture(run, Again)
    assert all(map(torch.equal, replayed.predictor.state(), before)), "the check leaves no trace"
    (question,), device = run.turns[1].questions, torch.device("cpu")
    inputs, targets = question.tensors(text, device)
    found = []
    for predictor, other in ((run.predictor, False), (replayed.predictor, True)):
        predictor.begin()
        head = predictor.predict(inputs)
        nats = head.nats(targets)
        if other:
            assert not torch.equal(head.nats(targets.flip(0)), nats)
        logs = head.log_probabilities(torch.tensor([0, targets.numel() - 1]))
        predictor.learn(Lesson(nats, len(question.windows), []))
        found.append((nats.detach(), logs.detach(), [t.clone() for t in predictor.state()]))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    replayed.predictor.predict(inputs)
    with pytest.raises(RuntimeError, match="asked again"):
        head.nats(targets)


class Fails(Again):
    """The second size cannot be captured."""

    def record(self, work):
        if self.recorded == 3:
            try:
                raise RuntimeError("operation not permitted when stream is capturing")
            finally:
                raise ValueError("and the capture could not be ended")
        return super().record(work)


class Wrong(Again):
    """The backward pass is not replayed."""

    def record(self, work):
        self.recorded += 1
        done = [work, work][: 0 if self.recorded == 3 else 2]
        return done.pop() if done else lambda: setattr(work.__self__, "_gradients", zeros(work.__self__))


def zeros(graphs):
    return tuple(torch.zeros_like(g) for g in graphs._gradients)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (Fails, "operation not permitted when stream is capturing"),
        (Wrong, "differs when a step of Size("),
        (None, "the device is cpu"),
    ],
)
def test_what_cannot_be_captured_is_launched_and_the_note_says_why(start, why, few_sizes):
    (losses, state, _), (replayed, other, predictor), note = both(
        small_model(), make_text(random_documents(LENGTHS)), TTT, start=start
    )
    assert note.startswith("steps of test-time training are launched kernel by kernel: ") and why in note
    assert not isinstance(predictor, Replayed)
    np.testing.assert_array_equal(replayed, losses)
    assert all(map(torch.equal, other, state))


def test_a_smear_gate_that_reads_across_windows_forbids_padding(few_sizes):
    model = small_model(shape=small_config(smear_over_bos=True))
    *_, note = both(model, make_text(random_documents([60, 60])), TTT)
    assert "with model.smear_over_bos, a window depends on what is before it" in note


def test_members_that_are_captured_have_memory_of_their_own(few_sizes):
    made = []

    def start(device):
        made.append(Again(device))
        return made[-1]

    *_, (_, _, predictor), note = both(
        small_model(), make_text(random_documents(LENGTHS)), replace(TTT, members=2), start=start
    )
    assert isinstance(predictor, Ensemble) and len(made) == 2 and note
    assert [again.recorded for again in made] == [6, 6]


def real_turns(lengths, config=None):
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    batches = plan_batches(lengths, 2048, config or TttConfig())
    return [turn for batch in batches for turn in batch_turns(batch, (starts, lengths))]


def random_lengths(count=2000):
    return np.exp(np.random.default_rng(0).normal(6.5, 1.1, count)).astype(np.int64) + 1


def test_the_plan_for_many_documents_pads_little_in_few_sizes():
    uses = step_sizes(real_turns(random_lengths()))
    plan = plan_sizes(uses)
    steps, padding = shares(plan, uses)
    assert 4 <= len(set(plan.values())) <= 40 and steps > 0.4 and padding < 0.15
    for step, size in plan.items():
        assert all(a <= b for a, b in zip(step, size, strict=True)) and size.cost < module.LAUNCH_COST * 1.01
    most = max(size.documents * size.width for size in uses)
    assert all(size.documents * size.width <= most for size in plan.values())
    often = Counter(size for step, size in plan.items() for _ in range(round(uses[step])))
    assert min(often.values()) > module.CAPTURE_STEPS, "each is used more often than it takes to capture"


def test_a_plan_with_exact_chunks_and_plans_of_little_work():
    uses = step_sizes(real_turns(random_lengths(), replace(TttConfig(), gradient="chunk")))
    plan = plan_sizes(uses, exact=True)
    assert plan and all(step.asked == size.asked for step, size in plan.items())
    assert plan_sizes({}) == {}
    assert plan_sizes({Size(4, 48, 48): 2.0}) == {}, "twice does not pay"
    assert plan_sizes({Size(4, 48, 48): 9.0}) == {Size(4, 48, 48): Size(4, 48, 48)}
    assert plan_sizes({Size(64, 2048, 48): 99.0}) == {}, "its kernels take longer than launching them"


@requires_gpu
@pytest.mark.parametrize(("way", "compiled"), [("ttt", False), ("ttt", True), ("phased", False)])
def test_on_a_gpu_replayed_scores_are_those_of_launched_steps(way, compiled, few_sizes):
    device = torch.device("cuda")
    shape = replace(FEW, width=128, heads=2, kv_heads=1, rope_dims=16)
    model = small_model(shape=shape).prepare(device)
    text, dist = make_text(random_documents([5, 60, 9, 31, 44, 90, 90])), FakeDist()
    dist.device = device
    config, found = replace(TTT, rank=16, lr=1e-3), []
    for replays in (False, True):
        where = {"bos_id": BOS, "context": CONTEXT, "compiled": compiled}
        with evaluating(model):
            if way == "ttt":
                run = adapted_pass(model, text, dist, config=config, **where)
            else:
                phases = replace(PHASES, two_caps=True, adapters=config)
                run = phased_pass(model, text, dist, phases=phases, **where)
            if replays:
                run, note = capture(run)
                assert "are replayed as CUDA graphs of" in note, note
            found.append(losses_of(run, text, dist)[1:])
    assert found[1].mean() == pytest.approx(found[0].mean(), rel=2e-3)
    assert np.abs(found[1] - found[0]).max() < 0.1


@requires_gpu
@pytest.mark.parametrize("changes", [{"members": 2}, {"gradient": "chunk"}], ids=str)
def test_on_a_gpu_members_and_gradients_of_chunks_are_replayed(changes, few_sizes):
    model = small_model(shape=replace(small_like("pr1855"), width=128, heads=2, kv_heads=1, rope_dims=16))
    model.prepare(torch.device("cuda"))
    text, dist = make_text(random_documents([5, 60, 9, 31, 44, 90, 90])), FakeDist()
    dist.device = torch.device("cuda")
    config, found = replace(TTT, rank=16, lr=1e-3, **changes), []
    for replays in (False, True):
        with evaluating(model):
            run = adapted_pass(model, text, dist, bos_id=BOS, context=CONTEXT, config=config)
            if replays:
                run, note = capture(run)
                assert "are replayed as CUDA graphs of" in note, note
            found.append(losses_of(run, text, dist)[1:])
    assert found[1].mean() == pytest.approx(found[0].mean(), rel=2e-3)
