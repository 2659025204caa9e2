"""Which checkpoints to keep, and why.

A policy looks at all candidates and gives the ones it wants to keep a reason; several policies
keep the union. Whatever the policies say, guards keep the newest two verified checkpoints, newer
ones that nobody has verified yet, pinned ones and held ones. A quota has its say last, and only
about what policies alone keep. Without policies and quota everything is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

FLOOR = 2
"""So many of the newest verified checkpoints survive every configuration."""
CLOCK_SKEW_S = 600.0
"""By so much the clocks of two machines may differ; a checkpoint counts as that much younger."""
Order = Literal["min", "max"]
_WAITING = "newer and not verified yet"


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
    created_at: float | None = None
    """Seconds since the epoch, by the clock of whoever saved it; None if it does not say."""
    size_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Keep or purge one step, with every reason that speaks for keeping it."""

    step: int
    reasons: tuple[str, ...]
    why_not: str = ""
    """For a step that goes: what does not keep it."""

    @property
    def keep(self) -> bool:
        """Whether anything speaks for keeping the step."""
        return bool(self.reasons)


class Policy(Protocol):
    """Something that wants some candidates kept."""

    @property
    def title(self) -> str:
        """The policy as a few words, the reason it gives."""
        ...

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Step to reason, for each candidate (oldest first) this policy keeps."""
        ...


@dataclass(frozen=True, slots=True)
class KeepLatest:
    """The newest `count` verified checkpoints, and unverified ones that are newer than these."""

    count: int

    @property
    def title(self) -> str:
        """For example `latest 3`."""
        return f"latest {self.count}"

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Unverified steps do not use up the count: they may turn out to be damaged."""
        return _newest_verified(candidates, self.count, self.title)


@dataclass(frozen=True, slots=True)
class KeepEvery:
    """Every step that is a multiple of `steps`."""

    steps: int

    @property
    def title(self) -> str:
        """For example `every 1000 steps`."""
        return f"every {self.steps} steps"

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Depends on the step's number alone, so that a resumed run keeps the same ones."""
        return {c.step: self.title for c in candidates if c.step % self.steps == 0}


@dataclass(frozen=True, slots=True)
class KeepBest:
    """The `count` checkpoints with the best value of `metric`; ones without it are not ranked."""

    count: int
    metric: str
    order: Order = "min"

    @property
    def title(self) -> str:
        """For example `best 2 by loss (min)`."""
        return f"best {self.count} by {self.metric} ({self.order})"

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """Among equals the newer wins; a value that is not a number never does."""
        sign = 1 if self.order == "min" else -1
        ranked = [
            c
            for c in candidates
            if c.metrics.get(self.metric, float("nan")) == c.metrics.get(self.metric)
        ]
        ranked.sort(key=lambda c: (sign * c.metrics[self.metric], -c.step))
        return {c.step: self.title for c in ranked[: self.count]}


@dataclass(frozen=True, slots=True)
class KeepRecent:
    """What was saved in the last `max_age_s` seconds before `now`, by clocks that may differ."""

    max_age_s: float
    now: float

    @property
    def title(self) -> str:
        """For example `younger than 3600 s`."""
        return f"younger than {self.max_age_s:g} s"

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """One that does not say when it was saved is kept: nothing proves that it is old."""
        oldest = self.now - self.max_age_s - CLOCK_SKEW_S
        return {
            c.step: self.title for c in candidates if c.created_at is None or c.created_at >= oldest
        }


@dataclass(frozen=True, slots=True)
class KeepSteps:
    """These steps, named one by one."""

    steps: tuple[int, ...]

    @property
    def title(self) -> str:
        """For example `steps 100, 200`."""
        return f"steps {', '.join(map(str, self.steps))}"

    def reasons(self, candidates: Sequence[Candidate]) -> Mapping[int, str]:
        """A step that is not there is nobody's mistake: it may come."""
        return {c.step: "named in steps" for c in candidates if c.step in self.steps}


