"""A run with a frozen base: what does not change is written once, and every step is whole."""

import contextlib
import errno
import itertools
import logging
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ray_ckpt.core.errors import ForeignFolderError, RayCkptError
from ray_ckpt.core.saving import Mode
from ray_ckpt.core.usage import Kind
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.usage import measure
from ray_ckpt.tensors import still
from tests.tensors.faults import DIED, SURVIVED, Refuse, arm, arm_s3, attempts, die
from tests.tensors.frozen import (
    BASE_BYTES,
    LITTLE_BYTES,
    NUM_ROWS,
    WIDTH,
    Adapted,
    Training,
)
from tests.tensors.plain import saved_steps
from tests.tensors.ranks import run


def _train(root: str, mode: Mode, num_saves: int) -> tuple[list[int], list[int], list[Tensor]]:
    training = Training(root, mode)
    adapters: list[Tensor] = []
    for number in range(1, num_saves + 1):
        training.step(number)
        adapters.append(training.model.adapter.detach().clone())
    training.manager.close()
    return training.written, training.taken_over, adapters


def _loaded(root: str | Path, step: int, num_rows: int = NUM_ROWS) -> dict[str, Tensor]:
    """With plain torch, in one process."""
    state = {"base": torch.zeros(num_rows, WIDTH), "adapter": torch.zeros(WIDTH)}
    dcp.load(state, checkpoint_id=Path(root, f"step-{step}"), no_dist=True)
    return state


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.mark.parametrize("mode", ["sync", "async", "process"])
def test_a_frozen_base_is_written_twice_and_then_taken_over(tmp_path: Path, mode: Mode) -> None:
    root = tmp_path / "run"
    (written, taken_over, adapters), _ = run(_train, str(root), mode, 5)
    assert all(number > BASE_BYTES for number in written[:2])
    assert all(number < LITTLE_BYTES for number in written[2:])
    assert taken_over[:2] == [0, 0] and all(number > BASE_BYTES for number in taken_over[2:])
    assert saved_steps(root) == [1, 2, 3, 4, 5]
    base = Adapted().base.detach()
    for step in (1, 2, 3, 4, 5):
        found = _loaded(root, step)
        assert torch.equal(found["base"], base), step
        assert torch.equal(found["adapter"], adapters[step - 1]), step


def test_every_step_is_whole_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    """Purged, quarantined, brought back, in any order: no step needs another one."""
    root = tmp_path / "run"
    training = Training(root)
    for step in range(1, 6):
        training.step(step)
    training.manager.close()
    catalog = open_catalog(str(root))
    shards = [root / f"step-{step}/__0_1.distcp" for step in (2, 3, 4, 5)]
    assert len({path.stat().st_ino for path in shards}) == 1
    catalog.trash(2)
    catalog.quarantine(4)
    assert saved_steps(root) == [1, 3, 5]
    (aside,) = catalog.store.list_folders(".ray_ckpt/trash")
    catalog.trash(3)
    freed = catalog.commit.erase(f".ray_ckpt/trash/{aside}", "step-2")
    assert freed < LITTLE_BYTES, "others still need the base"
    catalog.restore(3)
    assert saved_steps(root) == [1, 3, 5]
    assert all(torch.equal(_loaded(root, s)["base"], Adapted().base) for s in (1, 3, 5))


def test_bytes_that_steps_share_count_once(tmp_path: Path) -> None:
    """With the oldest of them, as long as it is there."""
    root = tmp_path / "run"
    training = Training(root)
    for step in range(1, 5):
        training.step(step)
    training.manager.close()
    catalog = open_catalog(str(root))
    for is_purged in (False, True):
        if is_purged:
            catalog.trash(2)
        found = measure(catalog, catalog.observe())
        files = {path.stat().st_ino: path for path in root.rglob("*") if path.is_file()}
        assert found.total_bytes == sum(path.stat().st_size for path in files.values())
        holder = 3 if is_purged else 2
        sizes = {u.owner.step: u.size_bytes for u in found.of(Kind.CHECKPOINT)}
        assert [step for step, size in sizes.items() if size > BASE_BYTES] == [holder, 1]
        models = {step: one.model for step, one in found.splits.items()}
        assert all(models[step] <= sizes[step] for step in sizes if step is not None)


