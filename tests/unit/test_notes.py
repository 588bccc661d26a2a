"""Notes in the job's store, and what a rank makes of them: with a good store, a bad one, and hostile notes."""

from __future__ import annotations

import logging
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch.distributed as dist

from logsync.coordinator.core import Coordinator
from logsync.coordinator.errors import CoordinatorLost, PeerFailed, PeerLost, RoundTimeout, TransportError
from logsync.coordinator.messages import Hello, Settings, encode_hello
from logsync.workers.transports.notes import (
    Note,
    Notes,
    Verdict,
    dead_neighbours,
    pid_space,
    ranks_text,
    within,
)
from logsync.workers.transports.postmortem import GAVE_UP
from logsync.workers.transports.watch import Watch

RUN = "run1"
WORLD_SIZE = 3
TIMEOUT_S = 3.0
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "zeros": b"\0" * 100,
    "no_utf8": b"\xff\xfe\x80",
    "no_utf8_in_a_string": b'["idle",1,1,1,1,"\xff",1,""]',
    "half": b'["idle",1,1,',
    "no_array": b'{"doing": "idle"}',
    "short": b'["idle",1]',
    "unknown_word": b'["dancing",1,1,1,1,"h",1,""]',
    "wrong_types": b'["idle","1","1","1","1",7,"1",[]]',
    "endless_text": b'["left",1,1,1,1,"h",1,"",[],"' + b"x" * 10_000_000 + b'"]',
    "endless_host": b'["idle",1,1,1,1,"' + b"x" * 2001 + b'",1,""]',
    "endless_list": b'["idle",1,1,1,1,"h",1,"",[' + b"1," * 5000 + b"1]]",
    "endless_number": b'["idle",1,1,' + b"9" * 100_000 + b',1,"h",1,""]',
    "deep": b"[" * 100_000,
}


def hash_store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it


def note(doing: Literal["idle", "waiting", "failed", "left"] = "idle", number: int = 1, **more: Any) -> Note:
    more = {"beat": 5, "call": 41, "step": 40, "host": "node-3", "pid": 99, "pid_space": "pid:[1]", **more}
    return Note(doing, number, **more)


def notes_of(store: Any, rank: int = 0, run: str = RUN) -> Notes:
    return Notes(store, run, rank, WORLD_SIZE)


# -- notes -----------------------------------------------------------------------------------------------------


def test_the_newest_note_of_every_rank_that_left_one_is_read_by_all() -> None:
    store = hash_store()
    first = note(step=2.5, dead=(2,), text="what \u2028 ever \x1b")
    notes_of(store, 0).leave(note("waiting"))
    notes_of(store, 0).leave(first)

    assert notes_of(store, 1).read() == {0: first}
    notes_of(store, 2).leave(note(step=None))
    notes_of(store, 1).leave(note(step=math.nan))
    assert notes_of(store, 1).read() == {0: first, 1: note(step=None), 2: note(step=None)}


def test_the_verdict_is_read_as_it_was_left_and_none_before() -> None:
    store = hash_store()
    verdict = Verdict(7, "lost", (1, 2), "rank 1 ended")

    assert notes_of(store, 1).verdict() is None
    notes_of(store, 0).judge(verdict)
    assert notes_of(store, 1).verdict() == verdict


def test_logs_and_attempts_do_not_read_each_others_notes_and_touch_no_key_of_others() -> None:
    store = hash_store()
    store.set("0", "mine")
    notes_of(store, 0, "run1").leave(note())
    notes_of(store, 0, "run1").judge(Verdict(1, "lost", (), ""))

    assert notes_of(store, 0, "run2").read() == {}
    assert notes_of(store, 0, "run2").verdict() is None
    assert store.get("0") == b"mine"


def test_the_training_jobs_own_client_is_cloned_twice_and_never_used() -> None:
    used: list[str] = []

    class Recorded:
        def __init__(self, store: Any) -> None:
            self.store = store

        def __getattr__(self, name: str) -> Any:
            used.append(name)
            return getattr(self.store, name)

    notes = notes_of(Recorded(hash_store()))
    notes.leave(note())
    notes.judge(Verdict(1, "lost", (), ""))
    assert notes.read() == {0: note()}
    assert notes.verdict() is not None

    assert used == ["clone", "clone"]


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_note_that_is_no_note_is_left_out_and_costs_the_others_nothing(data: bytes) -> None:
    store = hash_store()
    store.set(f"logsync/{RUN}/1", data)
    notes_of(store, 2).leave(note("waiting"))

    assert notes_of(store).read() == {2: note("waiting")}


