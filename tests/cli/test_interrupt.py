import contextlib
import signal

import pytest

from ray_ckpt.cli.interrupt import kept_interrupt


def test_an_interrupt_ends_what_is_going_on() -> None:
    with pytest.raises(KeyboardInterrupt), kept_interrupt():
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_somebody_swallowed_is_raised_at_the_next_check() -> None:
    with kept_interrupt() as check:
        check()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            check()


def test_afterwards_the_signal_does_what_it_did_before() -> None:
    before = signal.getsignal(signal.SIGINT)
    with kept_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
