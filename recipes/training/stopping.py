"""A signal as a wish to stop: the step finishes, the run saves, and all processes leave together."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def listening() -> Iterator[Callable[[], str | None]]:
    """Take SIGINT and SIGTERM as a wish to stop; gives a function that tells the signal's name, None before it came.

    A second SIGINT ends the process as it always does.
    """
    received: list[str] = []

    def take(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
