"""Makes the files beside this one with TorchTitan's own checkpoint manager.

Two gloo ranks, a Llama of one layer sharded by FSDP2, AdamW, a schedule and a data loader, all of
them TorchTitan's classes. Its trainer needs a GPU, so nothing runs forward: a gradient is a tenth
of its weight. Only `_Progress` is ours, a copy of what its trainer saves of itself.

    checkpoints.tar.xz    what TorchTitan wrote, byte for byte:
        run/step-2/           saved by interval: can be resumed
        last/step-3/          the last step as it is saved by default: weights alone
        last-hf/step-3/       the last step with `last_save_in_hf`: safetensors, no index of DCP
    expected.json         for each folder its keys; a tensor's dtype, shape, SHA-256, or the value

    python3.11 -m venv venv
    venv/bin/pip install torch==2.13.0 numpy --index-url https://download.pytorch.org/whl/cpu
    venv/bin/pip install --no-deps torchtitan==0.3.0 torch-checkpointing==0.1.1 spmd_types==0.2.3
    venv/bin/pip install tyro tensorboard safetensors tokenizers 'datasets>=3.6,<4.8' einops \
        pillow 'torchdata>=0.8' wandb triton
    OMP_NUM_THREADS=1 venv/bin/torchrun --standalone --nproc_per_node=2 make.py

Weights and digests are the same on every run; the archive is not, DCP puts a new id into each save.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    OptimizersContainer,
    default_adamw,
)
from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
from torchtitan.models.llama3 import (
    _EMBEDDING_INIT,
    _NORM_INIT,
    Llama3Model,
    _build_llama3_layers,
    _output_linear_init,
)
from torchtitan.models.llama3.state_dict_adapter import Llama3StateDictAdapter

HERE = Path(__file__).parent
DIM, NUM_HEADS, NUM_KV_HEADS, FFN_DIM, VOCAB_SIZE = 24, 6, 3, 16, 8


class _Numbers(IterableDataset):
    """0, 1, 2, ..."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(1000))


class _Progress:
    """What TorchTitan's trainer saves of itself, under `train_state`."""

    step = 0
    ntokens_seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]
        self.ntokens_seen = state_dict["ntokens_seen"]


class Trainer:
    """What TorchTitan's trainer builds before it starts to train. Collective."""

    def __init__(self, *, seed: int = 0) -> None:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(seed)
        self.config = model_config()
        self.model = self.config.build()
        self.model.init_states()
        for parameter in self.model.parameters():
            if parameter.ndim == 1:
                nn.init.normal_(parameter)  # no two norms alike
        mesh = init_device_mesh("cpu", (world_size,))
        for block in self.model.layers.values():
            fully_shard(block, mesh=mesh)
        fully_shard(self.model, mesh=mesh)
        optimizer = default_adamw(lr=1e-2)
        optimizer.implementation = "foreach"
        self.optimizers: OptimizersContainer = optimizer.build(model_parts=[self.model])
        self.lr_schedulers: LRSchedulersContainer = LRSchedulersContainer.Config(
            warmup_steps=4
        ).build(optimizers=self.optimizers, training_steps=10)
        self.dataloader = ParallelAwareDataloader(_Numbers(), rank, world_size, batch_size=2)
        self.progress = _Progress()
        self._batches = iter(self.dataloader)

    def manager(self, folder: Path | str, **options: Any) -> CheckpointManager:
        """TorchTitan's checkpoint manager over `folder`."""
        return CheckpointManager(
            CheckpointManager.Config(
                enable=True, folder=str(folder), **{"interval": 1, "keep_latest_k": 0, **options}
            ),
            dataloader=self.dataloader,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.lr_schedulers,
            states={"train_state": self.progress},
            sd_adapter=Llama3StateDictAdapter(self.config, None),
        )

    def train(self, num_steps: int) -> None:
        """So many optimizer steps more are done."""
        for _ in range(num_steps):
            next(self._batches)
            for parameter in self.model.parameters():
                parameter.grad = parameter.detach() / 10
            self.optimizers.step()
            self.optimizers.zero_grad()
            self.lr_schedulers.step()
            self.progress.step += 1
            self.progress.ntokens_seen += 16


def model_config() -> Llama3Model.Config:
    """Queries, keys and values in one parameter, as in all its Llamas; 3 key heads on 2 ranks."""
    return Llama3Model.Config(
        dim=DIM,
        vocab_size=VOCAB_SIZE,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCAB_SIZE, embedding_dim=DIM, param_init=_EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=_NORM_INIT),
        lm_head=Linear.Config(
            in_features=DIM, out_features=VOCAB_SIZE, param_init=_output_linear_init(DIM)
        ),
        layers=_build_llama3_layers(
            n_layers=1,
            dim=DIM,
            n_heads=NUM_HEADS,
            n_kv_heads=NUM_KV_HEADS,
            hidden_dim=FFN_DIM,
            rope=ComplexRoPE.Config(dim=DIM // NUM_HEADS, max_seq_len=32, theta=10000.0),
            attn_backend="flex",
        ),
    )


def describe(state: dict[str, Any]) -> dict[str, Any]:
    """Every key of a state dict, on whatever rank, and what is under it. Collective."""
    flat = flatten_state_dict(_plain(state))[0]
    own = {key: _describe(value) for key, value in flat.items()}
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return dict(sorted({key: value for part in everyone for key, value in part.items()}.items()))


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Every Stateful replaced by its state, as `dcp.save` does."""
    return {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return {"value": hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else value}
    whole = (value.full_tensor() if isinstance(value, DTensor) else value).detach().contiguous()
    data = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "dtype": str(whole.dtype).removeprefix("torch."),
        "shape": list(whole.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def make() -> dict[str, Any]:
    """The three folders are in the working directory; returns what is in them. Collective."""
    trainer = Trainer()
    expected: dict[str, Any] = {}
    manager = trainer.manager("run")
    trainer.train(2)
    expected["run"] = describe(manager._flattened_model_states_sd())
    manager.save(2)
    trainer.train(1)
    weights = manager.states["model"].state_dict()
    expected["last"] = describe(weights)
    trainer.manager("last").save(3, last_step=True)
    expected["last-hf"] = describe(manager.sd_adapter.to_hf(weights))
    trainer.manager("last-hf", last_save_in_hf=True).save(3, last_step=True)
    return expected


def write(expected: dict[str, Any]) -> None:
    """The archive holds the working directory, the JSON one line a key; neither names its owner."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = info.mtime = 0
        info.uname = info.gname = ""
        return info

    with tarfile.open(HERE / "checkpoints.tar.xz", "w:xz") as archive:
        for name in sorted(expected):
            archive.add(name, filter=anonymous)
    folders = (
        f"{json.dumps(name)}: {{\n"
        + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in keys.items())
        + "\n}"
        for name, keys in sorted(expected.items())
    )
    (HERE / "expected.json").write_text("{\n" + ",\n".join(folders) + "\n}\n")


def main() -> None:
    dist.init_process_group("gloo")
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    os.chdir(
        folder[0]
    )  # DCP notes the path it is given: a relative one says nothing of the machine
    expected = make()
    if dist.get_rank() == 0:
        write(expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
