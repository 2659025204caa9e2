"""A plan is kept while nothing changes and never longer; what is saved is what was there."""

import errno
import os
import pickle
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _DistWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from ray_ckpt.core.errors import SaveError, StateDictError, StepExistsError, StorageFullError
from ray_ckpt.tensors import save_protocol
from ray_ckpt.tensors.ranks import Ranks, causes, ours
from ray_ckpt.tensors.save_planner import ValueSavePlanner
from ray_ckpt.tensors.save_protocol import SaveProtocol
from ray_ckpt.tensors.writer import CommittingWriter, SaveJob
from tests.tensors.faults import Refuse
from tests.tensors.plain import before
from tests.tensors.ranks import run
from tests.tensors.test_save_process import Trainer, plain_job

State = dict[str, Any]
BOTH = pytest.mark.parametrize("num_ranks", [1, 2])


def sharded(tensor: Tensor, placement: Placement) -> Tensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [placement])


def filled(value: float, *shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) + 1000.0 * value


def state_of(step: int) -> State:
    """Of a training, a step later: other values, nothing else."""
    rank = dist.get_rank()
    return {
        "model": {
            "weight": sharded(filled(step, 7, 4), Shard(0)),
            "bias": filled(-step, 5),
            "frozen": sharded(filled(step, 3, 2), Shard(0)),
        },
        "optimizer": {"step": step, "lr": 0.1 * step, "names": ["a"]},
        "rng": {f"rank_{rank}": 10 * step + rank, f"words_{rank}": filled(step + rank, 3)},
    }


def changed(step: int, part: str, /, **values: Any) -> State:
    state = state_of(step)
    state[part] = {**state[part], **values}
    return state


def without_frozen(step: int) -> State:
    state = state_of(step)
    del state["model"]["frozen"]
    return state


def more_on_the_last_rank(step: int) -> State:
    last = dist.get_rank() == dist.get_world_size() - 1
    return changed(step, "rng", **({"last": step} if last else {}))


def under_another_path(step: int) -> State:
    """The same flat keys."""
    state = state_of(step)
    return {
        **state,
        "optimizer": {},
        **{f"optimizer.{k}": v for k, v in state["optimizer"].items()},
    }


def in_another_order(step: int) -> State:
    return dict(reversed(state_of(step).items()))


SAVES: list[tuple[str, Callable[[int], State], bool]] = [
    ("first", state_of, False),
    ("other values", state_of, True),
    ("a longer value", lambda s: changed(s, "optimizer", names=["b" * 1000 * s]), True),
    ("another kind of value", lambda s: changed(s, "optimizer", names=(s, None)), True),
    ("a frozen key is gone", without_frozen, False),
    ("once more", without_frozen, True),
    ("it is back", state_of, False),
    ("more", lambda s: changed(s, "model", more=filled(s, 2)), False),
    ("longer", lambda s: changed(s, "model", more=filled(s, 9)), False),
    ("in rows", lambda s: changed(s, "model", more=filled(s, 3, 3)), False),
    ("in columns", lambda s: changed(s, "model", weight=sharded(filled(s, 7, 4), Shard(1))), False),
    ("whole", lambda s: changed(s, "model", weight=sharded(filled(s, 7, 4), Replicate())), False),
    ("plain", lambda s: changed(s, "model", weight=filled(s, 7, 4)), False),
    ("plain again", lambda s: changed(s, "model", weight=filled(s, 7, 4)), True),
    ("a number is a tensor", lambda s: changed(s, "optimizer", step=torch.tensor(s)), False),
    ("and a number again", state_of, False),
    ("half as exact", lambda s: changed(s, "model", bias=filled(s, 5).half()), False),
    ("one rank has more", more_on_the_last_rank, False),
    ("and still has", more_on_the_last_rank, True),
    ("elsewhere", under_another_path, False),
    ("another order", in_another_order, False),
    ("as at first", state_of, False),
    ("and at last", state_of, True),
]
"""What is saved, and whether the plan of the save before is good for it."""


def job_of(root: str, step: int) -> SaveJob:
    job = plain_job(root)
    return replace(job, draft=replace(job.draft, step=step, save_id=f"save{step}"))


