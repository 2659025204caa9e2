"""Folders that TorchTitan 0.3.0 wrote are used as if they were ours, and it can use ours.

What it wrote lies in `tests/data/torchtitan-0.3.0`, with the script that made it and, computed by
that script before the save, what every key must hold. The weights of `last/step-3` are those of
`run/step-2` after one more step, whose last bits depend on the kind of CPU.
"""

import hashlib
import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.lr_scheduler import LambdaLR

from jobs.decoder import Decoder, DecoderConfig, hf_config
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.cluster.purge import apply_purge
from ray_ckpt.core.errors import ForeignFolderError, IntegrityError, StateDictError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.policy import KeepConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.adopt import adopt_step, foreign_steps
from ray_ckpt.tensors.export import export_step
from ray_ckpt.tensors.load_into import read_tensors
from ray_ckpt.tensors.loading import LoadReport
from tests.tensors.ranks import run
from tests.tensors.tiny import error_of, files_in, same_tensors

DATA = Path(__file__).parent.parent / "data/torchtitan-0.3.0"
EXPECTED: dict[str, dict[str, Any]] = json.loads((DATA / "expected.json").read_text())
SIZES = DecoderConfig(dim=24, num_layers=1, num_heads=6, num_kv_heads=3, ffn_dim=16)
VOCAB_SIZE = 8
MODEL_KEYS = {
    "tok_embeddings.weight",
    "layers.0.attention.qkv_linear.wq.weight",
    "layers.0.attention.qkv_linear.wk.weight",
    "layers.0.attention.qkv_linear.wv.weight",
    "layers.0.attention.wo.weight",
    "layers.0.attention_norm.weight",
    "layers.0.feed_forward.w1.weight",
    "layers.0.feed_forward.w2.weight",
    "layers.0.feed_forward.w3.weight",
    "layers.0.ffn_norm.weight",
    "norm.weight",
    "lm_head.weight",
}
OTHER_KEYS = {
    "dataloader.dp_rank_0",
    "dataloader.dp_rank_1",
    "dataloader.world_size",
    "lr_scheduler.last_epoch",
    "train_state.ntokens_seen",
    "train_state.step",
}
QKV = re.compile(r"w[qkv]\.weight")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three folders `run`, `last` and `last-hf`; nobody may change them."""
    folder = tmp_path_factory.mktemp("torchtitan")
    with tarfile.open(DATA / "checkpoints.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """A root with TorchTitan's step-2, this test's own."""
    return shutil.copytree(written / "run", tmp_path / "run")


# ---- adopting ----


def test_what_torchtitan_calls_the_state_of_a_run() -> None:
    """Names differ where one parameter is saved as three: its moments keep the parameter's name."""
    keys = set(EXPECTED["run"])
    parameters = {QKV.sub("wqkv.weight", key) for key in MODEL_KEYS}
    moments = ("exp_avg", "exp_avg_sq", "step")
    optimizer = {f"optimizer.state.{name}.{key}" for name in parameters for key in moments}
    groups = {key for key in keys if key.startswith("optimizer.param_groups.")}
    assert keys == MODEL_KEYS | OTHER_KEYS | optimizer | groups
    assert {key.rpartition(".")[0] for key in groups} == {
        f"optimizer.param_groups.{name}" for name in parameters
    }
    assert set(EXPECTED["last"]) == MODEL_KEYS


@pytest.mark.parametrize(("folder", "step"), [("run", 2), ("last", 3)])
def test_its_step_is_adopted_whole_and_untouched(
    written: Path, tmp_path: Path, folder: str, step: int
) -> None:
    root = shutil.copytree(written / folder, tmp_path / folder)
    before = files_in(root)
    catalog = open_catalog(str(root))
    assert foreign_steps(catalog) == [step]
    manifest = adopt_step(catalog, step)
    tensors = {key: what for key, what in EXPECTED[folder].items() if "sha256" in what}
    assert {entry.name: (entry.dtype, list(entry.shape)) for entry in manifest.tensors} == {
        key: (what["dtype"], what["shape"]) for key, what in tensors.items()
    }
    assert _described(read_tensors(catalog, manifest, sorted(tensors))) == tensors
    assert catalog.verify(step) == manifest
    after = files_in(root)
    assert after.pop(f"step-{step}/ray_ckpt.manifest.json")
    assert after == before


