"""Which step a folder is that others named: by Ray Train's own list, or by the number in its name.

checkpoint_2026-11-22_15-45-40.123456    as Ray Train's metrics say, under `step` and the like
checkpoint_000010  global_step10  iter_0000010    10
"""

import re
from collections.abc import Mapping
from typing import Any

SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints in a run's folder, beside them."""
_STEP_METRICS = "step", "global_step", "training_step", "training_iteration"
_NUMBERED = re.compile(r"\D*?(\d+)\D*")


def steps_in_snapshot(snapshot: Mapping[str, Any]) -> dict[str, int]:
    """Folder to step, for those whose metrics tell it.

    >>> steps_in_snapshot({"checkpoint_results": [
    ...     {"checkpoint_dir_name": "a", "metrics": {"loss": 1.5, "step": 20}},
    ...     {"checkpoint_dir_name": "b", "metrics": {"loss": 1.5}}]})
    {'a': 20}
    """
    found: dict[str, int] = {}
    for result in snapshot.get("checkpoint_results") or ():
        told = [result["metrics"].get(metric) for metric in _STEP_METRICS]
        step = next((value for value in told if type(value) is int and value >= 0), None)
        if step is not None:
            found[str(result["checkpoint_dir_name"])] = step
    return found


def step_in_name(name: str) -> int | None:
    """The one number in a name; None where there is none, or several.

    >>> step_in_name("checkpoint_000010"), step_in_name("checkpoint_2026-11-22_15-45-40.123456")
    (10, None)
    """
    match = _NUMBERED.fullmatch(name)
    return int(match[1]) if match else None
