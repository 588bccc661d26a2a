"""One run at the coordinator's actor: who its ranks are, whose frames are in, and what was answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from logsync.coordinator.errors import (
    CoordinatorLost,
    FrameTooLarge,
    PeerFailed,
    PeerLost,
    RoundTimeout,
    Step,
    TransportError,
    printable,
)
from logsync.coordinator.followers import MOST_WAITING, MOST_WAITING_BYTES, Followed
from logsync.coordinator.messages import MAX_FRAME, LogEntry, decode_decision
from logsync.workers.hosting import Hosted, Plan, Recovered, Standing
from logsync.workers.transports.notes import ranks_text
from logsync.workers.transports.ray_wire import (
    Answer,
    Exchange,
    Follow,
    Held,
    Hyperparams,
    Join,
    Leave,
    Quit,
    Release,
    failed,
)

__all__ = ["Member", "Run"]

_logger = logging.getLogger(__name__)

_HIGHEST_RANK = 2**20 - 1
_MOST_NOTICES = 16  # for a rank to print, that wait for its next poll
_QUICK_BYTES = 2**18  # frames of a round that are decided in a moment

T = TypeVar("T")


class Member:
    """A process that has a rank of a run."""

    def __init__(self, join: Join) -> None:
        self.session = join.session
        self.process = join.process
        self.rank = join.rank
        self.place = f"on {printable(join.host, 80)} (pid {join.pid}, node {printable(join.node, 16)})"
        self.call = 0
        self.step: Step = None
        self.seen = time.monotonic()
        self.notices: list[str] = []
        self.poll: asyncio.Future[None] | None = None
        self.left = False
        self.admission: Answer | None = None
        self.is_new = False  # it has taken a rank's place in a run that goes on, and has not been told where it is

    def heard(self, call: int, step: Step) -> None:
        """Note a sign of life, and where the rank is."""
        self.seen = time.monotonic()
        self.call, self.step = call, step

    def wake(self) -> None:
        """Answer its poll, so that it gives a new one."""
        if self.poll is not None and not self.poll.done():
            self.poll.set_result(None)

    def known(self) -> str:
        """Say where the rank was last."""
        silent = time.monotonic() - self.seen
        how = "" if silent < 15 else f", and has given no sign of life for {silent:.0f} s"  # noqa: PLR2004 - a poll takes 10 s
        return f"rank {self.rank} {self.place} was last heard of at call {self.call}, step {self.step}{how}"


class Run:
    """The ranks of one log, from their first frames to their last.

    Args:
        key: names it; a new name if not given.
        incarnation: of the actor.
    """

    def __init__(self, join: Join, incarnation: str, key: str = "") -> None:
        self.key = key or secrets.token_hex(8)
        self.world_size = join.world_size
        self.members: dict[int, Member] = {}
        self.turn = 0  # the open one
        self.lost: TransportError | None = None
        self.since: float | None = None  # when the first rank began to wait in the open turn that is not patient
        self.warned_s = 0.0
        self.timeout_s = join.timeout_s
        self.warn_after_s = join.warn_after_s
        self._incarnation = incarnation
        self._made_at = time.monotonic()
        self._frames: dict[int, Exchange] = {}
        self._waiting: dict[int, bool] = {}  # ranks in the open turn, and whether they are patient
        self._outcome: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._last: Answer | None = None  # of the turn before
        self._is_deciding = False
        self._closing = asyncio.Lock()
        self._at_work = 0  # what the root's thread has not done yet
        self._plan: Plan | None = None
        self._root: Hosted | None = None
        self._standing = Standing()
        self._memory = b""
        self._entries: dict[int, LogEntry] = {}
        self._notes: dict[int, dict[str, float]] = {}
        self._released = -1
        self._followers: dict[str, int] = {}  # what each counts as, by session; heard of last, last
        self._followers_seen = 0
        self._followed: dict[tuple[str, int], Followed] = {}  # windows for the next turn
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._entry_reply = b""  # the last one that has an entry
        # One thread: a root is used by one at a time, and a slow sink does not keep polls from being answered.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="logsync-root")

    # -- who is there ------------------------------------------------------------------------------------------

    @property
    def is_over(self) -> bool:
        """Whether no more turns can be made."""
        return self.lost is not None or any(member.left for member in self.members.values())

    @property
    def missing(self) -> list[int]:
        """The ranks whose frames of the open turn are not in."""
        return [rank for rank in range(self.world_size) if rank not in self._frames]

    def admit(self, join: Join) -> Member:
        """Let a process have a rank, in the place of one that is gone if there was one."""
        before = self.members.get(join.rank)
        member = self.members[join.rank] = Member(join)
        self._frames.pop(join.rank, None)
        self._waiting.pop(join.rank, None)
        if join.held is None:
            member.is_new = self.turn > 0
            if before is not None:
                _logger.warning("%s takes the place of the one that %s", member.known(), before.known())
        return member

    def take_plan(self, plan: Plan) -> None:
        """Note how rank 0 wants the root to be made."""
        if self._root is None:
            self._plan = plan

    def take(self, held: Held) -> None:
        """Take over what a rank knows of the run, where this actor knows less."""
        if held.turn > self.turn and self._root is not None:
            self._executor.submit(self._root.close)  # it was made of what is outdated
            self._root = None
        for reply in held.entries:
            entry = decode_decision(reply).entry
            if entry is not None and self._root is None:
                if entry.seq >= max(self._entries, default=0):
                    self._entry_reply = reply
                self._entries.setdefault(entry.seq, entry)
        if held.notes or held.released >= 0:
            self._notes.update(held.notes)
            self._released = max(self._released, held.released)
        if held.turn <= self.turn:
            return
        self._memory = held.memory
        self._standing = Standing(held.memory, -1, held.durable_seq, held.next_seq, held.entries_made)
        self.turn = held.turn - 1
        if held.refused:
            self._finish(failed(self._incarnation, FrameTooLarge(held.refused, ranks=held.culprits), self.turn))
            return
        last = decode_decision(held.reply).entry
        seq = -1 if last is None else last.seq
        self._finish(msgspec.structs.replace(self._answer(held.reply), entry_seq=seq))

    # -- turns -------------------------------------------------------------------------------------------------

    async def exchange(self, member: Member, ask: Exchange) -> Answer:
        """Take in a frame and wait for the outcome of its turn; a turn that is complete is answered again."""
        member.heard(ask.call, ask.step)
        rank = member.rank
        if member.is_new:
            member.admission = await self._readmit(member, ask.frame)
        if ask.turn == 0 and member.admission is not None:
            return member.admission  # also where its answer was lost
        member.admission = None
        if self._last is not None and ask.turn == self.turn - 1:
            return self._last
        if self.lost is None and ask.turn != self.turn:
            msg = f"rank {rank} came to exchange {ask.turn}, but the run is at {self.turn}"
            return failed(self._incarnation, CoordinatorLost(msg, ranks=(rank,)), ask.turn)
        self._check_leavers()
        if self.lost is not None:
            return failed(self._incarnation, self.lost, ask.turn)
        if ask.release is not None:
            await self.release(ask.release)
        outcome = self._outcome
        self._frames[rank] = ask
        self._waiting[rank] = ask.patient
        if not ask.patient:
            came = time.monotonic() - ask.waited_s
            self.since = came if self.since is None else min(came, self.since)
        if not self.missing and not self._is_deciding:
            await self._decide()
        return await asyncio.shield(outcome)

    async def _decide(self) -> None:
        self._is_deciding = True
        try:
            asks = [self._frames[rank] for rank in range(self.world_size)]
            large = next((rank for rank, ask in enumerate(asks) if ask.too_large), None)
            if large is not None:
                size = asks[large].too_large
                msg = f"the frame of rank {large} has {size} bytes, {MAX_FRAME} are the most; record fewer metrics"
                answer = failed(self._incarnation, FrameTooLarge(msg, ranks=(large,)), self.turn)
            else:
                followed, self._followed = tuple(self._followed.values()), {}
                quick = sum(len(ask.frame) for ask in asks) <= _QUICK_BYTES
                reply = await self._work(lambda root: _handled(root, asks, followed), quick=quick)
                answer = self._answer(reply)
            self._finish(answer)
        except Exception as error:  # noqa: BLE001 - whatever it is, no rank may wait for ever
            text = f"the coordinator's actor failed: {type(error).__name__}: {printable(str(error))}"
            self.lose(CoordinatorLost(text, round=self.turn))
        finally:
            self._is_deciding = False

    def _answer(self, reply: bytes) -> Answer:
        standing = self._standing
        return Answer(
            self._incarnation,
            "reply",
            turn=self.turn,
            body=reply,
            run=self.key,
            memory=standing.memory,
            entry_seq=standing.entry_seq,
            durable_seq=standing.durable_seq,
            next_seq=standing.next_seq,
            entries_made=standing.entries_made,
        )

    def _finish(self, answer: Answer) -> None:
        """End the open turn."""
        if answer.entry_seq >= 0:
            self._entry_reply = answer.body
        self._tell_followers()
        outcome, self._outcome = self._outcome, asyncio.get_running_loop().create_future()
        self._last = answer
        self._frames.clear()
        self._waiting.clear()
        self.turn = answer.turn + 1
        self.since = None
        self.warned_s = 0.0
        if not outcome.done():
            outcome.set_result(answer)

    async def _readmit(self, member: Member, hello: bytes) -> Answer:
        reply = await self._work(lambda root: root.readmit(member.rank, hello))
        member.is_new = False
        return Answer(
            self._incarnation,
            "reply",
            turn=self.turn - 1,
            body=reply,
            run=self.key,
            memory=self._standing.memory,
            durable_seq=self._standing.durable_seq,
            next_seq=self._standing.next_seq,
            entries_made=self._standing.entries_made,
        )

    async def _work(self, work: Callable[[Hosted], T], *, quick: bool = False) -> T:
        """Let the root do something, on its thread; or here, if that is `quick` and nothing is under way there."""
        if quick and self._root is not None and not self._at_work:  # two changes of threads are half of a round
            return self._worked(work)
        self._at_work += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, self._worked, work)
        finally:
            self._at_work -= 1

    def _worked(self, work: Callable[[Hosted], T]) -> T:
        root = self._opened()
        result = work(root)
        self._standing = root.standing()
        return result

    def _opened(self) -> Hosted:
        if self._root is None:
            if self._plan is None:
                msg = "rank 0 has not said how to make the coordinator"
                raise RuntimeError(msg)
            recovered = None
            if self._memory:
                recovered = Recovered(self._memory, dict(self._entries), dict(self._notes), self._released)
            self._root = self._plan.open(recovered)
            self._entries.clear()
        return self._root

    async def release(self, ask: Release) -> None:
        """Hand the entry that rank 0 has finished with to the sinks."""
        if ask.seq <= self._released and self._root is not None:
            return
        self._released = max(self._released, ask.seq)
        if self._root is None:  # it is made with these
            self._notes[ask.seq] = dict(ask.notes)
        elif ask.seq == self._standing.next_seq - 1:
            with contextlib.suppress(ValueError):  # a name that is merged already, which rank 0 has checked
                await self._work(lambda root: root.release(ask.notes), quick=True)

    async def hyperparams(self, ask: Hyperparams) -> None:
        """Have the sinks keep the run's settings."""
        if self._plan is not None:  # otherwise the run has ended
            await self._work(lambda root: root.hyperparams(ask.values))

    # -- followers ---------------------------------------------------------------------------------------------

    async def follow(self, ask: Follow) -> Answer:
        """Take in a follower's window, and wait for an entry that it has not heard of, or for the end of the run."""
        made = ask.made if ask.run == self.key else self._standing.entries_made
        counts_as = self._counts_as(ask.session)
        for number, came in sorted({**ask.earlier, ask.number: ask.window}.items()):
            if not came.schema:
                continue
            late = number != ask.number or self._standing.entries_made > made
            self._followed[ask.session, number] = Followed(ask.session, number, counts_as, ask.who, came, late)
            waiting = sum(one.size for one in self._followed.values())
            if waiting > MOST_WAITING_BYTES or len(self._followed) > MOST_WAITING:
                del self._followed[ask.session, number]
                text = f"a window of follower {ask.who} is lost: {len(self._followed)} wait for a round already"
                self._voice(text)
        while not ask.closing and not self.is_over and (self._standing.entries_made <= made or not self._entry_reply):
            await asyncio.shield(self._news)
        made_now, merged = self._standing.entries_made, self._standing.merged.get(ask.session, -1)
        if ask.closing or made_now <= made or not self._entry_reply:
            return Answer(self._incarnation, "again", run=self.key)
        return Answer(
            self._incarnation, "reply", body=self._entry_reply, run=self.key, entries_made=made_now, merged=merged
        )

    def _counts_as(self, session: str) -> int:
        """Return the rank that stands for a follower where an entry names one."""
        rank = self._followers.pop(session, None)
        if rank is None:
            rank = min(self.world_size + self._followers_seen, _HIGHEST_RANK)
            self._followers_seen += 1
        self._followers[session] = rank
        if len(self._followers) > MOST_WAITING:  # one that comes again counts as another
            del self._followers[next(iter(self._followers))]
        return rank

    def _voice(self, text: str) -> None:
        """Have the lowest rank that is here say something."""
        _logger.warning("%s", text)
        voice = self.members.get(min(self.members, default=0))
        if voice is not None and len(voice.notices) < _MOST_NOTICES:
            voice.notices.append(text)

    def _tell_followers(self) -> None:
        news, self._news = self._news, asyncio.get_running_loop().create_future()
        news.set_result(None)

    # -- the end -----------------------------------------------------------------------------------------------

    async def quit(self, member: Member, ask: Quit) -> Answer:
        """Let a rank go: no turn can be made without it."""
        member.heard(ask.call, ask.step)
        if self._is_deciding:  # with this rank's frame: the others shall have the answer
            await asyncio.wait([self._outcome])
        member.left = True
        self._tell_followers()
        if ask.reason is not None:
            text = (
                f"rank {member.rank} {member.place} left the log at call {ask.call}, step {ask.step}, because its code "
                f"raised {printable(ask.reason)}"
            )
            self.lose(PeerFailed(text, ranks=(member.rank,), round=self.turn))
        else:
            self._check_leavers()
        return Answer(self._incarnation, "again", entries_made=self._standing.entries_made)

    async def leave(self, member: Member, ask: Leave) -> None:
        """Flush the sinks when rank 0 goes; where it went without a word, the run is closed for its silence."""
        if member.rank == 0:
            await self.close(ask)

    async def close(self, ask: Leave | None = None) -> None:
        """Write what is held and flush the sinks; a second call does nothing."""

        def end(root: Hosted) -> None:
            if ask is not None and ask.window is not None:
                root.leave(ask.window, ask.step, ask.call)
            root.close()

        async with self._closing:
            if self._plan is not None:
                try:
                    await self._work(end)
                except Exception:
                    _logger.exception("could not end the log")
            self._plan = self._root = None
            self._executor.shutdown(wait=False)

    def lose(self, error: TransportError) -> None:
        """End the open turn, and every later one, with `error`; the first error stays."""
        if self.lost is None:
            self.lost = error
            self._tell_followers()
            if not self._outcome.done():
                self._outcome.set_result(failed(self._incarnation, error, self.turn))

    def dissolve(self, why: str) -> None:
        """Send the ranks that wait away, to come again: to another run, or with what they know of this one."""
        self.lost = CoordinatorLost(why)
        self._tell_followers()
        if not self._outcome.done():
            self._outcome.set_result(Answer(self._incarnation, "stranger"))

    def _check_leavers(self) -> None:
        """Tell ranks that wait of those that have left."""
        gone = [rank for rank, member in self.members.items() if member.left]
        if gone:
            msg = f"{ranks_text(gone)} left the group: {self._known(gone)}"
            self.lose(PeerLost(msg, ranks=tuple(sorted(gone)), round=self.turn))

    # -- who is missing ----------------------------------------------------------------------------------------

    def look(self, now: float) -> bool:
        """Give up on a turn that has waited for too long; say whether it is time to warn."""
        if self.lost is not None or self._is_deciding:
            return False
        if self.since is not None and now - self.since >= self.timeout_s:
            missing = self.missing
            text = (
                f"round {self.turn} failed: it waited {now - self.since:.1f} s of {self.timeout_s:g} s; "
                f"{ranks_text(missing)} did not come: {self._known(missing)}"
            )
            self.lose(RoundTimeout(text, ranks=tuple(missing[:64]), round=self.turn))
            return False
        if self._waiting and all(self._waiting.values()):
            silent = [rank for rank in self.missing if now - self._seen(rank) >= self.timeout_s]
            if silent:
                text = f"round {self.turn} failed: no sign of life of {ranks_text(silent)} for {self.timeout_s:g} s"
                msg = f"{text}: {self._known(silent)}"
                self.lose(PeerLost(msg, ranks=tuple(silent[:64]), round=self.turn))
        return self.since is not None and now - self.since - self.warned_s >= self.warn_after_s

    def _seen(self, rank: int) -> float:
        """Return when a rank gave a sign of life; one that this actor has never heard of, at the earliest then."""
        return self.members[rank].seen if rank in self.members else self._made_at

    async def warn(self) -> None:
        """Have the lowest rank that waits say who is missing and where they are."""
        if self.since is None:
            return
        self.warned_s = time.monotonic() - self.since
        turn = self.turn
        for rank in self.missing:
            if rank in self.members:
                self.members[rank].wake()  # it gives a new position, if it lives
        await asyncio.sleep(min(1.0, self.warn_after_s / 4))
        patient = self._waiting
        voices = [rank for rank, is_patient in patient.items() if not is_patient]
        if turn == self.turn and voices and self.missing:
            missing = self.missing
            voice = self.members[min(voices)]
            voice.notices.append(
                f"round {turn} has waited {self.warned_s:.0f} s for {ranks_text(missing)}: {self._known(missing)}"
            )
            voice.wake()

    def _known(self, ranks: Iterable[int]) -> str:
        found = [
            self.members[rank].known() if rank in self.members else f"rank {rank} has not connected"
            for rank in sorted(ranks)[:8]
        ]
        return "; ".join(found)


def _handled(root: Hosted, asks: list[Exchange], followed: tuple[Followed, ...]) -> bytes:
    loaded = asks[0].loaded
    if loaded is not None:
        root.loaded(loaded.state, loaded.last_entry, loaded.call)
    if followed:
        root.follow(followed)
    return root.handle([ask.frame for ask in asks])
