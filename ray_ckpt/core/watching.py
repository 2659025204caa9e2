"""What somebody who watches a root sees, and what has changed since the last look. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.beats import Watch
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.reconcile import Plan

_TEN_PERCENT = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Going:
    """One action that runs, and how far it is; speeds are known from the second look on."""

    title: str
    doing: str | None
    """None until it was heard of."""
    percent: int | None
    done_bytes: int
    total_bytes: int | None
    bytes_per_s: float | None
    eta_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One look at a root."""

    observed: Observation
    going: tuple[Going, ...]
    waiting: tuple[tuple[str, str | None], ...]
    """Titles of what is wanted and does not run, each with why not; None: it begins next."""
    dead: tuple[ActionRecord, ...]
    """What failed for good, and is still wanted."""
    problems: tuple[str, ...]
    trainer: str | None
    """Who saves here now, as a sentence's subject; None: nobody does."""
    manager: str | None
    """Who manages the root."""


def scene(
    observed: Observation,
    planned: Plan,
    watches: Mapping[str, Watch],
    *,
    trainer: str | None,
    manager: str | None,
) -> Scene:
    """What one look has found; `watches` by the key of each action that was heard of."""
    records = observed.records.values()
    running = [record for record in records if record.state is ActionState.RUNNING]
    keys = {record.action.key for record in running}
    wanted = {p.action.key for p in planned.planned}
    dead = [r for r in records if r.state is ActionState.DEAD and r.action.key in wanted]
    gone = keys | {record.action.key for record in dead}
    return Scene(
        observed=observed,
        going=tuple(_going(record, watches.get(record.action.key)) for record in running),
        waiting=tuple(
            (p.action.title, p.not_now) for p in planned.planned if p.action.key not in gone
        ),
        dead=tuple(dead),
        problems=planned.problems,
        trainer=trainer,
        manager=manager,
    )


def news(before: Scene | None, after: Scene) -> Iterator[str]:
    """A sentence for each thing that differs; of the first look, what is there."""
    yield from _new_lines(_steps(before), _steps(after), "step-{0} is {1}")
    yield from _news_of_actions(before, after)
    old = {going.title: going for going in before.going} if before else {}
    for going in after.going:
        known = old.get(going.title)
        if known is None or _tens(known) != _tens(going):
            yield f"{going.title}: {sentence(going)}"
    for problem in after.problems:
        if before is None or problem not in before.problems:
            yield f"problem: {problem}"


def sentence(going: Going) -> str:
    """`reads step-30 63 %, 121 MB/s, 40 s left`, as far as anybody knows."""
    if going.doing is None:
        return "begins"
    share = "" if going.percent is None else f" {going.percent} %"
    speed = "" if not going.bytes_per_s else f", {going.bytes_per_s / 1e6:.0f} MB/s"
    left = "" if going.eta_s is None else f", {going.eta_s:.0f} s left"
    return f"{going.doing}{share}{speed}{left}"


def document(scene: Scene) -> dict[str, Any]:
    """A look as plain JSON values: the command line's contract."""
    return {
        "run": scene.observed.run_id,
        "trainer": scene.trainer,
        "manager": scene.manager,
        "checkpoints": {str(step): state for step, state in _steps(scene).items()},
        "running": [
            {
                "title": going.title,
                "doing": going.doing,
                "percent": going.percent,
                "done_bytes": going.done_bytes,
                "total_bytes": going.total_bytes,
                "bytes_per_s": going.bytes_per_s,
                "eta_s": going.eta_s,
            }
            for going in scene.going
        ],
        "waiting": [{"title": title, "why": why} for title, why in scene.waiting],
        "dead": [{"title": r.action.title, "error": r.error} for r in scene.dead],
        "problems": list(scene.problems),
    }


def _going(record: ActionRecord, watch: Watch | None) -> Going:
    beat = watch.last if watch else None
    return Going(
        title=record.action.title,
        doing=beat.doing if beat else None,
        percent=beat.percent if beat else None,
        done_bytes=beat.done_bytes if beat else 0,
        total_bytes=beat.total_bytes if beat else None,
        bytes_per_s=watch.bytes_per_s if watch else None,
        eta_s=watch.eta_s if watch else None,
    )


def _steps(scene: Scene | None) -> dict[int, str]:
    views = scene.observed.checkpoints if scene else ()
    return {view.step: str(view.state) for view in views}


def _news_of_actions(before: Scene | None, after: Scene) -> Iterator[str]:
    """What has ended since; of the first look only what failed."""
    if before is None:
        yield from (f"dead: {r.action.title}: {_line(r)}" for r in after.dead)
        return
    for key, record in after.observed.records.items():
        old = before.observed.records.get(key)
        if old is not None and (old.state, old.changed_at) == (record.state, record.changed_at):
            continue
        if record.state is not ActionState.RUNNING:
            why = f": {_line(record)}" if record.error else ""
            yield f"{record.action.title}: {record.state}{why}"


def _line(record: ActionRecord) -> str:
    return (record.error or "").partition("\n")[0]


def _new_lines(old: Mapping[int, str], new: Mapping[int, str], text: str) -> Iterator[str]:
    for number, state in new.items():
        if old.get(number) != state:
            yield text.format(number, state)
    yield from (text.format(number, "gone") for number in old.keys() - new.keys())


def _tens(going: Going) -> tuple[str | None, int | None]:
    return going.doing, None if going.percent is None else going.percent // _TEN_PERCENT
