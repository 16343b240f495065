"""The signals by which a run is asked to stop."""

from __future__ import annotations

import signal
import time

from dints import system


class StopSignal:
    """Notes that this process was asked to stop: by SIGTERM, SIGINT or the warning signal.

    Args:
        warning_signal: name without SIG, which schedulers send ahead of a time limit.

    Attributes:
        received: the first signal's number, once there was one.
    """

    def __init__(self, warning_signal: str = "USR1"):
        self.received: int | None = None
        self.received_at = 0.0
        for number in system.signals("SIGTERM", "SIGINT", f"SIG{warning_signal}"):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        # A second Ctrl-C does not wait; but a launcher may pass on a signal that the scheduler has
        # sent to all.
        if self.received == number == signal.SIGINT and now - self.received_at > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received, self.received_at = number, now
