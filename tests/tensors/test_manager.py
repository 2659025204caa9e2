"""What a training loop relies on: exactly resumed, never mixed, nothing damaged used."""

import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig
from ray_ckpt.core import names
from ray_ckpt.core.config import SaveConfig
from ray_ckpt.core.errors import (
    ForeignFolderError,
    IntegrityError,
    LeaseHeldError,
    RayCkptError,
    StateDictError,
    StepExistsError,
    StepNotFoundError,
)
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.loading import LoadReport
from ray_ckpt.tensors.manager import CheckpointManager, Run
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState, TrainState
from tests.tensors.conftest import STEPS, SavedRun
from tests.tensors.ranks import RankGroup, run, stopped, wait_until
from tests.tensors.tiny import (
    SIZES,
    error_of,
    files_in,
    make_trainer,
    record_log,
    same_tensors,
    train,
    train_step,
)

SYNC = SaveConfig(every_steps=3, mode="sync")
ASYNC = SaveConfig(every_steps=3, mode="async")
NEVER = SaveConfig(every_steps=1_000_000)

# ---- exactness ----


@pytest.mark.parametrize("save", [SYNC, ASYNC], ids=["sync", "async"])
def test_a_run_that_was_interrupted_is_bit_identical_to_one_that_was_not(
    saved_run: SavedRun, root: str, save: SaveConfig
) -> None:
    first = run(train, root, 6, save, 0)
    second = run(train, root, 12, save, 1)  # the other seed must not matter
    for straight, before, after in zip(saved_run.ranks, first, second, strict=True):
        assert after.report.step == 6
        assert {**before.losses, **after.losses} == straight.losses
        assert {**before.draws, **after.draws} == straight.draws
        assert same_tensors(after.state, straight.state)
        assert after.num_samples == straight.num_samples == 12 * 4


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_another_number_of_ranks_loads_the_same_state(
    saved_run: SavedRun, saved_root: Path, tmp_path: Path, num_ranks: int
) -> None:
    if num_ranks == 2:  # from one rank to two; otherwise from two to one
        saved_root = tmp_path / "by one"
        written = run(train, str(saved_root), 12, ASYNC, num_ranks=1)[0]
    else:
        written = saved_run.ranks[0]
    loaded = run(train, str(saved_root), 12, NEVER, 7, num_ranks=num_ranks)
    for outcome in loaded:
        assert outcome.report.step == 12
        assert same_tensors(outcome.state, written.state)
        assert outcome.num_samples == written.num_samples
    strangers = [o for o in loaded if any("no random state for rank" in line for line in o.log)]
    assert len(strangers) == (1 if num_ranks == 2 else 0)


def test_training_goes_on_with_the_same_samples_on_another_number_of_ranks(
    saved_run: SavedRun, saved_root: Path
) -> None:
    shutil.rmtree(saved_root / "step-12")
    shutil.rmtree(saved_root / "step-9")
    outcome = run(train, str(saved_root), 12, NEVER, num_ranks=1)[0]
    assert outcome.report.step == 6
    straight = {s: loss for s, loss in saved_run.ranks[0].losses.items() if s > 6}
    assert outcome.losses == pytest.approx(straight, rel=1e-5)


# ---- damage ----


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a flipped bit in a shard": lambda step: _flip(step / "__1_0.distcp"),
    "a flipped bit in the index": lambda step: _flip(step / ".metadata"),
    "a flipped bit in an asset": lambda step: _flip(step / "hf_assets/tokenizer.json"),
    "a truncated shard": lambda step: _truncate(step / "__1_0.distcp"),
    "a missing shard": lambda step: (step / "__0_0.distcp").unlink(),
}


