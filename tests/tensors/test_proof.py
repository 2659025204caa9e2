"""A load reads each byte once, and what it has read is what was committed, or it says so."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ray_ckpt.core import names
from ray_ckpt.core.errors import IntegrityError, RayCkptError
from ray_ckpt.core.loading import FromWeights, LoadConfig
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.disk.store import LocalStore
from tests.tensors.plain import EVERY_STEP_SYNC, Layer, plain_manager, save_steps
from tests.tensors.ranks import run
from tests.tensors.shard_reads import counted_shard_reads
from tests.tensors.tiny import error_of

NUM_ROWS = 96_000
"""1.5 MB in float32: what is read beside the tensors does not count."""


def _save(root: str) -> None:
    model = Layer(value=3.0, num_rows=NUM_ROWS)
    manager = plain_manager(root, model, EVERY_STEP_SYNC)
    manager.save(1)
    manager.close()


def _bytes_of_load(root: str) -> int:
    """How many bytes of shards this rank reads to load the newest step."""
    taken = counted_shard_reads()
    open_read = LocalStore.open_read

    def opened(self: LocalStore, key: str) -> Any:
        assert not key.endswith(".distcp"), "a shard is read in ranges alone"
        return open_read(self, key)

    LocalStore.open_read = opened  # in this process alone
    model = Layer(value=-1.0, num_rows=NUM_ROWS)
    manager = plain_manager(root, model)
    manager.load()
    manager.close()
    assert model.values() == {3.0}
    return sum(taken)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 2), (1, 4), (4, 1), (2, 3)])
def test_each_byte_is_read_once_by_as_many_ranks_as_saved_it_or_by_others(
    tmp_path: Path, before: int, after: int
) -> None:
    run(_save, str(tmp_path), num_ranks=before)
    manifest = open_catalog(str(tmp_path)).manifest(1)
    shards = sum(e.size_bytes for e in manifest.files if e.path.endswith(".distcp"))
    read = sum(run(_bytes_of_load, str(tmp_path), num_ranks=after))
    assert shards <= read <= 1.05 * shards


# ---- whatever is damaged ----


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_any_flipped_bit_of_a_shard_is_found(tmp_path: Path) -> None:
    """In a value, in what frames a tensor, in a tensor, in what nobody reads but to compare."""
    save_steps(tmp_path, 1, 2)
    (shard,) = (tmp_path / "step-2").glob("*.distcp")
    whole = shard.read_bytes()
    manager = plain_manager(tmp_path, Layer())
    for at in range(0, len(whole), len(whole) // 60):
        _flip(shard, at)
        with pytest.raises(IntegrityError, match=rf"{shard.name} is crc64nvme:.*the manifest says"):
            manager.load(step=2)
        shard.write_bytes(whole)
    assert manager.load(step=2).step == 2
    manager.close()


class _Call:
    """Pickled, it is a call that leaves a mark wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._mark),)


def _loads(path: str) -> tuple[RayCkptError | None, RayCkptError | None]:
    root = Path(path)
    manager = plain_manager(root, Layer())
    own = error_of(lambda: manager.load(step=2))
    manager.close()
    manager = plain_manager(root.with_name("another"), Layer())
    start = FromWeights(path=str(root / "step-2"), parts=("train_state",))
    other = error_of(lambda: manager.load(config=LoadConfig(start=start)))
    manager.close()
    return own, other


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_no_pickle_is_run_before_its_file_was_compared(
    tmp_path: Path, num_ranks: int, forged: Callable[[Path, Path], None]
) -> None:
    root, mark = tmp_path / "run", tmp_path / "was-here"
    save_steps(root, 1, 2)
    forged(root / "step-2", mark)
    for own, other in run(_loads, str(root), num_ranks=num_ranks):
        assert isinstance(own, IntegrityError)
        assert "step-2 is corrupt" in own.what
        assert "do not train on" in own.safe
        assert isinstance(other, IntegrityError)
        assert "the source is damaged" in other.what
        assert str(root / "step-2") in other.where
    assert not mark.exists()


@pytest.fixture
def forged() -> Callable[[Path, Path], None]:
    """A value of the step becomes code, of the same length; the manifest is as it was."""

    def forge(step: Path, mark: Path) -> None:
        (shard,) = step.glob("*.distcp")
        data = bytearray(shard.read_bytes())
        metadata = pickle.loads((step / names.METADATA).read_bytes())
        stored = metadata.storage_data
        index = next(i for i in stored if i.fqn == "train_state.step")
        stream = io.BytesIO()
        torch.save(_Call(mark), stream, _use_new_zipfile_serialization=False)
        at, length = stored[index].offset, stored[index].length
        code = stream.getvalue().ljust(length, b"\0")
        torch.load(io.BytesIO(code), weights_only=False)
        mark.rmdir()  # so it is code
        data[at : at + length] = code
        assert len(data) == shard.stat().st_size
        shard.write_bytes(data)

    return forge