def test_its_last_step_in_hugging_face_format_stays_foreign_and_is_passed_over(
    written: Path, root: Path
) -> None:
    """TorchTitan itself picks such a step to resume from, and fails."""
    shutil.copytree(written / "last-hf/step-3", root / "step-3")
    catalog = open_catalog(str(root))
    adopt_step(catalog, 2)
    before = files_in(root / "step-3")
    with pytest.raises(ForeignFolderError, match="step-3"):
        adopt_step(catalog, 3)
    trainer = Trainer(root)
    report = trainer.checkpoints.load()
    assert (report.step, [step for step, _ in report.skipped]) == (2, [3])
    trainer.train()
    assert isinstance(error_of(lambda: trainer.checkpoints.save(3)), ForeignFolderError)
    trainer.checkpoints.close()
    assert files_in(root / "step-3") == before


def test_its_last_step_of_weights_alone_is_passed_over(written: Path, root: Path) -> None:
    """TorchTitan's default last step; TorchTitan itself picks it to resume from, and fails."""
    shutil.copytree(written / "last/step-3", root / "step-3")
    catalog = open_catalog(str(root))
    assert [adopt_step(catalog, step).holds for step in (2, 3)] == ["everything", "model"]
    trainer = Trainer(root)
    report = trainer.checkpoints.load()
    trainer.checkpoints.close()
    assert (report.step, [step for step, _ in report.skipped]) == (2, [3])


def test_a_flipped_bit_that_changes_a_value_is_found_before_adoption(
    written: Path, tmp_path: Path
) -> None:
    """Every item that torch wrote carries a checksum, which TorchTitan never looks at."""
    source = written / "run/step-2"
    metadata = FileSystemReader(source).read_metadata()
    for index, item in list(metadata.storage_data.items())[::20]:
        root = shutil.copytree(written / "run", tmp_path / f"{index.fqn}-{item.offset}")
        shard = root / "step-2" / item.relative_path
        data = bytearray(shard.read_bytes())
        with zipfile.ZipFile(io.BytesIO(data[item.offset : item.offset + item.length])) as archive:
            content = max(archive.infolist(), key=lambda info: "data" in info.filename)
        inside = (
            30
            + int.from_bytes(data[item.offset + content.header_offset + 26 :][:2], "little")
            + int.from_bytes(data[item.offset + content.header_offset + 28 :][:2], "little")
        )
        data[item.offset + content.header_offset + inside] ^= 1
        shard.write_bytes(data)
        with pytest.raises(IntegrityError, match=shard.name):
            adopt_step(open_catalog(str(root)), 2)


def test_an_adopted_step_becomes_the_folder_that_torchtitan_would_have_written(
    written: Path, tmp_path: Path
) -> None:
    root = shutil.copytree(written / "last", tmp_path / "last")
    catalog = open_catalog(str(root))
    config = hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=0)
    manifest = adopt_step(
        catalog,
        3,
        family="torchtitan_llama3",
        assets={"config.json": json.dumps(config).encode()},
    )
    export_step(catalog, manifest, ExportSpec(name="hf-fp32", dtype="float32"))
    (shard,) = (root / "exports/hf-fp32/step-3").glob("*.safetensors")
    assert _described(load_file(shard)) == EXPECTED["last-hf"]


def test_a_crashed_save_of_torchtitan_is_not_adopted(root: Path) -> None:
    for path in ("__1_0.distcp", ".metadata"):
        (root / "step-2" / path).unlink()
        error = error_of(lambda: adopt_step(open_catalog(str(root)), 2))
        assert isinstance(error, ForeignFolderError | IntegrityError)
        assert foreign_steps(open_catalog(str(root))) == [2]


@pytest.mark.parametrize("shard", ["__0_0.distcp", "__1_0.distcp"])
def test_a_shard_that_lacks_its_last_byte_is_not_adopted(root: Path, shard: str) -> None:
    data = (root / "step-2" / shard).read_bytes()
    (root / "step-2" / shard).write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=shard):
        adopt_step(open_catalog(str(root)), 2)