def _ask_for_damaged(
    root: str,
) -> tuple[RayCkptError | None, dict[str, str], LoadReport, list[str], int]:
    told = record_log()
    trainer = make_trainer(root, SYNC)
    error = error_of(lambda: trainer.checkpoints.load(step=12))
    before = files_in(root)
    report = trainer.checkpoints.load()
    samples_at_load = trainer.windows.num_samples
    for step in range(report.step + 1, 13):
        train_step(trainer)
        trainer.checkpoints.save(step, last_step=step == 12)
    trainer.checkpoints.close()
    return error, before, report, told, samples_at_load


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_step_is_passed_over_told_and_trained_anew(
    saved_root: Path, damage: Callable[[Path], None]
) -> None:
    damage(saved_root / "step-12")
    as_found = files_in(saved_root)
    for error, after_error, report, _, num_samples in run(_ask_for_damaged, str(saved_root)):
        assert isinstance(error, IntegrityError), "asked for by number, it is never replaced"
        assert after_error == as_found
        assert report.step == 9
        assert [step for step, _ in report.skipped] == [12]
        assert num_samples == 9 * 4
    catalog = open_catalog(str(saved_root))
    views = catalog.observe().checkpoints
    assert [v.step for v in views if v.state is CheckpointState.QUARANTINED] == [12]
    catalog.verify(12)  # saved once more by the training that went on


def test_a_damaged_step_is_logged_once_with_file_and_reason(saved_root: Path) -> None:
    _flip(saved_root / "step-12/__1_0.distcp")
    outcomes = run(train, str(saved_root), 9, NEVER)
    warnings = [line for o in outcomes for line in o.log if line.startswith("WARNING")]
    assert len(warnings) == 2  # moved, and passed over
    assert all("step-12" in line and "__1_0.distcp" in line for line in warnings)


def test_a_step_whose_manifest_cannot_be_read_is_passed_over_and_refused_by_number(
    saved_root: Path,
) -> None:
    os.truncate(saved_root / "step-12" / names.MANIFEST, 500)
    before = files_in(saved_root)
    manager = _plain_manager(saved_root, nn.Linear(2, 2))
    with pytest.raises(IntegrityError, match="manifest"):
        manager.load(step=12)
    manager.close()
    assert files_in(saved_root) == before
    report = run(train, str(saved_root), 9, NEVER)[0].report
    assert (report.step, [step for step, _ in report.skipped]) == (9, [12])


def test_when_all_steps_are_damaged_no_run_starts_from_scratch_beside_them(
    saved_root: Path,
) -> None:
    for step in STEPS:
        _flip(saved_root / names.step_dir(step) / "__0_0.distcp")
    with pytest.raises(AssertionError, match="training did not start from scratch"):
        run(train, str(saved_root), 0, NEVER)


def test_a_step_that_is_not_there_is_refused_by_number(saved_root: Path) -> None:
    trainer = _plain_manager(saved_root, nn.Linear(2, 2))
    with pytest.raises(StepNotFoundError, match="step-7"):
        trainer.load(step=7)
    trainer.close()


def test_a_model_of_another_shape_of_keys_is_refused_before_a_tensor_is_read(
    saved_root: Path,
) -> None:
    model = nn.Linear(2, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    manager = _plain_manager(saved_root, model)
    with pytest.raises(StateDictError, match=r"weight.*tok_embeddings\.weight"):
        manager.load()
    manager.close()
    assert same_tensors(dict(model.state_dict()), before)


def test_a_model_of_other_shapes_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    manager = _plain_manager(tmp_path, nn.Linear(2, 2), SaveConfig(every_steps=1))
    manager.save(1)
    manager.close()
    wider = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in wider.state_dict().items()}
    manager = _plain_manager(tmp_path, wider)
    with pytest.raises(StateDictError, match="weight"):
        manager.load()
    manager.close()
    assert same_tensors(dict(wider.state_dict()), before)


# ---- what may not be overwritten ----


def _save_where_something_is(root: str) -> tuple[LoadReport, list[RayCkptError | None]]:
    trainer = make_trainer(root, SYNC)
    report = trainer.checkpoints.load()
    errors = [error_of(lambda: trainer.checkpoints.save(12)), error_of(lambda: _save(trainer, 15))]
    trainer.checkpoints.close()
    trainer = make_trainer(root, ASYNC)
    trainer.checkpoints.save(12)
    errors.append(error_of(trainer.checkpoints.wait))
    trainer.checkpoints.close()
    return report, errors


