"""Ctrl-C asks a run to stop after the step it is in; a second one stops it at once."""

import signal
import threading
from types import FrameType
from typing import Any

from longwave.errors import LongwaveError


class Interrupted(LongwaveError):
    """The run was asked to stop and has saved a checkpoint. Exit status: 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_status = 128 + signal_number


class Interrupt:
    """Context manager: `signal_number` is None until SIGINT or SIGTERM arrives, then that signal.

    Outside the main thread, where Python takes no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._first)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _first(self, number: int, _: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
