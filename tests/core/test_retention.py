"""Which checkpoints survive: literal histories with their reasons, then laws that always hold."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.retention import (
    CLOCK_SKEW_S,
    FLOOR,
    Candidate,
    KeepBest,
    KeepEvery,
    KeepLatest,
    KeepRecent,
    KeepSteps,
    Policy,
    decide,
    quota_problem,
)

FLOOR_TEXT = "newest two verified"
FEW_TEXT = "fewer than two checkpoints are verified"
FREE_TEXT = "no policy asks to purge anything"
WAITING_TEXT = "newer and not verified yet"


def good(step: int, **metrics: float) -> Candidate:
    return Candidate(step=step, is_verified=True, metrics=metrics)


def new(step: int, **metrics: float) -> Candidate:
    return Candidate(step=step, is_verified=False, metrics=metrics)


CASES: dict[str, tuple[list[Candidate], list[Policy], dict[int, tuple[str, ...]]]] = {
    "an empty root": ([], [KeepLatest(2)], {}),
    "no policy keeps everything": (
        [good(1), good(2), good(3)],
        [],
        {1: (FREE_TEXT,), 2: (FLOOR_TEXT, FREE_TEXT), 3: (FLOOR_TEXT, FREE_TEXT)},
    ),
    "the latest three of five": (
        [good(1), good(2), good(3), good(4), good(5)],
        [KeepLatest(3)],
        {
            1: (),
            2: (),
            3: ("latest 3",),
            4: (FLOOR_TEXT, "latest 3"),
            5: (FLOOR_TEXT, "latest 3"),
        },
    ),
    "unverified ones do not use up the count": (
        [good(1), good(2), good(3), new(4), new(5)],
        [KeepLatest(2)],
        {
            1: (),
            2: (FLOOR_TEXT, "latest 2"),
            3: (FLOOR_TEXT, "latest 2"),
            4: (WAITING_TEXT,),
            5: (WAITING_TEXT,),
        },
    ),
    "an unverified one between verified ones waits too": (
        [good(1), good(2), new(3), good(4)],
        [KeepLatest(2)],
        {1: (), 2: (FLOOR_TEXT, "latest 2"), 3: (WAITING_TEXT,), 4: (FLOOR_TEXT, "latest 2")},
    ),
    "an unverified one that is older than the latest goes": (
        [new(1), good(2), good(3)],
        [KeepLatest(2)],
        {1: (), 2: (FLOOR_TEXT, "latest 2"), 3: (FLOOR_TEXT, "latest 2")},
    ),
    "one verified checkpoint is no way back": (
        [new(1), new(2), good(3)],
        [KeepEvery(1000)],
        {1: (FEW_TEXT,), 2: (FEW_TEXT,), 3: (FEW_TEXT,)},
    ),
    "multiples survive": (
        [good(500), good(1000), good(1500), good(2000), good(2500)],
        [KeepEvery(1000)],
        {
            500: (),
            1000: ("every 1000 steps",),
            1500: (),
            2000: (FLOOR_TEXT, "every 1000 steps"),
            2500: (FLOOR_TEXT,),
        },
    ),
    "the best two by loss, the newer among equals": (
        [good(1, loss=2.0), good(2, loss=1.0), good(3, loss=2.0), good(4, loss=9.0), good(5)],
        [KeepBest(2, "loss")],
        {
            1: (),
            2: ("best 2 by loss (min)",),
            3: ("best 2 by loss (min)",),
            4: (FLOOR_TEXT,),
            5: (FLOOR_TEXT,),
        },
    ),
    "the best by accuracy is the largest": (
        [good(1, acc=0.9), good(2, acc=0.1), good(3), good(4)],
        [KeepBest(1, "acc", "max")],
        {1: ("best 1 by acc (max)",), 2: (), 3: (FLOOR_TEXT,), 4: (FLOOR_TEXT,)},
    ),
    "what is not a number is never the best": (
        [good(1, loss=float("nan")), good(2, loss=5.0), good(3), good(4)],
        [KeepBest(1, "loss")],
        {1: (), 2: ("best 1 by loss (min)",), 3: (FLOOR_TEXT,), 4: (FLOOR_TEXT,)},
    ),
    "several policies keep the union and give every reason": (
        [good(1, loss=0.1), good(2), good(3), good(4)],
        [KeepLatest(2), KeepEvery(2), KeepBest(1, "loss")],
        {
            1: ("best 1 by loss (min)",),
            2: ("every 2 steps",),
            3: (FLOOR_TEXT, "latest 2"),
            4: (FLOOR_TEXT, "latest 2", "every 2 steps"),
        },
    ),
    "steps are named one by one": (
        [good(1), good(2), good(3), good(4)],
        [KeepSteps((2, 99))],
        {1: (), 2: ("named in steps",), 3: (FLOOR_TEXT,), 4: (FLOOR_TEXT,)},
    ),
    "the newest work is kept before anybody has verified it": (
        [good(1000), good(1500), new(1600)],
        [KeepEvery(1000)],
        {1000: (FLOOR_TEXT, "every 1000 steps"), 1500: (FLOOR_TEXT,), 1600: (WAITING_TEXT,)},
    ),
    "pins and holds come first": (
        [
            Candidate(
                step=1,
                is_verified=True,
                metrics={},
                pins=("paper", "demo"),
                holds=("not done yet",),
            ),
            good(2),
            good(3),
        ],
        [KeepLatest(2)],
        {
            1: ("pinned: paper", "pinned: demo", "not done yet"),
            2: (FLOOR_TEXT, "latest 2"),
            3: (FLOOR_TEXT, "latest 2"),
        },
    ),
}


@pytest.mark.parametrize(("history", "policies", "expected"), CASES.values(), ids=CASES)
def test_a_history_gives_these_verdicts_for_these_reasons(
    history: list[Candidate], policies: list[Policy], expected: dict[int, tuple[str, ...]]
) -> None:
    verdicts = decide(list(reversed(history)), policies)
    assert [(v.step, v.reasons) for v in verdicts] == list(expected.items())
    assert {v.step: v.keep for v in verdicts} == {s: bool(r) for s, r in expected.items()}


def sized(step: int, size_bytes: int, *pins: str, is_verified: bool = True) -> Candidate:
    return Candidate(
        step=step, is_verified=is_verified, metrics={}, pins=pins, size_bytes=size_bytes
    )


TEN_EACH = [sized(step, 10) for step in (1, 2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("age_s", "is_kept"),
    [(0.0, True), (100.0, True), (100.0 + CLOCK_SKEW_S, True), (101.0 + CLOCK_SKEW_S, False)],
)
def test_what_is_young_is_kept_and_ten_minutes_of_clock_skew_do_not_matter(
    age_s: float, is_kept: bool
) -> None:
    """Scenario 34: retention by age."""
    now = 1e6
    old = Candidate(step=1, is_verified=True, metrics={}, created_at=now - age_s)
    verdict = decide([old, good(2), good(3)], [KeepRecent(100.0, now)])[0]
    assert verdict.reasons == (("younger than 100 s",) if is_kept else ())


def test_one_from_the_future_or_without_a_date_is_young() -> None:
    future = Candidate(step=1, is_verified=True, metrics={}, created_at=2e6)
    assert kept([future, good(2), good(3), good(4)], [KeepRecent(100.0, 1e6)]) == {1, 2, 3, 4}


@pytest.mark.parametrize(
    ("max_bytes", "survivors"),
    [(50, {1, 2, 3, 4, 5}), (49, {2, 3, 4, 5}), (30, {3, 4, 5}), (20, {4, 5}), (1, {4, 5})],
)
def test_a_quota_alone_keeps_the_newest_that_fit_and_never_less_than_two(
    max_bytes: int, survivors: set[int]
) -> None:
    assert kept(TEN_EACH, [], max_bytes) == survivors


def test_a_quota_drops_the_oldest_of_what_policies_keep_and_says_so() -> None:
    verdicts = decide(TEN_EACH, [KeepLatest(4), KeepSteps((1,))], max_bytes=40)
    assert [v.step for v in verdicts if not v.keep] == [1]
    assert verdicts[0].why_not == (
        "one of the oldest over max_bytes of 40, although: named in steps"
    )
    assert verdicts[1].reasons == ("latest 4",)


def test_a_quota_counts_what_guards_keep_and_passes_over_it() -> None:
    history = [sized(1, 10, "paper"), *TEN_EACH[1:]]
    assert kept(history, [KeepEvery(1)], 30) == {1, 4, 5}
    assert quota_problem(history, 30) is None


def test_a_quota_that_guards_alone_exceed_is_a_problem_and_not_a_purge_of_these() -> None:
    history = [sized(1, 10, "paper"), *TEN_EACH[1:], sized(6, 10, is_verified=False)]
    assert kept(history, [], 25) == {1, 4, 5, 6}
    assert "max_bytes is 25, but 4 checkpoints that nothing may purge" in str(
        quota_problem(history, 25)
    )
    assert quota_problem(history, 40) is None
    assert quota_problem(history, None) is None


def test_what_goes_says_what_did_not_keep_it() -> None:
    verdicts = decide(TEN_EACH, [KeepLatest(2), KeepEvery(2)])
    assert verdicts[0].why_not == "kept by neither a pin nor: latest 2, every 2 steps"
    assert [v.why_not for v in verdicts if v.keep] == [""] * 3


@st.composite
def histories(draw: st.DrawFn) -> list[Candidate]:
    steps = draw(st.lists(st.integers(0, 40), unique=True, max_size=10))
    words = st.lists(st.sampled_from(["a", "b"]), unique=True, max_size=1).map(tuple)
    loss = st.one_of(st.none(), st.floats(allow_infinity=True, allow_nan=True))
    return [
        Candidate(
            step=step,
            is_verified=draw(st.booleans()),
            metrics={} if (value := draw(loss)) is None else {"loss": value},
            pins=draw(words),
            holds=draw(words),
            created_at=draw(st.none() | st.floats(0, 3000)),
            size_bytes=draw(st.integers(0, 9)),
        )
        for step in steps
    ]


POLICIES = st.one_of(
    st.builds(KeepLatest, st.integers(2, 4)),
    st.builds(KeepEvery, st.integers(1, 20)),
    st.builds(KeepBest, st.integers(1, 3), st.just("loss"), st.sampled_from(["min", "max"])),
    st.builds(KeepRecent, st.floats(1, 2000), st.just(3000.0)),
    st.builds(KeepSteps, st.lists(st.integers(0, 40), max_size=3).map(tuple)),
)
QUOTAS = st.none() | st.integers(1, 60)


def kept(
    candidates: Sequence[Candidate], policies: Sequence[Policy], max_bytes: int | None = None
) -> set[int]:
    return {v.step for v in decide(candidates, policies, max_bytes=max_bytes) if v.keep}


def guarded(history: Sequence[Candidate]) -> set[int]:
    """What no configuration may purge, said in other words than the code's."""
    verified = sorted(c.step for c in history if c.is_verified)
    if len(verified) < FLOOR:
        return {c.step for c in history}
    protected = {c.step for c in history if c.pins or c.holds}
    unread = {c.step for c in history if not c.is_verified and c.step > verified[-FLOOR]}
    return protected | unread | set(verified[-FLOOR:])


