"""Two ranks save a state most of which stands still: all of it, what has moved alone, by DCP.

A frozen base under trained tensors and their AdamW, all sharded over the ranks. Before each save
the optimizer has made a step. The save before lies where it was put; older ones are removed.
"""

import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from jobs.bench.ranks import NUM_RANKS, on_ranks, write_raw
from jobs.bench.rows import Compared, compared
from jobs.bench.timing import Taken, Timing, in_turn, stopwatch, timing_of
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.tensors.run import Run

_RAW, _MOVED, _ALL, _DCP = "raw write of all", "ray_ckpt, what moved", "ray_ckpt, all", "dcp.save"
_WIDTH = 1024
_TENSOR_BYTES = 16 << 20
_COPIES_THAT_MOVE = 3
"""Of each trained tensor: its values and two moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wrote(Timing):
    written_mb: float
    """The median of one save's, on both ranks together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StillRow(Compared):
    """One way to save it."""

    written_mb: float
    """The median of one save's, on both ranks together."""


def measure_still_saves(
    folder: Path, *, size_mb: int, repeats: int, still: float
) -> list[StillRow]:
    """Rank 0's times; `still` is the share of the state, of about `size_mb`, that never changes."""
    timings = on_ranks(partial(_saves, size_mb, repeats, still), below=folder)
    written = {t.what: t.written_mb for t in timings if isinstance(t, _Wrote)}
    return [
        StillRow(**asdict(row), written_mb=written[row.what])
        for row in compared([_plain(t) for t in timings], limit=_RAW, peer=_DCP)
    ]


def _plain(timing: Timing) -> Timing:
    return Timing(**{name: value for name, value in asdict(timing).items() if name != "written_mb"})


def _saves(size_mb: int, repeats: int, still: float, folder: Path) -> list[Timing]:
    trained = _Trained(size_mb * 1_000_000, still, folder)
    ways: dict[str, Callable[[], tuple[Taken, float]]] = {
        _RAW: trained.write_raw,
        _MOVED: partial(trained.save, trained.sharing),
        _ALL: partial(trained.save, trained.plain),
        _DCP: trained.save_with_dcp,
    }
    for _ in range(2):  # the first save knows nothing, the second sets apart what stands still
        trained.save(trained.sharing)
    returned = in_turn(ways, repeats)
    trained.close()
    return [
        _Wrote(
            **asdict(timing_of(what, [taken for taken, _ in each])),
            written_mb=statistics.median(written_mb for _, written_mb in each),
        )
        for what, each in returned.items()
    ]


class _Manager:
    """One of ours, in a folder of its own."""

    def __init__(self, folder: Path, state: TrainingState, *, full_every_saves: int) -> None:
        self.folder = folder
        self.events: list[SaveEvent] = []
        self.manager = CheckpointManager(
            str(folder),
            state,
            config=SaveConfig(
                every_steps=1, mode="sync", listen=False, full_every_saves=full_every_saves
            ),
            run=Run(on_event=self.events.append),
        )

    @property
    def written_mb(self) -> float:
        """By the last save; 0 on rank 1, which is told of none."""
        return self.events[-1].volume.written_bytes / 1e6 if self.events else 0.0


class _Trained:
    """A frozen base, trained tensors and their optimizer."""

    def __init__(self, size_bytes: int, still: float, folder: Path) -> None:
        torch.manual_seed(0)
        self._folder = folder
        self._steps = count(1)
        self._base = _tensors(int(size_bytes * still), requires_grad=False)
        self._moving = _tensors(
            int(size_bytes * (1 - still) / _COPIES_THAT_MOVE), requires_grad=True
        )
        self._model = nn.ParameterDict({**self._base, **self._moving})
        self._optimizer = torch.optim.AdamW(self._moving.values())
        self._move()
        state = TrainingState(model=ModelWrapper(self._model), optimizer=self._optimizer)
        self.sharing = _Manager(folder / "sharing", state, full_every_saves=1_000_000)
        self.plain = _Manager(folder / "plain", state, full_every_saves=1)

    def save(self, ours: _Manager) -> tuple[Taken, float]:
        """By one of our managers; then the step before is removed."""
        step = next(self._steps)
        self._move()
        taken = stopwatch()
        assert ours.manager.save(step), "every step is due"
        took = taken()
        self._remove(*(path for path in ours.folder.glob("step-*") if path.name != f"step-{step}"))
        return took, ours.written_mb

    def save_with_dcp(self) -> tuple[Taken, float]:
        """As its documentation does it."""
        self._move()
        taken = stopwatch()
        model, optimizer = get_state_dict(self._model, self._optimizer)
        state = {"model": model, "optimizer": optimizer}
        dcp.save(state, checkpoint_id=str(self._folder / "dcp"))
        took = taken()
        written_mb = sum(p.stat().st_size for p in (self._folder / "dcp").iterdir()) / 1e6
        self._remove(self._folder / "dcp")
        return took, written_mb

    def write_raw(self) -> tuple[Taken, float]:
        """Each rank writes as many bytes as it holds, past the page cache."""
        frozen = sum(tensor.numel() for tensor in self._base.values())
        moving = sum(tensor.numel() for tensor in self._moving.values())
        size_bytes = 4 * (frozen + _COPIES_THAT_MOVE * moving) // NUM_RANKS
        dist.barrier()
        taken = stopwatch()
        write_raw(self._folder / "raw", size_bytes)
        took = taken()
        self._remove(self._folder / "raw")
        return took, NUM_RANKS * size_bytes / 1e6

    def close(self) -> None:
        """Both roots are free."""
        self.sharing.manager.close()
        self.plain.manager.close()

    def _move(self) -> None:
        for parameter in self._moving.values():
            parameter.grad = torch.ones_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _remove(self, *folders: Path) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            for folder in folders:
                shutil.rmtree(folder)
        dist.barrier()


def _tensors(size_bytes: int, *, requires_grad: bool) -> dict[str, nn.Parameter]:
    """Sharded over the ranks, of so many bytes together."""
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    kind = "trained" if requires_grad else "frozen"
    found: dict[str, nn.Parameter] = {}
    for number, begin in enumerate(range(0, size_bytes, _TENSOR_BYTES)):
        num_rows = max(NUM_RANKS, min(_TENSOR_BYTES, size_bytes - begin) // (4 * _WIDTH))
        tensor = distribute_tensor(torch.randn(num_rows, _WIDTH), mesh, [Shard(0)])
        found[f"{kind}_{number}"] = nn.Parameter(tensor, requires_grad=requires_grad)
    return found
