"""What a manager refuses, what it leaves on storage, and what it tells."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder
from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    StateDictError,
    StepNotFoundError,
)
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.saving import SaveConfig
from ray_ckpt.storage.backends import open_catalog
from tests.tensors.conftest import STEPS, SavedRun
from tests.tensors.plain import plain_manager
from tests.tensors.ranks import run
from tests.tensors.tiny import (
    SIZES,
    record_log,
    same_tensors,
    train,
)

SYNC = SaveConfig(every_steps=3, mode="sync")

# ---- what is refused ----


def test_a_step_that_is_not_there_is_refused_by_number(saved_root: Path) -> None:
    trainer = plain_manager(saved_root, nn.Linear(2, 2))
    with pytest.raises(StepNotFoundError, match="step-7"):
        trainer.load(step=7)
    trainer.close()


def test_a_model_of_another_shape_of_keys_is_refused_before_a_tensor_is_read(
    saved_root: Path,
) -> None:
    """Scenario 24: the model's code has changed."""
    model = nn.Linear(2, 2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    manager = plain_manager(saved_root, model)
    with pytest.raises(StateDictError, match=r"weight.*tok_embeddings\.weight"):
        manager.load()
    manager.close()
    assert same_tensors(dict(model.state_dict()), before)


def test_a_model_of_other_shapes_is_refused_before_a_tensor_is_read(tmp_path: Path) -> None:
    manager = plain_manager(tmp_path, nn.Linear(2, 2), SaveConfig(every_steps=1, when_busy="wait"))
    manager.save(1)
    manager.close()
    wider = nn.Linear(3, 2)
    before = {key: value.clone() for key, value in wider.state_dict().items()}
    manager = plain_manager(tmp_path, wider)
    with pytest.raises(StateDictError, match="weight"):
        manager.load()
    manager.close()
    assert same_tensors(dict(wider.state_dict()), before)


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


def test_a_pending_save_is_committed_when_wait_returns(tmp_path: Path) -> None:
    committed: list[int] = []
    manager = plain_manager(
        tmp_path,
        nn.Linear(2, 2),
        SaveConfig(every_steps=1, when_busy="wait"),
        on_event=lambda event: committed.append(event.step),
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
    manager = plain_manager(tmp_path, model, SaveConfig(every_steps=1, when_busy="wait"))
    for step in (1, 2):  # the second one uses the first one's buffers again
        pending = manager.save(step)
        with torch.no_grad():
            model.weight.add_(1.0)
        assert pending is not None
        pending.wait()
    manager.close()
    for step, value in ((1, expected), (2, expected + 1.0)):
        fresh = nn.Linear(512, 512)
        manager = plain_manager(tmp_path, fresh)
        manager.load(step=step)
        manager.close()
        assert torch.equal(fresh.weight, value)


def test_what_a_listener_raises_cannot_undo_a_commit(tmp_path: Path) -> None:
    def raise_(event: SaveEvent) -> None:
        raise OSError(f"nobody listens to {event.step}")

    told = record_log()
    config = SaveConfig(every_steps=1, mode="sync")
    manager = plain_manager(tmp_path, nn.Linear(2, 2), config, on_event=raise_)
    manager.save(1)
    manager.close()
    open_catalog(str(tmp_path)).verify(1)
    assert any(line.startswith("ERROR") and "nobody listens to 1" in line for line in told)
