"""What a run's owner writes down once: which steps are exported, copied, kept and read again.

    [lifecycle.keep]            latest = 3    every_steps = 5000    max_bytes = 2_000_000_000_000
    [lifecycle.verify]          scrub_every_s = 604800
    [[lifecycle.export]]        name = "hf-bf16"    every_steps = 1000    best = 1
    [[lifecycle.publish]]       see core.copy_policy
    [lifecycle.limits]          total = 8    per_node = 2    per_kind = { export = 1 }

Knows what each field means and which do not go together; decides nothing about any step.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

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
from ray_ckpt.core.copy_policy import (
    DEFAULT_METRIC,
    PublishPolicy,
    WhenBehind,
    changed_ranking,
    check_steps,
    named_policies,
)
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.limits import Limits
from ray_ckpt.core.retention import KeepBest, KeepRecent, KeepSteps, Order, Policy


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
    metric: str = DEFAULT_METRIC
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
        check_steps("export.steps", self.steps)
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
class KeepConfig:
    """Which checkpoints survive; several lines keep the union, then `max_bytes` has its say."""

    latest: int | None = None
    """The newest so many verified checkpoints; at least 2."""
    every_steps: int | None = None
    """Every step that is a multiple of this."""
    best: int | None = None
    """The best so many by `best_metric`."""
    best_metric: str = DEFAULT_METRIC
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
        check_steps("keep.steps", self.steps)
        _ranked_by("keep", best=self.best, best_metric=self.best_metric, best_order=self.best_order)

    def policies(self, *, now: float) -> list[Policy]:
        """The retention policies these fields stand for; none keeps everything."""
        policies = named_policies(latest=self.latest, every_steps=self.every_steps)
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
    """Copies made of these exports, and of checkpoints."""
    keep: KeepConfig = dataclasses.field(default_factory=KeepConfig)
    """What is kept; the default keeps everything."""
    verify: VerifyPolicy = dataclasses.field(default_factory=VerifyPolicy)
    """What is read again."""
    limits: Limits = dataclasses.field(default_factory=Limits)
    """How much of all this runs at once."""

    def __post_init__(self) -> None:
        names = [export.name for export in self.export]
        unknown = sorted({p.export for p in self.publish if p.export} - set(names))
        if unknown:
            raise ConfigError(
                f"publish names exports that no [[export]] makes: {', '.join(unknown)}",
                "publish.export",
                do=f"use one of: {', '.join(names) or 'none is defined'}",
            )
        if len(set(names)) < len(names):
            raise ConfigError("two [[export]] entries have the same name", "export.name")
        if len({(p.export, p.to) for p in self.publish}) < len(self.publish):
            raise ConfigError("two [[publish]] entries copy the same to one place", "publish.to")
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


def _ranked_by(section: str, *, best: int | None, **fields: str) -> None:
    """Nothing, if `best` says how many, or nothing else says by what."""
    changed = changed_ranking(**fields)
    if best is None and changed:
        raise ConfigError(
            f"{changed[0]} ranks steps, but best does not say how many to take",
            f"{section}.{changed[0]}",
            do="set best = 1, or remove it",
        )
