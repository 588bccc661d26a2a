"""What the coordinator's actor does, without Ray: it finds the run and the rank that a question belongs to.

Everything here runs on one event loop; what takes time runs on the threads of the runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable

from logsync.coordinator.errors import (
    ConfigMismatch,
    CoordinatorLost,
    LaunchError,
    LogsyncError,
    PeerLost,
    ProtocolError,
)
from logsync.coordinator.reduction import Partials
from logsync.workers.hosting import Plan
from logsync.workers.transports.ray_run import Member, Run
from logsync.workers.transports.ray_wire import (
    WIRE,
    Answer,
    Exchange,
    Follow,
    Hyperparams,
    Join,
    Leave,
    Poll,
    Quit,
    Release,
    decode_ask,
    encode,
    failed,
)

__all__ = ["RootServer"]

_logger = logging.getLogger(__name__)

_POLL_S = 10.0  # how long a poll is left open at most
_SILENCE_S = 45.0  # without any sign of life from anybody, the job may be over
_LINGER_S = 5.0  # how long an actor that nobody uses waits for the next log of its name
_GRACE_S = 15.0  # how long one that takes the place of another waits for those that knew it
_CHALLENGE_S = 3.0  # how long a rank has to show that it lives


class RootServer:
    """The runs of one name, of which one goes on and those before it end.

    Args:
        job: the Ray job that it works for.
        succeeds: whether an actor was lost whose place this one takes: then ranks know what it has to know.
        stays: whether it goes on waiting when its job is gone.
        end: ends the actor for good.
    """

    def __init__(self, job: str, *, succeeds: bool, stays: bool, end: Callable[[], None]) -> None:
        self.incarnation = secrets.token_hex(8)
        self._job = job
        self._end = end
        self._stays = stays
        self._graced_until = time.monotonic() + (_GRACE_S if succeeds else 0.0)
        self._sessions: dict[str, tuple[Run, Member]] = {}
        self._plans: dict[str, Plan] = {}
        self._current: Run | None = None
        self._joining = asyncio.Lock()
        self._following = 0  # calls of followers that are not answered yet
        self._watch: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: dict[str, asyncio.Task[None]] = {}  # by run

    @property
    def was_asked(self) -> bool:
        """Whether anybody has come yet."""
        return self._watch is not None

    def place(self, session: str, plan: Plan) -> None:
        """Take in how rank 0 wants the root to be made; before it joins."""
        self._plans[session] = plan

    async def ask(self, data: bytes) -> bytes:
        """Answer one question. Never raises."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._look())
        try:
            ask = decode_ask(data)
            if isinstance(ask, Follow):
                answer = await self._follow(ask)
            else:
                answer = await (self._join(ask) if isinstance(ask, Join) else self._answer(ask))
        except LogsyncError as error:
            answer = failed(self.incarnation, error)
        except Exception as error:
            _logger.exception("the coordinator's actor failed")
            answer = failed(self.incarnation, CoordinatorLost(f"the coordinator's actor failed: {error!r}"))
        return encode(answer)

    async def _answer(self, ask: Exchange | Poll | Release | Hyperparams | Quit | Leave) -> Answer:
        found = self._sessions.get(ask.session)
        if found is None:
            return Answer(self.incarnation, "stranger")
        run, member = found
        if run.members.get(member.rank) is not member:
            msg = f"another process has taken the place of rank {member.rank} in the log: {self._of(run, member.rank)}"
            return failed(self.incarnation, PeerLost(msg, ranks=(member.rank,)))
        if isinstance(ask, Exchange):
            return await run.exchange(member, ask)
        if isinstance(ask, Poll):
            return await self._poll(run, member, ask)
        if isinstance(ask, Release):
            await run.release(ask)
        elif isinstance(ask, Hyperparams):
            await run.hyperparams(ask)
        elif isinstance(ask, Quit):
            return await run.quit(member, ask)
        else:
            await run.leave(member, ask)
            self._sessions.pop(ask.session, None)
        return Answer(self.incarnation, "again")

    async def _poll(self, run: Run, member: Member, ask: Poll) -> Answer:
        member.heard(ask.call, ask.step)
        if not member.notices:
            member.poll = asyncio.get_running_loop().create_future()
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                await asyncio.wait_for(member.poll, min(_POLL_S, max(0.25, run.timeout_s / 4)))
            member.poll = None
        notices, member.notices = member.notices, []
        return Answer(self.incarnation, "again", notices=tuple(notices))

    # -- followers ---------------------------------------------------------------------------------------------

    async def _follow(self, ask: Follow) -> Answer:
        if ask.wire != WIRE:
            msg = (
                f"follower {ask.who} speaks version {ask.wire} to an actor of version {WIRE}; install the same logsync"
            )
            raise ProtocolError(msg)
        if ask.job != self._job:  # a name that another job's actor has, which the ranks of this one will replace
            return Answer(self.incarnation, "stranger")
        for window in (ask.window, *ask.earlier.values()):  # refused here, it harms nobody's round
            await asyncio.to_thread(Partials().add_windows, [(0, window)])
        self._following += 1
        try:
            until = time.monotonic() + (0 if ask.closing else _POLL_S)
            while (run := self._current) is None or run.is_over:
                if time.monotonic() >= until:
                    return Answer(self.incarnation, "again")
                await asyncio.sleep(0.1)
            return await run.follow(ask)
        finally:
            self._following -= 1

    # -- joining -----------------------------------------------------------------------------------------------

    async def _join(self, ask: Join) -> Answer:
        if ask.wire != WIRE:
            msg = f"rank {ask.rank} speaks version {ask.wire} to an actor of version {WIRE}; install the same logsync"
            raise ProtocolError(msg, ranks=(ask.rank,))
        if ask.session not in self._sessions:
            if ask.rank >= ask.world_size:
                msg = f"rank {ask.rank} is outside a world of {ask.world_size}"
                raise LaunchError(msg, ranks=(ask.rank,))
            if ask.held is not None:
                if ask.held.run in self._closing:  # its files are still open
                    await asyncio.wait([self._closing[ask.held.run]])
                run = self._run_of(ask, ask.held.run)
            else:
                async with self._joining:
                    if ask.job != self._job:
                        return await self._from_another_job(ask)
                    run = await self._run_for(ask)
            self._sessions[ask.session] = run, run.admit(ask)
        run, _ = self._sessions[ask.session]
        if ask.session in self._plans:
            run.take_plan(self._plans.pop(ask.session))
        if ask.held is not None:
            run.take(ask.held)
        return Answer(self.incarnation, "again", run=run.key)

    def _run_of(self, ask: Join, key: str) -> Run:
        """Return the run that a rank remembers, which a lost actor had."""
        run = self._current
        if run is not None and run.key != key and not run.turn and not run.is_over:
            # A newcomer was here first; it belongs to the run that is remembered, whose others may still come.
            run.dissolve("this run never began")
            for session in [s for s, (r, _) in self._sessions.items() if r is run]:
                del self._sessions[session]
            run = self._current = None
        if run is not None and run.key != key:
            known = next((r for r, _ in self._sessions.values() if r.key == key), None)
            if known is None and not run.is_over:
                msg = f"the coordinator's actor was lost, and rank {ask.rank} came back when another run had begun"
                raise CoordinatorLost(msg)
            run = known
        if run is None:
            run = self._current = Run(ask, self.incarnation, key)
        taken = run.members.get(ask.rank)
        if taken is not None and taken.process != ask.process:
            msg = f"another process has taken the place of rank {ask.rank} in the log: {taken.known()}"
            raise PeerLost(msg, ranks=(ask.rank,))
        return run

    async def _run_for(self, ask: Join) -> Run:
        """Return the run that a newcomer belongs to: the one that goes on, or a new one."""
        while self._current is None and time.monotonic() < self._graced_until:  # noqa: ASYNC110 - two events, and a clock
            await asyncio.sleep(0.1)  # for those that know how it stood
        run = self._current
        if run is None or run.is_over:
            return self._begin(ask)
        if ask.world_size != run.world_size and await self._any_lives(run):
            if run.turn or ask.rank:
                msg = f"world_size is {run.world_size} in the log that runs, but {ask.world_size} on rank {ask.rank}"
                raise ConfigMismatch(msg, ranks=(ask.rank,))
            # Rank 0 is right, and those that came before it are not.
            msg = f"world_size is {ask.world_size} on rank 0, but {run.world_size} here"
            run.lose(CoordinatorLost(msg, ranks=tuple(sorted(run.members))[:64]))
            return self._begin(ask)
        taken = run.members.get(ask.rank)
        if ask.world_size != run.world_size:
            return await self._begin_again(run, ask)
        if taken is None:
            return run
        if taken.process != ask.process and await self._lives(taken):
            msg = f"rank {ask.rank} is taken: {taken.known()}; two processes use one rank, or two logs one name"
            raise LaunchError(msg, ranks=(ask.rank,))
        if not run.turn or await self._any_lives(run, but=taken):
            return run
        return await self._begin_again(run, ask)

    async def _from_another_job(self, ask: Join) -> Answer:
        run = self._current
        if run is not None and not run.is_over and await self._any_lives(run):
            msg = (
                f"the name of this log is taken by job {self._job} of this cluster, whose ranks live; use another name"
            )
            raise LaunchError(msg, ranks=(ask.rank,))
        if run is not None:
            await run.close()
        return Answer(self.incarnation, "stale")

    def _begin(self, ask: Join) -> Run:
        self._current = Run(ask, self.incarnation)
        return self._current

    async def _begin_again(self, run: Run, ask: Join) -> Run:
        """Begin a new run in the place of one whose ranks have all ended."""
        run.lose(CoordinatorLost("the job was started again"))
        await run.close()
        return self._begin(ask)

    async def _any_lives(self, run: Run, but: Member | None = None) -> bool:
        found = await asyncio.gather(*(self._lives(member) for member in run.members.values() if member is not but))
        return any(found)

    async def _lives(self, member: Member) -> bool:
        asked = time.monotonic()
        member.wake()
        while not member.left and time.monotonic() - asked < _CHALLENGE_S:
            if member.seen > asked:
                return True
            await asyncio.sleep(0.05)
        return False

    def _of(self, run: Run, rank: int) -> str:
        member = run.members.get(rank)
        return "nobody" if member is None else member.known()

    # -- the clock ---------------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Look at the clock four times a second: give up on turns, warn, and end with the job."""
        idle_since = time.monotonic()
        while True:
            await asyncio.sleep(0.25)
            try:
                idle_since = self._looked(idle_since)
            except Exception:  # the clock must go on
                _logger.exception("the coordinator's actor could not look at its ranks")

    def _looked(self, idle_since: float) -> float:
        """Look once; return since when nobody uses this actor."""
        now = time.monotonic()
        runs = {run.key: run for run, _ in self._sessions.values()}
        for run in runs.values():
            if run.look(now):
                task = asyncio.create_task(run.warn())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                run.warned_s = now - (run.since or now)
        self._forget(runs, now)
        if self._sessions or self._tasks or self._following or self._joining.locked() or now < self._graced_until:
            return now
        if not self._stays and now - idle_since >= _LINGER_S:
            self._end()
        return idle_since

    def _forget(self, runs: dict[str, Run], now: float) -> None:
        """Close the files of the runs of which nothing has been heard for long; ranks that live bring theirs back."""
        for key, run in runs.items():
            members = [member for r, member in self._sessions.values() if r is run]
            if all(now - member.seen >= _SILENCE_S for member in members) and not self._stays:
                said = f"nothing was heard of any rank for {_SILENCE_S:.0f} s"
                _logger.warning("%s: the log's files are closed", said)
                run.dissolve(said)
                if self._current is run:
                    self._current = None
                task = asyncio.create_task(run.close(), name=key)
                self._closing[key] = task
                self._tasks.add(task)
                task.add_done_callback(self._closed)
                for session in [s for s, (r, _) in self._sessions.items() if r is run]:
                    del self._sessions[session]

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._closing.pop(task.get_name(), None)
