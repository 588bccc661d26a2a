"""Visits every state that a model can come to, breadth first, and checks its promises in each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterator
from typing import Protocol, TypeVar

__all__ = ["Explorable", "Violation", "explore"]

S = TypeVar("S", bound=Hashable)


class Violation(AssertionError):
    """A promise does not hold in a state; the text has the way that leads there."""


class Explorable(Protocol[S]):
    """What can be explored."""

    def start(self) -> S:
        """Return the first state."""

    def actions(self, state: S) -> Iterator[tuple[str, bool, S]]:
        """Yield every action that is possible: in words, whether it is bound to come, and the state it leads to."""

    def check(self, state: S) -> None:
        """Check what holds in every state; raise `Violation` if it does not."""

    def check_end(self, state: S) -> None:
        """Check what holds where nothing has to happen any more; raise `Violation` if it does not."""


def explore(model: Explorable[S], *, most_states: int = 10_000_000) -> Counter[str]:
    """Visit every state that can be reached and return how many states, transitions and ends there are.

    Raises:
        Violation: a promise does not hold; the text has the shortest way there.
    """
    start = model.start()
    came_from: dict[S, tuple[S, str] | None] = {start: None}
    open_states = deque([start])
    facts: Counter[str] = Counter()
    while open_states:
        state = open_states.popleft()
        done, way = True, "the last action"
        try:
            for way, sure, after in model.actions(state):
                done = done and not sure
                facts["transitions"] += 1
                if after not in came_from:
                    came_from[after] = (state, way)
                    model.check(after)
                    open_states.append(after)
            if done:
                way = "nothing more"
                model.check_end(state)
        except Violation as violation:
            msg = f"{violation}\n" + "\n".join([*_way_to(state, came_from), way])
            raise Violation(msg) from violation
        facts["ends"] += done
        assert len(came_from) <= most_states, "more states than expected; the search would take too long"
    facts["states"] = len(came_from)
    return facts


def _way_to(state: S, came_from: dict[S, tuple[S, str] | None]) -> list[str]:
    way = []
    while (origin := came_from[state]) is not None:
        state, action = origin
        way.append(action)
    return way[::-1]