class Saves:
    """One rank that saves again and again."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.protocol = SaveProtocol(Ranks(timeout_s=30.0).group)

    def save(self, step: int, state: State) -> Exception | None:
        """What it raised, of ours; a save that went well is loaded and compared."""
        try:
            writer = CommittingWriter(job_of(self._root, step))
            self.protocol.save(state, ValueSavePlanner(), writer)
        except CheckpointException as error:
            return ours(causes(error)) or next(iter(causes(error).values()))
        expect_loaded(f"{self._root}/step-{step}", state)
        return None


def expect_loaded(folder: str, state: State) -> None:
    """Plain DCP finds there what the state holds, bit for bit."""
    found = _emptied(state)
    dcp.load(found, checkpoint_id=folder)
    _expect_equal(found, state)


def _emptied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _emptied(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_emptied(part) for part in value]
    return torch.full_like(value, -1) if isinstance(value, Tensor) else None


def _expect_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, part in expected.items():
            _expect_equal(found[key], part)
    elif isinstance(expected, list):
        _expect_equal(dict(enumerate(found)), dict(enumerate(expected)))
    elif isinstance(expected, Tensor):
        pair = [t.to_local() if isinstance(t, DTensor) else t for t in (found, expected)]
        assert torch.equal(*pair)
        assert pair[0].dtype == pair[1].dtype
    else:
        assert (type(found), found) == (type(expected), expected)


def _save_all(root: str) -> list[str | None]:
    saves = Saves(root)
    plans: list[str | None] = []
    for step, (_, state, _) in enumerate(SAVES, 1):
        assert saves.save(step, state(step)) is None
        plans.append(saves.protocol.plan)
    return plans


@BOTH
def test_a_plan_is_kept_while_nothing_changes_and_never_longer(root: str, num_ranks: int) -> None:
    first, *others = run(_save_all, root, num_ranks=num_ranks)
    assert all(plans == first for plans in others)
    assert None not in first
    kept = [new == old for old, new in zip([None, *first], first, strict=False)]
    told = [(name, is_kept) for (name, _, _), is_kept in zip(SAVES, kept, strict=True)]
    assert told == [(name, is_kept) for name, _, is_kept in SAVES]
    assert len(set(first)) == sum(not is_kept for _, _, is_kept in SAVES)


# ---- as DCP does it ----


def _save_both_ways(root: str) -> None:
    saves = Saves(root)
    for step in (1, 2):
        assert saves.save(step, state_of(step)) is None
    dcp.save(state_of(2), checkpoint_id=f"{root}/dcp")


def _described(folder: Path) -> Any:
    """All but where things lie; chunks come in the order of who writes them."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    for entry in metadata.state_dict_metadata.values():
        if isinstance(entry, TensorStorageMetadata):
            entry.chunks.sort(key=lambda chunk: chunk.offsets)
    stored = set(metadata.storage_data or {})
    return metadata.state_dict_metadata, metadata.planner_data, stored, metadata.version


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_the_metadata_is_that_of_plain_dcp(root: str, num_ranks: int) -> None:
    run(_save_both_ways, root, num_ranks=num_ranks)
    expected = _described(Path(root, "dcp"))
    assert _described(Path(root, "step-1")) == expected
    assert _described(Path(root, "step-2")) == expected


# ---- what goes from rank to rank ----