def test_a_bad_sector_is_found_in_every_step_that_has_it(tmp_path: Path) -> None:
    root = tmp_path / "run"
    training = Training(root)
    for step in (1, 2, 3, 4):
        training.step(step)
    training.manager.close()
    with (root / "step-2/__0_1.distcp").open("r+b") as file:
        file.seek(5000)
        file.write(b"bad")
    catalog = open_catalog(str(root))
    damage = {step: catalog.damage(step) for step in (1, 2, 3, 4)}
    assert damage[1] == []
    assert all("__0_1.distcp is crc64nvme" in damage[step][0] for step in (2, 3, 4))


def _moved(training: Training, step: int) -> None:
    """One element of the base."""
    training.model.local_base[3, 5] += 1.0
    training.step(step)


def test_a_base_that_moves_is_written_with_its_new_values(tmp_path: Path) -> None:
    """It comes back once it was still for twice as long as the first time."""
    training = Training(tmp_path / "run")
    for step in (1, 2, 3):
        training.step(step)
    before = training.model.local_base.clone()
    _moved(training, 4)
    for step in (5, 6, 7):
        training.step(step)
    training.manager.close()
    assert training.shares == [
        False, False, True, False, False, False, True
    ]  # fmt: skip
    assert torch.equal(_loaded(tmp_path / "run", 3)["base"], before)
    for step in (4, 5, 6, 7):
        assert torch.equal(_loaded(tmp_path / "run", step)["base"], training.model.local_base)
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7]


def test_a_still_weight_with_nan_in_it_is_named_in_every_step(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.model.local_base[3, 5] = math.nan
    for step in (1, 2, 3, 4):
        training.step(step)
    training.manager.close()
    assert training.shares == [False, False, True, True]
    catalog = open_catalog(str(tmp_path / "run"))
    assert {catalog.manifest(step).non_finite for step in (1, 2, 3, 4)} == {("base",)}


def test_no_more_steps_share_a_file_than_the_config_says(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", full_every_saves=3)
    for step in range(1, 9):
        training.step(step)
    training.manager.close()
    files = [(tmp_path / f"run/step-{step}/__0_1.distcp").stat() for step in range(2, 9)]
    inodes = [file.st_ino for file in files]
    assert [inodes.count(inode) for inode in inodes] == [3, 3, 3, 3, 3, 3, 1]


def test_without_being_asked_to_a_save_shares_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", full_every_saves=1)
    for step in (1, 2, 3):
        training.step(step)
    training.manager.close()
    assert training.taken_over == [0, 0, 0] and min(training.written) > BASE_BYTES
    assert {path.stat().st_nlink for path in Path(tmp_path, "run").glob("step-*/*")} == {1}


@pytest.mark.parametrize("act", ["trash", "quarantine"])
def test_a_step_that_is_gone_is_not_missed(tmp_path: Path, act: str) -> None:
    """The file is written from memory."""
    root = tmp_path / "run"
    training = Training(root)
    for step in (1, 2, 3):
        training.step(step)
    getattr(open_catalog(str(root)), act)(3)
    for step in (4, 5):
        training.step(step)
    training.manager.close()
    assert training.shares == [0, 0, 1, 0, 1]
    assert saved_steps(root) == [1, 2, 4, 5]


def test_a_file_that_a_damaged_step_has_as_well_is_not_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "run"
    training = Training(root)
    for step in (1, 2, 3):
        training.step(step)
    open_catalog(str(root)).quarantine(2)
    training.step(4)
    training.manager.close()
    assert training.taken_over[3] == 0 and training.written[3] > BASE_BYTES
    sound, shared = (root / f"step-{step}/__0_1.distcp" for step in (4, 3))
    assert sound.stat().st_ino != shared.stat().st_ino


def test_another_file_under_the_same_name_is_not_taken_over(tmp_path: Path) -> None:
    root = tmp_path / "run"
    training = Training(root)
    for step in (1, 2, 3):
        training.step(step)
    shard = root / "step-3/__0_1.distcp"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 0xFF
    shard.unlink()
    shard.write_bytes(data)
    training.step(4)
    training.manager.close()
    assert training.taken_over[3] == 0
    open_catalog(str(root)).verify(4)


@pytest.mark.parametrize(
    "code", [errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOTSUP], ids=errno.errorcode.get
)
def test_a_place_that_refuses_links_is_told_of_once_and_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    """As the kernel does it for files of others, or where too many names lead to one."""
    link = os.link

    def refuse(source: Any, target: Any, **options: Any) -> None:
        if "/step-" in str(source):
            raise OSError(code, os.strerror(code))
        link(source, target, **options)

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(still, "LEAST_BYTES", 0)
    training = Training(tmp_path / "run", num_rows=2)
    for step in range(1, 6):
        training.step(step)
    training.manager.close()
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1 and "no file can be taken over here" in told[0].getMessage()
    assert training.taken_over == [0] * 5
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4, 5]


def test_a_state_that_lacks_a_tensor_is_another_one(tmp_path: Path) -> None:
    training = Training(tmp_path / "run")
    training.model.register_buffer("extra", torch.zeros(8))
    for step in (1, 2, 3):
        training.step(step)
    del training.model.extra
    for step in (4, 5, 6):
        training.step(step)
    training.manager.close()
    assert training.shares == [False, False, True, False, False, True]


@pytest.mark.parametrize("mode", ["sync", "process"])
def test_a_save_that_failed_forgets_what_was_known(tmp_path: Path, mode: Mode) -> None:
    """Its step 4 is there already, from somebody else: the save of it fails."""
    training = Training(tmp_path / "run", mode)
    for step in (1, 2, 3):
        training.step(step)
    (tmp_path / "run/step-4").mkdir()
    (tmp_path / "run/step-4/file").touch()
    with pytest.raises(ForeignFolderError):
        training.step(4)
    for step in (5, 6, 7):
        training.step(step)
    training.manager.close()
    taken = {event.step: event.volume.taken_over_bytes > BASE_BYTES for event in training.events}
    assert taken == {1: False, 2: False, 3: True, 4: False, 5: False, 6: False, 7: True}
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 5, 6, 7]


