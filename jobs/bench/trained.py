"""A model and its optimizer that some ranks train, and every way to save and to load them."""

import os
import shutil
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor

from jobs.bench.at import remove
from jobs.bench.models import config_of
from jobs.bench.ranks import DEVICE, read_raw, sharded_decoder, synchronize, write_raw
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.core.saving import Mode

_NUM_TOKENS = 64
"""Of one training step, on each rank: little, for the model is large and the cores are few."""


class Trained:
    """A model and its optimizer after one step, and where they are saved."""

    def __init__(
        self,
        size_mb: int,
        root: str,
        *,
        mode: Mode = "sync",
        keep_in_memory_s: float | None = None,
    ) -> None:
        torch.manual_seed(0)
        self._root = root
        self._steps = count(1)
        self._model = sharded_decoder(config_of(size_mb // 3), DEVICE)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        for parameter in self._model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.manager = CheckpointManager(
            f"{root}/ours",
            TrainingState(model=ModelWrapper(self._model), optimizer=self._optimizer),
            config=SaveConfig(
                every_steps=1, mode=mode, listen=False, keep_in_memory_s=keep_in_memory_s
            ),
        )
        self._held = self._local()
        self._copies = [
            torch.empty_like(tensor, device="cpu", pin_memory=DEVICE == "cuda")
            for tensor in self._held
        ]
        self._gloo: Any = dist.new_group(backend="gloo")

    def __enter__(self) -> "Trained":
        return self

    def __exit__(self, *_: object) -> None:
        self.manager.close()

    def train(self) -> None:
        """One step: forward, backward, and the optimizer's."""
        tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device=DEVICE)
        self._model(tokens).float().logsumexp(-1).mean().backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        synchronize()

    @property
    def is_on_disk(self) -> bool:
        """Whether the machine's own disk is the limit, and not a store."""
        return "://" not in self._root

    def evict(self) -> None:
        """No byte of any save is in the page cache."""
        if dist.get_rank() == 0 and self.is_on_disk:
            for path in Path(self._root).glob("**/*.distcp"):
                file = os.open(path, os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
        dist.barrier()

    def read_raw(self) -> None:
        """Each rank reads its own file of our save, past the page cache."""
        [path] = Path(self._root).glob(f"ours/step-*/__{dist.get_rank()}_0.distcp")
        read_raw(path)

    def clear(self) -> None:
        """Nothing is left of earlier saves."""
        dist.barrier()
        if dist.get_rank() == 0:
            if self.is_on_disk:
                for pattern in ("ours/step-*", "dcp", "raw"):
                    for path in Path(self._root).glob(pattern):
                        shutil.rmtree(path)
            else:
                remove(self._root, "ours/step-", "dcp/")
        dist.barrier()

    def save(self) -> None:
        """By our manager, in the thread that trains."""
        assert self.manager.save(next(self._steps)), "every step is due"

    def save_with_dcp(self) -> None:
        """As its documentation does it."""
        dcp.save(self._state(), checkpoint_id=self._dcp)

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

    def begin_save_with_dcp(
        self, checkpointer: AsyncCheckpointerType = AsyncCheckpointerType.THREAD
    ) -> Callable[[], object]:
        """As its documentation does it."""
        saved: Any = dcp.async_save(
            self._state(),
            checkpoint_id=self._dcp,
            process_group=self._gloo,
            async_checkpointer_type=checkpointer,
        )
        return saved.result

    def load_with_dcp(self) -> None:
        """As its documentation does it."""
        state = self._state()
        dcp.load(state, checkpoint_id=self._dcp)
        set_state_dict(
            self._model,
            self._optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )

    def write_raw(self) -> None:
        """Each rank writes as many bytes as it holds, past the page cache."""
        write_raw(Path(self._root, "raw"), sum(tensor.nbytes for tensor in self._held))

    def copy(self) -> None:
        """Each rank copies what it holds to the host's memory, which is there, and pinned."""
        for tensor, its_copy in zip(self._held, self._copies, strict=True):
            its_copy.copy_(tensor, non_blocking=True)
        synchronize()

    def copy_back(self) -> None:
        """The other way round."""
        for tensor, its_copy in zip(self._held, self._copies, strict=True):
            tensor.copy_(its_copy, non_blocking=True)
        synchronize()

    @property
    def _dcp(self) -> str:
        return f"{self._root}/dcp"

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}

    def _local(self) -> list[torch.Tensor]:
        values: list[Mapping[str, Any]] = [self._model.state_dict()]
        values += self._optimizer.state.values()
        tensors = [tensor for value in values for tensor in value.values()]
        return [(t.to_local() if isinstance(t, DTensor) else t).detach() for t in tensors]
