"""What a run's owner writes down once: which steps are exported, copied, kept and read again.

    [lifecycle.keep]            latest = 3    every_steps = 5000    max_bytes = 2_000_000_000_000
    [lifecycle.verify]          scrub_every_s = 604800
    [[lifecycle.export]]        name = "hf-bf16"    every_steps = 1000    best = 1
    [[lifecycle.publish]]       export = "hf-bf16"    to = "s3://bucket/models"    keep.latest = 5
    [lifecycle.limits]          total = 8    per_node = 2    per_kind = { export = 1 }

Knows what each field means and which do not go together; decides nothing about any step.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ray_ckpt.core import names
from ray_ckpt.core.config import (
    MAX_SHARD_BYTES,
    Device,
    Dtype,
    ExportFormat,
    a_word,
    at_least,
    build,
    parse_toml,
)
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.retention import (
    KeepBest,
    KeepEvery,
    KeepLatest,
    KeepRecent,
    KeepSteps,
    Order,
    Policy,
)

_DEFAULT_METRIC = "loss"
WhenBehind = Literal["all", "newest"]
"""What to do of several steps that wait for the same: each of them, or the newest alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPolicy:
    """Steps that become a Hugging Face folder by themselves: the union of what is named."""

    name: str
    """Folder under `exports/`, for example `hf-bf16`."""
    dtype: Dtype = "bfloat16"
    """What floating-point tensors are cast to."""
    every_steps: int | None = None
    """Export each step that is a multiple of this."""
    last_step: bool = True
    """Export the last step of the run."""
    best: int | None = None
    """Export a step when it becomes one of the best so many; older ones stay exported."""
    metric: str = _DEFAULT_METRIC
    """For `best`: a metric that was handed to `save`."""
    order: Order = "min"
    """For `best`: which end of `metric` is best."""
    steps: tuple[int, ...] = ()
    """Export these steps."""
    flavors: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    """Converter to what it is exported as, for example `lora = "peft"`."""
    format: ExportFormat = "safetensors"
    """Several safetensors files, or one file for `torch.load`: `torch`."""
    max_shard_bytes: int = MAX_SHARD_BYTES
    """Of each safetensors file."""
    device: Device = "cpu"
    """Where merges are computed; with `cuda` the task asks for one GPU."""
    logits_within: float | None = None
    """Refuse an export whose logits of the run's prompt are further from the recorded ones."""
    license: str | None = None
    """For the model card, as the Hub calls it: `apache-2.0`; else the base model's, if known."""
    when_behind: WhenBehind = "all"
    """When steps come faster than exports: make each all the same, or of those that only
    `every_steps` asks for and that wait, `newest`: older ones are superseded, copies included."""

    def __post_init__(self) -> None:
        a_word("export.name", self.name)
        at_least(1, every_steps=self.every_steps, best=self.best)
        at_least(1, max_shard_bytes=self.max_shard_bytes)
        at_least(0, logits_within=self.logits_within)
        _steps("export.steps", self.steps)
        _ranked_by("export", best=self.best, metric=self.metric, order=self.order)
        if not (self.every_steps or self.last_step or self.best or self.steps):
            raise ConfigError(
                f"the export {self.name} names no step",
                "export.last_step",
                do="set every_steps, best, steps or last_step = true, or remove the entry",
            )

    @property
    def ranking(self) -> KeepBest | None:
        """How `best` ranks steps; None without it."""
        return None if self.best is None else KeepBest(self.best, self.metric, self.order)


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
        return _named(latest=self.latest, every_steps=self.every_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishPolicy:
    """A place every export of one name is copied to."""

    export: str
    """Name of the export."""
    to: str
    """`/path`, `s3://bucket/prefix` or `hf://org/repo`."""
    required: bool = True
    """Whether a step is kept until its copy was made."""
    when_behind: WhenBehind = "all"
    """When exports come faster than copies: make each all the same, or of those that wait and are
    exported by `every_steps` alone, `newest`: older ones are superseded and hold no step."""
    keep: KeepCopies | None = None
    """Which copies stay there; None keeps all. What `promote` leads to always does."""
    promote: str | None = None
    """A name, for example `latest`, that leads to one of the copies there: a symbolic link beside
    them, on S3 an object whose text is `step-<n>`, on the Hub a tag."""
    promote_by: Literal["newest", "best"] = "newest"
    """Which copy that is; never one with NaN or Inf in its weights."""
    metric: str = _DEFAULT_METRIC
    """For `promote_by = "best"`: a metric that was handed to `save`."""
    order: Order = "min"
    """For `promote_by = "best"`: which end of `metric` is best."""

    def __post_init__(self) -> None:
        self._check_promote()
        if self.keep is not None and names.is_repository(self.to):
            raise ConfigError(
                f"copies at {self.to} are never removed: a tag on the Hub is history",
                "publish.keep",
                do=f"leave out keep; when it is time: ray-ckpt purge-hub ROOT {self.to}",
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
        changed = _changed(metric=self.metric, order=self.order)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepConfig:
    """Which checkpoints survive; several lines keep the union, then `max_bytes` has its say."""

    latest: int | None = None
    """The newest so many verified checkpoints; at least 2."""
    every_steps: int | None = None
    """Every step that is a multiple of this."""
    best: int | None = None
    """The best so many by `best_metric`."""
    best_metric: str = _DEFAULT_METRIC
    """A metric that was handed to `save`; smaller is better unless `best_order` says otherwise."""
    best_order: Order = "min"
    """Which end of `best_metric` is best."""
    max_age_s: float | None = None
    """What was saved in the last so many seconds; ten minutes more, as clocks differ."""
    steps: tuple[int, ...] = ()
    """These steps."""
    max_bytes: int | None = None
    """Drop the oldest of what only these lines keep until the checkpoints fit; alone, keep the
    newest that fit. Exports and the trash do not count. What nothing may purge stays anyway."""
    trash_grace_s: float = 3600.0
    """Seconds a purged step stays in the trash, where `ray-ckpt undo` finds it."""

    def __post_init__(self) -> None:
        at_least(2, latest=self.latest)
        at_least(1, every_steps=self.every_steps, best=self.best)
        at_least(1, max_age_s=self.max_age_s, max_bytes=self.max_bytes)
        at_least(0, trash_grace_s=self.trash_grace_s)
        _steps("keep.steps", self.steps)
        _ranked_by("keep", best=self.best, best_metric=self.best_metric, best_order=self.best_order)

    def policies(self, *, now: float) -> list[Policy]:
        """The retention policies these fields stand for; none keeps everything."""
        policies = _named(latest=self.latest, every_steps=self.every_steps)
        if self.best is not None:
            policies.append(KeepBest(self.best, self.best_metric, self.best_order))
        if self.max_age_s is not None:
            policies.append(KeepRecent(self.max_age_s, now))
        if self.steps:
            policies.append(KeepSteps(self.steps))
        return policies


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyPolicy:
    """When bytes are read and compared again. Every new step is verified, whatever this says."""

    scrub_every_s: float | None = None
    """Verify a step again once its last look is so many seconds ago; None never does."""

    def __post_init__(self) -> None:
        at_least(1, scrub_every_s=self.scrub_every_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecyclePolicy:
    """What happens to every checkpoint of a run after its save."""

    export: tuple[ExportPolicy, ...] = ()
    """Exports made without being asked for."""
    publish: tuple[PublishPolicy, ...] = ()
    """Copies made of these exports."""
    keep: KeepConfig = dataclasses.field(default_factory=KeepConfig)
    """What is kept; the default keeps everything."""
    verify: VerifyPolicy = dataclasses.field(default_factory=VerifyPolicy)
    """What is read again."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """How much of all this runs at once."""

    def __post_init__(self) -> None:
        names = [export.name for export in self.export]
        unknown = sorted({p.export for p in self.publish} - set(names))
        if unknown:
            raise ConfigError(
                f"publish names exports that no [[export]] makes: {', '.join(unknown)}",
                "publish.export",
                do=f"use one of: {', '.join(names) or 'none is defined'}",
            )
        if len(set(names)) < len(names):
            raise ConfigError("two [[export]] entries have the same name", "export.name")
        if len({(p.export, p.to) for p in self.publish}) < len(self.publish):
            raise ConfigError("two [[publish]] entries copy one export to one place", "publish.to")
        tags = [(p.repository, p.promote) for p in self.publish if p.promote and p.repository]
        if len(set(tags)) < len(tags):
            raise ConfigError(
                "two [[publish]] entries move the same tag of one repository",
                "publish.promote",
                do="give each a name of its own",
            )


def policy_of_toml(text: str, *, where: str) -> LifecyclePolicy:
    """The policy in a file of its own, or in the `lifecycle` section of a job's file.

    Raises:
        ConfigError: no TOML, an unknown key, a value of the wrong type or one that is refused.
    """
    document = parse_toml(text, where=where)
    if "lifecycle" not in document:
        return build(LifecyclePolicy, document, where=where)
    section = document["lifecycle"]
    if not isinstance(section, dict):
        raise ConfigError("expected a section", f"{where}: lifecycle", do="write [lifecycle.keep]")
    return build(LifecyclePolicy, cast(dict[str, Any], section), where=f"{where}: lifecycle")


def _named(*, latest: int | None, every_steps: int | None) -> list[Policy]:
    policies: list[Policy] = []
    if latest is not None:
        policies.append(KeepLatest(latest))
    if every_steps is not None:
        policies.append(KeepEvery(every_steps))
    return policies


def _steps(field: str, steps: tuple[int, ...]) -> None:
    if any(step < 0 for step in steps):
        raise ConfigError(f"a step must be at least 0, got {min(steps)}", field)


def _ranked_by(section: str, *, best: int | None, **fields: str) -> None:
    """Nothing, if `best` says how many, or nothing else says by what."""
    changed = _changed(**fields)
    if best is None and changed:
        raise ConfigError(
            f"{changed[0]} ranks steps, but best does not say how many to take",
            f"{section}.{changed[0]}",
            do="set best = 1, or remove it",
        )


def _changed(**fields: str) -> list[str]:
    """Names of those that say by what steps are ranked, and not by loss as always."""
    return [name for name, value in fields.items() if value not in (_DEFAULT_METRIC, "min")]
