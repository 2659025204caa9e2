"""One try to carry out an action, and whether it still counts."""

from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.actions import Action
from ray_ckpt.core.copy_policy import Proof
from ray_ckpt.core.errors import LeaseHeldError
from ray_ckpt.core.lifecycle import ActionState
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.lease import MANAGER, LeaseGuard


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try to carry out an action: a small record, so that nothing large travels through Ray."""

    action: Action
    number: int
    started_at: float
    """As the action's record says: with the number it tells this attempt from every other one."""
    epoch: int
    """The manager's that planned it: what moves a checkpoint is refused under a later one."""
    beat_s: float
    """Seconds between two signs of life."""
    places_after: tuple[str, ...] = ()
    """Of an export: where it is copied to afterwards. Some take its files while it is made."""

    verify: Proof = "sizes"
    """Of a copy: what is to say that it is whole."""

    @property
    def title(self) -> str:
        """What the dashboard calls it."""
        again = f", attempt {self.number}" if self.number > 1 else ""
        return f"{self.action.title}{again}"

    @property
    def beat_key(self) -> str:
        """Where its signs of life are."""
        return names.running_key(self.action.key, self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptGuard:
    """Whether an attempt still counts: its manager holds the lease and waits for this very one."""

    catalog: Catalog
    attempt: Attempt

    def __call__(self) -> None:
        """Nothing, as long as it does.

        Raises:
            LeaseHeldError: another manager has taken over, or the attempt was given up.
        """
        attempt = self.attempt
        LeaseGuard(store=self.catalog.store, role=MANAGER, epoch=attempt.epoch)()
        record = self.catalog.records.action(attempt.action)
        current = record.state, record.attempts, record.changed_at
        if current != (ActionState.RUNNING, attempt.number, attempt.started_at):
            raise LeaseHeldError(
                f"attempt {attempt.number} of {attempt.action.title} was given up: the record says "
                f"{record.state}, attempt {record.attempts}",
                self.catalog.uri,
                "nothing was changed by this attempt",
            )
