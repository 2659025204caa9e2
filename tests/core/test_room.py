"""What is free against what is needed."""

from dataclasses import replace

import pytest

from ray_ckpt.core.errors import StorageFullError
from ray_ckpt.core.reconcile import plan
from ray_ckpt.core.room import Room, refuse_without_room, room_problem
from tests.core.worlds import observe, view


def room(place: str, free_bytes: int) -> Room:
    return Room(place=place, where=f"/data on {place}", free_bytes=free_bytes)


def test_ranks_that_share_a_disk_need_room_for_all_of_them() -> None:
    refuse_without_room("step-5", [(room("a", 100), 50), (room("a", 100), 50)])
    with pytest.raises(StorageFullError, match="step-5 needs 101 bytes, 100 are free") as caught:
        refuse_without_room("step-5", [(room("a", 100), 50), (room("a", 100), 51)])
    assert caught.value.where == "/data on a"
    assert caught.value.safe.startswith("nothing was written")
    assert "ray-ckpt gc" in caught.value.do


def test_ranks_with_disks_of_their_own_need_room_for_their_own_bytes() -> None:
    needs = [(room("a", 100), 90), (room("b", 100), 90)]
    refuse_without_room("step-5", needs)
    with pytest.raises(StorageFullError, match="needs 90 bytes, 10 are free"):
        refuse_without_room("step-5", [*needs, (room("c", 10), 90)])


@pytest.mark.parametrize(
    ("free_bytes", "told"),
    [
        (99, "room for no more checkpoint: 99 bytes are free, the newest one has 100"),
        (100, "room for 1 more checkpoint: 100 bytes are free"),
        (199, "room for 1 more checkpoint"),
        (200, None),
        (None, None),
    ],
)
def test_room_for_less_than_two_more_checkpoints_is_a_problem(
    free_bytes: int | None, told: str | None
) -> None:
    observed = replace(observe(view(10), view(100)), free_bytes=free_bytes)
    problem = room_problem(observed)
    assert (problem or "").startswith(told or "") and (problem is None) == (told is None)
    assert plan(observed, now=0.0).problems == ((problem,) if problem else ())


def test_a_root_without_a_checkpoint_has_no_measure() -> None:
    assert room_problem(replace(observe(), free_bytes=1)) is None