def decide(
    candidates: Sequence[Candidate], policies: Sequence[Policy], *, max_bytes: int | None = None
) -> list[Verdict]:
    """One verdict a candidate, oldest first; pure, so a plan can be printed before it is applied.

    Guards keep what they keep whatever the policies and the quota say. While fewer than two
    checkpoints are verified, everything is kept: nothing proves that a way back exists. Where all
    that is kept is larger than `max_bytes`, the oldest of what only policies keep go.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.step)
    guards = guards_of(ordered)
    wanted = _wanted(ordered, policies, max_bytes)
    dropped = _beyond(max_bytes, ordered, guards, wanted)
    why_not = f"kept by neither a pin nor: {', '.join(policy.title for policy in policies)}"
    return [
        Verdict(step=c.step, reasons=(), why_not=_over(max_bytes, wanted[c.step]))
        if c.step in dropped
        else _verdict(c.step, (*guards[c.step], *wanted[c.step]), why_not)
        for c in ordered
    ]


def quota_problem(candidates: Sequence[Candidate], max_bytes: int | None) -> str | None:
    """Why the quota cannot be met, if what nothing may purge is larger by itself; else None."""
    guards = guards_of(candidates)
    guarded = [c for c in candidates if guards[c.step]]
    total = sum(c.size_bytes for c in guarded)
    if max_bytes is None or total <= max_bytes:
        return None
    return (
        f"keep.max_bytes is {max_bytes}, but {len(guarded)} checkpoints that nothing may purge "
        f"(the newest two verified, unverified, pinned and held ones) have {total} bytes; "
        "nothing of these is purged: unpin some, or raise it"
    )


def _verdict(step: int, reasons: tuple[str, ...], why_not: str) -> Verdict:
    unique = tuple(dict.fromkeys(reasons))
    return Verdict(step=step, reasons=unique, why_not="" if unique else why_not)


def guards_of(candidates: Sequence[Candidate]) -> dict[int, tuple[str, ...]]:
    """For each step, the reasons to keep it that neither a configuration nor a person overrules."""
    ordered = sorted(candidates, key=lambda candidate: candidate.step)
    floor = _floor(ordered)
    return {
        c.step: (
            *(f"pinned: {name}" for name in c.pins),
            *c.holds,
            *([floor[c.step]] if c.step in floor else []),
        )
        for c in ordered
    }


def _floor(ordered: Sequence[Candidate]) -> Mapping[int, str]:
    """The newest verified ones, and what is newer: it is the run's latest work, verified or not."""
    if sum(c.is_verified for c in ordered) < FLOOR:
        return {c.step: "fewer than two checkpoints are verified" for c in ordered}
    return _newest_verified(ordered, FLOOR, "newest two verified")


def _newest_verified(ordered: Sequence[Candidate], count: int, reason: str) -> Mapping[int, str]:
    verified = [c.step for c in ordered if c.is_verified][-count:]
    oldest = verified[0] if len(verified) == count else -1
    waiting = {c.step: _WAITING for c in ordered if c.step > oldest}
    return {**waiting, **dict.fromkeys(verified, reason)}


def _wanted(
    ordered: Sequence[Candidate], policies: Sequence[Policy], max_bytes: int | None
) -> dict[int, tuple[str, ...]]:
    """For each step, the reasons that policies give."""
    given = [policy.reasons(ordered) for policy in policies]
    if not policies and max_bytes is None:
        given = [{c.step: "no policy asks to purge anything" for c in ordered}]
    elif not policies:
        given = [{c.step: f"newest that fit in {max_bytes} bytes" for c in ordered}]
    return {c.step: tuple(r[c.step] for r in given if c.step in r) for c in ordered}


def _beyond(
    max_bytes: int | None,
    ordered: Sequence[Candidate],
    guards: Mapping[int, tuple[str, ...]],
    wanted: Mapping[int, tuple[str, ...]],
) -> set[int]:
    """Steps that go for the quota: the oldest that no guard keeps, until the rest fits."""
    if max_bytes is None:
        return set()
    kept = [c for c in ordered if guards[c.step] or wanted[c.step]]
    excess = sum(c.size_bytes for c in kept) - max_bytes
    dropped: set[int] = set()
    for candidate in (c for c in kept if not guards[c.step]):
        if excess <= 0:
            break
        dropped.add(candidate.step)
        excess -= candidate.size_bytes
    return dropped


def _over(max_bytes: int | None, reasons: Iterable[str]) -> str:
    return f"one of the oldest over max_bytes of {max_bytes}, although: {', '.join(reasons)}"
