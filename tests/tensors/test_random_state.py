"""Random numbers go on exactly where they were, whichever generators a process has."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ray_ckpt.tensors.random_state import RandomState


def _draw() -> list[Any]:
    return [
        [random.random() for _ in range(3)],
        [random.gauss(0, 1) for _ in range(3)],  # every other one is kept for the next call
        torch.rand(5).tolist(),
        np.random.rand(3).tolist(),
        np.random.standard_normal(3).tolist(),
    ]


def _reseed(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed)


def _generators(rank: int = 0) -> tuple[dict[str, Any], set[str]]:
    """State of all generators of a rank, and the names under which storage holds it."""
    state = RandomState(rank).state_dict()
    return state, set(flatten_state_dict(state)[0])


def test_random_numbers_go_on_exactly_after_any_draws() -> None:
    random.gauss(0, 1)
    np.random.standard_normal()
    saved = RandomState(0).state_dict()
    expected = _draw()
    _draw()
    _reseed(99)
    RandomState(0).load_state_dict(saved)
    assert _draw() == expected


def test_random_states_are_plain_values_and_tensors_that_need_no_pickle(tmp_path: Path) -> None:
    torch.save(RandomState(0).state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    expected = _draw()
    RandomState(0).load_state_dict(loaded)
    assert _draw() == expected


def test_each_rank_has_a_key_of_its_own() -> None:
    assert set(RandomState(3).state_dict()) == {"rank_3"}


@pytest.mark.parametrize(
    ("lacking", "kind", "changed"), [("numpy", "numpy", [3, 4]), ("torch", "torch", [2])]
)
def test_a_generator_that_was_not_saved_starts_afresh_and_the_others_go_on(
    caplog: pytest.LogCaptureFixture, lacking: str, kind: str, changed: list[int]
) -> None:
    state, held = _generators()
    held = {key for key in held if not key.startswith(f"rank_0.{lacking}")}
    expected = _draw()
    _reseed(99)
    wanted = RandomState(0).wanted(held)
    assert lacking not in wanted["rank_0"]
    RandomState(0).load_state_dict({"rank_0": {k: state["rank_0"][k] for k in wanted["rank_0"]}})
    assert [at for at, drawn in enumerate(_draw()) if drawn != expected[at]] == changed
    assert f"for rank 0 of {kind}: these generators start afresh" in caplog.text


def test_a_generator_that_is_not_here_is_left_on_storage(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Saved with a GPU, loaded without one."""
    state, held = _generators()
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert RandomState(0).wanted({*held, "rank_0.cuda"}).keys() == state.keys()
    assert "cuda" not in RandomState(0).wanted({*held, "rank_0.cuda"})["rank_0"]
    assert caplog.text == ""


def test_a_rank_that_was_not_there_starts_afresh(caplog: pytest.LogCaptureFixture) -> None:
    _, held = _generators(rank=0)
    assert RandomState(1).wanted(held) == {}
    assert "for rank 1 of python, torch, numpy" in caplog.text
    assert RandomState(10).wanted(_generators(rank=1)[1]) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_random_numbers_go_on_exactly() -> None:
    saved = RandomState(0).state_dict()
    expected = torch.rand(5, device="cuda").tolist()
    torch.cuda.manual_seed(99)
    RandomState(0).load_state_dict(saved)
    assert torch.rand(5, device="cuda").tolist() == expected
