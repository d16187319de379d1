"""`Interrupts`: Ctrl-C waits for the end of the step, so that a whole state can be saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Within the block a first Ctrl-C is only noted, and `check` raises it; a second one interrupts at once.

    Does nothing unless ``active``, outside the main thread, and where the program handles Ctrl-C in its own way.
    """

    def __init__(self, active: bool) -> None:
        self.active, self.noted = active, False

    def __enter__(self) -> Interrupts:
        main = threading.current_thread() is threading.main_thread()
        self.active = self.active and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self.active:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self.active:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if one was noted."""
        if self.noted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