def test_a_flipped_bit_anywhere_in_an_adopted_step_is_found(root: Path) -> None:
    """TorchTitan loads such a step and trains on."""
    catalog = open_catalog(str(root))
    adopt_step(catalog, 2)
    for shard in sorted((root / "step-2").glob("*.distcp")):
        data = shard.read_bytes()
        for place in range(0, len(data), len(data) // 39):
            shard.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(IntegrityError, match=shard.name):
                catalog.verify(2)
        shard.write_bytes(data)
    catalog.verify(2)


def test_crashed_saves_neither_count_nor_go_when_old_steps_are_purged(root: Path) -> None:
    """TorchTitan counts them, and deletes the good steps in their place."""
    for step in (1, 7):
        shutil.copytree(root / "step-2", root / f"step-{step}")
    for step in (3, 4, 5):
        shutil.copytree(root / "step-2", root / f"step-{step}").joinpath(".metadata").unlink()
    catalog = open_catalog(str(root))
    for step in (1, 2):
        adopt_step(catalog, step)
    assert apply_purge(catalog, KeepConfig(latest=2)).doomed == []
    adopt_step(catalog, 7)
    assert apply_purge(catalog, KeepConfig(latest=2)).doomed == [1]
    assert sorted(path.name for path in root.glob("step-*")) == [
        f"step-{step}" for step in (2, 3, 4, 5, 7)
    ]


# ---- resuming, and writing what TorchTitan reads ----


class FusedQkv(nn.Module):
    """TorchTitan's `FusedQKVLinear`: one parameter, three keys in the state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = SIZES.dim // SIZES.num_heads
        self.num_rows = SIZES.num_heads // SIZES.num_kv_heads + 2  # of heads, for each key head
        rows = SIZES.num_kv_heads * self.num_rows * self.head_dim
        self.wqkv = nn.Linear(SIZES.dim, rows, bias=False)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._merge)

    @staticmethod
    def _split(self: "FusedQkv", state_dict: dict[str, Any], prefix: str, _: Any) -> None:
        fused = state_dict.pop(f"{prefix}wqkv.weight")
        if isinstance(fused, DTensor):
            fused = fused.redistribute(fused.device_mesh, [Replicate()])
        heads = fused.reshape(SIZES.num_kv_heads, self.num_rows, self.head_dim, SIZES.dim)
        for name, part in zip("qkv", heads.split([self.num_rows - 2, 1, 1], dim=1), strict=True):
            state_dict[f"{prefix}w{name}.weight"] = part.reshape(-1, SIZES.dim).contiguous()

    @staticmethod
    def _merge(self: "FusedQkv", state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        parts = (state_dict.pop(f"{prefix}w{name}.weight") for name in "qkv")
        heads = [p.reshape(SIZES.num_kv_heads, -1, self.head_dim, SIZES.dim) for p in parts]
        state_dict[f"{prefix}wqkv.weight"] = torch.cat(heads, dim=1).reshape(-1, SIZES.dim)


class Values:
    """A part that is nothing but values."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = dict(state_dict)


class Trainer:
    """A trainer with TorchTitan's names; its optimizer's settings must come from the checkpoint."""

    def __init__(self, root: Path | str, *, rank: int = 0, num_ranks: int = 1) -> None:
        torch.manual_seed(7)
        self.model = _llama()
        if num_ranks > 1:
            mesh = init_device_mesh("cpu", (num_ranks,))
            for block in self.model.layers.values():
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)
        named = list(self.model.named_parameters())
        self.optimizer = torch.optim.AdamW(named, lr=0.5, betas=(0.5, 0.6))
        self.schedule = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 4))
        self.dataloader = Values(**{f"dp_rank_{rank}": b"", "world_size": num_ranks})
        self.train_state = Values(step=0, ntokens_seen=0)
        self.checkpoints = self.manager(root)

    def manager(self, root: Path | str) -> CheckpointManager:
        state = TrainingState(
            model=ModelWrapper(self.model),
            optimizer=self.optimizer,
            lr_scheduler=self.schedule,
            extra={"dataloader": self.dataloader, "train_state": self.train_state},
        )
        return CheckpointManager(str(root), state, config=SaveConfig(every_steps=1, mode="sync"))

    def train(self) -> None:
        """One step, as `make.py` makes them."""
        for parameter in self.model.parameters():
            parameter.grad = parameter.detach() / 10
        self.optimizer.step()
        self.schedule.step()

    def values(self) -> dict[str, Any]:
        """What the parts that are no tensors hold, by key."""
        parts = {"dataloader": self.dataloader, "train_state": self.train_state}
        return {f"{part}.{key}": v for part, o in parts.items() for key, v in o.values.items()}


