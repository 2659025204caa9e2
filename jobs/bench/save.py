"""Two ranks save a training state and load it again: ours, DCP's own, and the machine's limit.

The state is a decoder under FSDP2 and its AdamW, three times the size of the weights. A save ends
when all bytes are on the disk; ours has digested them and committed the step by then. Loads find
the files in the page cache; ours verifies every digest first.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor

from jobs.bench.models import config_of
from jobs.bench.rows import OURS, Compared, compared
from jobs.bench.timing import Taken, Timing, in_turn, interleaved, stopwatch, timing_of
from jobs.bench.two_ranks import on_two_ranks, sharded_decoder, write_raw
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.core.saving import Mode

_RAW, _COPY = "raw write", "copy in memory"
_SAVE, _ASYNC_SAVE, _LOAD = "dcp.save", "dcp.async_save", "dcp.load"
_STILL, _DURABLE = "stands still", "until durable"


def measure_saves(folder: Path, *, size_mb: int, repeats: int) -> list[Compared]:
    """Rank 0's times; the state has about `size_mb` megabytes on both ranks together."""
    timings = on_two_ranks(partial(_saves, size_mb, repeats), below=folder)
    return compared(timings, limit=_RAW, peer=_SAVE)


def measure_async_saves(folder: Path, *, size_mb: int, repeats: int) -> list[Compared]:
    """The same of saves beside training: how long it stands still, and until the step is safe."""
    timings = on_two_ranks(partial(_async_saves, size_mb, repeats), below=folder)
    rows: list[Compared] = []
    for half, limit, other in ((_STILL, _COPY, _RAW), (_DURABLE, _RAW, _COPY)):
        its = [t for t in timings if t.what.endswith(half) and not t.what.startswith(other)]
        rows += compared(its, limit=f"{limit}: {half}", peer=f"{_ASYNC_SAVE}: {half}")
    return rows


def measure_loads(folder: Path, *, size_mb: int, repeats: int) -> list[Compared]:
    """The same of loading it."""
    timings = on_two_ranks(partial(_loads, size_mb, repeats), below=folder)
    return compared(timings, limit=_COPY, peer=_LOAD)


def _saves(size_mb: int, repeats: int, folder: Path) -> list[Timing]:
    trained = _Trained(size_mb, folder)
    ways: dict[str, Callable[[], object]] = {
        _RAW: trained.write_raw,
        OURS: trained.save,
        _SAVE: trained.save_with_dcp,
    }
    with trained:
        return interleaved(ways, repeats, prepare=trained.clear)


def _async_saves(size_mb: int, repeats: int, folder: Path) -> list[Timing]:
    trained = _Trained(size_mb, folder, mode="async")
    ways: dict[str, Callable[[], Callable[[], object]]] = {
        _COPY: trained.begin_copy,
        _RAW: trained.begin_raw_write,
        OURS: trained.begin_save,
        _ASYNC_SAVE: trained.begin_save_with_dcp,
    }
    with trained:
        taken = in_turn({w: partial(_halves, b, trained.clear) for w, b in ways.items()}, repeats)
    return [
        timing_of(f"{what}: {half}", [both[number] for both in halves])
        for number, half in enumerate((_STILL, _DURABLE))
        for what, halves in taken.items()
    ]


def _halves(
    begin: Callable[[], Callable[[], object]], prepare: Callable[[], object]
) -> tuple[Taken, Taken]:
    """What `begin` takes, and what it takes until what it returned has returned."""
    prepare()
    taken = stopwatch()
    wait = begin()
    begun = taken()
    wait()
    return begun, taken()


def _loads(size_mb: int, repeats: int, folder: Path) -> list[Timing]:
    trained = _Trained(size_mb, folder)
    with trained:
        trained.save()
        trained.save_with_dcp()
        ways: dict[str, Callable[[], object]] = {
            _COPY: trained.copy,
            OURS: trained.manager.load,
            _LOAD: trained.load_with_dcp,
        }
        return interleaved(ways, repeats, prepare=dist.barrier)


class _Trained:
    """A model and its optimizer after one step, and where they are saved."""

    def __init__(self, size_mb: int, folder: Path, *, mode: Mode = "sync") -> None:
        torch.manual_seed(0)
        self._folder = folder
        self._steps = count(1)
        self._model = sharded_decoder(config_of(size_mb // 3))
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.manager = CheckpointManager(
            str(folder / "ours"),
            TrainingState(model=ModelWrapper(self._model), optimizer=self._optimizer),
            config=SaveConfig(every_steps=1, mode=mode, listen=False),
        )
        self._held = self._local()
        self._copies = [torch.empty_like(tensor) for tensor in self._held]
        self._gloo: Any = dist.new_group(backend="gloo")

    def __enter__(self) -> "_Trained":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def clear(self) -> None:
        """Nothing is left of earlier saves."""
        dist.barrier()
        if dist.get_rank() == 0:
            for pattern in ("ours/step-*", "dcp", "raw"):
                for path in self._folder.glob(pattern):
                    shutil.rmtree(path)
        dist.barrier()

    def save(self) -> None:
        """By our manager, in the thread that trains."""
        assert self.manager.save(next(self._steps)), "every step is due"

    def save_with_dcp(self) -> None:
        """As its documentation does it."""
        dcp.save(self._state(), checkpoint_id=str(self._folder / "dcp"))

    def begin_copy(self) -> Callable[[], object]:
        """All that has to be done before training may go on."""
        self.copy()
        return lambda: None

    def begin_raw_write(self) -> Callable[[], object]:
        """All that has to be done until the bytes are safe."""
        return self.write_raw

    def begin_save(self) -> Callable[[], object]:
        """By our manager; returns what waits for the commit."""
        pending = self.manager.save(next(self._steps))
        assert pending is not None, "every step is due"
        return pending.wait

    def begin_save_with_dcp(self) -> Callable[[], object]:
        """As its documentation does it."""
        where = str(self._folder / "dcp")
        saved: Any = dcp.async_save(self._state(), checkpoint_id=where, process_group=self._gloo)
        return saved.result

    def load_with_dcp(self) -> None:
        """As its documentation does it."""
        state = self._state()
        dcp.load(state, checkpoint_id=str(self._folder / "dcp"))
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def write_raw(self) -> None:
        """Each rank writes as many bytes as it holds, past the page cache."""
        write_raw(self._folder / "raw", sum(tensor.nbytes for tensor in self._held))

    def copy(self) -> None:
        """Each rank copies what it holds, to memory that is there."""
        for tensor, its_copy in zip(self._held, self._copies, strict=True):
            its_copy.copy_(tensor)

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def _local(self) -> list[torch.Tensor]:
        values: list[Mapping[str, Any]] = [self._model.state_dict()]
        values += self._optimizer.state.values()
        tensors = [tensor for value in values for tensor in value.values()]
        return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
