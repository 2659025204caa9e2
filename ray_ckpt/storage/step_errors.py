"""What is said when a step cannot be read or written, and what to type then. Looks at nothing."""

from collections.abc import Sequence

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    ForeignFolderError,
    IntegrityError,
    StepExistsError,
    StepNotFoundError,
    UsageError,
)
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import Observation

UNCHANGED = "nothing was changed"
_NOT_COMMITTED = CheckpointState.SAVING, CheckpointState.ABANDONED


def exists(uri: str, step: int) -> StepExistsError:
    """The step was committed before."""
    return StepExistsError(
        f"step-{step} is committed already and is never written again",
        f"{uri}/{names.step_dir(step)}",
        "the committed one is untouched",
        f"ray-ckpt show {uri} {step}    or give this run a root of its own",
    )


def staged(uri: str, step: int) -> StepExistsError:
    """The same run has saved it to its nodes, and it is no checkpoint yet."""
    return StepExistsError(
        f"step-{step} was saved before, and is on its way to the root",
        uri,
        "that save is untouched",
        f"ray-ckpt ls {uri}    (shows how far it has come)",
    )


def foreign(uri: str, step: int) -> ForeignFolderError:
    """Somebody else's folder is in the step's place."""
    return ForeignFolderError(
        f"step-{step} is a folder without a manifest: ray_ckpt did not commit it",
        f"{uri}/{names.step_dir(step)}",
        "it was neither read nor changed",
        f"ray-ckpt adopt {uri}    (verifies it and writes the manifest)",
    )


def corrupt(uri: str, step: int, damage: Sequence[str]) -> IntegrityError:
    """Files of the step differ from its manifest; `damage` has a sentence about each."""
    return IntegrityError(
        f"step-{step} is corrupt: {'; '.join(damage)}",
        f"{uri}/{names.step_dir(step)}",
        "nothing was changed; the other steps do not depend on this one",
        f"ray-ckpt resume-plan {uri}    (shows the newest good step)",
    )


def found_corrupt(uri: str, step: int, damage: str) -> IntegrityError:
    """The same, found out by the very load that put it into the model's memory."""
    return IntegrityError(
        f"step-{step} is corrupt: {damage}",
        f"{uri}/{names.step_dir(step)}",
        "storage was not changed; the model may hold some of the step's values: do not train on",
        f"start this process again, from the newest good step: ray-ckpt resume-plan {uri}",
    )


def not_readable(
    uri: str, step: int, observed: Observation
) -> StepNotFoundError | ForeignFolderError | IntegrityError:
    """Nothing that a reader may use is in the step's place; `observed` shows why."""
    views = [view for view in observed.checkpoints if view.step == step]
    states = {view.state for view in views}
    if CheckpointState.FOREIGN in states:
        return foreign(uri, step)
    if CheckpointState.QUARANTINED in states:
        return corrupt(uri, step, [view.problem or "it is in quarantine" for view in views])
    there = ", ".join(str(view.step) for view in observed.readable()) or "none"
    trashed = CheckpointState.TRASHED in states
    unfinished = [f"{v.state}: {v.problem}" for v in views if v.state in _NOT_COMMITTED]
    place = "in the trash" if trashed else next(iter(unfinished), "not there")
    return StepNotFoundError(
        f"step-{step} is {place}; committed steps: {there}",
        uri,
        UNCHANGED,
        f"ray-ckpt {'undo' if trashed else 'ls'} {uri}{f' {step}' if trashed else ''}",
    )


def cannot_roll_back(uri: str, step: int, newer: Sequence[int], pinned: int) -> UsageError:
    """A step of the branch that would go to the trash is pinned."""
    return UsageError(
        f"training went on from step-{step}, but steps {list(newer)} are here and step {pinned} is "
        "pinned",
        uri,
        "the committed steps are untouched; nothing is saved over them",
        "give the run that goes on from an older step a root of its own",
    )
