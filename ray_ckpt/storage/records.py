"""What `.ray_ckpt/` remembers: the run, what was asked for, what became of it.

All of it can be lost without losing a checkpoint or a pin. One object holds one fact.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord, ExportSpec
from ray_ckpt.core.config import LifecyclePolicy, build
from ray_ckpt.core.errors import ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.observation import Request
from ray_ckpt.storage.base import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What belongs to the run as a whole."""

    run_id: str
    policy: LifecyclePolicy = field(default_factory=LifecyclePolicy)


class Records:
    """Reads and writes these objects of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def run(self) -> Run | None:
        """The run, or None for a root that no run has written to."""
        try:
            document: dict[str, Any] = json.loads(self._store.read(names.RUN))
        except ObjectNotFoundError:
            return None
        where = f"{self._store.uri}/{names.RUN}"
        return Run(
            run_id=document["run_id"],
            policy=build(LifecyclePolicy, document["policy"], where=where),
        )

    def begin_run(self, run_id: str, policy: LifecyclePolicy | None) -> Run:
        """The run of this root: the one that is there already, with `policy` if one is given."""
        known = self.run()
        run = Run(
            run_id=known.run_id if known else run_id,
            policy=policy or (known.policy if known else LifecyclePolicy()),
        )
        if run != known:
            self._store.write(names.RUN, _json({"schema": "ray_ckpt.run/1", **asdict(run)}))
        return run

    def actions(self) -> dict[str, ActionRecord]:
        """Every action's record under its key."""
        records = (ActionRecord.from_json(text) for text in self._all(names.ACTIONS))
        return {record.action.key: record for record in records}

    def action(self, action: Action) -> ActionRecord:
        """The record of one action; a fresh one if it was never started."""
        try:
            return ActionRecord.from_json(self._store.read(names.action_key(action.key)))
        except ObjectNotFoundError:
            return ActionRecord(action=action)

    def write_action(self, record: ActionRecord) -> None:
        """Replaces the record. Its one writer is whoever runs the action."""
        self._store.write(names.action_key(record.action.key), record.to_json())

    def forget_action(self, action: Action) -> None:
        """The action counts as never started."""
        self._store.delete([names.action_key(action.key)])

    def requests(self) -> tuple[Request, ...]:
        """Everything that was asked for."""
        return tuple(_request(json.loads(text)) for text in self._all(names.REQUESTS))

    def add_request(self, request: Request) -> None:
        """Asked for from now on; asking twice is asking once."""
        text = _json(asdict(request))
        try:
            self._store.create(names.request_key(_request_key(request)), text)
        except ObjectExistsError:
            return

    def _all(self, folder: str) -> list[bytes]:
        texts: list[bytes] = []
        for info in sorted(self._store.list_objects(folder), key=lambda info: info.key):
            try:
                texts.append(self._store.read(info.key))
            except ObjectNotFoundError:
                continue  # removed since it was listed
        return texts


def _request(document: dict[str, Any]) -> Request:
    export = document["export"]
    return Request(
        kind=ActionKind(document["kind"]),
        step=document["step"],
        export=ExportSpec(**export) if export else None,
        destination=document["destination"],
    )


def _request_key(request: Request) -> str:
    """The key such an action would have for any source: a request outlives a re-save."""
    return Action(
        kind=request.kind,
        step=request.step,
        source_id="",
        export=request.export,
        destination=request.destination,
    ).key


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
