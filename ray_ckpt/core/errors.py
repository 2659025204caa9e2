"""Every error ray_ckpt raises on purpose.

RayCkptError
├── UsageError                  exit 2   asked for something that cannot be (also a ValueError)
│   ├── ConfigError                      a field or file of the configuration
│   ├── StepNotFoundError                no such checkpoint or export
│   ├── StepExistsError                  the step is committed and is never written again
│   ├── ForeignFolderError               a step folder that ray_ckpt did not write
│   ├── PurgeRefusedError                a step that must stay: pinned, read, saved anew, needed
│   ├── LeaseHeldError                   somebody else is writing to this root
│   ├── StateDictError                   keys lacking, unexpected or claimed twice
│   └── TransitionError                  a state that may not follow the present one
├── IntegrityError              exit 1   bytes differ from what the manifest says
│   └── UnknownSchemaError               another version wrote the manifest; it may be sound
├── SaveError                   exit 1   a save failed; nothing of it is visible
├── NodeLostError               exit 1   a node is gone, and with it what lay on it alone
├── OutOfMemoryError            exit 3   a node's memory did not suffice
└── StorageError                exit 3   a store refused or failed
    ├── ObjectNotFoundError     exit 2
    ├── ObjectExistsError       exit 2   a conditional create lost
    ├── TransientError          exit 3   worth another try
    │   ├── ThrottledError               the store asks to be asked less often
    │   └── ConflictError                somebody else changed the same thing meanwhile
    ├── StorageFullError        exit 3   no room
    └── AuthorizationError      exit 4   not allowed, or not signed in

Every error says what happened, where, whether the data is safe and what to type next.
All of them survive pickling, hence Ray: the four texts are the exception's arguments.
"""

from typing import ClassVar


class RayCkptError(Exception):
    """What happened, where, what is safe and what to do next."""

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, where: str = "", safe: str = "", do: str = "") -> None:
        super().__init__(what, where, safe, do)
        self.what = what
        self.where = where
        self.safe = safe
        self.do = do

    def __str__(self) -> str:
        labelled = (("where", self.where), ("safe", self.safe), ("do", self.do))
        return "\n".join(
            [self.what, *(f"  {label + ':':<7}{text}" for label, text in labelled if text)]
        )


class UsageError(RayCkptError, ValueError):
    """The caller asked for something that cannot be."""

    exit_code = 2


class ConfigError(UsageError):
    """A field or a file of the configuration is wrong."""


class StepNotFoundError(UsageError):
    """No checkpoint or export of that step is there."""


class StepExistsError(UsageError):
    """The step is committed already, and nothing writes into a committed step."""


class ForeignFolderError(UsageError):
    """A step folder without a manifest: not ours to use, count or delete."""


class PurgeRefusedError(UsageError):
    """What was planned to be purged must stay, as it turned out; nothing was done to it."""


class LeaseHeldError(UsageError):
    """Somebody else is writing to this root."""


class StateDictError(UsageError):
    """Keys are lacking, unexpected or claimed by two owners; each is named."""


class TransitionError(UsageError):
    """A checkpoint or an action may not go from its state to that one."""


class IntegrityError(RayCkptError):
    """Bytes on storage differ from what the manifest says."""


class UnknownSchemaError(IntegrityError):
    """A manifest that another version of ray_ckpt wrote; its step is neither used nor touched."""


class SaveError(RayCkptError):
    """A save failed; nothing of it is visible and older steps are untouched."""


class NodeLostError(RayCkptError):
    """A node is gone, or what lay on it alone; committed steps never lie on one node alone."""


class OutOfMemoryError(RayCkptError):
    """A node's memory did not suffice; what ran there was killed."""

    exit_code = 3


class StorageError(RayCkptError):
    """A store refused or failed."""

    exit_code = 3


class ObjectNotFoundError(StorageError):
    """The object is not there."""

    exit_code = 2


class ObjectExistsError(StorageError):
    """A conditional create found the object already there."""

    exit_code = 2


class TransientError(StorageError):
    """A time-out, a throttle or a reset connection: the same call may succeed later."""


class ThrottledError(TransientError):
    """The store asks to be asked less often."""

    def __init__(
        self,
        what: str,
        where: str = "",
        safe: str = "",
        do: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what, where, safe, do)
        self.args = (*self.args, retry_after_s)
        self.retry_after_s = retry_after_s
        """Seconds after which it wants to be asked again, where it says so."""


class ConflictError(TransientError):
    """Somebody else changed the same thing meanwhile: look again, then decide."""


class StorageFullError(StorageError):
    """No room is left, or a quota is used up."""


class AuthorizationError(StorageError):
    """The store knows who asks and says no, or does not know who asks."""

    exit_code = 4


def error_called(kind: str | None) -> type[RayCkptError]:
    """The error that a record tells of by its class name; RayCkptError if it is not ours."""
    found = globals().get(kind or "", RayCkptError)
    return found if isinstance(found, type) and issubclass(found, RayCkptError) else RayCkptError
