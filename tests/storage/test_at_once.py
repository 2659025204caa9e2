import threading
import time

import pytest

from ray_ckpt.storage.at_once import at_once
from tests.waiting import PATIENCE_S


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_for_small(number: int) -> int:
        time.sleep(0.001 * (20 - number))
        return number * number

    assert at_once(slow_for_small, range(20), num_threads=7) == [n * n for n in range(20)]
    assert at_once(slow_for_small, [], num_threads=7) == []


def test_as_many_run_at_the_same_time_as_it_is_told() -> None:
    meeting = threading.Barrier(5)
    met = at_once(lambda _: meeting.wait(PATIENCE_S) >= 0, range(20), num_threads=5)
    assert met == [True] * 20


def test_after_an_error_what_has_begun_ends_and_the_rest_never_begins() -> None:
    begun: list[int] = []
    ended: list[int] = []
    has_failed = threading.Event()

    def work(number: int) -> None:
        begun.append(number)
        if number == 0:
            has_failed.set()
            raise OSError("the first one")
        assert has_failed.wait(PATIENCE_S)
        time.sleep(0.05)  # the other thread says meanwhile that it is over
        ended.append(number)

    with pytest.raises(OSError, match="the first one"):
        at_once(work, range(100), num_threads=2)
    assert sorted(begun) == [0, *sorted(ended)]
    assert len(begun) < 100
