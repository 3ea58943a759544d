"""Ctrl-C and SIGTERM as a wish to stop at the next safe point; a second Ctrl-C stops at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """While entered, the first SIGINT or SIGTERM is noted, and :meth:`check` raises it as KeyboardInterrupt.

    Args:
        listen: whether signals are this object's at all, or another's, who ends the process as he sees fit.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, listen: bool = True) -> None:
        self.asked = False
        self._listen = listen
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if self._listen and threading.current_thread() is threading.main_thread():  # handlers can be set nowhere else
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """A safe point.

        Raises:
            KeyboardInterrupt: somebody asked to stop.
        """
        if self.asked:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
