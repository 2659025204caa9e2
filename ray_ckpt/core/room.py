"""Whether there is room for what is to be written. Pure: how much is free comes in.

before a save       the bytes of all ranks that write to one disk, against what is free there
before one writer   an export, a copy: its own bytes
now and then        the newest checkpoint, twice, against what is free at the root
"""

from collections.abc import Iterable
from dataclasses import dataclass

from ray_ckpt.core.errors import StorageFullError
from ray_ckpt.core.observation import Observation

_ENOUGH = 2
"""With room for fewer checkpoints than these people hear of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What is free in one place."""

    place: str
    """Equal for all writers that share it."""
    where: str
    """As a person finds it."""
    free_bytes: int


def refuse_without_room(what: str, needs: Iterable[tuple[Room, int]]) -> None:
    """Nothing, if every place has room for the bytes of all that write there.

    Raises:
        StorageFullError: one has not; `what` is the subject of its sentence.
    """
    needed: dict[str, int] = {}
    rooms: dict[str, Room] = {}
    for room, num_bytes in needs:
        needed[room.place] = needed.get(room.place, 0) + num_bytes
        rooms.setdefault(room.place, room)
    for place, room in rooms.items():
        if needed[place] > room.free_bytes:
            raise StorageFullError(
                f"{what} needs {needed[place]} bytes, {room.free_bytes} are free",
                room.where,
                "nothing was written; what was committed before is untouched",
                "free space: ray-ckpt gc ROOT and ray-ckpt purge ROOT show what could go",
            )


def room_problem(observed: Observation) -> str | None:
    """That the root is nearly full; None where it is not, or nobody can say."""
    sizes = [view.manifest.total_bytes for view in observed.readable() if view.manifest]
    if observed.free_bytes is None or not sizes or not sizes[-1]:
        return None
    num_more = observed.free_bytes // sizes[-1]
    if num_more >= _ENOUGH:
        return None
    many = "1 more checkpoint" if num_more == 1 else "no more checkpoint"
    return (
        f"room for {many}: {observed.free_bytes} bytes are free, the newest one has {sizes[-1]}; "
        "ray-ckpt gc and ray-ckpt purge show what could go"
    )