@given(history=histories(), policies=st.lists(POLICIES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_every_candidate_gets_one_verdict_oldest_first(
    history: list[Candidate], policies: list[Policy]
) -> None:
    verdicts = decide(history, policies)
    assert [v.step for v in verdicts] == sorted(c.step for c in history)


@given(history=histories(), policies=st.lists(POLICIES, max_size=3), max_bytes=QUOTAS)
@settings(max_examples=300, deadline=None)
def test_no_combination_of_policies_and_quota_drops_what_is_guarded(
    history: list[Candidate], policies: list[Policy], max_bytes: int | None
) -> None:
    assert guarded(history) <= kept(history, policies, max_bytes)


@given(history=histories(), policies=st.lists(POLICIES, max_size=3), max_bytes=QUOTAS)
@settings(max_examples=300, deadline=None)
def test_a_quota_is_met_or_only_guarded_ones_are_left_and_told_of(
    history: list[Candidate], policies: list[Policy], max_bytes: int | None
) -> None:
    survivors = kept(history, policies, max_bytes)
    total = sum(c.size_bytes for c in history if c.step in survivors)
    if max_bytes is not None and total > max_bytes:
        assert survivors == guarded(history)
        assert quota_problem(history, max_bytes) is not None
    else:
        assert quota_problem(history, max_bytes) is None


@given(history=histories(), policies=st.lists(POLICIES, max_size=3), max_bytes=st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_a_quota_only_takes_away_and_takes_the_oldest_first(
    history: list[Candidate], policies: list[Policy], max_bytes: int
) -> None:
    without, survivors = kept(history, policies), kept(history, policies, max_bytes)
    assert survivors <= without
    dropped = without - survivors
    assert all(step > max(dropped, default=-1) for step in survivors - guarded(history))


@given(history=histories(), policies=st.lists(POLICIES, min_size=1, max_size=3), extra=POLICIES)
@settings(max_examples=100, deadline=None)
def test_one_more_policy_never_purges_more(
    history: list[Candidate], policies: list[Policy], extra: Policy
) -> None:
    assert kept(history, policies) <= kept(history, [*policies, extra])


@given(history=histories())
@settings(max_examples=50, deadline=None)
def test_no_policies_keep_all(history: list[Candidate]) -> None:
    assert kept(history, []) == {c.step for c in history}


@given(history=histories(), policies=st.lists(POLICIES, min_size=1, max_size=3), max_bytes=QUOTAS)
@settings(max_examples=300, deadline=None)
def test_deciding_again_on_what_is_left_purges_nothing_more(
    history: list[Candidate], policies: list[Policy], max_bytes: int | None
) -> None:
    survivors = kept(history, policies, max_bytes)
    left = [c for c in history if c.step in survivors]
    assert kept(left, policies, max_bytes) == survivors