@pytest.mark.parametrize(
    "data",
    [*HOSTILE.values(), b'[1,"worse",[],""]', b'[1,"lost",["0"],""]', b'[1,"lost",[],"' + b"x" * 2001 + b'"]'],
)
def test_a_verdict_that_is_no_verdict_is_none(data: bytes) -> None:
    store = hash_store()
    store.set(f"logsync/{RUN}/verdict", data)

    assert notes_of(store).verdict() is None


def test_ranks_are_listed_up_to_16() -> None:
    assert ranks_text([3]) == "rank 3"
    assert ranks_text({5, 1, 2}) == "ranks 1, 2, 5"
    assert ranks_text(range(16)) == "ranks " + ", ".join(map(str, range(16)))
    assert ranks_text(range(20)).endswith(", 14, 15 and 4 more")


# -- a deadline for a store that has none ----------------------------------------------------------------------


def test_work_that_is_done_in_time_gives_its_result_whatever_that_is() -> None:
    assert within(10, lambda: 7) == (7,)
    assert within(10, lambda: None) == (None,)


def test_work_that_raises_gives_nothing() -> None:
    def work() -> None:
        msg = "Connection reset by peer"
        raise dist.DistNetworkError(msg)

    assert within(10, work) is None


def test_work_that_takes_longer_is_not_waited_for_and_its_thread_tells_when_it_ends() -> None:
    let_go = threading.Event()
    started = time.monotonic()

    late = within(0.05, let_go.wait)
    assert 0.05 <= time.monotonic() - started < 5
    assert isinstance(late, threading.Thread)
    assert late.is_alive()
    let_go.set()
    late.join(5)
    assert not late.is_alive()


# -- who has died on this host ---------------------------------------------------------------------------------


@pytest.fixture
def neighbour() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def at(pid: int, host: str = "", space: str = "") -> Note:
    return note(host=host or socket.gethostname(), pid=pid, pid_space=space or pid_space())


def test_a_neighbour_is_dead_once_its_process_has_ended_reaped_or_not(neighbour: subprocess.Popen[bytes]) -> None:
    around = {2: at(neighbour.pid)}
    assert dead_neighbours(around) == ()

    neighbour.kill()
    deadline = time.monotonic() + 10
    while not dead_neighbours(around):  # a zombie: nobody has waited for it
        assert time.monotonic() < deadline
    neighbour.wait()
    assert dead_neighbours(around) == (2,)


def test_only_pids_of_this_host_and_this_pid_space_are_judged(neighbour: subprocess.Popen[bytes]) -> None:
    neighbour.kill()
    neighbour.wait()
    gone = neighbour.pid

    assert dead_neighbours({1: at(gone, host="another"), 2: at(gone, space="pid:[7]"), 3: at(gone)}) == (3,)


# -- what a rank makes of them ---------------------------------------------------------------------------------


class Moody:
    """A store that works until it is told to block or to fail."""

    def __init__(self) -> None:
        self.store = hash_store()
        self.mood: Literal["good", "blocks", "fails"] = "good"
        self.let_go = threading.Event()
        self.asked = 0

    def clone(self) -> Moody:
        return self

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def answer(*arguments: Any) -> Any:
            if self.mood == "good":
                return getattr(self.store, name)(*arguments)
            self.asked += 1
            if self.mood == "blocks":
                self.let_go.wait(60)
            if str(self.mood) == "good":  # meanwhile
                return getattr(self.store, name)(*arguments)
            msg = "Broken pipe"
            raise dist.DistNetworkError(msg)

        return answer