def _count_messages(root: str, num_tensors: int) -> list[list[int]]:
    """Bytes of what this rank told in each of three saves."""
    told: list[int] = []
    gather = _DistWrapper.gather_object

    def counted(self: _DistWrapper, object: Any) -> Any:
        told.append(len(pickle.dumps(object)))
        return gather(self, object)

    _DistWrapper.gather_object = counted
    saves, counts = Saves(root), list[list[int]]()
    for step in (1, 2, 3):
        tensors = {f"layers.{n}": filled(step, 2) for n in range(num_tensors)}
        told.clear()
        assert saves.save(step, {"model": tensors, "note": "x" * 1000 * (step // 3)}) is None
        counts.append(told[: 3 if step == 1 else 2])  # the load has messages of its own
    return counts


def test_while_nothing_changes_messages_are_small_whatever_the_number_of_tensors(
    root: str,
) -> None:
    for first, second, third in run(_count_messages, root, 500, num_ranks=2):
        assert max(first) > 4000
        assert max(second) < 1000
        assert third[0] == second[0]
    # one value has another length: where everything lies is told anew, by whoever wrote it
    assert max(rank[2][1] for rank in run(_count_messages, f"{root}/2", 500, num_ranks=2)) > 4000


def _count_metadata(root: str) -> list[int]:
    """How often this rank has made `.metadata` anew, after each of four saves."""
    made: list[int] = []
    make = save_protocol.MetadataFile
    save_protocol.MetadataFile = lambda *of: made.append(1) or make(*of)
    saves, counts = Saves(root), list[int]()
    for step in (1, 2, 3, 4):
        assert saves.save(step, {**state_of(step), "note": "x" * 1000 * (step // 3)}) is None
        counts.append(len(made))
    return counts


def test_metadata_is_made_anew_by_one_rank_and_only_where_something_has_moved(root: str) -> None:
    assert run(_count_metadata, root) == [[1, 1, 2, 2], [0, 0, 0, 0]]
    steps = [pickle.loads(Path(root, f"step-{n}", ".metadata").read_bytes()) for n in (1, 2)]
    assert steps[0].storage_data == steps[1].storage_data
    assert [step.storage_meta.checkpoint_id for step in steps] == ["step-1", "step-2"]


# ---- after a failure ----


def _fail_and_go_on(root: str, moment: str, rank: int) -> list[tuple[str | None, str | None]]:
    """Kind of error and plan of each of five saves, the third of which fails."""
    saves, told = Saves(root), list[tuple[str | None, str | None]]()
    for step in (1, 2, 3, 4, 5):
        if step == 3 and dist.get_rank() == rank:
            before(moment, Refuse(errno.ENOSPC))
        error = saves.save(step, state_of(step))
        told.append((error and type(error).__name__, saves.protocol.plan))
    return told


@pytest.mark.parametrize(
    ("moment", "rank"),
    [("planning", 1), ("writing", 1), ("written", 0), ("finishing", 0), ("committing", 0)],
)
def test_after_a_save_that_failed_on_one_rank_all_plan_anew(
    root: str, moment: str, rank: int
) -> None:
    first, second = run(_fail_and_go_on, root, moment, rank)
    assert first == second
    errors, plans = zip(*first, strict=True)
    assert [error is not None for error in errors] == [False, False, True, False, False]
    assert plans[0] == plans[1]
    assert plans[2] is None
    assert plans[3] == plans[4]
    assert plans[3] not in (None, plans[0])
    assert sorted(path.name for path in Path(root).glob("step-*")) == [
        f"step-{step}" for step in (1, 2, 4, 5)
    ]


def _be_refused(root: str) -> list[Exception | None]:
    saves = Saves(root)
    rank, piece = dist.get_rank(), torch.ones(2)
    of_two_kinds = changed(2, "model", bias=piece if rank else "none")
    return [
        saves.save(1, state_of(1)),
        saves.save(1, state_of(1)),
        saves.save(2, of_two_kinds),
        saves.save(2, state_of(2)),
    ]


def test_what_is_refused_is_refused_on_every_rank_and_the_next_save_is_sound(root: str) -> None:
    for errors in run(_be_refused, root):
        kinds = [type(error) for error in errors]
        assert kinds == [type(None), StepExistsError, StateDictError, type(None)]
        assert "model.bias: is one thing on one rank" in str(errors[2])
    assert list(Path(root, ".ray_ckpt/staging").iterdir()) == []


def _forget_on_one_rank(root: str) -> list[str | None]:
    saves, plans = Saves(root), list[str | None]()
    for step in (1, 2, 3):
        if step == 2 and dist.get_rank() == 1:
            saves.protocol.forget()
        assert saves.save(step, state_of(step)) is None
        plans.append(saves.protocol.plan)
    return plans


def test_a_rank_that_has_lost_the_plan_makes_all_plan_anew(root: str) -> None:
    first, second = run(_forget_on_one_rank, root)
    assert first == second
    assert first[0] != first[1] == first[2]


class Changing(Trainer):
    """A trainer whose state may get a part more."""

    extra: State | None = None

    def state(self) -> State:
        return {**super().state(), **(self.extra or {})}


def _lose_a_child_between_changes(root: str) -> list[Exception | None]:
    trainer, errors = Changing(root), list[Exception | None]()
    for step in range(1, 8):
        if step in (3, 6):
            trainer.extra = {"data": {"more": torch.full((step,), float(step))}}
        if step == 5 and trainer.ranks.rank == 1:
            os.kill(trainer.process.pid, signal.SIGKILL)
            os.waitid(os.P_PID, trainer.process.pid, os.WEXITED | os.WNOWAIT)
        kills = {"note": lambda *_: os.kill(trainer.process.pid, signal.SIGKILL)}
        is_victim = step == 2 and trainer.ranks.rank == 1
        errors.append(trainer.save(step, **(kills if is_victim else {})))
        if errors[-1] is None:
            expect_loaded(f"{root}/step-{step}", trainer.state())
        for parameter in trainer.model.parameters():
            parameter.data.mul_(-2.0)
    trainer.close()
    return errors


def test_children_that_are_lost_take_their_plan_with_them(root: str) -> None:
    for errors in run(_lose_a_child_between_changes, root):
        assert isinstance(errors.pop(1), SaveError)
        assert errors == [None] * 6


def test_full_storage_is_told_in_full(root: str) -> None:
    first, _ = run(_fail_and_go_on, root, "writing", 1)
    assert first[2][0] == StorageFullError.__name__