def _save(trainer: Any, step: int) -> None:
    train_step(trainer)
    trainer.checkpoints.save(step)


def test_neither_a_committed_step_nor_a_foreign_folder_is_ever_written(saved_root: Path) -> None:
    foreign = saved_root / "step-15"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    before = files_in(saved_root)
    for report, errors in run(_save_where_something_is, str(saved_root)):
        assert (report.step, [step for step, _ in report.skipped]) == (12, [15])
        assert [type(e) for e in errors] == [StepExistsError, ForeignFolderError, StepExistsError]
    assert files_in(saved_root) == before
    assert list((saved_root / ".ray_ckpt/staging").iterdir()) == []


def test_a_background_failure_is_logged_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1/notes.txt").write_text("mine")
    told = record_log()
    manager = _plain_manager(tmp_path, nn.Linear(2, 2), SaveConfig(every_steps=1))
    manager.save(1)
    manager.save(2)
    manager.close()
    assert any(line.startswith("ERROR") and "step-1" in line for line in told)
    assert [view.step for view in open_catalog(str(tmp_path)).observe().readable()] == [2]


# ---- one writer ----


def _hold_the_root(root: str) -> None:
    make_trainer(root, NEVER)
    threading.Event().wait()


def test_a_second_trainer_is_refused_while_the_first_lives_and_welcome_once_it_is_dead(
    tmp_path: Path,
) -> None:
    with RankGroup(_hold_the_root, str(tmp_path), num_ranks=1) as group:
        wait_until(lambda: list(tmp_path.glob(".ray_ckpt/lease/trainer-*.json")))
        with pytest.raises(LeaseHeldError, match=str(group.pids[0])):
            _plain_manager(tmp_path, nn.Linear(2, 2))
        os.kill(group.pids[0], signal.SIGKILL)
        group.wait()
        _plain_manager(tmp_path, nn.Linear(2, 2)).close()


def test_a_trainer_that_was_taken_over_commits_nothing_more(tmp_path: Path) -> None:
    config = SaveConfig(every_steps=1, mode="sync")
    old = _plain_manager(tmp_path, nn.Linear(2, 2), config, owner="job")
    new = _plain_manager(tmp_path, nn.Linear(2, 2), config, owner="job")
    with pytest.raises(LeaseHeldError):
        old.save(1)
    assert open_catalog(str(tmp_path)).observe().checkpoints == ()
    new.save(1)
    old.close()
    new.save(2)
    new.close()
    assert [view.step for view in open_catalog(str(tmp_path)).observe().readable()] == [1, 2]


# ---- death ----

LARGE = DecoderConfig(dim=160, num_layers=4, num_heads=4, num_kv_heads=2, ffn_dim=512)


def _train_and_note_commits(root: str, journal: str) -> None:
    """Saves after every step, until it is killed; the journal holds what was said committed."""

    def note(step: int) -> None:
        with Path(journal).open("a") as file:
            file.write(f"{step}\n")

    torch.manual_seed(0)
    trainer = make_trainer(root, SaveConfig(every_steps=1), sizes=LARGE, on_commit=note)
    report = trainer.checkpoints.load()
    for step in range(report.step + 1, report.step + 1000):
        train_step(trainer)
        trainer.checkpoints.save(step)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_rank_killed_at_any_moment_of_a_save_costs_no_step_that_was_said_committed(
    tmp_path: Path,
) -> None:
    root, journal = tmp_path / "run", tmp_path / "journal"
    journal.touch()
    chance = random.Random(0)
    catalog = open_catalog(str(root))
    for _ in range(5):
        said = len(journal.read_text().split())
        moment = chance.uniform(0.0, 0.99)  # of a whole save, measured in bytes staged
        with RankGroup(_train_and_note_commits, str(root), str(journal), num_ranks=2) as group:
            wait_until(lambda said=said: len(journal.read_text().split()) > said)
            whole = catalog.observe().readable()[-1].manifest.total_bytes
            wait_until(lambda m=moment, w=whole: _staged_bytes(root) >= m * w)
            group.kill(1)
            assert group.wait(20.0) == [False, False], "rank 0 must not hang on a dead rank"
        for step in {int(line) for line in journal.read_text().split()}:
            catalog.verify(step)
        assert not [v for v in catalog.observe().checkpoints if v.problem]
    newest = catalog.observe().readable()[-1].step
    outcome = run(train, str(root), newest, NEVER, 0, LARGE)[0]
    assert (outcome.report.step, outcome.report.skipped) == (newest, ())


