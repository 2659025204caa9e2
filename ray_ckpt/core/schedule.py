"""When a training loop saves. Pure: what every rank must agree on comes in as arguments."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSchedule:
    """Save every so many optimizer steps or seconds, and on the first or last step if asked to."""

    every_steps: int | None
    """Interval in optimizer steps; the last step is saved whether or not it is a multiple."""
    every_s: float | None = None
    """Interval in seconds, between the beginnings of two saves."""
    first_step: bool = False
    """Also save after the first step, to learn early that saving works."""

    def reason_to_save(self, step: int, *, last_step: bool) -> str | None:
        """Why step `step` is to be saved, by its number alone; None if it is not."""
        if last_step:
            return "last step"
        if self.every_steps is not None and step > 0 and step % self.every_steps == 0:
            return f"every {self.every_steps} steps"
        return "first step" if self.first_step and step == 1 else None

    def is_time(self, seconds_since_save: float) -> bool:
        """Whether so many seconds after the last save began the next one is due."""
        return self.every_s is not None and seconds_since_save >= self.every_s


def fits(notice_s: float, elapsed_s: float, last_save_s: float | None) -> bool:
    """Whether a save ends before the kill; one that was never measured is tried."""
    return last_save_s is None or elapsed_s + 1.2 * last_save_s <= notice_s
