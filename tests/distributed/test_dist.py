"""Two and four ranks (gloo; NCCL with two GPUs) compared with one process, in one launch each."""

import json
import socket
from pathlib import Path

import pytest
import rank_program
import torch
from safetensors.torch import load_file, save_file

from pgolf.dist import Dist
from pgolf.ops.adam_step import STEPS
from tests.conftest import requires_two_gpus
from tests.ranks import run_ranks

PROGRAM = Path(rank_program.__file__)


@pytest.fixture(scope="module")
def alone():
    """The same training on one process: all steps, and only the first steps."""
    dist = Dist.start("cpu")
    return rank_program.train(dist, 0, rank_program.STEPS), rank_program.train(
        dist, 0, rank_program.RESUME_AT
    )


@pytest.fixture(scope="module")
def candidates():
    """The same as `alone`, with the settings that are off by default."""
    dist, config = Dist.start("cpu"), rank_program.CANDIDATES
    steps = (rank_program.STEPS, rank_program.RESUME_AT)
    return [rank_program.train(dist, 0, last, config=config)[0] for last in steps]


@pytest.fixture(
    scope="module",
    params=[("cpu", 2), ("cpu", 4), pytest.param(("cuda", 2), marks=requires_two_gpus)],
    ids=str,
)
def ranks(request, alone, candidates, tmp_path_factory):
    """The results of all ranks: a list of (json, tensors)."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param[1]
    save_file(alone[1][0], folder / "resume.safetensors")
    save_file(candidates[1], folder / "candidates.safetensors")
    device = request.param[0]
    done = run_ranks(world, PROGRAM, str(folder), device, device=device)
    assert done.returncode == 0, done.stderr[-4000:]
    return [
        (json.loads((folder / f"rank{r}.json").read_text()), load_file(folder / f"rank{r}.safetensors"))
        for r in range(world)
    ]


def assert_like_alone(seen, tensors, expected, prefix):
    """Compare with one process; the polar map amplifies rounding by up to 990."""
    close = {"rtol": 2e-4, "atol": 2e-5}
    if seen["device"] == "cuda":  # bfloat16 on the wire and in the momentum; parameters moved by 0.2
        close = {"rtol": 2e-2, "atol": 2e-2}
    for name, value in expected.items():
        torch.testing.assert_close(
            tensors[prefix + name].to(value.dtype), value, **close, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_parameters_and_state_equal_one_process_on_the_mean_gradient(ranks, alone):
    expected, norms = alone[0]
    seen, tensors = ranks[0]
    assert_like_alone(seen, tensors, expected, "")
    assert seen["norms"] == pytest.approx(norms, rel=1e-5 if seen["device"] == "cpu" else 1e-2)


def test_ranks_are_identical_bit_for_bit(ranks):
    first = ranks[0][1]
    for seen, tensors in ranks:
        assert seen["trained"] is None
        assert seen["norms"] == ranks[0][0]["norms"]
        assert [name for name in first if not torch.equal(first[name], tensors[name])] == []


def test_one_rank_with_a_broken_gradient_makes_all_skip_the_step(ranks):
    for _, tensors in ranks:
        assert (tensors["skipped"], tensors["broken.skipped"]) == (0, 1)
        names = [n.removeprefix("start.") for n in tensors if n.startswith("start.")]
        names = [n for n in names if n not in ("skipped", "optim.counts")]
        assert tensors["start.optim.counts"][STEPS] == tensors["broken.optim.counts"][STEPS]
        assert [n for n in names if not torch.equal(tensors[f"start.{n}"], tensors[f"broken.{n}"])] == []


def test_state_of_one_process_continues_on_many(ranks, alone):
    assert_like_alone(*ranks[0], alone[0][0], "resumed.")


def test_settings_that_are_off_by_default_continue_on_many_ranks_too(ranks, candidates):
    assert {"optim.muon.square.few", "optim.muon.slow.few"} <= candidates[0].keys()
    ahead = candidates[1]["model.few"] - candidates[1]["optim.nesterov.base.few"]
    assert ahead.abs().min() > 0
    assert_like_alone(*ranks[0], candidates[0], "candidates.")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_collectives_give_exact_means_sums_and_order(ranks, dtype):
    world = len(ranks)
    # Rank r holds 0..2W-1 shifted by 4r: the mean shift is 2 (W - 1).
    mean = [i + 2.0 * (world - 1) for i in range(2 * world)]
    for rank, (seen, _) in enumerate(ranks):
        assert seen[dtype]["part"] == mean[2 * rank : 2 * rank + 2]
        assert seen[dtype]["gathered"] == mean
        assert seen[dtype]["mean"] == mean
        assert seen[dtype]["sum"] == [world * m for m in mean]


def test_share_gives_rank_0_values_bit_for_bit(ranks):
    assert [seen["share"] for seen, _ in ranks] == [[0.1, 1e300, 0.0]] * len(ranks)
    assert [seen["is_main"] for seen, _ in ranks] == [True] + [False] * (len(ranks) - 1)


def test_check_raises_on_every_rank_and_names_the_failed_ones(ranks):
    world = len(ranks)
    for seen, _ in ranks:
        assert seen["check_ok"] is None
        assert seen["check_one"] == f"rank {world - 1} failed: the disk is full: \u00e9"
        assert seen["check_all"] == "; ".join(f"rank {r} failed: no {r}" for r in range(world))
        assert seen["check_empty"] == "rank 0 failed: no message"


def test_texts_of_any_length_are_known_to_all_ranks(ranks):
    for seen, _ in ranks:
        assert seen["texts"] == ["\u00e9" * rank for rank in range(len(ranks))]


def test_ranks_that_chose_different_kernels_take_torchs_together_and_rank_0_says_why(ranks):
    last = len(ranks) - 1
    trial = "torch computes what is next to attention, because the output differs"

    def note(together, first, differs):
        said = [f"rank {r} had {first}" for r in range(last)] + [f"rank {last} had {differs}"]
        return f"attention is {together} with composed heads on all ranks, because {'; '.join(said)}"

    notes = {
        "other_attention": note("sdpa", "sdpa with composed heads", "doc with auto heads, it is new"),
        "no_common_attention": note("varlen", "fa4 with auto heads", "doc with auto heads, it is new"),
        "other_heads": note("doc", "doc with auto heads", f"doc with composed heads, {trial}"),
    }
    together = {"other_attention": "sdpa", "no_common_attention": "varlen", "other_heads": "doc"}
    for rank, (seen, _) in enumerate(ranks):
        assert seen["agreed"] == ["doc", "auto", False, "", []]
        for case, said in notes.items():
            warned = [said] if rank == 0 else []
            assert seen[case] == [together[case], "composed", True, said, warned]


def test_replica_check_names_tensor_and_ranks_on_every_rank(ranks):
    world = len(ranks)
    for rank, (seen, _) in enumerate(ranks):
        said = seen["replicas"]
        assert said["same"] is None
        assert said["flipped"] == f"ranks differ from rank 0 in 1 of 3 tensors: c (ranks [{world - 1}])"
        assert f"in 1 of 1 tensors: a (ranks {list(range(1, world))})" in said["permuted"]
        assert "a (ranks" in said["shaped"]
        assert f"different numbers of tensors; rank {rank}: {rank + 1}" in said["counts"]


def test_one_process_needs_no_process_group():
    dist = Dist.start("cpu")
    assert (dist.rank, dist.world_size, dist.local_rank, dist.is_main) == (0, 1, 0, True)
    assert not torch.distributed.is_initialized()
    assert dist.share([1.5, 2.0]) == [1.5, 2.0]
    dist.check(None)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        dist.check("broken")
    out = torch.zeros(3)
    dist.all_gather(out, torch.ones(3)).wait()
    dist.reduce_scatter_avg(out, 2 * out).wait()
    dist.all_reduce_avg(out).wait()
    assert dist.all_reduce(out).tolist() == [2, 2, 2]
    dist.assert_replicas_equal({"a": out})
    dist.close()


def test_part_that_does_not_fit_is_refused():
    with pytest.raises(
        ValueError, match=r"reduce_scatter_avg: the whole must hold world_size=1 parts of 3.*got 4"
    ):
        Dist.start("cpu").reduce_scatter_avg(torch.zeros(3), torch.zeros(4))


def test_start_names_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match=r"device must be one of \('auto', 'cuda', 'cpu'\), got 'tpu'"):
        Dist.start("tpu")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(
        RuntimeError, match=r"rank 0 of 2 could not join the others on cpu: .*MASTER_ADDR.*torchrun"
    ):
        Dist.start("cpu")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(RuntimeError, match=r"RANK must be below WORLD_SIZE=2, got 2"):
        Dist.start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_a_gpu_is_refused_and_auto_takes_the_cpu():
    with pytest.raises(RuntimeError, match=r"device 'cuda' was asked for, but .*; use device cpu or auto"):
        Dist.start("cuda")
    assert Dist.start("auto").device.type == "cpu"


def test_a_store_that_takes_connections_and_never_answers_is_given_up(monkeypatch):
    """A stopped rank 0 looks like this to the others: torch's client of the store has no time limit then."""
    monkeypatch.setattr("pgolf.dist.MEET_S", 0.5)
    with socket.create_server(("localhost", 0)) as silent:
        place = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": silent.getsockname()[1]}
        for name, value in {**place, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(RuntimeError, match=r"rank 1 of 2 could not join .*did not answer within 0\.5 s"):
            Dist.start("cpu")
