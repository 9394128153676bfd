"""What is said of an error: one sentence to the person who can mend it, a traceback of everything else."""

import pytest
import torch

from pgolf.errors import (
    Checked,
    MemoryAdvice,
    OutOfMemory,
    RanksFailed,
    RunError,
    UserError,
    UserTypeError,
    brief,
    is_checked,
    lacks_memory,
    told,
)


def caught(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Return the error as it is after it was raised, with its traceback."""
    try:
        raise error from cause
    except BaseException as e:
        return e


def too_much() -> BaseException:
    """Return what torch raises where the host has no memory left."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    ("kind", "plain"), [(UserError, ValueError), (UserTypeError, TypeError), (RunError, RuntimeError)]
)
def test_a_checked_error_is_what_a_library_would_raise(kind, plain):
    error = caught(kind("seed must be >= 0, got -1"))
    assert isinstance(error, plain) and isinstance(error, Checked) and is_checked(error)
    assert brief(error) == told(error) == "seed must be >= 0, got -1"


def test_a_fault_is_told_with_its_type_and_place():
    error = caught(TypeError("no"))
    assert not is_checked(error)
    assert brief(error).startswith("TypeError: no (") and "test_errors.py:" in brief(error)
    assert told(error).startswith("Traceback (most recent call last)") and told(error).endswith(
        "TypeError: no"
    )


def test_errors_of_the_file_system_name_the_file_and_not_their_number(tmp_path):
    error = caught(FileNotFoundError(2, "No such file or directory", str(tmp_path / "a")))
    assert is_checked(error) and brief(error) == f"{tmp_path / 'a'}: No such file or directory"
    assert brief(caught(OSError(28, "cannot write a: no space"))) == "cannot write a: no space"
    assert brief(caught(FileNotFoundError("no run at a"))) == "no run at a"


def test_what_every_rank_knows_is_checked_unless_a_fault_caused_it():
    assert is_checked(caught(RanksFailed("rank 1 failed: no")))
    assert is_checked(caught(RanksFailed("rank 1 failed: no"), UserError("no")))
    fault = caught(RanksFailed("rank 1 failed: no"), caught(KeyError("a")))
    assert not is_checked(fault)
    assert "KeyError: 'a'" in told(fault) and "direct cause" in told(fault)


@pytest.mark.parametrize("error", [MemoryError(), MemoryError("Unable to allocate 7 TiB"), too_much()])
def test_want_of_memory_is_no_fault_of_the_program(error):
    assert lacks_memory(error) and is_checked(error)
    assert brief(error).startswith("there is not enough memory for it") and "\n" not in brief(error)


def test_want_of_memory_on_a_gpu_is_told_without_the_paragraph_on_the_allocator():
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.81 GiB of which "
        "1.2 GiB is free. Including non-PyTorch memory, this process has 100 GiB memory in use."
    )
    error = torch.OutOfMemoryError(text)
    with pytest.raises(OutOfMemory) as raised, MemoryAdvice("pass a smaller --data.micro-tokens"):
        raise error
    assert raised.value.__cause__ is error and is_checked(raised.value)
    assert str(raised.value) == (
        "there is not enough memory for it (CUDA out of memory. Tried to allocate 2.00 GiB); "
        "pass a smaller --data.micro-tokens"
    )


def test_advice_on_memory_leaves_other_errors_alone():
    for error in (ValueError("no"), UserError("CUDA error: out of memory"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as raised, MemoryAdvice("ask for less"):
            raise error
        assert raised.value is error
    with MemoryAdvice("ask for less"):
        pass
