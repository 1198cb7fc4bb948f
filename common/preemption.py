"""Turns SIGTERM and SIGUSR1 into a request to stop at the next step boundary."""

import contextlib
import signal
import threading
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """``requested`` becomes True once this process got a signal that announces its end."""

    def __init__(self) -> None:
        self.requested = False
        self.signal_name: str | None = None

    def _receive(self, number: int, frame: object) -> None:
        self.requested, self.signal_name = True, signal.Signals(number).name

    @contextlib.contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Listens inside the block, then restores the earlier handlers. Outside the main thread it never fires."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
