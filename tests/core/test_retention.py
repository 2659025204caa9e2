"""Which checkpoints survive: literal histories with their reasons, then laws that always hold."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.retention import (
    FLOOR,
    Candidate,
    KeepBest,
    KeepEvery,
    KeepLatest,
    Policy,
    decide,
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
        )
        for step in steps
    ]


POLICIES = st.one_of(
    st.builds(KeepLatest, st.integers(2, 4)),
    st.builds(KeepEvery, st.integers(1, 20)),
    st.builds(KeepBest, st.integers(1, 3), st.just("loss"), st.sampled_from(["min", "max"])),
)


def kept(candidates: Sequence[Candidate], policies: Sequence[Policy]) -> set[int]:
    return {v.step for v in decide(candidates, policies) if v.keep}


@given(history=histories(), policies=st.lists(POLICIES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_every_candidate_gets_one_verdict_oldest_first(
    history: list[Candidate], policies: list[Policy]
) -> None:
    verdicts = decide(history, policies)
    assert [v.step for v in verdicts] == sorted(c.step for c in history)


@given(history=histories(), policies=st.lists(POLICIES, max_size=3))
@settings(max_examples=100, deadline=None)
def test_the_newest_two_verified_pinned_and_held_ones_always_survive(
    history: list[Candidate], policies: list[Policy]
) -> None:
    verified = sorted(c.step for c in history if c.is_verified)
    safe = set(verified[-FLOOR:]) | {c.step for c in history if c.pins or c.holds}
    survivors = kept(history, policies)
    assert safe <= survivors
    if len(verified) < FLOOR:
        assert survivors == {c.step for c in history}


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


@given(history=histories(), policies=st.lists(POLICIES, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_deciding_again_on_what_is_left_purges_nothing_of_the_latest_and_multiples(
    history: list[Candidate], policies: list[Policy]
) -> None:
    survivors = kept(history, policies)
    left = [c for c in history if c.step in survivors]
    assert kept(left, policies) == survivors
