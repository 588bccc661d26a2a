"""SIGTERM on rank 0: what was merged goes to its destinations, and then the process ends as it would have."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from logsync.coordinator.host import Host

__all__ = ["flush_at_sigterm", "let_go", "wait_if_ending"]

_logger = logging.getLogger(__name__)

_BOUND_S = 12.0  # launchers wait 30 s between SIGTERM and SIGKILL; closing the sinks takes 10 s at most
_ARMED, _DISARMED = 200, 201  # no numbers of signals


class _Guard:
    """A handler of SIGTERM, and a thread that acts on it; one for the process's whole life.

    The thread hears of the signal from the interpreter's wake-up descriptor. Handlers in Python run on the main
    thread only, which may be stuck in a collective of the training: a process that SIGTERM would have ended at once
    must not wait for SIGKILL because of us. The handler itself only passes the word on, since it may have interrupted
    its thread where that holds any lock.
    """

    def __init__(self) -> None:
        self.hosts: set[Host] = set()
        self.is_ending = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakes = False  # whether the interpreter writes to the pipe
        threading.Thread(target=self._serve, name="logsync-sigterm", daemon=True).start()

    def arm(self) -> None:
        """Handle SIGTERM where nothing else does; on the main thread."""
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        self._tell(_ARMED)
        before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._wakes = before == -1
        if not self._wakes:  # an event loop's, say; then the handler tells the thread
            signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, self.on_sigterm)

    def disarm(self) -> None:
        """Put back what was there, as far as it is still ours to do so; on the main thread.

        A signal that came before the default was in force is in the pipe, before this word: it still ends the process.
        """
        if signal.getsignal(signal.SIGTERM) == self.on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._tell(_DISARMED)
        if self._wakes:
            self._wakes = False
            other = signal.set_wakeup_fd(-1)
            if other not in {-1, self._write}:
                signal.set_wakeup_fd(other)

    def on_sigterm(self, _signum: int, _frame: FrameType | None) -> None:
        """Have everything flushed and the process ended; called by another program's handler, do nothing."""
        if signal.getsignal(signal.SIGTERM) == self.on_sigterm:
            self._tell(signal.SIGTERM)

    def forget(self) -> None:
        """In a forked child: its signals are no business of its parent's thread."""
        if signal.getsignal(signal.SIGTERM) == self.on_sigterm:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self._wakes:
            signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def _tell(self, word: int) -> None:
        with contextlib.suppress(BlockingIOError):  # full of what the thread will read
            os.write(self._write, bytes([word]))

    def _serve(self) -> None:
        is_armed = False
        while True:
            for word in os.read(self._read, 64):
                if word in {_ARMED, _DISARMED}:
                    is_armed = word == _ARMED
                elif word == signal.SIGTERM and is_armed and self._is_ours():
                    self.is_ending = True
                    self._close_all()
                    _end_by_default()

    def _is_ours(self) -> bool:
        # The default handler was put back by disarm() after the signal had come.
        return signal.getsignal(signal.SIGTERM) in {self.on_sigterm, signal.SIG_DFL}

    def _close_all(self) -> None:
        """Close all hosts, each on a thread of its own: whatever one waits for, the process ends in time."""
        deadline = time.monotonic() + _BOUND_S
        hosts = tuple(self.hosts)
        for host in hosts:
            _start(host.close)
        missing = [host for host in hosts if not host.ended.wait(max(0.0, deadline - time.monotonic()))]
        if hosts:
            what = f"{len(missing)} logs could not be flushed" if missing else "what was logged is flushed"
            told = _start(lambda: _logger.warning("SIGTERM: %s, and the process ends", what))
            told.join(0.5)  # the main thread may be stuck with a lock of logging's


def _start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work, name="logsync-flush", daemon=True)
    with contextlib.suppress(RuntimeError):  # no more threads are to be had
        thread.start()
    return thread


_guard: _Guard | None = None
_masks = threading.local()


def flush_at_sigterm(host: Host) -> None:
    """Have the entries of `host` flushed when SIGTERM ends this process.

    Nothing is done where the program handles or ignores SIGTERM itself, or where this is not the main thread. A
    handler that is set later replaces this one and decides what follows.
    """
    global _guard  # noqa: PLW0603 - the handler is the process's, too
    if threading.current_thread() is not threading.main_thread():
        if _guard is not None:
            _guard.hosts.add(host)
        return
    if _guard is None:
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            return
        _guard = _Guard()
    _guard.hosts.add(host)
    _guard.arm()


def let_go(host: Host) -> None:
    """Forget `host`, which is closed; SIGTERM is as it was before once no host is left."""
    if _guard is None:
        return
    wait_if_ending()
    _guard.hosts.discard(host)
    # On another thread nothing can be put back; then the guard has nothing to flush and ends the process at once.
    if not _guard.hosts and threading.current_thread() is threading.main_thread():
        _guard.disarm()


def wait_if_ending() -> None:
    """Hold the caller, who must hold no lock, where the log is being flushed and the process ends right after."""
    if _guard is not None and _guard.is_ending:
        time.sleep(2 * _BOUND_S)


def _block_before_fork() -> None:
    # A child that is terminated before it has forgotten the guard would write to the pipe that is its parent's, too.
    if _guard is not None:
        _masks.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _unblock_after_fork() -> None:
    before = _masks.__dict__.pop("before", None)
    if before is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _forget_in_child() -> None:
    global _guard
    if _guard is not None:
        guard, _guard = _guard, None
        with contextlib.suppress(ValueError):  # in a program that embeds Python, this may not be the main thread
            guard.forget()
    _unblock_after_fork()


os.register_at_fork(before=_block_before_fork, after_in_parent=_unblock_after_fork, after_in_child=_forget_in_child)


def _end_by_default() -> None:
    """End this process as SIGTERM does where nobody handles it; from any thread."""
    # Python lets only the main thread change a handler, and that thread may be stuck.
    ctypes.CDLL(None).signal(int(signal.SIGTERM), None)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(1.0)
    os._exit(128 + signal.SIGTERM)  # the first process of a container has no default action
