"""A rank that makes no calls for a while: its rounds are answered on a thread, and its next call waits for the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Absence"]

_SLICE_S = 0.5  # a wait without a timeout cannot be interrupted by Ctrl-C on every platform


class Absence:
    """Run `answer` again and again until it returns True or raises.

    Args:
        answer: makes one round; says whether the absence is over.
    """

    def __init__(self, answer: Callable[[], bool]) -> None:
        self._answer = answer
        self._error: BaseException | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, name="logsync-absence", daemon=True)

    def start(self) -> None:
        """Begin; the thread is a daemon, which an exit does not wait for."""
        self._thread.start()

    def wait(self, warn_after_s: float, warn: Callable[[float], None]) -> float:
        """Wait until it is over, and return the seconds that it took; signal handlers run meanwhile.

        Args:
            warn_after_s: how often to call `warn`, with the seconds waited so far.

        Raises:
            BaseException: what ended the absence.
        """
        started = time.monotonic()
        due_s = warn_after_s
        while self._thread.is_alive():
            self._thread.join(max(0.01, min(_SLICE_S, due_s - (time.monotonic() - started))))
            waited_s = time.monotonic() - started
            if waited_s >= due_s and self._thread.is_alive():
                warn(waited_s)
                due_s += warn_after_s
        if self._error is not None:
            raise self._error
        if not self._is_over:
            msg = "the absence has not begun"
            raise RuntimeError(msg)
        return time.monotonic() - started

    def _serve(self) -> None:
        try:
            while not self._answer():
                pass
            self._is_over = True
        except BaseException as error:  # noqa: BLE001 - it belongs to the caller, who will come for it
            self._error = error
