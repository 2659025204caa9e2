"""What can happen to a run, one function each; each says what it did, or None if it could not."""

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ray_ckpt.core.errors import StepNotFoundError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.observation import Request
from ray_ckpt.storage.backends import open_catalog
from tests.cluster.chaos.world import World
from tests.cluster.hosts import Process, running

PAUSE_S = 4.0
LONG_PAUSE_S = 26.0
"""Longer than a lease outlives its holder's silence: another manager takes over meanwhile."""
_ACTIONS = ("verify ", "export ", "publish ", "purge ", "scrub ")


def a_rank_dies(world: World) -> str | None:
    """One rank; the other finds out by itself."""
    assert world.trainer is not None, "it is tended"
    rank = world.random.randrange(2)
    world.trainer.kill(rank)
    return f"rank {rank}"


def the_trainer_dies(world: World) -> str | None:
    """Both ranks in the same moment."""
    assert world.trainer is not None, "it is tended"
    world.trainer.kill()
    return "both ranks"


def a_rank_stands_still(world: World) -> str | None:
    """For a while, and then it goes on."""
    assert world.trainer is not None, "it is tended"
    rank = world.random.randrange(2)
    _pause(world, Process(pid=world.trainer.pids[rank], title=f"rank {rank}"), PAUSE_S)
    return f"rank {rank} for {PAUSE_S:.0f} s"


def the_manager_dies(world: World) -> str | None:
    """Ray starts it again, and it remembers nothing."""
    return _kill(world, "Manager")


def the_manager_stands_still(world: World) -> str | None:
    """Another one takes over; then the first one wakes up."""
    found = world.hosts.processes("Manager")
    if not found:
        return None
    _pause(world, found[0], LONG_PAUSE_S)
    world.start_rival(timeout_s=LONG_PAUSE_S)
    return f"for {LONG_PAUSE_S:.0f} s, and a second manager came"


def a_task_dies(world: World) -> str | None:
    """A worker in the middle of an action, whichever is running."""
    return _kill(world, *_ACTIONS)


def an_export_dies(world: World) -> str | None:
    """As before, but one that writes."""
    return _kill(world, "export ", "publish ")


def a_node_dies(world: World) -> str | None:
    """A whole host; another one joins."""
    node = world.random.choice(world.hosts.nodes)
    ran = [process.title for process in node.processes() if process.title.startswith(_TITLES)]
    world.hosts.kill_node(node)
    world.hosts.add_node()
    return f"it ran: {', '.join(ran) or 'nothing of ours'}"


def the_head_dies(world: World) -> str | None:
    """The whole cluster; a new one is started for the same root."""
    world.hosts.kill_all()
    world.start_cluster()
    return "with every node"


def a_rival_dies(world: World) -> str | None:
    """A second manager is started and killed at some moment."""
    rival = world.start_rival(timeout_s=60.0)
    world.tend(world.random.uniform(1.0, 6.0))
    rival.kill()
    return "a second manager, soon after its start"


def the_object_store_stands_still(world: World) -> str | None:
    """Every request waits."""
    _pause(world, _object_store(world), PAUSE_S)
    return f"for {PAUSE_S:.0f} s"


def the_hub_fails(world: World) -> str | None:
    """One commit is made and its answer is lost, one is refused, one is to come later."""
    world.hub.fail(match=r"POST .*/commit/", status=500, after=True)
    world.hub.fail(match=r"POST .*/commit/", status=503)
    world.hub.fail(match=r"POST .*/preupload/", status=429)
    return "500 after a commit, then 503; 429 before an upload"


def a_person_pins_and_asks(world: World) -> str | None:
    """The newest step must stay, and is exported under a name of its own."""
    catalog = open_catalog(world.root)
    steps = [view.step for view in catalog.observe().readable()]
    if not steps:
        return None
    step, name = steps[-1], f"asked-{len(world.asked)}"
    try:
        catalog.pin(step, name="chaos", reason="must stay")
    except StepNotFoundError:
        return None
    spec = ExportSpec(name=name, dtype="float32")
    catalog.records.add_request(Request(step=step, export=spec))
    world.pinned.add(step)
    world.asked[step] = name
    return f"step-{step}, {name}"


def a_person_removes_an_export(world: World) -> str | None:
    """Copies of it are safe, and it is made again as long as its checkpoint is there."""
    made = [e for e in open_catalog(world.root).observe().exports if e.name == "hf"]
    if not made or "://" in world.root:
        return None
    export = world.random.choice(made)
    shutil.rmtree(Path(world.root) / "exports" / export.name / f"step-{export.step}")
    world.removed.add(export.step)
    return f"step-{export.step}"


FAULTS: tuple[Callable[[World], str | None], ...] = (
    a_task_dies,
    a_rank_dies,
    the_manager_dies,
    a_person_pins_and_asks,
    a_node_dies,
    an_export_dies,
    the_hub_fails,
    the_manager_stands_still,
    the_object_store_stands_still,
    the_trainer_dies,
    the_head_dies,
    a_rank_stands_still,
    a_rival_dies,
    a_person_removes_an_export,
)
_TITLES = tuple(f"ray::{kind}" for kind in (*_ACTIONS, "Manager"))


def happen(world: World, *, num_faults: int) -> Iterator[str]:
    """So many faults, a few seconds apart; all kinds in random order, then all again."""
    deck: list[Callable[[World], str | None]] = []
    num_done = 0
    while num_done < num_faults:
        deck = deck or world.random.sample(FAULTS, len(FAULTS))
        fault = deck.pop()
        world.tend(world.random.uniform(1.0, 5.0))
        done = _in_time(world, fault)
        if done is not None:
            num_done += 1
            yield f"{fault.__name__.replace('_', ' ')}: {done}"


def _in_time(world: World, fault: Callable[[World], str | None]) -> str | None:
    """What the fault did; its moment, say a running task, is waited for, but not for ever."""
    until = time.monotonic() + 10.0
    while time.monotonic() < until:
        done = fault(world)
        if done is not None:
            return done
        world.tend(0.05)
    return None


def _kill(world: World, *titles: str) -> str | None:
    found = [process for title in titles for process in world.hosts.processes(title)]
    if not found:
        return None
    victim = world.random.choice(found)
    return victim.title.removeprefix("ray::") if victim.send(signal.SIGKILL) else None


def _pause(world: World, process: Process, seconds: float) -> None:
    process.send(signal.SIGSTOP)
    timer = threading.Timer(seconds, process.send, (signal.SIGCONT,))
    timer.start()
    world.paused.append(timer)


def _object_store(world: World) -> Process:
    """The one server that listens on the port of the S3 endpoint."""
    port = world.s3.url.rpartition(":")[2]
    return next(process for _, process in running() if f"-s3.port={port} " in process.title)
