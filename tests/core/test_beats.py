"""An attempt lives as long as it is heard of and comes further, by the listener's clock."""

from dataclasses import replace

import pytest

from ray_ckpt.core.beats import WAITS_AFTER_S, Beat, Watch
from ray_ckpt.core.limits import Limits

LIMITS = Limits(hung_after_s=10, stalled_after_s=100)
FIRST = Beat(
    attempt_started_at=5.0, host="host-a", node="c0ffee", pid=7, process_born="1", total_bytes=200
)


def heard(*beats: tuple[float, Beat | None]) -> Watch:
    watch = Watch(begun_at=0.0)
    for now, beat in beats:
        watch = watch.after(beat, now)
    return watch


def test_an_attempt_that_has_not_begun_is_never_dead_but_told_of_after_a_minute() -> None:
    watch = heard((1.0, None), (500.0, None))
    assert watch.why_dead(LIMITS, 10_000.0) is None
    assert not watch.has_waited(WAITS_AFTER_S, 60.0)
    assert watch.has_waited(WAITS_AFTER_S, 61.0)
    assert not heard((70.0, FIRST)).has_waited(WAITS_AFTER_S, 500.0)


def test_the_same_beat_again_or_none_at_all_is_no_sign_of_life() -> None:
    watch = heard((1.0, FIRST), (5.0, FIRST), (9.0, None))
    assert watch.why_dead(LIMITS, 11.0) is None
    dead = watch.why_dead(LIMITS, 12.0)
    assert dead is not None
    assert dead.startswith("nothing was heard of it for 11 s: process 7 on host-a, node c0ffee")


def test_beats_without_a_byte_are_a_stall_that_says_how_far_it_was() -> None:
    half = replace(FIRST, count=1, doing="exports hf", done_bytes=100, peak_rss_bytes=2 * 10**9)
    watch = heard((1.0, FIRST), *((2.0 + n, replace(half, count=1 + n)) for n in range(120)))
    assert watch.why_dead(LIMITS, 102.0) is None
    assert watch.why_dead(LIMITS, 121.5) == (
        "it came no further for 120 s: process 7 on host-a, node c0ffee, exports hf 50 %, "
        "peak memory 2.00 GB"
    )


def test_what_counts_no_bytes_takes_as_long_as_it_takes() -> None:
    quiet = replace(FIRST, total_bytes=None)
    watch = heard(*((float(n), replace(quiet, count=n)) for n in range(500)))
    assert watch.why_dead(LIMITS, 500.0) is None
    assert quiet.percent is None


def test_what_was_said_while_nobody_listened_is_not_missed() -> None:
    watch = heard((1.0, FIRST)).without(50.0)
    assert watch.why_dead(LIMITS, 61.0) is None
    assert watch.why_dead(LIMITS, 62.0) is not None


def test_speed_is_of_what_it_does_now() -> None:
    sends = replace(FIRST, count=1, doing="sends")
    watch = heard((1.0, FIRST), (3.0, replace(FIRST, count=1, done_bytes=100)))
    assert watch.bytes_per_s == pytest.approx(50.0)
    watch = watch.after(replace(sends, count=2), 4.0)
    assert watch.bytes_per_s is None
    watch = watch.after(replace(sends, count=3, done_bytes=30), 6.0)
    assert watch.bytes_per_s == pytest.approx(15.0)


def test_a_beat_survives_its_file() -> None:
    assert Beat.from_json(FIRST.to_json()) == FIRST
    with pytest.raises(TypeError):
        Beat.from_json(b'{"pid": 1}')
