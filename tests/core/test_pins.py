"""Until when a pin holds."""

from datetime import UTC, datetime

import pytest

from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.observation import CheckpointView, Observation
from ray_ckpt.core.pins import Pin, after, moment
from ray_ckpt.core.policy import LifecyclePolicy

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC).timestamp()


def test_a_pin_without_an_end_holds_for_ever() -> None:
    assert Pin(name="ada").holds(1e12)
    assert Pin(name="ada").title == "ada"


def test_a_pin_holds_until_its_moment_and_not_at_it() -> None:
    pin = Pin(name="ada", until="2026-11-22T12:00:00+00:00")
    assert pin.holds(NOW - 1)
    assert not pin.holds(NOW)
    assert pin.title == "ada until 2026-11-22"


@pytest.mark.parametrize(
    ("duration", "end"),
    [
        ("30m", "2026-11-22T12:30:00+00:00"),
        ("12h", "2026-11-23T00:00:00+00:00"),
        ("7d", "2026-11-29T12:00:00+00:00"),
        ("2w", "2026-12-06T12:00:00+00:00"),
    ],
)
def test_a_duration_ends_so_long_after_now(duration: str, end: str) -> None:
    assert after(duration, NOW) == end


@pytest.mark.parametrize("duration", ["", "7", "d", "0d", "-1d", "7y", "1.5h", "7 d"])
def test_another_duration_is_refused_with_an_example(duration: str) -> None:
    with pytest.raises(ConfigError, match="is no duration") as caught:
        after(duration, NOW)
    assert "7d" in caught.value.do


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("2027-01-01", "2027-01-01T00:00:00+00:00"),
        ("2027-01-01T12:00", "2027-01-01T12:00:00+00:00"),
        ("2027-01-01T12:00:00+02:00", "2027-01-01T10:00:00+00:00"),
    ],
)
def test_a_day_or_a_time_is_utc_unless_it_names_a_zone(text: str, end: str) -> None:
    assert moment(text, NOW) == end


@pytest.mark.parametrize(("text", "why"), [("soon", "is no day"), ("2026-01-01", "is over")])
def test_a_moment_that_cannot_be_meant_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        moment(text, NOW)


def test_an_observation_at_a_time_has_no_expired_pins() -> None:
    pins = (Pin(name="ada"), Pin(name="bob", until="2026-11-22T12:00:00+00:00"))
    view = CheckpointView(step=1, state=CheckpointState.VERIFIED, pins=pins)
    observed = Observation(run_id="r", policy=LifecyclePolicy(), checkpoints=(view,))
    assert [pin.name for pin in observed.at(NOW - 1).checkpoints[0].pins] == ["ada", "bob"]
    assert [pin.name for pin in observed.at(NOW).checkpoints[0].pins] == ["ada"]