def test_a_save_process_that_was_killed_forgets_what_was_known(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", "process")
    for step in (1, 2, 3):
        training.step(step)
    process = training.manager._saver._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process._child._process.wait()
    for step in (4, 5, 6):
        training.step(step)
    training.manager.close()
    assert training.shares == [0, 0, 1, 0, 0, 1]
    assert saved_steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_the_log_tells_how_much_was_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray_ckpt")
    training = Training(tmp_path / "run")
    for step in (1, 2, 3):
        training.step(step)
    training.manager.close()
    lines = [line for line in caplog.messages if "is committed" in line]
    written, taken_over = training.written[2], training.taken_over[2]
    assert "written" not in lines[1]
    assert f"; {written} bytes were written, {taken_over} have not changed" in lines[2]


@pytest.mark.s3
@pytest.mark.parametrize("mode", ["async", "process"])
def test_an_object_store_copies_the_base_itself(s3_root: str, mode: Mode) -> None:
    """Each step has an object of its own."""
    training = Training(s3_root, mode)
    for step in range(1, 6):
        training.step(step)
    assert training.shares == [False, False, True, True, True]
    assert all(number < LITTLE_BYTES for number in training.written[2:])
    catalog = open_catalog(s3_root)
    catalog.trash(2)
    catalog.quarantine(5)
    training.step(6)
    training.manager.close()
    assert training.shares[5] is False, "step-5 is not to be trusted"
    (aside,) = catalog.store.list_folders(".ray_ckpt/trash")
    assert catalog.commit.erase(f".ray_ckpt/trash/{aside}", "step-2") > BASE_BYTES
    assert saved_steps(s3_root) == [1, 3, 4, 6]
    anew = Training(s3_root)
    anew.model.local_base.zero_()
    anew.manager.load(step=4)
    anew.manager.close()
    assert torch.equal(anew.model.local_base, Adapted().local_base)


@pytest.mark.s3
def test_a_damaged_object_is_not_copied_again(s3_root: str) -> None:
    training = Training(s3_root)
    for step in (1, 2, 3):
        training.step(step)
    store = open_catalog(s3_root).store
    (key,) = [info.key for info in store.list_objects("step-3") if info.size_bytes > BASE_BYTES]
    data = bytearray(store.read(key))
    data[5000] ^= 0xFF
    store.write(key, bytes(data))
    training.step(4)
    training.manager.close()
    assert training.shares == [False, False, True, False]
    open_catalog(s3_root).verify(4)


def test_a_store_that_computes_no_checksums_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = f"local://{tmp_path}/run"
    training = Training(root)
    for step in range(1, 6):
        training.step(step)
    training.manager.close()
    (told,) = [line for line in caplog.messages if "no file can be taken over here" in line]
    assert "computes no checksum" in told
    assert not any(training.shares) and saved_steps(root) == [1, 2, 3, 4, 5]


def _save_that_takes_over(root: str, number: int, armed: Callable[..., None]) -> None:
    """Steps 1 and 2 are there; the process dies in the save of step 3, before a change."""
    still.LEAST_BYTES = 0
    training = Training(root, num_rows=2)
    training.step(1)
    training.step(2)
    armed(Path(root), number, die)
    training.step(3)
    assert training.taken_over[2] > 0
    os._exit(SURVIVED)


def _check(root: str) -> int:
    """The newest step; all are whole, whatever becomes of the oldest, and training goes on."""
    steps = saved_steps(root)
    training = Training(root, num_rows=2)
    base = training.model.local_base.clone()
    training.model.local_base.zero_()
    assert training.manager.load().step == steps[-1]
    assert torch.equal(training.model.local_base, base)
    training.step(steps[-1] + 1)
    training.manager.close()
    open_catalog(root).trash(1)
    assert saved_steps(root) == [*steps[1:], steps[-1] + 1]
    return steps[-1]


def test_a_save_that_dies_while_it_takes_over_leaves_whole_steps(tmp_path: Path) -> None:
    roots = ((tmp_path / f"run{number}").as_posix() for number in itertools.count())
    found: list[int] = []
    for _, root in attempts(_save_that_takes_over, roots, arm):
        found.append(_check(root))
        assert list(Path(root, ".ray_ckpt/staging").iterdir()) == []
    assert {*found} == {2, 3} and found == sorted(found)


def _save_that_is_refused(root: str, number: int) -> None:
    """Step 3 meets the fault, step 4 does not."""
    still.LEAST_BYTES = 0
    training = Training(root, num_rows=2)
    training.step(1)
    training.step(2)
    refuse = Refuse(errno.EIO)
    fault = arm(Path(root), number, refuse)
    with contextlib.suppress(RayCkptError):
        training.step(3)
    fault.stop()
    steps = saved_steps(root)
    training.step(4)
    training.manager.close()
    assert saved_steps(root) == [*steps, 4]
    assert [event.kind == "committed" for event in training.events] == [1, 1, 3 in steps, 1]
    os._exit(DIED if refuse.was_asked else SURVIVED)


@pytest.mark.slow
def test_a_save_that_is_refused_while_it_takes_over_is_whole_or_not_there(tmp_path: Path) -> None:
    roots = ((tmp_path / f"run{number}").as_posix() for number in itertools.count())
    found: list[list[int]] = []
    for _, root in attempts(_save_that_is_refused, roots):
        found.append(saved_steps(root))
        base = Adapted(num_rows=2).local_base
        assert all(torch.equal(_loaded(root, step, num_rows=2)["base"], base) for step in found[-1])
    assert [1, 2, 4] in found and [1, 2, 3, 4] in found


@pytest.mark.s3
@pytest.mark.slow
def test_a_save_that_dies_while_a_store_copies_leaves_whole_steps(s3_root: str) -> None:
    roots = (f"{s3_root}{number}" for number in itertools.count())
    found = [_check(root) for _, root in attempts(_save_that_takes_over, roots, arm_s3)]
    assert {*found} == {2, 3}
