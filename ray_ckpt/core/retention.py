"""Which checkpoints to keep, and why.

A policy looks at all candidates and gives the ones it wants to keep a reason; several policies
keep the union. Whatever the policies say, `decide` keeps the newest two verified checkpoints,
pinned ones and held ones. Without any policy everything is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FLOOR = 2
"""So many of the newest verified checkpoints survive every configuration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A committed checkpoint, as far as retention cares."""

    step: int
    is_verified: bool
    """Verified, and a run could go on from it: whole, healthy, with its optimizer."""
    metrics: Mapping[str, float]
    pins: tuple[str, ...] = ()
    """Names of pins; each keeps the step."""
    holds: tuple[str, ...] = ()
    """Sentences about unfinished work that still needs the step; each keeps it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Keep or purge one step, with every reason that speaks for keeping it."""

    step: int
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        """Whether anything speaks for keeping the step."""
        return bool(self.reasons)


class Policy(Protocol):
    """Something that wants some candidates kept."""

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Step to reason, for each candidate (oldest first) this policy keeps."""
        ...


@dataclass(frozen=True, slots=True)
class KeepLatest:
    """The newest `count` verified checkpoints, and unverified ones that are newer than these."""

    count: int

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Unverified steps do not use up the count: they may turn out to be damaged."""
        verified = [c.step for c in candidates if c.is_verified][-self.count :]
        oldest = verified[0] if len(verified) == self.count else -1
        waiting = {c.step: "newer and not verified yet" for c in candidates if c.step > oldest}
        return {**waiting, **dict.fromkeys(verified, f"latest {self.count}")}


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Every step that is a multiple of `steps`."""

    steps: int

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Depends on the step's number alone, so that a resumed run keeps the same ones."""
        return {c.step: f"every {self.steps} steps" for c in candidates if c.step % self.steps == 0}


@dataclass(frozen=True, slots=True)
class KeepBest:
    """The `count` checkpoints with the best value of `metric`; ones without it are not ranked."""

    count: int
    metric: str
    order: Literal["min", "max"] = "min"

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Among equals the newer wins; a value that is not a number never does."""
        sign = 1 if self.order == "min" else -1
        ranked = [
            c
            for c in candidates
            if c.metrics.get(self.metric, float("nan")) == c.metrics.get(self.metric)
        ]
        ranked.sort(key=lambda c: (sign * c.metrics[self.metric], -c.step))
        text = f"best {self.count} by {self.metric} ({self.order})"
        return {c.step: text for c in ranked[: self.count]}


def decide(candidates: Sequence[Candidate], policies: Sequence[Policy]) -> list[Verdict]:
    """One verdict a candidate, oldest first; pure, so a plan can be printed before it is applied.

    The newest two verified checkpoints, pinned and held ones are kept whatever the policies say.
    While fewer than two are verified, everything is kept: nothing proves that a way back exists.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.step)
    wanted = [_floor(ordered), *(policy.reasons(ordered) for policy in policies)]
    if not policies:
        wanted.append({c.step: "no policy asks to purge anything" for c in ordered})
    return [
        Verdict(
            step=candidate.step,
            reasons=(
                *(f"pinned: {name}" for name in candidate.pins),
                *candidate.holds,
                *(reasons[candidate.step] for reasons in wanted if candidate.step in reasons),
            ),
        )
        for candidate in ordered
    ]


def _floor(ordered: Sequence[Candidate]) -> Mapping[int, str]:
    verified = [c.step for c in ordered if c.is_verified][-FLOOR:]
    if len(verified) < FLOOR:
        return {c.step: "fewer than two checkpoints are verified" for c in ordered}
    return dict.fromkeys(verified, "newest two verified")