@dataclass(frozen=True)
class Resumed:
    """What one rank knows after it has resumed from TorchTitan's step and trained on."""

    report: LoadReport
    weights_at_2: dict[str, Any]
    weights_at_3: dict[str, Any]
    values: dict[str, Any]
    last_lr: list[float]


def _resume(adopted: str, own: str) -> Resumed:
    """Loads step 2 from one root, saves it to another as it is, and trains one step."""
    trainer = Trainer(adopted, rank=dist.get_rank(), num_ranks=dist.get_world_size())
    report = trainer.checkpoints.load()
    trainer.checkpoints.close()
    weights = _described(trainer.model.state_dict())
    values = trainer.values()
    copy = trainer.manager(own)
    copy.load()
    copy.save(2)
    copy.close()
    trainer.train()
    return Resumed(
        report=report,
        weights_at_2=weights,
        weights_at_3=_described(trainer.model.state_dict()),
        values=values,
        last_lr=trainer.schedule.get_last_lr(),
    )


@pytest.fixture(scope="module", params=[2, 1], ids=["2 ranks", "1 rank"])
def resumed(
    request: pytest.FixtureRequest, written: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Resumed], Path]:
    """What each rank knows, and the root that the step was saved to anew."""
    folder = tmp_path_factory.mktemp("resumed")
    adopted = shutil.copytree(written / "run", folder / "adopted")
    adopt_step(open_catalog(str(adopted)), 2)
    ranks = run(_resume, str(adopted), str(folder / "own"), num_ranks=request.param)
    return ranks, folder / "own"


@pytest.fixture(scope="module")
def one_step_more(written: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights one step after step 2, which plain DCP has read, here on this very CPU."""
    trainer = Trainer(tmp_path_factory.mktemp("plain"))
    trainer.checkpoints.close()
    held = _plain(written / "run/step-2")
    trainer.model.load_state_dict({key: held[key] for key in MODEL_KEYS})
    (group,) = trainer.optimizer.param_groups
    for name, parameter in trainer.model.named_parameters():
        group |= _below(f"optimizer.param_groups.{name}.", held)
        trainer.optimizer.state[parameter] = _below(f"optimizer.state.{name}.", held)
    trainer.train()
    return trainer.model.state_dict()


def _below(prefix: str, held: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}


def _plain(folder: Path) -> dict[str, Any]:
    """All that a folder holds, as `dcp.load` reads it."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    held: dict[str, Any] = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        if isinstance(found, TensorStorageMetadata)
        else None
        for key, found in stored.items()
    }
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(held, checkpoint_id=folder)
    return held


def test_training_goes_on_from_its_step_bit_for_bit(
    resumed: tuple[list[Resumed], Path], one_step_more: dict[str, Tensor]
) -> None:
    for rank in resumed[0]:
        assert rank.report.step == 2
        assert rank.weights_at_2 == {key: EXPECTED["run"][key] for key in MODEL_KEYS}
        assert rank.weights_at_3 == _described(one_step_more)
        assert rank.last_lr == [1e-2]  # the fourth of four steps of warmup


def test_that_step_is_the_one_that_torchtitan_made(
    written: Path, one_step_more: dict[str, Tensor]
) -> None:
    theirs = _plain(written / "last/step-3")
    assert theirs.keys() == one_step_more.keys() == MODEL_KEYS
    for key, tensor in theirs.items():
        torch.testing.assert_close(one_step_more[key], tensor, rtol=1e-6, atol=1e-7)


def test_data_position_and_progress_are_what_torchtitan_had(
    resumed: tuple[list[Resumed], Path],
) -> None:
    ranks, _ = resumed
    for index, rank in enumerate(ranks):
        own = f"dataloader.dp_rank_{index}"
        position = {"value": hashlib.sha256(rank.values.pop(own)).hexdigest()}
        assert position == EXPECTED["run"][own]
        assert {key: {"value": value} for key, value in rank.values.items()} == {
            key: EXPECTED["run"][key]
            for key in ("dataloader.world_size", "train_state.step", "train_state.ntokens_seen")
        }


