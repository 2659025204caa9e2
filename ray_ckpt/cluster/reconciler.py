"""One root's rounds: observe storage, plan, act; under a lease, and wherever it runs.

The manager actor, `jobs/reconcile.py`, `ray-ckpt drain` and an export typed without a cluster all
turn this crank. It keeps nothing between rounds that it cannot read from storage again: killed at
any line, the next one goes on. Whoever does not hold the lease changes nothing.
"""

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.executors import Executor
from ray_ckpt.cluster.in_flight import Flight, InFlight
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.admission import Nodes, Start, admit, nodes_of_bytes
from ray_ckpt.core.breaker import resting
from ray_ckpt.core.coalescing import superseded
from ray_ckpt.core.draft import Ended
from ray_ckpt.core.errors import LeaseHeldError
from ray_ckpt.core.gathering import abandonments, forgettable, leftovers
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.looks import proof_needed
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.reconcile import Plan, plan
from ray_ckpt.core.settling import obeyed, overtaken, refused
from ray_ckpt.core.wanted import places_after
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.garbage import find_garbage, remove_garbage
from ray_ckpt.storage.history import Teller
from ray_ckpt.storage.lease import MANAGER, Lease

log = logging.getLogger("ray_ckpt")

TIDY_EVERY_S = 300.0
"""So often a manager looks for what nobody needs any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """What one round saw, and what it would do."""

    observed: Observation
    planned: Plan
    running: tuple[Flight, ...]
    """Attempts in flight after the round."""
    waiting: tuple[Action, ...]
    """Actions that may start and have found no room yet."""
    waits: Mapping[str, str]
    """Why each of these waits, by its key."""
    problems: tuple[str, ...]
    """What keeps actions from beginning, as sentences."""
    standing_by: str | None = None
    """Who else holds the lease; None where the round has acted."""
    elsewhere: tuple[Action, ...] = ()
    """Actions that must be carried out where this process has no hand: on other hosts."""


def every_action(action: Action) -> bool:
    """Everything that is planned is done."""
    return True


class Reconciler:
    """Drives the actions of one root while it holds the lease; `close` gives it back.

    `owner` is equal for all incarnations of one manager, which may take over from itself at once;
    `wants` tells the actions that are to be done, where that is not all of them.
    """

    def __init__(
        self,
        catalog: Catalog,
        executor: Executor,
        *,
        owner: str,
        wants: Callable[[Action], bool] = every_action,
    ) -> None:
        self._catalog = catalog
        self._executor = executor
        self._owner = owner
        self._wants = wants
        self._lease: Lease | None = None
        self._in_flight = InFlight(catalog.store, executor)
        self._observer = catalog.observer()
        self._tidied_at: float | None = None
        self._teller: Teller | None = None
        self._weaknesses: tuple[str, ...] = ()
        """What the store lacks, as sentences."""

    def round(self, now: float) -> Round:
        """One look at storage, and what follows from it, has begun."""
        try:
            self._hold_lease()
            return self._act(now)
        except LeaseHeldError as error:
            return self._stand_by(error, now)

    @property
    def epoch(self) -> int:
        """Of the lease; 0 while it is not held."""
        return 0 if self._lease is None else self._lease.epoch

    def close(self) -> None:
        """No action is in flight, and the next one need not wait for the lease."""
        self._executor.close()
        if self._lease is not None:
            self._lease.release()
            self._lease = None

    def _hold_lease(self) -> None:
        """Checked before anything is changed: a manager that was paused finds out here."""
        if self._lease is None:
            self._weaknesses = tuple(map(str, self._catalog.store.weaknesses()))
            lease = Lease(self._catalog.store, MANAGER, owner=self._owner)
            lease.acquire()
            log.info("this process manages %s epoch=%d", self._catalog.uri, lease.epoch)
            self._lease = lease
            self._teller = Teller(self._catalog.store, who=f"manager epoch {lease.epoch}")
        self._lease.check()

    def _stand_by(self, error: LeaseHeldError, now: float) -> Round:
        """Another one acts. Tasks of ours that still run end in private places, or find out too."""
        if self._lease is not None:
            log.warning("this process does not manage %s any more: %s", self._catalog.uri, error)
            self._lease.release()
            self._lease = None
        self._in_flight.forget()
        observed = self._observer.observe(now=now).at(now)
        planned = plan(observed, now=now)
        return Round(
            observed=observed,
            planned=planned,
            running=(),
            waiting=planned.actions,
            waits={},
            problems=(),
            standing_by=error.what,
        )

    def _act(self, now: float) -> Round:
        self._collect(now)
        observed = self._settle_records(self._observer.observe(now=now).at(now), now)
        observed = self._rewrite(observed, self._given_up(observed.policy.limits, now))
        observed = self._give_up_drafts(observed, now)
        self._tell(observed, now)
        planned = plan(observed, now=now)
        elsewhere = [p.action for p in planned.planned if not self._executor.takes(p.action)]
        # must come before the limits: an unwanted action would hold the room of a wanted one
        wanted = [a for a in planned.actions if self._wants(a) and a not in elsewhere]
        waits = self._start_all(wanted, observed, now)
        for request in planned.settled:
            self._catalog.records.settle_request(request)
        self._tidy(observed, now)
        open_requests = tuple(r for r in observed.requests if r not in planned.settled)
        return Round(
            observed=replace(observed, requests=open_requests),
            planned=planned,
            running=self._in_flight.all(),
            waiting=tuple(action for action in wanted if action.key not in self._in_flight),
            waits=waits,
            problems=(*self._weaknesses, *self._in_flight.problems()),
            elsewhere=tuple(elsewhere),
        )

    def _start_all(
        self, wanted: list[Action], observed: Observation, now: float
    ) -> Mapping[str, str]:
        """Whatever finds room has begun; why the others wait, by their keys."""
        ready = [action for action in wanted if action.key not in self._in_flight]
        if not ready:
            return {}  # and nobody is asked for the nodes
        admission = admit(
            ready,
            self._in_flight.occupants(),
            limits=observed.policy.limits,
            resting=resting(observed.records.values(), now=now),
            nodes=Nodes(
                living=self._executor.nodes(), near=nodes_of_bytes(ready, observed.records)
            ),
        )
        for start in admission.starts:
            self._start(start, observed, now)
        return admission.waits

    def _give_up_drafts(self, observed: Observation, now: float) -> Observation:
        """Staged saves of which something is lost for good say so, and wait for nothing more."""
        given_up: dict[str, Ended] = {}
        for draft, reason in abandonments(observed):
            self._held().check()
            ended = self._catalog.drafts.end(draft.save_id, "abandoned", why=reason, at=now)
            given_up[draft.save_id] = ended
        drafts = (replace(d, ended=given_up.get(d.save_id, d.ended)) for d in observed.drafts)
        return replace(observed, drafts=tuple(drafts))

    def _tidy(self, observed: Observation, now: float) -> None:
        """What nobody needs any more is gone; looked for now and then, since it takes requests."""
        self._held().check()  # nobody can undo what follows
        for draft in leftovers(observed):
            self._catalog.drafts.discard_parts(draft)
        for draft in forgettable(observed, now=now):
            self._catalog.drafts.forget(draft)
        self._in_flight.sweep()
        if self._tidied_at is not None and 0 <= now - self._tidied_at < TIDY_EVERY_S:
            return
        self._tidied_at = now
        found = find_garbage(self._catalog, observed, now=now)
        failed = remove_garbage(found, guard=self._held().check)
        if found:
            size_bytes = sum(garbage.size_bytes for garbage in found)
            log.info("tidied things=%d bytes=%d failed=%d", len(found), size_bytes, len(failed))
        for garbage, why in failed:
            log.warning("%s at %s cannot be removed: %s", garbage.what, garbage.where, why)

    def _tell(self, observed: Observation, now: float) -> None:
        """Whatever has changed since somebody told last is an event on storage, and a log line."""
        assert self._teller is not None, "made with the lease"
        for event in self._teller.tell(observed, now=now):
            log.info("%s", event.text)

    def _settle_records(self, observed: Observation, now: float) -> Observation:
        """Records that time has overtaken say what is true now.

        One that says RUNNING under a manager that died is to run again: its task died with it.
        """
        interrupted = [
            record.interrupted(now)
            for key, record in observed.records.items()
            if record.state is ActionState.RUNNING and key not in self._in_flight
        ]
        observed = self._rewrite(observed, interrupted)
        observed = self._obey(observed, now)
        observed = self._rewrite(observed, overtaken(observed, now=now))
        observed = self._rewrite(observed, refused(observed, now=now))
        return self._rewrite(observed, superseded(observed, now=now))

    def _obey(self, observed: Observation, now: float) -> Observation:
        """What people want to become of actions; a task that is cancelled is stopped first."""
        changed = obeyed(observed, now=now)
        for record in changed:
            self._in_flight.stop(record.action.key)
            log.info(
                "%s is %s: %s", record.action.title, record.state, record.error or record.asked_by
            )
        observed = self._rewrite(observed, changed)
        for command in observed.commands:
            self._catalog.records.settle_command(command)
        return observed

    def _rewrite(self, observed: Observation, records: list[ActionRecord]) -> Observation:
        for record in records:
            self._write(record)
        changed = {record.action.key: record for record in records}
        return replace(observed, records={**observed.records, **changed})

    def _start(self, start: Start, observed: Observation, now: float) -> None:
        """The record says RUNNING before the task exists, so that no crash hides an attempt."""
        action = start.action
        record = observed.records.get(action.key)
        if record is None or record.state.is_terminal:
            record = (record or ActionRecord(action=action)).afresh()
        started = record.started(now)
        self._write(started)
        attempt = Attempt(
            action=action,
            number=started.attempts,
            started_at=started.changed_at,
            epoch=self._held().epoch,
            beat_s=observed.policy.limits.beat_s,
            places_after=places_after(action, observed),
            verify=proof_needed(action, observed, now=now),
        )
        self._in_flight.start(started, attempt, start.placement)
        log.info("started %s node=%s", attempt.title, start.placement and start.placement.node.name)

    def _collect(self, now: float) -> None:
        """Records of the actions that have ended since the last round."""
        for flight in self._in_flight.ended():
            self._write(self._outcome(flight, now))
            self._in_flight.drop(flight)

    def _outcome(self, flight: Flight, now: float) -> ActionRecord:
        title = flight.attempt.title
        try:
            result = self._in_flight.result_of(flight)
        except Exception as error:  # noqa: BLE001  what failed is in the record; the loop goes on
            log.warning("failed %s: %s", title, error)
            return flight.record.failed(error, now, jitter=random.random())
        log.info("finished %s", title)
        return flight.record.succeeded(result, now)

    def _given_up(self, limits: Limits, now: float) -> list[ActionRecord]:
        """Records of attempts of which nothing was heard for too long; these are stopped."""
        records: list[ActionRecord] = []
        for flight, error in self._in_flight.listen(limits):
            log.warning("gave up %s: %s", flight.attempt.title, error)
            records.append(flight.record.failed(error, now, jitter=random.random()))
        return records

    def _write(self, record: ActionRecord) -> None:
        """Records have one writer: whoever holds the lease."""
        self._held().check()
        self._catalog.records.write_action(record)

    def _held(self) -> Lease:
        assert self._lease is not None, "taken at the beginning of the round"
        return self._lease
