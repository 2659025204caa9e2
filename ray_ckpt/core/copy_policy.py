"""What a run's owner writes down of copies: of what, where to, and how long they stay there.

    [[lifecycle.publish]]    export = "hf-bf16"    to = "s3://bucket/models"    keep.latest = 5
    [[lifecycle.publish]]    checkpoint.every_steps = 5000    to = "/mnt/backup/run"

Knows what each field means and which do not go together; decides nothing about any step.
"""

from dataclasses import dataclass
from typing import Literal

from ray_ckpt.core import names
from ray_ckpt.core.config import a_word, at_least
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.retention import KeepBest, KeepEvery, KeepLatest, Order, Policy

DEFAULT_METRIC = "loss"
WhenBehind = Literal["all", "newest"]
"""What to do of several steps that wait for the same: each of them, or the newest alone."""
Proof = Literal["sizes", "digests"]
"""What says that a copy is whole. What is sent was proven before it left, whichever it is."""
NOT_ON_HUB = "a checkpoint goes to no repository on the Hub: what is committed there stays for ever"
INSTEAD_OF_HUB = (
    "copy it to s3://bucket/prefix, a path, hf://buckets/org/name; or publish an export"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepCopies:
    """Which copies survive at one destination; the newest one always does."""

    latest: int | None = None
    """The newest so many copies."""
    every_steps: int | None = None
    """Every copy whose step is a multiple of this."""

    def __post_init__(self) -> None:
        at_least(1, latest=self.latest, every_steps=self.every_steps)
        if self.latest is None and self.every_steps is None:
            raise ConfigError(
                "no copy is named",
                "publish.keep",
                do="set latest or every_steps; without keep every copy stays",
            )

    def policies(self) -> list[Policy]:
        """The retention policies these fields stand for."""
        return named_policies(latest=self.latest, every_steps=self.every_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedSteps:
    """Checkpoints that are copied as they are: the union of what is named."""

    every_steps: int | None = None
    """Each step that is a multiple of this."""
    last_step: bool = True
    """The last step of the run."""
    steps: tuple[int, ...] = ()
    """These steps."""

    def __post_init__(self) -> None:
        at_least(1, every_steps=self.every_steps)
        check_steps("publish.checkpoint.steps", self.steps)
        if not (self.every_steps or self.last_step or self.steps):
            raise ConfigError(
                "no checkpoint is named",
                "publish.checkpoint",
                do="set every_steps, steps or last_step = true, or remove the entry",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishPolicy:
    """A place every export of one name is copied to, or checkpoints themselves."""

    to: str
    """`/path`, `s3://bucket/prefix` or `hf://org/repo`; a checkpoint goes to no repository."""
    export: str | None = None
    """Name of the export."""
    checkpoint: CopiedSteps | None = None
    """Instead of an export: which checkpoints are copied, optimizer and all."""
    required: bool = True
    """Whether a step is kept until its copy was made."""
    when_behind: WhenBehind = "all"
    """When steps come faster than copies: make each all the same, or of those that wait and that
    `every_steps` alone asks for, `newest`: older ones are superseded and hold no step."""
    verify: Proof = "sizes"
    """With `digests` every file is read back from there and compared before the copy is visible;
    on the Hub before its tag is set. Else the sizes are looked at, and what the store has proven
    of what it received."""
    look_every_s: float | None = None
    """Look at each copy there again once its last look is so many seconds ago: at its sizes, and
    whether the store says that it was written anew. One that is gone is made again, one that is
    another now is told of. None never does."""
    scrub_every_s: float | None = None
    """And read every byte of it so often; of the Hub, whose history never changes, nothing."""
    keep: KeepCopies | None = None
    """Which copies stay there; None keeps all. What `promote` leads to always does."""
    promote: str | None = None
    """A name, for example `latest`, that leads to one of the copies there: a symbolic link beside
    them, on S3 an object whose text is `step-<n>`, on the Hub a tag."""
    promote_by: Literal["newest", "best"] = "newest"
    """Which copy that is; never one with NaN or Inf in its weights."""
    metric: str = DEFAULT_METRIC
    """For `promote_by = "best"`: a metric that was handed to `save`."""
    order: Order = "min"
    """For `promote_by = "best"`: which end of `metric` is best."""

    def __post_init__(self) -> None:
        self._check_what()
        at_least(1, look_every_s=self.look_every_s, scrub_every_s=self.scrub_every_s)
        self._check_promote()
        if self.keep is not None and names.is_repository(self.to):
            raise ConfigError(
                f"copies at {self.to} are never removed: a tag on the Hub is history",
                "publish.keep",
                do=f"leave out keep; when it is time: ray-ckpt purge-hub ROOT {self.to}",
            )

    def _check_what(self) -> None:
        if (self.export is None) is (self.checkpoint is None):
            raise ConfigError(
                "a [[publish]] entry copies exports of one name, or checkpoints",
                "publish.export",
                do='set export = "hf-bf16", or else checkpoint.every_steps = 1000',
            )
        if self.checkpoint is not None and names.is_repository(self.to):
            raise ConfigError(NOT_ON_HUB, "publish.to", do=INSTEAD_OF_HUB)
        if self.checkpoint is not None and self.promote is not None:
            raise ConfigError(
                "promote names a copy of an export, and this entry copies checkpoints",
                "publish.promote",
                do="leave out promote: whoever loads the copies takes the newest by itself",
            )

    def _check_promote(self) -> None:
        if self.promote is not None:
            a_word("publish.promote", self.promote)
        elif self.promote_by != "newest":
            raise ConfigError(
                "promote_by says which copy a name leads to, but promote names none",
                "publish.promote_by",
                do='set promote = "best", or another name',
            )
        changed = changed_ranking(metric=self.metric, order=self.order)
        if self.promote_by != "best" and changed:
            raise ConfigError(
                f"{changed[0]} ranks copies, but {self.promote_by} ones are promoted",
                f"publish.{changed[0]}",
                do='set promote_by = "best", or remove it',
            )

    @property
    def ranking(self) -> KeepBest | None:
        """How copies are ranked for `promote`; None where the newest counts."""
        return KeepBest(1, self.metric, self.order) if self.promote_by == "best" else None

    @property
    def repository(self) -> str | None:
        """Where its tags lie, on the Hub; None for any other destination."""
        return self.to.partition("@")[0] if names.is_repository(self.to) else None


def named_policies(*, latest: int | None, every_steps: int | None) -> list[Policy]:
    """The retention policies of these two fields."""
    policies: list[Policy] = []
    if latest is not None:
        policies.append(KeepLatest(latest))
    if every_steps is not None:
        policies.append(KeepEvery(every_steps))
    return policies


def check_steps(field: str, steps: tuple[int, ...]) -> None:
    """Nothing, if every step can be one; else a ConfigError names the field."""
    if any(step < 0 for step in steps):
        raise ConfigError(f"a step must be at least 0, got {min(steps)}", field)


def changed_ranking(**fields: str) -> list[str]:
    """Names of those that say by what steps are ranked, and not by loss as always."""
    return [name for name, value in fields.items() if value not in (DEFAULT_METRIC, "min")]
