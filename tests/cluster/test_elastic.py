"""Nodes die, come and leave with notice: training goes on, no sample is lost or learnt twice."""

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train.collective
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import jobs.train
from jobs.corpus import VOCAB_SIZE, Windows, standard_library_text
from jobs.decoder import Decoder, DecoderConfig, init_weights
from jobs.train import DataConfig, TrainConfig, make_trainer
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.states import TrainState
from tests.cluster.nodes import TRAINER, Node, Nodes, nodes_of
from tests.waiting import PATIENCE_S, wait_for

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    # Ray Train reads deprecated settings of Ray Data in the process that calls fit
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
STEPS = 120
FAST_STEPS = 20
BATCH = 4
SAVE_EVERY = 10
NOTES = "notes"
HURRY = "hurry"


@pytest.fixture
def nodes(ray_cluster: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Nodes beside the session's own, which does not train."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    # what was placed on a node that has just died is placed anew after so long
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    yield from nodes_of(ray_cluster)


def config(root: str) -> TrainConfig:
    return TrainConfig(
        root=root,
        steps=STEPS,
        batch_size=BATCH,
        min_workers=1,
        resize_every_s=1.0,
        worker_resources={"CPU": 1, TRAINER: 1},
        # asked of Ray after steps 5, 10, 15, ...: a save for a leaving node is none of the schedule
        report_every_steps=SAVE_EVERY // 2,
        model=DecoderConfig(
            dim=16, num_layers=1, num_heads=2, num_kv_heads=1, ffn_dim=24, max_seq_len=32
        ),
        data=DataConfig(max_bytes=20_000, seq_len=16),
        save=SaveConfig(every_steps=SAVE_EVERY, when_busy="wait"),
    )


def noting_worker(values: dict[str, Any]) -> None:
    """The job's own worker; it notes every sample, and waits for the test after FAST_STEPS."""
    context = ray.train.get_context()
    folder = Path(values["root"]).parent / NOTES
    folder.mkdir(parents=True, exist_ok=True)
    note = {
        "attempt": ray.train.collective.broadcast_from_rank_zero(time.time()),
        "world": context.get_world_size(),
        "rank": context.get_world_rank(),
        "node": ray.get_runtime_context().get_node_id(),
    }
    path = folder / f"{note['attempt']}-{note['rank']}.jsonl"

    class Noting(Windows):
        def _window(self, index: int) -> Tensor:
            step = self.num_samples // BATCH
            with path.open("a") as file:
                file.write(json.dumps({**note, "sample": index, "step": step}) + "\n")
            if step > FAST_STEPS and not (folder / HURRY).exists():
                time.sleep(1 / (BATCH // note["world"]))
            return super()._window(index)

    jobs.train.Windows = Noting  # in this process, which is the worker's own
    jobs.train.train_worker(values)


def notes(root: str) -> list[dict[str, Any]]:
    """One for every sample that a worker took, in the order of the attempts."""
    paths = sorted((Path(root).parent / NOTES).glob("*.jsonl"))
    lines = [line for path in paths for line in path.read_text().splitlines(keepends=True)]
    return [json.loads(line) for line in lines if line.endswith("\n")]


def worlds(root: str) -> list[int]:
    """How many workers each attempt had."""
    return list({note["attempt"]: note["world"] for note in notes(root)}.values())


def surviving(taken: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Step to samples: of a step that was done again, the last time counts."""
    attempts: dict[float, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for note in taken:
        attempts[note["attempt"]][note["step"]].append(note["sample"])
    history: dict[int, list[int]] = {}
    for steps in attempts.values():
        history = {step: s for step, s in history.items() if step < min(steps)} | steps
    return history


def committed(root: str) -> dict[int, float]:
    """Step to the loss in its manifest."""
    catalog = open_catalog(root)
    steps = sorted(view.step for view in catalog.observe().checkpoints)
    return {step: catalog.manifest(step).metrics["loss"] for step in steps}


def undisturbed(train: TrainConfig) -> tuple[dict[int, float], dict[str, Tensor]]:
    """Loss of every step, and the weights after the last, in one process without trouble."""
    torch.manual_seed(train.seed)
    model = Decoder(train.model, VOCAB_SIZE)
    init_weights(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    warm_up = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / train.warmup_steps))
    text = standard_library_text(train.data.max_bytes)
    windows = Windows(text, seq_len=train.data.seq_len, seed=train.seed)
    losses: dict[int, float] = {}
    for step in range(1, STEPS + 1):
        batch = windows.next_batch(BATCH, rank=0, world_size=1)
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
        losses[step] = loss.item()
    return losses, model.state_dict()


def load_each(train: TrainConfig, steps: list[int]) -> Decoder:
    """The model after the last of them; every one was loaded, and is where its number says."""
    model = Decoder(train.model, VOCAB_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate)
    text = standard_library_text(train.data.max_bytes)
    windows, progress = Windows(text, seq_len=train.data.seq_len, seed=0), TrainState()
    state = TrainingState(
        model=ModelWrapper(model),
        optimizer=optimizer,
        lr_scheduler=LambdaLR(optimizer, lambda _: 1.0),
        extra={"dataloader": windows, "train_state": progress},
    )
    manager = CheckpointManager(train.root, state)
    for step in steps:
        assert manager.load(step).step == progress.step == step
        assert windows.num_samples == step * BATCH
    manager.close()
    return model


def fit(train: TrainConfig) -> Callable[[], None]:
    """Training has begun; what is returned waits for its end."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            make_trainer(train, noting_worker, name="elastic").fit()
        except BaseException as error:  # noqa: BLE001  told by the test, not by a dying thread
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> None:
        thread.join(timeout=PATIENCE_S)
        assert failed == []
        assert not thread.is_alive()

    return wait


def test_a_run_shrinks_grows_and_saves_for_a_node_that_leaves(root: str, nodes: Nodes) -> None:
    """Scenarios 17 and 23: nodes die, come, and are drained with a notice."""
    train = config(root)
    both: list[Node] = [nodes.add(), nodes.add()]
    finished = fit(train)

    wait_for(lambda: committed(root))
    home = next(note["node"] for note in notes(root) if note["rank"] == 0)
    # the rank that holds the lease and commits is the one that dies
    next(node for node in both if node.find_id() == home).kill()
    wait_for(lambda: worlds(root) == [2, 1])
    last = nodes.add()
    wait_for(lambda: worlds(root) == [2, 1, 2])
    nodes.drain(last, deadline_s=600)
    wait_for(lambda: [step for step in committed(root) if step % SAVE_EVERY])
    (Path(root).parent / NOTES / HURRY).touch()
    finished()

    assert worlds(root) == [2, 1, 2]
    steps = surviving(notes(root))
    assert sorted(steps) == list(range(1, STEPS + 1))
    for step, samples in steps.items():
        assert sorted(samples) == list(range((step - 1) * BATCH, step * BATCH))
    losses, weights = undisturbed(train)
    saved = committed(root)
    scheduled = set(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))
    assert scheduled - set(saved) == set()
    assert len(set(saved) - scheduled) == 1  # the node that leaves is news once
    assert saved == pytest.approx({step: losses[step] for step in saved}, rel=1e-3)
    model = load_each(train, list(saved))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-3)
