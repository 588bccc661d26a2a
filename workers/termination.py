"""SIGTERM on rank 0: what was merged goes to its destinations, and then the process ends as it would have."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from types import FrameType

from logsync.coordinator.host import Host

__all__ = ["flush_at_sigterm", "let_go"]

_logger = logging.getLogger(__name__)

_BOUND_S = 15.0  # launchers wait 30 s between SIGTERM and SIGKILL; closing the sinks takes 10 s at most


class _Guard:
    """A handler of SIGTERM, and a thread that acts on it.

    The thread hears of the signal from the interpreter's wake-up descriptor. Handlers in Python run on the main
    thread only, which may be stuck in a collective of the training: a process that SIGTERM would have ended at once
    must not wait for SIGKILL because of us.
    """

    def __init__(self) -> None:
        self.hosts: set[Host] = set()
        self._pid = os.getpid()
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._has_wakeup = before == -1
        if not self._has_wakeup:  # an event loop's, say; then the handler tells the thread
            signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, self.on_sigterm)
        self._thread = threading.Thread(target=self._serve, name="logsync-sigterm", daemon=True)
        self._thread.start()

    def on_sigterm(self, _signum: int, _frame: FrameType | None) -> None:
        """Have everything flushed and the process ended; called by another handler, only flush."""
        if os.getpid() != self._pid:
            _end_by_default()
        if self._is_in_force():
            os.write(self._write, bytes([signal.SIGTERM]))
            if not all(host.is_closed for host in self.hosts):  # otherwise this thread is closing them
                time.sleep(_BOUND_S)  # the other thread ends the process
            return
        for host in list(self.hosts):
            host.flush()

    def undo(self) -> None:
        """Put back what was before, as far as it is still ours to do so."""
        with contextlib.suppress(ValueError):  # not on the main thread: it stays, and has nothing to flush
            if self._is_in_force():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._has_wakeup:
                other = signal.set_wakeup_fd(-1)
                if other not in {-1, self._write}:
                    signal.set_wakeup_fd(other)
            os.write(self._write, b"\0")
            self._thread.join(1.0)  # it closes the pipe

    def forget(self) -> None:
        """In a forked child: its signals are no business of its parent's thread."""
        signal.set_wakeup_fd(-1)
        if self._is_in_force():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _is_in_force(self) -> bool:
        return signal.getsignal(signal.SIGTERM) == self.on_sigterm

    def _serve(self) -> None:
        while True:
            told = os.read(self._read, 64)
            if signal.SIGTERM in told and self._is_in_force():
                # On a thread of its own: whatever it waits for, the process ends in time.
                flushing = threading.Thread(target=self._close_all, name="logsync-flush", daemon=True)
                flushing.start()
                flushing.join(_BOUND_S)
                _end_by_default()
            if 0 in told:
                os.close(self._read)
                os.close(self._write)
                return

    def _close_all(self) -> None:
        for host in list(self.hosts):
            _logger.warning("SIGTERM: flushing what was logged, then this process ends")
            try:
                host.close()
                host.wait_closed(_BOUND_S)  # the main thread may be at it already
            except Exception:
                _logger.exception("could not flush the log at SIGTERM")


_guard: _Guard | None = None


def flush_at_sigterm(host: Host) -> None:
    """Have the entries of `host` flushed when SIGTERM ends this process.

    Nothing is done where the program handles or ignores SIGTERM itself, or where this is not the main thread. A
    handler that is set later, and calls the one before it, has the entries flushed by that and decides what follows.
    """
    global _guard  # noqa: PLW0603 - the handler is the process's, too
    if threading.current_thread() is not threading.main_thread():
        return
    if _guard is None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        _guard = _Guard()
    _guard.hosts.add(host)


def let_go(host: Host) -> None:
    """Forget `host`; SIGTERM is as it was before once no host is left."""
    global _guard
    if _guard is None:
        return
    _guard.hosts.discard(host)
    if not _guard.hosts:
        guard, _guard = _guard, None
        guard.undo()


def _forget_in_child() -> None:
    global _guard
    if _guard is not None:
        guard, _guard = _guard, None
        with contextlib.suppress(ValueError):  # forked by a thread of a process that embeds Python
            guard.forget()


os.register_at_fork(after_in_child=_forget_in_child)


def _end_by_default() -> None:
    """End this process as SIGTERM does where nobody handles it; from any thread."""
    # Python lets only the main thread change a handler, and that thread may be stuck.
    ctypes.CDLL(None).signal(int(signal.SIGTERM), None)
    os.kill(os.getpid(), signal.SIGTERM)