def _staged_bytes(root: Path) -> int:
    """Of the save that is being written; files may vanish while they are counted."""
    size = 0
    for path in (root / ".ray_ckpt/staging").glob("save-*/*"):
        try:
            size += path.stat().st_size
        except FileNotFoundError:
            return 0
    return size


def _save_with_a_short_patience(root: str) -> RayCkptError | None:
    config = SaveConfig(every_steps=1, mode="sync", timeout_s=2.0)
    trainer = make_trainer(root, config, sizes=LARGE)
    train_step(trainer)
    return error_of(lambda: trainer.checkpoints.save(1))


def test_a_rank_that_gives_up_leaves_the_files_to_the_one_that_commits(tmp_path: Path) -> None:
    """Rank 0 hangs between its last shard and the commit for longer than rank 1 waits."""
    with RankGroup(_save_with_a_short_patience, str(tmp_path), num_ranks=2) as group:
        wait_until(lambda: list(tmp_path.glob(".ray_ckpt/staging/save-*/.metadata*")))
        with stopped(group.pids[0]):
            wait_until(lambda: _has_ended(group.pids[1]))
            staged = list(tmp_path.glob(".ray_ckpt/staging/save-*/__1_0.distcp"))
            committed = (tmp_path / "step-1").exists()
        group.wait()
    assert staged or committed
    catalog = open_catalog(str(tmp_path))
    for view in catalog.observe().readable():
        catalog.verify(view.step)


def _has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


# ---- what lies on storage ----


def test_plain_torch_reads_a_step_under_torchtitan_names(saved_run: SavedRun) -> None:
    folder = saved_run.root / "step-12"
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    fqns = set(Decoder(SIZES, VOCAB_SIZE).state_dict())
    reserved = ("optimizer.", "lr_scheduler.", "dataloader.", "rng.rank_0.", "rng.rank_1.")
    assert {key for key in stored if not key.startswith(reserved)} == fqns
    for fqn in fqns:
        assert f"optimizer.state.{fqn}.exp_avg" in stored
        assert f"optimizer.state.{fqn}.exp_avg_sq" in stored
        assert f"optimizer.state.{fqn}.step" in stored
        assert f"optimizer.param_groups.{fqn}.lr" in stored
    assert {"lr_scheduler.last_epoch", "dataloader.num_samples"} <= set(stored)
    weights = {key: torch.empty(stored[key].size) for key in fqns}
    with pytest.warns(UserWarning, match="load in a single process"):
        dcp.load(weights, checkpoint_id=folder)
    expected = {key: value for key, value in saved_run.ranks[0].state.items() if key in fqns}
    assert same_tensors(weights, expected)


def test_the_manifest_says_what_save_was_told(saved_run: SavedRun) -> None:
    manifests = [saved_run.catalog.manifest(step) for step in STEPS]
    losses = saved_run.ranks[0].losses
    assert [m.metrics for m in manifests] == [
        {"loss": losses[step], "step": float(step)} for step in STEPS
    ]
    assert [m.is_last_step for m in manifests] == [False, False, False, True]
    assert {m.world_size for m in manifests} == {2}
    assert len({m.save_id for m in manifests}) == len(STEPS)
    newest = manifests[-1]
    assert newest.model is not None
    assert newest.model.family == "llama"
    assert set(newest.model.keys) == set(Decoder(SIZES, VOCAB_SIZE).state_dict())


def test_a_resumed_save_names_the_step_it_came_from(saved_root: Path) -> None:
    run(train, str(saved_root), 15, SYNC)
    catalog = open_catalog(str(saved_root))
    assert catalog.manifest(12).lineage.resumed_from is None
    assert catalog.manifest(15).lineage.resumed_from == 12
    assert catalog.manifest(15).lineage.run_id == catalog.manifest(12).lineage.run_id


