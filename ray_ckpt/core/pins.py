"""What keeps one checkpoint from every purge: who says so, why, and until when."""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from ray_ckpt.core.errors import ConfigError

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_DURATION = re.compile(rf"([1-9][0-9]*)([{''.join(_UNITS)}])")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Lies in the step's folder and travels with it."""

    name: str
    """Who or what pins."""
    reason: str = ""
    pinned_at: str = ""
    """UTC, ISO 8601."""
    until: str | None = None
    """UTC, ISO 8601; from then on the pin holds nothing. None: until somebody takes it away."""

    def holds(self, now: float) -> bool:
        """Whether it keeps its step at `now`, in seconds since the epoch."""
        return self.until is None or now < _moment(self.until).timestamp()

    @property
    def title(self) -> str:
        """The name, and the day it ends where it does."""
        return self.name if self.until is None else f"{self.name} until {self.until[:10]}"


def after(duration: str, now: float) -> str:
    """The moment that lies `duration` (`30m`, `12h`, `7d`, `2w`) after `now`.

    Raises:
        ConfigError: it is no such duration.
    """
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ConfigError(f"{duration!r} is no duration", do="write 30m, 12h, 7d or 2w")
    span = timedelta(**{_UNITS[match[2]]: int(match[1])})
    return _text(datetime.fromtimestamp(now, UTC) + span)


def moment(text: str, now: float) -> str:
    """The moment that a person means by a day or an ISO 8601 time; UTC if it names no zone.

    Raises:
        ConfigError: it is none, or it is over.
    """
    try:
        meant = _moment(text)
    except ValueError as error:
        raise ConfigError(
            f"{text!r} is no day and no time", do="write 2027-01-01 or 2027-01-01T12:00"
        ) from error
    if meant.timestamp() <= now:
        raise ConfigError(f"{text} is over: such a pin would hold nothing", do="give a later one")
    return _text(meant)


def _moment(text: str) -> datetime:
    parsed = datetime.fromisoformat(text)
    return parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)


def _text(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")
