"""How many actions of one root run at once, and how long a silent one is waited for.

    [lifecycle.limits]    total = 8    per_node = 2    per_kind = { export = 1 }

Knows what each field means; `core.admission` decides by them, `core.beats` by the two times.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from ray_ckpt.core.config import at_least
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.lifecycle import ActionKind

_BEATS_UNTIL_HUNG = 24
_SLOWEST_BEAT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one root; several roots on one cluster share its slots of `ckpt_io` as well."""

    total: int = 8
    """Actions that run at once."""
    per_kind: Mapping[str, int] = dataclasses.field(default_factory=dict[str, int])
    """Of one kind, for example `{export = 1}`; a kind that is not named has `total` alone."""
    per_destination: int = 1
    """Copies made or removed at one place: a slow or dead one holds so many slots and no more.
    Beside them one copy there may be looked at."""
    per_node: int = 2
    """On one node, and never more than the node has slots of `ckpt_io`."""
    hung_after_s: float = 120.0
    """An attempt that has not been heard of for so long is stopped and tried again."""
    stalled_after_s: float = 1800.0
    """And one that is heard of, but has counted no byte for so long, where it counts them; or one
    that has not begun for so long although there is room."""

    def __post_init__(self) -> None:
        at_least(1, total=self.total, per_destination=self.per_destination, per_node=self.per_node)
        at_least(1, hung_after_s=self.hung_after_s, stalled_after_s=self.stalled_after_s)
        unknown = sorted(set(self.per_kind) - set(ActionKind))
        if unknown:
            raise ConfigError(
                f"no action is called {unknown[0]!r}",
                "limits.per_kind",
                do=f"use one of: {', '.join(ActionKind)}",
            )
        for kind, count in self.per_kind.items():
            at_least(1, **{f"limits.per_kind.{kind}": count})

    @property
    def beat_s(self) -> float:
        """Seconds between two signs of life: many fit into `hung_after_s`, as some may fail."""
        return min(_SLOWEST_BEAT_S, self.hung_after_s / _BEATS_UNTIL_HUNG)
