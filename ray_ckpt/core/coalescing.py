"""What a newer step makes needless while it waits, where `when_behind = "newest"`. Pure.

    step      100        200         300         400
    export    running    waits       waits       may begin
                         superseded  superseded

Only what `every_steps` alone asks for is passed over: the last step, the best, named ones and what
a person wants never are. The newer one must be able to begin or have begun: its step is verified,
for a copy its export is there, and it was not given up. So one always goes on, however far behind
things are, and nothing is passed over for a step that turns out to be damaged.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.lifecycle import GIVEN_UP, ActionKind, ActionState, CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.wanted import Wanted, WantedAction, all_wanted, export_of

_NOT_BEGUN = None, ActionState.RETRY_WAIT, ActionState.BLOCKED
"""PENDING is what was interrupted, or what a person has asked for again."""
_Lane = tuple[ActionKind, str | None, str | None]
"""What is done, to which export, and where: the same for every step."""


def superseded(observed: Observation, *, now: float) -> list[ActionRecord]:
    """Records of what newer steps have made needless, as they are to be; each says by what."""
    policy = observed.policy
    if all(each.when_behind == "all" for each in (*policy.export, *policy.publish)):
        return []
    wanted = all_wanted(observed)
    newest = _newest(wanted, observed)
    pairs = [pair for each in wanted.values() for pair in _passed_over(each, newest)]
    return [_record(action, observed).superseded(by, now) for action, by in pairs]


def coalesced(observed: Observation, *, now: float) -> Observation:
    """The same with these records."""
    records = {record.action.key: record for record in superseded(observed, now=now)}
    return replace(observed, records={**observed.records, **records})


def _newest(wanted: Mapping[int, Wanted], observed: Observation) -> dict[_Lane, Action]:
    """In each lane the newest due action that could begin, has begun or is done."""
    newest: dict[_Lane, Action] = {}
    for view in filter(_is_good, observed.readable()):
        for each in (*wanted[view.step].exports, *wanted[view.step].publishes):
            can_begin = each.action.kind is ActionKind.EXPORT or each.is_exported
            if each.is_due and can_begin and each.state not in GIVEN_UP:
                newest[_lane(each.action)] = each.action
    return newest


def _is_good(view: CheckpointView) -> bool:
    return view.state is CheckpointState.VERIFIED and view.is_healthy and not view.problem


def _passed_over(wanted: Wanted, newest: Mapping[_Lane, Action]) -> Iterator[tuple[Action, str]]:
    """Actions of one step, each with the title of the newer one that makes it needless."""
    skipped: dict[str, str] = {}
    for export in wanted.exports:
        by = None if export.is_exported else _newer(export, newest)
        if by is not None:
            skipped[export.action.key] = by
            if export.state in _NOT_BEGUN:
                yield export.action, by
    for publish in wanted.publishes:  # whoever asks for a copy asks for its export
        by = skipped.get(export_of(publish.action).key) or _newer(publish, newest)
        if by is not None and publish.state in _NOT_BEGUN:
            yield publish.action, by


def _newer(each: WantedAction, newest: Mapping[_Lane, Action]) -> str | None:
    """Title of what makes it needless, or has made it so before; None if nothing does."""
    newer = newest.get(_lane(each.action))
    is_needless = each.is_skippable and each.state in (*_NOT_BEGUN, ActionState.SUPERSEDED)
    return newer.title if newer and is_needless and newer.step > each.action.step else None


def _record(action: Action, observed: Observation) -> ActionRecord:
    return observed.records.get(action.key, ActionRecord(action=action))


def _lane(action: Action) -> _Lane:
    return action.kind, action.export and action.export.name, action.destination
