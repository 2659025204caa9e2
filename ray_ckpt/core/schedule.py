"""When a training loop saves. Decides from the step alone, so that every rank agrees unasked."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSchedule:
    """Save every so many optimizer steps, and on the first or last one if asked to."""

    every_steps: int
    """Interval in optimizer steps; the last step is saved whether or not it is a multiple."""
    first_step: bool = False
    """Also save after the first step, to learn early that saving works."""

    def reason_to_save(self, step: int, *, last_step: bool) -> str | None:
        """Why step `step` is to be saved, or None if it is not."""
        if last_step:
            return "last step"
        if step > 0 and step % self.every_steps == 0:
            return f"every {self.every_steps} steps"
        return "first step" if self.first_step and step == 1 else None