def test_nothing_on_storage_names_a_path_of_the_machine(saved_run: SavedRun) -> None:
    for step in STEPS:
        for path in (saved_run.root / names.step_dir(step)).rglob("*"):
            data = path.read_bytes() if path.is_file() else b""
            assert str(saved_run.root.parent).encode() not in data, path
            assert str(Path.home()).encode() + b"/" not in data, path


def test_every_rank_loads_and_rank_0_alone_hears_of_commits(saved_run: SavedRun) -> None:
    assert [outcome.committed for outcome in saved_run.ranks] == [STEPS, []]
    assert saved_run.ranks[1].log == []


# ---- when and how, in one process ----


class _Counting(nn.Linear):
    num_calls = 0

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        _Counting.num_calls += 1
        return super().state_dict(*args, **kwargs)


def _plain_manager(
    root: Path,
    model: nn.Module,
    config: SaveConfig = NEVER,
    *,
    owner: str | None = None,
    on_commit: Callable[[int], None] | None = None,
) -> CheckpointManager:
    """A manager without a process group."""
    state = TrainingState(model=ModelWrapper(model), extra={"train_state": TrainState(step=5)})
    return CheckpointManager(
        str(root), state, config=config, run=Run(owner=owner, on_commit=on_commit)
    )


def test_a_manager_asks_the_model_for_nothing_before_it_is_told_to(tmp_path: Path) -> None:
    _Counting.num_calls = 0
    manager = _plain_manager(tmp_path, _Counting(2, 2), SaveConfig(every_steps=2))
    manager.load()
    manager.save(1)
    assert _Counting.num_calls == 0
    manager.save(2)
    assert _Counting.num_calls > 0
    manager.close()


def test_steps_that_are_due_are_saved_and_no_others(tmp_path: Path) -> None:
    config = SaveConfig(every_steps=4, first_step=True)
    manager = _plain_manager(tmp_path, nn.Linear(2, 2), config)
    begun = [s for s in range(1, 11) if manager.save(s, last_step=s == 10) is not None]
    manager.close()
    assert begun == [1, 4, 8, 10]
    assert [view.step for view in open_catalog(str(tmp_path)).observe().readable()] == begun


def test_a_pending_save_is_committed_when_wait_returns(tmp_path: Path) -> None:
    committed: list[int] = []
    manager = _plain_manager(
        tmp_path, nn.Linear(2, 2), SaveConfig(every_steps=1), on_commit=committed.append
    )
    pending = manager.save(1)
    assert pending is not None
    pending.wait()
    assert (pending.step, pending.done(), committed) == (1, True, [1])
    open_catalog(str(tmp_path)).verify(1)
    manager.close()
    assert committed == [1]


def test_an_asynchronous_save_holds_the_values_of_the_moment_it_was_called(tmp_path: Path) -> None:
    model = nn.Linear(512, 512)
    expected = model.weight.detach().clone()
    manager = _plain_manager(tmp_path, model, SaveConfig(every_steps=1))
    for step in (1, 2):  # the second one uses the first one's buffers again
        pending = manager.save(step)
        with torch.no_grad():
            model.weight.add_(1.0)
        assert pending is not None
        pending.wait()
    manager.close()
    for step, value in ((1, expected), (2, expected + 1.0)):
        fresh = nn.Linear(512, 512)
        manager = _plain_manager(tmp_path, fresh)
        manager.load(step=step)
        manager.close()
        assert torch.equal(fresh.weight, value)


def test_what_a_listener_raises_cannot_undo_a_commit(tmp_path: Path) -> None:
    def raise_(step: int) -> None:
        raise OSError(f"nobody listens to {step}")

    told = record_log()
    config = SaveConfig(every_steps=1, mode="sync")
    manager = _plain_manager(tmp_path, nn.Linear(2, 2), config, on_commit=raise_)
    manager.save(1)
    manager.close()
    open_catalog(str(tmp_path)).verify(1)
    assert any(line.startswith("ERROR") and "nobody listens to 1" in line for line in told)
