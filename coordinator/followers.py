"""Windows of processes that do not march with the ranks: kept for the next entry, and merged into it.

Nothing that a follower sends may cost the ranks an entry: what does not fit is left out, and said.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from logsync.coordinator.errors import ProtocolError, ReductionMismatch, printable
from logsync.coordinator.messages import Window
from logsync.coordinator.reduction import Merged, Partials

__all__ = ["LATE", "MOST_REMEMBERED", "MOST_WAITING", "MOST_WAITING_BYTES", "Followed", "kept", "merge", "remembered"]

LATE = "logsync/late_windows"
"""The metric that says how many followers' windows in an entry were too late for the entry before; absent if none."""

MOST_REMEMBERED = 256
"""Followers whose windows are known to be merged, so that one that is sent again is not merged twice; more only where
the newest entry has windows of more."""

MOST_WAITING = 4096
"""Windows that wait for an entry."""

MOST_WAITING_BYTES = 2**21
"""The size of their windows; with what spread makes of them, a reply takes that."""


class Followed(NamedTuple):
    """A follower's share of an entry.

    Attributes:
        follower: names the follower's log.
        number: of this window among that follower's.
        rank: what the follower counts as, from the world's size on.
        who: the follower in words.
        late: the entry that it was meant for was made before it came.
    """

    follower: str
    number: int
    rank: int
    who: str
    window: Window
    late: bool = False

    @property
    def size(self) -> int:
        """The bytes of the window."""
        return len(self.window.schema) + len(self.window.values)


def kept(
    waiting: tuple[Followed, ...], came: Iterable[Followed], merged: Mapping[str, int]
) -> tuple[tuple[Followed, ...], list[Followed]]:
    """Return what waits for the next entry, and what there is no room for; a window that is known is left out.

    Args:
        merged: the number of the last window of each follower that is in an entry.
    """
    found = {(w.follower, w.number): w for w in waiting}
    size = sum(window.size for window in waiting)
    refused: list[Followed] = []
    for window in came:
        key = (window.follower, window.number)
        if key in found or window.number <= merged.get(window.follower, -1):
            continue
        if size + window.size > MOST_WAITING_BYTES or len(found) >= MOST_WAITING:
            refused.append(window)
        else:
            size += window.size
            found[key] = window
    return tuple(found.values()), refused


def remembered(merged: Mapping[str, int], windows: Iterable[Followed]) -> dict[str, int]:
    """Return `merged` after an entry took `windows`, without the followers of which nothing was heard for longest."""
    now = dict(merged)
    newest: set[str] = set()
    for window in windows:
        number = max(window.number, now.pop(window.follower, -1))
        now[window.follower] = number  # last: it was heard of just now
        newest.add(window.follower)
    # Those of this entry may all ask again, where the coordinator is lost before they were answered.
    return dict(list(now.items())[-max(MOST_REMEMBERED, len(newest)) :])


def merge(partials: Partials, followed: Iterable[Followed], world_size: int, notices: list[str]) -> Merged:
    """Reduce the ranks' partials together with followers' windows.

    Args:
        notices: takes up what is said of windows that do not fit.

    Raises:
        ReductionMismatch: the ranks' own partials do not fit together.
    """
    both = Partials()
    both.merge(partials)
    late = 0
    for window in followed:
        own = Partials()
        try:
            own.add_windows([(window.rank, window.window)])
            problem = both.misfit(own)
        except ProtocolError as error:
            problem = str(error)
        if problem:
            notices.append(f"what follower {window.who} recorded is left out: {problem}")
            continue
        both.merge(own)
        late += window.late
    try:
        merged = both.reduce(world_size)
    except ReductionMismatch as error:
        merged = partials.reduce(world_size)  # raises again, if it is not the followers' doing
        notices.append(f"what followers recorded is left out: {printable(str(error), 500)}")
        return merged
    if late:
        merged.metrics.setdefault(LATE, float(late))
    return merged
