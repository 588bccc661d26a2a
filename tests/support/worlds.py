"""Worlds for the transport contract: one process alone, threads, and real processes over gloo."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from logsync.workers.testing import Member, play
from logsync.workers.transports.base import Transport
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.threads import ThreadTransport, ThreadWorld

__all__ = ["GlooWorld", "LocalWorld", "ThreadsWorld", "free_port", "places"]

DEADLINE_S = 90.0


class LocalWorld:
    """One rank: the single-node fallback."""

    world_size = 1

    def run(self, name: str) -> list[Any]:
        return [play(name, Member(0, 1, lambda _: LocalTransport()))]


class ThreadsWorld:
    """Ranks as threads. The n-th transports of all ranks belong to one ThreadWorld."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size

    def run(self, name: str) -> list[Any]:
        worlds: list[ThreadWorld] = []
        lock = threading.Lock()
        results: list[Any] = [None] * self.world_size
        errors: list[BaseException] = []

        def rank_main(rank: int) -> None:
            made = 0

            def make_transport(timeout_s: float) -> Transport:
                nonlocal made
                with lock:
                    if made == len(worlds):
                        worlds.append(ThreadWorld(self.world_size, timeout_s=timeout_s))
                    made += 1
                    return self._shown(worlds[made - 1].transports[rank])

            try:
                results[rank] = play(name, Member(rank, self.world_size, make_transport))
            except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
                errors.append(error)
                for world in worlds:  # the others would wait for this rank
                    world.transports[rank].close(str(error))

        threads = [threading.Thread(target=rank_main, args=(r,), daemon=True) for r in range(self.world_size)]
        deadline = time.monotonic() + DEADLINE_S
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if errors:
            raise errors[0]
        hanging = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        assert not hanging, f"ranks {hanging} hang in {name}"
        return results

    def _shown(self, transport: ThreadTransport) -> Transport:
        """Return what a rank sees of its transport."""
        return transport


class GlooWorld:
    """Ranks as processes in one torch.distributed job over gloo, started once and told what to play.

    Args:
        world_size: how many processes.
        nodes: how many of them are on each node, for frames that go through the nodes' first ranks.
    """

    def __init__(self, world_size: int, nodes: Sequence[int] = ()) -> None:
        self.world_size = world_size
        self._places = places(nodes) if nodes else [{}] * world_size
        self._shape = "tree" if nodes else "flat"
        self._members: list[subprocess.Popen[bytes]] = []
        self._answers: list[queue.Queue[bytes]] = []

    def run(self, name: str) -> list[Any]:
        """Have every process play a scenario; raise what one of them raised."""
        if not self._members:
            self._start()
        for member in self._members:
            assert member.stdin is not None
            member.stdin.write(f"{name}\n".encode())
            member.stdin.flush()
        deadline = time.monotonic() + DEADLINE_S
        try:
            answers = [
                pickle.loads(answers.get(timeout=max(0.0, deadline - time.monotonic())))  # noqa: S301 - ours
                for answers in self._answers
            ]
        except queue.Empty:
            self._dump_and_close()
            msg = f"{name}: a rank did not answer in {DEADLINE_S:.0f} s; see the stacks on stderr"
            raise AssertionError(msg) from None
        except BaseException:
            self.close()
            raise
        failures = [(rank, value) for rank, (kind, value) in enumerate(answers) if kind == "raised"]
        if failures:
            self.close()  # ranks may be at different places now
            raise AssertionError("\n".join(f"rank {rank} raised:\n{text}" for rank, text in failures))
        return [value for _, value in answers]

    def close(self) -> None:
        """End all processes."""
        for member in self._members:
            member.kill()
        for member in self._members:
            member.wait(10)
        self._members, self._answers = [], []

    def _start(self) -> None:
        port = free_port()
        script = Path(__file__).with_name("gloo_member.py")
        for rank in range(self.world_size):
            surroundings = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(self.world_size),
                **self._places[rank],
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
                "OMP_NUM_THREADS": "1",
                # torch's store asks for the host name of every client, in its one thread: a name server that does
                # not answer stops all ranks, for 10 seconds if it may.
                "RES_OPTIONS": "timeout:1 attempts:1",
            }
            member = subprocess.Popen(
                [sys.executable, str(script), self._shape],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=surroundings,
            )
            answers: queue.Queue[bytes] = queue.Queue()
            threading.Thread(target=_read_answers, args=(member, answers), daemon=True).start()
            self._members.append(member)
            self._answers.append(answers)

    def _dump_and_close(self) -> None:
        for member in self._members:
            member.send_signal(signal.SIGUSR1)  # faulthandler writes all stacks
        with contextlib.suppress(queue.Empty):
            self._answers[0].get(timeout=1)  # time to write them
        self.close()


def _read_answers(member: subprocess.Popen[bytes], answers: queue.Queue[bytes]) -> None:
    assert member.stdout is not None
    while head := member.stdout.read(8):
        answers.put(member.stdout.read(int.from_bytes(head, "little")))


def places(nodes: Sequence[int]) -> list[dict[str, str]]:
    """Return what a launcher tells each rank about its place, given how many are on each node."""
    return [{"LOCAL_RANK": str(at), "LOCAL_WORLD_SIZE": str(size)} for size in nodes for at in range(size)]


def free_port() -> int:
    """Return a port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