@pytest.fixture
def moody() -> Iterator[Moody]:
    store = Moody()
    yield store
    store.let_go.set()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks ask each other for half a second only."""
    monkeypatch.setattr("logsync.workers.transports.watch._ROOT_ASKS_S", 0.5)
    monkeypatch.setattr("logsync.workers.transports.watch._OTHERS_ASK_S", 0.5)


def first_reply() -> bytes:
    settings = Settings("train", 1, "exact", "step", "auto", TIMEOUT_S, 0)
    hellos = [encode_hello(Hello(rank, WORLD_SIZE, "1", settings)) for rank in range(WORLD_SIZE)]
    reply, _ = Coordinator(settings, WORLD_SIZE, run=RUN, run_dir="/r").handle(hellos)
    return reply


def watch_of(store: Any, rank: int, warn_after_s: float = 1.0) -> Watch:
    watch = Watch(store, rank, WORLD_SIZE, timeout_s=TIMEOUT_S, warn_after_s=warn_after_s)
    watch.position = lambda: (41, 40)
    watch.round_done(first_reply())
    return watch


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_the_first_reply_a_rank_has_left_where_it_is() -> None:
    store = hash_store()
    watch = watch_of(store, 1)

    found = notes_of(store).read()[1]
    assert (found.doing, found.round, found.call, found.step) == ("idle", 1, 41, 40)
    assert (found.host, found.pid_space) == (socket.gethostname(), pid_space())
    watch.idle()
    assert notes_of(store).read()[1].beat > found.beat


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "reason",
    ["KeyError: 'bad batch'", "x" * 100_000, "a\x00\x1b\n", "OSError: no 'caf\udce9.png'"],
    ids=["plain", "endless", "control", "name_of_a_file_in_latin_1"],
)
def test_a_reason_reaches_the_others_whatever_its_text_is(reason: str) -> None:
    store = hash_store()
    watch_of(store, 1).leave(reason)
    error = watch_of(store, 0).explain("Read error", 0.1)

    assert type(error) is PeerFailed
    assert error.ranks == (1,)
    assert str(error).isprintable()
    assert "at call 41, step 40" in str(error)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_blocks_delays_the_error_by_less_than_5_seconds_and_is_not_asked_again(
    moody: Moody, rank: int
) -> None:
    watch = watch_of(moody, rank)
    moody.mood = "blocks"
    started = time.monotonic()
    error = watch.explain("Read error", TIMEOUT_S)

    assert time.monotonic() - started < 5
    assert str(error).startswith("round 1 failed: ")
    assert moody.asked == 1
    watch.idle()
    watch.waiting(1.0, patient=True)
    watch.leave("KeyError")
    assert moody.asked == 1


def test_a_rank_whose_store_answers_late_leaves_notes_and_reads_them_again(
    moody: Moody, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logsync.workers.transports.watch._STORE_S", 0.1)
    watch = watch_of(moody, 1)
    before = notes_of(moody.store).read()[1]
    moody.mood = "blocks"
    watch.waiting(1.0, patient=False)
    watch.waiting(2.0, patient=False)
    assert moody.asked == 1
    moody.mood = "good"
    moody.let_go.set()

    def noted() -> bool:
        watch.waiting(0.4, patient=False)
        newest = notes_of(moody.store).read()[1]
        return newest.doing == "waiting" and newest.beat > before.beat + 2

    wait_for(noted)
    notes_of(moody.store, 0).judge(Verdict(1, "timeout", (2,), "rank 2 did not come"))
    assert type(watch.explain("Read error", TIMEOUT_S)) is RoundTimeout


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("waited_s", [0.1, TIMEOUT_S])
def test_when_the_store_fails_only_the_root_can_be_supposed_lost(moody: Moody, rank: int, waited_s: float) -> None:
    watch = watch_of(moody, rank)
    moody.mood = "fails"
    error = watch.explain("Read error", waited_s)

    if rank:
        assert type(error) is CoordinatorLost
        assert error.ranks == (0,)
    else:
        assert set(error.ranks) <= {1, 2}


def test_a_store_that_fails_does_not_disturb_a_rank_that_waits(moody: Moody, caplog: pytest.LogCaptureFixture) -> None:
    watch = watch_of(moody, 1)
    moody.mood = "fails"
    for waited_s in (0.4, 1.0, 2.0):
        assert watch.waiting(waited_s, patient=False) > 0
        assert watch.waiting(waited_s, patient=True) > 0

    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told == [
        f"round 1 has waited {n} s; the job's store does not answer, so it is not known for whom" for n in (1, 2)
    ]


@pytest.mark.usefixtures("impatient")
def test_a_log_without_a_store_has_errors_all_the_same() -> None:
    watch = watch_of(None, 1)
    watch.idle()

    assert watch.waiting(1.0, patient=False) > 0
    assert type(watch.explain("Read error", 0.1)) is CoordinatorLost


def test_a_store_whose_clients_are_slow_to_connect_gets_its_notes_once_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A new client looks its own address up by DNS: 5 s where a question is lost.
    monkeypatch.setattr("logsync.workers.transports.watch._STORE_S", 0.1)
    store = hash_store()

    class Slow:
        def clone(self) -> Any:
            time.sleep(0.3)
            return store.clone()

    watch = watch_of(Slow(), 1)

    def noted() -> bool:
        watch.idle()
        return bool(notes_of(store).read())

    wait_for(noted)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_note_or_verdict_does_not_keep_a_rank_from_its_error(data: bytes) -> None:
    store = hash_store()
    root, other = watch_of(store, 0), watch_of(store, 1)
    store.set(f"logsync/{RUN}/2", data)
    store.set(f"logsync/{RUN}/verdict", data)

    for error in (other.explain("Read error", 0.1), root.explain("Read error", 0.1)):
        assert str(error).startswith("round 1 failed: ")
        assert str(error).isprintable()
        assert len(str(error)) < 2100


@pytest.mark.parametrize(
    "field",
    [
        {"host": "\x1b[2J" * 400},
        {"host": "a\nWARNING all is well\n"},
        {"call": 10**4000},
        {"step": 10**4000},
        {"pid": -(10**4000)},
    ],
    ids=["escapes", "newlines", "call", "step", "pid"],
)
def test_a_warning_about_a_hostile_note_is_one_short_printable_line(
    field: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    store = hash_store()
    watch = watch_of(store, 0)
    notes_of(store, 1).leave(note("waiting"))
    notes_of(store, 2).leave(note("idle", **field))
    watch.waiting(1.0, patient=False)

    (text,) = [record.getMessage() for record in caplog.records if "has waited" in record.getMessage()]
    assert "rank 2" in text
    assert text.isprintable()
    assert len(text) < 1000


@pytest.mark.parametrize(
    ("doing", "warner", "missing"),
    [
        ({0: "waiting", 1: "idle", 2: "waiting"}, 0, "rank 1"),
        ({0: "waiting", 1: "idle", 2: "idle"}, 0, "ranks 1, 2"),
        ({0: "idle", 1: "waiting", 2: "waiting"}, 1, "rank 0"),
        ({0: "idle", 1: "idle", 2: "waiting"}, 2, "ranks 0, 1"),
        ({0: "waiting", 1: "waiting", 2: "waiting"}, None, ""),
    ],
)
def test_the_lowest_waiting_rank_alone_warns_of_the_missing_every_warn_after(
    doing: dict[int, Literal["idle", "waiting"]],
    warner: int | None,
    missing: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = hash_store()
    watches = {rank: watch_of(store, rank) for rank in range(WORLD_SIZE)}
    for rank, word in doing.items():
        notes_of(store, rank).leave(note(word))

    for rank in (rank for rank, word in doing.items() if word == "waiting"):
        caplog.clear()
        for waited_s in (0.4, 0.9, 1.0, 1.4, 2.0, 2.9):
            watches[rank].waiting(waited_s, patient=False)
        told = [record.getMessage() for record in caplog.records]

        if rank == warner:
            assert [text.partition(":")[0] for text in told] == [
                f"round 1 has waited 1 s for {missing}",
                f"round 1 has waited 2 s for {missing}",
            ]
            assert "was last heard of at call 41, step 40" in told[0]
        else:
            assert told == []


def test_a_warning_does_not_name_ranks_that_wait_for_the_lost_roots_last_reply(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = hash_store()
    watch = watch_of(store, 1)
    notes_of(store, 0).leave(note("idle", 0))
    notes_of(store, 2).leave(note("waiting", 0))
    watch.waiting(1.0, patient=False)

    (record,) = caplog.records
    assert record.getMessage().startswith("round 1 has waited 1 s for rank 0: rank 0 on ")


@pytest.mark.parametrize("warn_after_s", [0.1, 1.0, 60.0])
def test_a_rank_leaves_its_first_note_long_before_anybody_warns(warn_after_s: float) -> None:
    assert watch_of(hash_store(), 1, warn_after_s).first_pause_s <= warn_after_s / 2


@pytest.mark.parametrize(
    ("noted", "error", "says"),
    [
        ({"doing": "left", "text": "ValueError: nan"}, PeerFailed, "its code raised ValueError: nan"),
        ({"doing": "failed", "number": 1}, PeerLost, "rank 2 waited 1.0 s"),
        ({"doing": "failed", "number": 2}, PeerLost, "rank 2 waited 1.0 s"),
        ({"doing": "failed", "number": 0}, None, ""),
        ({"doing": "waiting", "number": 1}, None, ""),
    ],
)
def test_a_rank_whose_own_connection_holds_does_not_wait_on_once_others_say_that_the_group_is_lost(
    noted: dict[str, Any], error: type[TransportError] | None, says: str
) -> None:
    store = hash_store()
    watch = watch_of(store, 2)
    notes_of(store, 0).leave(note("waiting"))
    notes_of(store, 1).leave(note(**noted))
    if noted["doing"] == "failed":
        notes_of(store, 0).judge(Verdict(1, "lost", (1,), "rank 2 waited 1.0 s and so on"))

    if error is None:
        watch.waiting(1.0, patient=False)
    else:
        with pytest.raises(error, match=says):
            watch.waiting(1.0, patient=False)


def test_a_rank_does_not_wait_on_for_a_process_of_its_host_that_has_ended(
    neighbour: subprocess.Popen[bytes],
) -> None:
    neighbour.kill()
    neighbour.wait()
    store = hash_store()
    watch = watch_of(store, 2)
    notes_of(store, 0).leave(note("waiting"))
    notes_of(store, 1).leave(at(neighbour.pid))

    with pytest.raises(PeerLost, match=r"rank 2 waited 1\.0 s; rank 1 ended: "):
        watch.waiting(1.0, patient=False)


def test_a_patient_rank_fails_when_a_peer_has_left_or_shows_no_life_for_the_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 1000.0
    monkeypatch.setattr("logsync.workers.transports.watch.time.monotonic", lambda: now)
    monkeypatch.setattr("logsync.workers.transports.watch.within", lambda _, work: (work(),))
    store = hash_store()
    watch, silent, lively = (watch_of(store, rank) for rank in (2, 1, 0))
    silent.idle()
    for waited_s in (0.4, 1.5, 2.6, 3.3):
        now = 1000.0 + waited_s
        lively.idle()
        watch.waiting(waited_s, patient=True)
    now = 1000.0 + 0.4 + TIMEOUT_S + 0.1
    lively.idle()

    with pytest.raises(RoundTimeout, match="rank 1 showed no life for 3 s: rank 1 on") as caught:
        watch.waiting(3.5, patient=True)
    assert caught.value.ranks == (1,)
    silent.leave("KeyError: 'bad batch'")
    with pytest.raises(PeerFailed, match="KeyError: 'bad batch'") as left:
        watch.waiting(3.6, patient=True)
    assert left.value.ranks == (1,)


def test_the_others_take_the_roots_verdict_for_their_own() -> None:
    store = hash_store()
    watches = [watch_of(store, rank) for rank in range(WORLD_SIZE)]
    notes_of(store, 1).leave(note("waiting"))
    first = watches[0].explain("Timed out", TIMEOUT_S)
    second = watches[1].explain("Connection closed by peer", 0.1)

    assert type(first) is type(second) is RoundTimeout
    assert str(first) == str(second)
    assert first.ranks == second.ranks == (2,)


def test_a_rank_that_comes_while_the_root_asks_around_after_its_timeout_is_still_the_culprit() -> None:
    store = hash_store()
    root = watch_of(store, 0)
    late = watch_of(store, 1)
    notes_of(store, 2).leave(note("failed"))

    comes = threading.Timer(0.3, lambda: late.explain("Connection closed by peer", 0.1))
    comes.start()
    error = root.explain("Timed out", TIMEOUT_S)
    comes.join()

    assert type(error) is RoundTimeout
    assert error.ranks == (1,)


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_lost_its_connection_before_another_gave_up_does_not_blame_itself_for_coming_late() -> None:
    store = hash_store()
    watch = watch_of(store, 1)
    notes_of(store, 2).leave(note("failed"))

    gives_up = threading.Timer(0.3, lambda: notes_of(store, 0).leave(note("failed", text=GAVE_UP)))
    gives_up.start()
    error = watch.explain("Connection reset by peer", 0.0)
    gives_up.join()

    assert 1 not in error.ranks


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_is_a_round_ahead_of_the_verdict_takes_it_as_well() -> None:
    # At the instant of a failure some ranks have a reply that the root could not send to all.
    store = hash_store()
    root, ahead = watch_of(store, 0), watch_of(store, 1)
    ahead.round_done(b"")
    notes_of(store, 2).leave(note("idle"))
    verdict = root.explain("Connection reset by peer", 0.1)
    error = ahead.explain("Connection closed by peer", 0.1)

    assert str(error) == str(verdict)
