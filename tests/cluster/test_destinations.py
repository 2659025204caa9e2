"""What becomes of a copy whose destination refuses it, and of those to other places."""

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi

from ray_ckpt.cluster.tasks import Attempt, run_action
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import LiveNode, Placement
from ray_ckpt.core.beats import Beat
from ray_ckpt.core.failures import ErrorClass
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from tests.cluster.cranks import Crank
from tests.roots import make_root
from tests.servers.hub import HubDouble
from tests.waiting import wait_for

HUB = "hf://ray/model"
COMMIT = r"POST .*/commit/"
FULL = "Private repository storage limit reached"


class Processes:
    """Carries out actions in processes that read the environment when the first one begins."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def nodes(self) -> Sequence[LiveNode]:
        return [LiveNode(id="", name="here")]

    def start(self, root: str, attempt: Attempt, placement: Placement | None) -> Future[Any]:
        return self._pool.submit(run_action, root, attempt)

    def takes(self, action: Action) -> bool:
        return True

    def why_waiting(self) -> str:
        return "waits for a process"

    def has_room(self) -> bool:
        return False

    def end_process(self, beat: Beat) -> None:
        pass

    def close(self) -> None:
        self._pool.shutdown()


@pytest.fixture
def hub(hub: HubDouble, monkeypatch: pytest.MonkeyPatch) -> HubDouble:
    """With a repository; the environment knows it."""
    hub.api().create_repo("ray/model")
    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture
def copies(root: str, tmp_path: Path) -> str:
    """A folder to which the same export is copied as to the Hub."""
    places = HUB, str(tmp_path / "copies")
    make_root(
        root,
        (10, 20),
        LifecyclePolicy(
            export=(ExportPolicy(name="hf", steps=(20,)),),
            publish=tuple(PublishPolicy(export="hf", to=place) for place in places),
        ),
    )
    return places[1]


@pytest.fixture
def start(root: str) -> Iterator[Callable[[], Crank]]:
    """A manager whose tasks see the environment as it is then."""
    started: list[tuple[Crank, Processes]] = []

    def begin() -> Crank:
        processes = Processes()
        started.append((Crank(root, processes), processes))
        return started[-1][0]

    yield begin
    for crank, processes in started:
        crank.close()
        processes.close()


def record_of(crank: Crank, place: str) -> ActionRecord | None:
    records = crank.records(ActionKind.PUBLISH)
    return next((r for r in records if r.action.destination == place), None)


def until(crank: Crank, place: str, state: ActionState, *, later_s: float = 0.0) -> ActionRecord:
    """The record of the copy there, once it is in that state; by a clock that is so far ahead."""

    def look() -> ActionRecord | None:
        crank.reconciler.round(time.time() + later_s)
        record = record_of(crank, place)
        return record if record is not None and record.state is state else None

    return wait_for(look)


def num_commits(hub: HubDouble) -> int:
    client = HfApi(endpoint=hub.url, token=hub.token)
    titles = [commit.title for commit in client.list_repo_commits("ray/model")]
    return sum(title.startswith("step-20") for title in titles)


@pytest.mark.parametrize("status", [429, 503])
def test_the_hub_is_not_asked_before_it_wants_to_be(
    hub: HubDouble, copies: str, start: Callable[[], Crank], status: int
) -> None:
    """Scenario 35: it is waited for as long as it says, and other places wait for nobody."""
    hub.fail(match=COMMIT, status=status, headers={"Retry-After": "7200"})
    crank = start()
    waiting = until(crank, HUB, ActionState.RETRY_WAIT)
    assert waiting.error_class is ErrorClass.THROTTLED
    assert (waiting.next_attempt_at or 0) >= waiting.changed_at + 7200
    until(crank, copies, ActionState.SUCCEEDED)
    until(crank, HUB, ActionState.RETRY_WAIT, later_s=7000)
    assert num_commits(hub) == 0
    until(crank, HUB, ActionState.SUCCEEDED, later_s=7300)
    assert num_commits(hub) == 1


def test_a_token_that_has_expired_is_dead_at_once_until_somebody_has_signed_in(
    root: str,
    hub: HubDouble,
    copies: str,
    start: Callable[[], Crank],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Scenario 38: with the way out; other places go on."""
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    crank = start()
    dead = until(crank, HUB, ActionState.DEAD)
    assert (dead.attempts, dead.error_class) == (1, ErrorClass.AUTH)
    assert "hf auth login" in (dead.error or "")
    until(crank, copies, ActionState.SUCCEEDED)
    crank.close()
    monkeypatch.setenv("HF_TOKEN", hub.token)
    open_catalog(root).records.write_action(dead.asked_again("somebody", time.time()))
    until(start(), HUB, ActionState.SUCCEEDED)
    assert num_commits(hub) == 1


def test_a_hub_without_room_is_looked_at_again_until_there_is_some(
    hub: HubDouble, copies: str, start: Callable[[], Crank]
) -> None:
    """Scenario 38: a quota that is full; nobody needs to say that it is larger now."""
    hub.fail(match=COMMIT, status=403, text=FULL, times=2)
    crank = start()
    until(crank, HUB, ActionState.RETRY_WAIT)
    blocked = until(crank, HUB, ActionState.BLOCKED, later_s=60)
    assert blocked.error_class is ErrorClass.RESOURCE
    assert "free space on the Hub" in (blocked.error or "")
    until(crank, copies, ActionState.SUCCEEDED, later_s=60)
    until(crank, HUB, ActionState.SUCCEEDED, later_s=600)
    assert num_commits(hub) == 1
