"""When a save is due: a table of steps and reasons."""

import pytest

from ray_ckpt.core.schedule import SaveSchedule


@pytest.mark.parametrize(
    ("step", "last_step", "reason"),
    [
        (0, False, None),
        (1, False, None),
        (499, False, None),
        (500, False, "every 500 steps"),
        (501, False, None),
        (1000, False, "every 500 steps"),
        (1000, True, "last step"),
        (777, True, "last step"),
        (0, True, "last step"),
    ],
)
def test_a_step_is_saved_at_the_interval_and_at_the_end(
    step: int, last_step: bool, reason: str | None
) -> None:
    assert SaveSchedule(every_steps=500).reason_to_save(step, last_step=last_step) == reason


@pytest.mark.parametrize(
    ("every_steps", "step", "reason"),
    [(500, 1, "first step"), (500, 2, None), (500, 0, None), (1, 1, "every 1 steps")],
)
def test_the_first_step_is_saved_if_asked_for(
    every_steps: int, step: int, reason: str | None
) -> None:
    schedule = SaveSchedule(every_steps=every_steps, first_step=True)
    assert schedule.reason_to_save(step, last_step=False) == reason