def test_saved_by_us_the_step_has_all_that_torchtitan_asks_for_and_the_same_in_it(
    resumed: tuple[list[Resumed], Path],
) -> None:
    """It asks `dcp.load` for exactly the keys it would have written itself."""
    ranks, own = resumed
    asked = _keys_asked_for(num_ranks=len(ranks))
    stored = FileSystemReader(own / "step-2").read_metadata().state_dict_metadata
    assert asked <= set(stored)
    assert {key.partition(".")[0] for key in set(stored) - asked} == {"rng"}
    state_dict: dict[str, Any] = {
        key: torch.empty(found.size, dtype=found.properties.dtype)
        if isinstance(found := stored[key], TensorStorageMetadata)
        else None
        for key in sorted(asked)
    }
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(state_dict, checkpoint_id=own / "step-2")
    assert _described(state_dict) == {key: EXPECTED["run"][key] for key in asked}


def test_our_folder_is_found_by_what_torchtitan_looks_for(
    resumed: tuple[list[Resumed], Path],
) -> None:
    """`re.search("step-([0-9]+)")` on what lies in the root, and a `.metadata` in it."""
    _, own = resumed
    found = [path for path in own.iterdir() if re.search(r"step-(\d+)", path.name)]
    assert [path.name for path in found] == ["step-2"]
    assert (found[0] / ".metadata").is_file()


def test_a_model_of_other_names_is_refused_by_name_and_left_as_it_is(root: Path) -> None:
    """`jobs.decoder` has the names that Llama's own code uses."""
    adopt_step(open_catalog(str(root)), 2)
    model = Decoder(SIZES, VOCAB_SIZE)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    manager = CheckpointManager(str(root), TrainingState(model=ModelWrapper(model)))
    error = error_of(manager.load)
    manager.close()
    assert isinstance(error, StateDictError)
    for key in set(before) ^ MODEL_KEYS:
        assert key in error.what
    assert same_tensors(dict(model.state_dict()), before)


# ---- names and values in Hugging Face format ----


def test_our_adapter_names_and_turns_the_weights_as_its_own_adapter_does(
    written: Path, tmp_path: Path
) -> None:
    """Three key heads on two ranks: rows of a head lie in different shards."""
    root = shutil.copytree(written / "last", tmp_path / "last")
    catalog = open_catalog(str(root))
    native = read_tensors(catalog, adopt_step(catalog, 3), sorted(MODEL_KEYS))
    config = hf_config(SIZES, vocab_size=VOCAB_SIZE, eos_token_id=0)
    adapter = make_adapter("torchtitan_llama3", config)
    theirs = load_file(written / "last-hf/step-3/model-00001-of-00001.safetensors")
    assert _described(theirs) == EXPECTED["last-hf"]
    assert same_tensors(adapter.to_hf(native), theirs)
    assert same_tensors(adapter.from_hf(theirs), native)


# ---- parts ----


def _llama() -> Decoder:
    """Our decoder under the names of TorchTitan's Llama."""
    model = Decoder(SIZES, VOCAB_SIZE)
    model.lm_head = model.output
    del model.output
    for block in model.layers.values():
        attention = block.attention
        del attention.wq, attention.wk, attention.wv
        attention.qkv_linear = FusedQkv()
    return model


def _keys_asked_for(*, num_ranks: int) -> set[str]:
    """Keys that TorchTitan's own trainer of so many ranks would have."""
    others = {f"dataloader.dp_rank_{rank}" for rank in range(num_ranks, 2)}
    return set(EXPECTED["run"]) - others


def _described(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Every value as `expected.json` has it. Collective where tensors are sharded."""
    return {key: _describe(value) for key, value in state_dict.items()}


def _describe(value: Any) -> dict[str, Any]:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        data = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    if isinstance(value, bytes):
        return {"value": hashlib.sha256(value).hexdigest()}
    return {"value": list(value) if isinstance(value, tuple) else value}
