"""What `.ray_ckpt/` remembers: the run, what was asked for, what became of it.

All of it can be lost without losing a checkpoint or a pin. One object holds one fact.
"""

import getpass
import hashlib
import json
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action, ActionRecord
from ray_ckpt.core.config import build
from ray_ckpt.core.errors import ObjectExistsError, ObjectNotFoundError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.observation import Command, Request
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.read_once import ReadOnce
from ray_ckpt.storage.secrets import without_secrets

log = logging.getLogger("ray_ckpt")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What belongs to the run as a whole."""

    run_id: str
    policy: LifecyclePolicy = field(default_factory=LifecyclePolicy)


class Records:
    """Reads and writes these objects of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._is_run_damaged = False
        """Told of once."""
        self._actions = ReadOnce(store, partial(_parse_or_tell, ActionRecord.from_json))
        self._requests = ReadOnce(store, partial(_parse_or_tell, _request))
        self._commands = ReadOnce(store, partial(_parse_or_tell, _command))

    def run(self) -> Run | None:
        """The run, or None for a root that no run has written to, or whose record is damaged."""
        where = f"{self._store.uri}/{names.RUN}"
        try:
            text = self._store.read(names.RUN)
        except ObjectNotFoundError:
            return None
        try:
            document: dict[str, Any] = json.loads(text)
            document = {"run_id": document["run_id"], "policy": document["policy"]}
        except (ValueError, KeyError, TypeError) as error:
            if not self._is_run_damaged:
                log.warning("%s cannot be read, so everything is kept: %r", where, error)
            self._is_run_damaged = True
            return None
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

    def ask_to_save(self) -> None:
        """The trainer saves at its next step, if one runs."""
        self._store.write(names.SAVE_NOW, b"{}\n")

    def take_save_request(self) -> bool:
        """Whether somebody has asked the trainer to save; the request is gone then."""
        if self._store.stat(names.SAVE_NOW) is None:
            return False
        self._store.delete([names.SAVE_NOW])
        return True

    def actions(self) -> dict[str, ActionRecord]:
        """Every action's record under its key."""
        records = self._all(names.ACTIONS, self._actions)
        return {record.action.key: record for record in records}

    def action(self, action: Action) -> ActionRecord:
        """The record of one action; a fresh one if it was never started."""
        try:
            return ActionRecord.from_json(self._store.read(names.action_key(action.key)))
        except ObjectNotFoundError:
            return ActionRecord(action=action)

    def write_action(self, record: ActionRecord) -> None:
        """Replaces the record. Its one writer is whoever runs the action."""
        seen = replace(record, error=_seen(record.error), first_error=_seen(record.first_error))
        self._store.write(names.action_key(record.action.key), seen.to_json())

    def forget_action(self, action: Action) -> None:
        """The action counts as never started."""
        self._store.delete([names.action_key(action.key)])

    def requests(self) -> tuple[Request, ...]:
        """Everything that was asked for and is not settled yet."""
        return tuple(self._all(names.REQUESTS, self._requests))

    def add_request(self, request: Request) -> None:
        """Asked for from now on; asking twice is asking once."""
        text = _json(_document(request))
        try:
            self._store.create(_request_key(request), text)
        except ObjectExistsError:
            return

    def settle_request(self, request: Request) -> None:
        """No longer asked for: what became of it is in its action's record."""
        self._store.delete([_request_key(request)])

    def commands(self) -> tuple[Command, ...]:
        """What people want to become of actions and is not obeyed yet."""
        return tuple(self._all(names.COMMANDS, self._commands))

    def add_command(self, command: Command) -> None:
        """Whoever manages the root obeys it in its next round."""
        key = names.command_key(command.verb, command.action.key)
        self._store.write(key, _json({**asdict(command), "action": command.action.to_document()}))

    def settle_command(self, command: Command) -> None:
        """Obeyed: what became of it is in its action's record."""
        self._store.delete([names.command_key(command.verb, command.action.key)])

    def _all(self, folder: str, known: ReadOnce[T | None]) -> list[T]:
        """Every record of a folder; only what has changed since the last call is read."""
        listed = sorted(self._store.list_objects(folder), key=lambda info: info.key)
        return [record for record in known.read(listed).values() if record is not None]


def who_asks() -> str:
    """The person at this process, `user@host`: how a command names them."""
    return f"{user_name()}@{socket.gethostname()}"


def user_name() -> str:
    """Whom this process belongs to, by name where there is one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number that has no name
        return str(os.getuid())


def _parse_or_tell(parse: Callable[[bytes], T], text: bytes, where: str) -> T | None:
    """A damaged record is told of and left out, as if it were lost."""
    try:
        return parse(text)
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read: %r", where, error)
        return None


def _request(text: bytes) -> Request:
    document = json.loads(text)
    return Request(
        step=int(document["step"]),
        export=ExportSpec(**document["export"]) if document["export"] else None,
        destination=document["destination"],
        verify=document.get("verify", "sizes"),
    )


def _command(text: bytes) -> Command:
    document = json.loads(text)
    return Command(
        verb=document["verb"],
        action=Action.from_document(document["action"]),
        by=document["by"],
    )


def _document(request: Request) -> dict[str, Any]:
    """What it says beyond the usual: names of requests that were made before stay."""
    document = asdict(request)
    if request.verify == "sizes":
        del document["verify"]
    return document


def _request_key(request: Request) -> str:
    """Named by what is asked for, so that asking twice writes one object."""
    text = json.dumps(_document(request), sort_keys=True)
    return names.request_key(hashlib.sha256(text.encode()).hexdigest()[:16])


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()


def _seen(text: str | None) -> str | None:
    """As anybody may read it."""
    return None if text is None else without_secrets(text)
