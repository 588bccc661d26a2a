"""A follower's talk with the actor, over a line that the test holds the other end of."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from logsync.coordinator.messages import KeySpec, Window, encode, pack_values
from logsync.workers.transports.ray_follow import FollowSession
from logsync.workers.transports.ray_member import LineBroken
from logsync.workers.transports.ray_wire import Answer, Follow, decode_ask

Reply = Callable[[Follow], Answer | Exception]


def window(**values: float) -> Window:
    return Window(
        encode([KeySpec(name) for name in values]), pack_values([n for v in values.values() for n in (v, 1.0)])
    )


def news(made: int) -> Reply:
    return lambda _: Answer("actor", "reply", body=b"entry", run="run", entries_made=made)


def nothing(_: Follow) -> Answer:
    return Answer("actor", "again", run="run")


def broken(_: Follow) -> Exception:
    return LineBroken("the actor died")


class Line:
    """Answers as it is told, and then not at all."""

    job = "ours"

    def __init__(self) -> None:
        self.replies: queue.SimpleQueue[Reply] = queue.SimpleQueue()
        self.asks: list[Follow] = []
        self.found = 0

    def find(self) -> None:
        self.found += 1

    def ask(self, data: bytes) -> Callable[[float], bytes]:
        ask = decode_ask(data)
        assert isinstance(ask, Follow)
        self.asks.append(ask)

        def wait(seconds: float) -> bytes:
            try:
                reply = (nothing if ask.closing else self.replies.get(timeout=seconds))(ask)
            except queue.Empty:
                raise TimeoutError from None
            if isinstance(reply, Exception):
                raise reply
            return encode(reply)

        return wait


@pytest.fixture
def line() -> Line:
    return Line()


@pytest.fixture
def session(line: Line, monkeypatch: pytest.MonkeyPatch) -> Iterator[FollowSession]:
    monkeypatch.setattr("logsync.workers.transports.ray_follow._PAUSE_S", 0.01)
    session = FollowSession(line)
    session.start("rollout")
    yield session
    session.close(Window)
    assert not session._thread.is_alive()


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_window_is_handed_over_after_news_and_travels_with_the_next_question(
    line: Line, session: FollowSession
) -> None:
    assert not session.has_news
    line.replies.put(news(3))
    until(lambda: session.has_news)
    session.hand_over(lambda: window(reward=1.0))
    until(lambda: len(line.asks) == 2)

    first, second = line.asks
    assert (first.number, first.window, first.run, first.made) == (0, Window(), "", 0)
    assert (second.number, second.window, second.run, second.made) == (1, window(reward=1.0), "run", 3)
    assert (session.reply, session.has_news) == (b"entry", False)


def test_a_question_is_asked_again_with_the_same_window_where_the_actor_was_lost(
    line: Line, session: FollowSession
) -> None:
    line.replies.put(news(1))
    until(lambda: session.has_news)
    session.hand_over(lambda: window(reward=1.0))
    line.replies.put(broken)
    line.replies.put(nothing)
    until(lambda: len(line.asks) == 4)

    assert [(ask.number, ask.window) for ask in line.asks[1:]] == [(1, window(reward=1.0))] * 3
    assert line.found == 2
    assert not session.has_news


def test_the_last_window_is_sent_at_the_end_and_so_is_one_that_may_not_have_arrived(
    line: Line, session: FollowSession
) -> None:
    line.replies.put(news(1))
    until(lambda: session.has_news)
    session.hand_over(lambda: window(reward=1.0))
    until(lambda: len(line.asks) == 2)

    assert session.close(lambda: window(reward=2.0))
    assert [(ask.number, ask.window, ask.closing) for ask in line.asks[2:]] == [
        (1, window(reward=1.0), True),
        (2, window(reward=2.0), True),
    ]


def test_news_that_come_while_the_log_is_closed_do_not_keep_the_last_window(line: Line, session: FollowSession) -> None:
    def close_first(ask: Follow) -> Answer | Exception:
        session._last = lambda: window(reward=2.0)
        session._closed.set()
        session._handed.set()
        return news(1)(ask)

    line.replies.put(close_first)
    session._thread.join(10)

    assert not session._thread.is_alive()
    assert [(ask.window, ask.closing) for ask in line.asks] == [(Window(), False), (window(reward=2.0), True)]


def test_a_window_that_a_device_did_not_give_is_lost_and_the_next_one_is_not(
    line: Line, session: FollowSession, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> Window:
        msg = "the device"
        raise RuntimeError(msg)

    line.replies.put(news(1))
    until(lambda: session.has_news)
    session.hand_over(fail)
    line.replies.put(news(2))
    until(lambda: session.has_news)
    session.hand_over(lambda: window(reward=2.0))
    until(lambda: len(line.asks) == 3)

    assert [ask.window for ask in line.asks] == [Window(), Window(), window(reward=2.0)]
    assert "what follower rollout on" in caplog.text


def test_where_there_never_was_a_log_the_last_window_is_waited_for_by_nobody(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        msg = "there is none yet"
        raise LineBroken(msg)

    monkeypatch.setattr(line, "find", fail)
    monkeypatch.setattr("logsync.workers.transports.ray_follow._GOODBYE_S", 3600.0)
    session = FollowSession(line)
    session.start(None)

    assert not session.close(lambda: window(reward=2.0))
    assert not line.asks
