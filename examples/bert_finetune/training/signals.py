"""Catches the signals that ask a training run to stop after its current step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

# Maps a step to the signal that asks to stop after it, or None.
_StopSignal = Callable[[int], int | None]


def caught() -> contextlib.AbstractContextManager[_StopSignal]:
    """Catches the signals; yields a function that reports them after each step."""
    return _caught_by_all() if jax.process_count() > 1 else _caught()


@contextlib.contextmanager
def _caught() -> Iterator[_StopSignal]:
    """Catches SIGINT and SIGTERM once; a second signal kills."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda step: None  # Only the main thread may handle signals.
        return
    previous: dict[int, Any] = {}

    def receive(number: int, _: Any) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, receive)
    try:
        yield lambda step: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _caught_by_all() -> Iterator[_StopSignal]:
    """Catches the signals in several processes, which stop after the same step.

    JAX handles SIGTERM and notifies the other processes; SIGINT becomes a SIGTERM.
    """

    def receive(*_: Any) -> None:
        signal.signal(signal.SIGINT, previous)
        os.kill(os.getpid(), signal.SIGTERM)

    def stop_signal(step: int) -> int | None:
        reached = multihost_utils.reached_preemption_sync_point(step)
        return signal.SIGTERM if reached else None

    previous = signal.signal(signal.SIGINT, receive)
    try:
        yield stop_signal
    finally:
        signal.signal(signal.SIGINT, previous)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
