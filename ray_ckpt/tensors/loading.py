"""Which step is loaded, and getting it into place: nothing is used before it was verified."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.core.errors import IntegrityError, RayCkptError, StateDictError
from ray_ckpt.core.observation import READABLE
from ray_ckpt.core.resume import ResumePlan, plan_resume
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.reader import StepReader, load_into
from ray_ckpt.tensors.states import RNG, collect

log = logging.getLogger("ray_ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What `load` chose, and why."""

    step: int
    """Optimizer steps that are done; 0 for a new run."""
    reason: str
    skipped: tuple[tuple[int, str], ...] = ()
    """Newer steps that were passed over, newest first, each with the reason."""

    def log(self) -> None:
        """Says so."""
        log.info("resuming from step-%d: %s", self.step, self.reason)
        for step, why in self.skipped:
            log.warning("passed over step-%d: %s", step, why)


def choose(catalog: Catalog, ranks: Ranks, step: int) -> LoadReport:
    """The very step, every byte of which was read and is as committed.

    Raises:
        StepNotFoundError: it is not there.
        IntegrityError: it is damaged; storage is not touched.
    """
    damage = _damage(catalog, ranks, step)
    if damage:
        raise catalog.corrupt(step, damage)
    return LoadReport(step=step, reason="asked for by number")


def choose_newest(catalog: Catalog, ranks: Ranks) -> LoadReport:
    """The newest step whose every byte was read and is as committed; damaged ones are set aside.

    Raises:
        IntegrityError: steps are here and none can be used: a run that started from scratch
            beside them would throw them away.
    """
    damaged: dict[int, str] = {}
    while True:
        plan, visibly_damaged = ranks.on_coordinator(lambda: _plan(catalog))
        if plan.refusal is not None:
            raise _refused(catalog, plan)
        for step, why in visibly_damaged.items():
            _set_aside(catalog, ranks, step, why)
        damaged.update(visibly_damaged)
        damage = [] if plan.step is None else _damage(catalog, ranks, plan.step)
        if plan.step is None or not damage:
            skipped = {**dict(plan.skipped), **damaged}
            return LoadReport(
                step=plan.step or 0,
                reason=plan.reason,
                skipped=tuple(sorted(skipped.items(), reverse=True)),
            )
        damaged[plan.step] = "; ".join(damage)
        _set_aside(catalog, ranks, plan.step, damaged[plan.step])


def restore(
    catalog: Catalog,
    ranks: Ranks,
    step: int,
    *,
    model: ModelWrapper,
    parts: Mapping[str, Stateful],
) -> None:
    """Model and parts are as they were at `step`.

    Raises:
        StateDictError: keys differ; nothing was read and nothing changed.
    """
    reader = StepReader(catalog, catalog.manifest(step))
    state_dict = collect(model, parts)
    _fit(state_dict, reader, ranks, names=tuple(parts))
    load_into(state_dict, reader, process_group=ranks.group)
    loaded = {name: state_dict.pop(name) for name in parts if name in state_dict}
    model.load_state_dict(state_dict)
    for name, values in loaded.items():
        parts[name].load_state_dict(values)


def _plan(catalog: Catalog) -> tuple[ResumePlan, dict[int, str]]:
    """What to resume from, and newer committed steps whose sizes alone show damage.

    These must go out of the way: the run that goes on from an older step will save them again.
    """
    views = catalog.observe().checkpoints
    plan = plan_resume(views)
    newer = (view for view in views if view.step > (plan.step or 0) and view.state in READABLE)
    return plan, {view.step: view.problem for view in newer if view.problem is not None}


def _refused(catalog: Catalog, plan: ResumePlan) -> IntegrityError:
    reasons = "; ".join(f"step-{step}: {why}" for step, why in plan.skipped)
    return IntegrityError(
        f"no checkpoint can be loaded: {plan.refusal} ({reasons})",
        catalog.uri,
        "nothing was loaded, and training did not start from scratch",
        f"ray-ckpt adopt {catalog.uri} (foreign folders), or give this run a root of its own",
    )


def _fit(
    state_dict: dict[str, Any], reader: StepReader, ranks: Ranks, *, names: tuple[str, ...]
) -> None:
    """Keys agree, found out on the index alone; random numbers of a new rank start afresh."""
    available = set(reader.read_metadata().state_dict_metadata)
    if not any(key.startswith(f"{RNG}.rank_{ranks.rank}.") for key in available):
        del state_dict[RNG]
        log.warning("no random state for rank %d: its generators start afresh", ranks.rank)
    wanted = set(flatten_state_dict(state_dict)[0])
    everyone = set[str]().union(*ranks.gather(wanted))
    prefixes = tuple(f"{name}." for name in names)
    missing = sorted(everyone - available)
    unexpected = sorted(key for key in available - everyone if not key.startswith(prefixes))
    if missing or unexpected:
        raise StateDictError(
            f"the checkpoint does not fit the model: it lacks {missing or 'nothing'} and "
            f"brings unexpected {unexpected or 'nothing'}",
            safe="no tensor was read, the model is as it was",
            do="load it with the model and optimizer it was saved from",
        )


def _damage(catalog: Catalog, ranks: Ranks, step: int) -> list[str]:
    """Each rank reads its share of the files; all hear of all damage."""
    found: list[str] = []
    for share in ranks.gather(_own_share(catalog, ranks, step)):
        if isinstance(share, RayCkptError):
            raise share
        found.extend(share)
    return found


def _own_share(catalog: Catalog, ranks: Ranks, step: int) -> list[str] | RayCkptError:
    try:
        return catalog.damage(step, part=slice(ranks.rank, None, ranks.size))
    except RayCkptError as error:
        return error


def _set_aside(catalog: Catalog, ranks: Ranks, step: int, damage: str) -> None:
    def quarantine() -> None:
        catalog.quarantine(step)
        log.warning("step-%d is damaged and was moved to quarantine: %s", step, damage)

    ranks.on_coordinator(quarantine)
