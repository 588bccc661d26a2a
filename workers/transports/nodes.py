"""Which ranks share a node, and over which groups a frame goes to the root: directly, or through its node's first rank.

With one group for all, every rank holds a socket to every other and the root reads a message from each. With a tree, a
rank has sockets to its node's ranks, a node's first rank to those of the other nodes besides, and the root reads one
message per node.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import Meta

from logsync.coordinator.errors import CollectiveSetupError, ConfigMismatch, printable
from logsync.workers.transports.notes import pid_space, ranks_text

__all__ = ["SHAPES", "TREE_FROM", "Nodes", "Stage", "agree", "flat", "node_name", "slots", "stages", "tree"]

SHAPES = ("auto", "flat", "tree")
TREE_FROM = 256
"""The world size from which on "auto" is a tree. A process may often have 1,024 files open, and training needs some."""

_MOST_ROOM = 4  # times the ranks

Nodes = Sequence[Sequence[int]]
"""The ranks by node, in order of their first ranks; rank 0 is the first of the first."""


class Stage(NamedTuple):
    """A part of a frame's way: the first of `members` gathers from the others, and broadcasts the reply to them.

    Attributes:
        name: what the group is for, as torch's debugging shows it.
        members: ranks of the log, in order. One that is alone needs no group.
        width: how many frames each of them brings.
        places: for how many members there is room: the same on each node, since all of a gather bring equally much.
    """

    name: str
    members: tuple[int, ...]
    width: int
    places: int


def flat(world_size: int) -> Nodes:
    """Return one node of all ranks."""
    return (range(world_size),)


def tree(names: Sequence[str]) -> Nodes:
    """Return the ranks by node, given the name of each one's node."""
    nodes: dict[str, list[int]] = {}
    for rank, name in enumerate(names):
        nodes.setdefault(name, []).append(rank)
    return tuple(nodes.values())


def stages(nodes: Nodes, rank: int) -> list[Stage]:
    """Return the stages in which `rank` takes part, from the ranks to the root."""
    if len(nodes) == 1:
        return [Stage("logsync", tuple(nodes[0]), 1, len(nodes[0]))]
    widest = max(map(len, nodes))
    own = next(node for node in nodes if rank in node)
    found = [Stage("logsync node", tuple(own), 1, widest)]
    if rank == own[0]:
        found.append(Stage("logsync leaders", tuple(node[0] for node in nodes), widest, len(nodes)))
    return found


def slots(nodes: Nodes) -> list[int]:
    """Return where each rank's frame lies in what the root gathers, counted in frames."""
    widest = max(map(len, nodes))
    places = {rank: at * widest + place for at, node in enumerate(nodes) for place, rank in enumerate(node)}
    return [places[rank] for rank in range(len(places))]


def node_name(rank: int, environ: Mapping[str, str] = os.environ) -> str:
    """Return a name that the ranks of a node share and others do not.

    A launcher that numbers the ranks of a node says it (torchrun's LOCAL_WORLD_SIZE and LOCAL_RANK); else it is the
    host, and the container on it.
    """
    numbers = [environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    if numbers[2].isdecimal() and int(numbers[2]) > 0:
        if numbers[0].isdecimal() and numbers[1].isdecimal():
            return f"of rank {int(numbers[0]) - int(numbers[1])}"
        return f"of rank {rank - rank % int(numbers[2])}"
    return f"{socket.gethostname()} {pid_space()}"


_Count = Annotated[int, Meta(ge=0, le=2**31)]


class _Asked(msgspec.Struct, frozen=True, array_like=True):
    """What a rank brings to the agreement."""

    node: Annotated[str, Meta(max_length=400)]
    shape: Annotated[str, Meta(max_length=20)]


class _Agreed(msgspec.Struct, frozen=True, array_like=True):
    """The number of each rank's node, as runs of (number, ranks); or why there is none."""

    runs: tuple[tuple[_Count, _Count], ...]
    refusal: str = ""
    ranks: tuple[int, ...] = ()


def agree(store: Any, prefix: str, rank: int, world_size: int, *, node: str, shape: str, timeout_s: float) -> Nodes:
    """Return the nodes, the same on all ranks, which all call this; waits for them through the job's store.

    The store gets one value of each rank and hands each the answer: its work grows with the ranks, not their square.

    Args:
        store: the job's; it is never blocked, since the training may use the same client meanwhile.
        prefix: tells this log's agreement from others.
        node: this rank's node.
        shape: one of SHAPES.
        timeout_s: how long to wait for the last rank.

    Raises:
        ConfigMismatch: the ranks ask for different shapes.
        TimeoutError: a rank did not come.
    """
    until = time.monotonic() + timeout_s
    store.set(f"{prefix}/{rank}", _encoded(_Asked(node[:400], shape)))
    if rank == 0:
        keys = [f"{prefix}/{rank}" for rank in range(world_size)]
        _wait(store, keys, until, world_size)
        found = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
        store.set(f"{prefix}/nodes", _encoded(_decide([_decoded(one, _Asked) for one in found])))
    _wait(store, [f"{prefix}/nodes"], until, world_size)
    agreed = _decoded(store.get(f"{prefix}/nodes"), _Agreed)
    if agreed.refusal:
        raise ConfigMismatch(printable(agreed.refusal, 400), ranks=agreed.ranks)
    told = sum(length for _, length in agreed.runs)
    if told != world_size:
        msg = f"rank 0 has {told} ranks on its nodes, this rank is one of {world_size}"
        raise CollectiveSetupError(msg)
    return tree([str(number) for number, length in agreed.runs for _ in range(length)])


def _wait(store: Any, keys: list[str], until: float, world_size: int) -> None:
    started = time.monotonic()
    # All ranks ask one server: together, two thousand times a second at most once it takes long.
    longest_s = max(0.01, world_size / 2000)
    while not store.check(keys):
        waited_s = time.monotonic() - started
        if started + waited_s >= until:
            msg = "not all ranks have come"
            raise TimeoutError(msg)
        time.sleep(min(longest_s, 0.002 + waited_s / 8))


def _decide(asked: Sequence[_Asked]) -> _Agreed:
    world_size = len(asked)
    shape = asked[0].shape
    others = tuple(rank for rank, one in enumerate(asked) if one.shape != shape)
    if others:
        msg = (
            f"the ranks' ways to the root differ: {asked[others[0]].shape!r} on {ranks_text(others)}, {shape!r} on "
            "rank 0. Every rank must call connect() with the same transport"
        )
        return _Agreed((), msg, others[:16])
    nodes = tree([one.node for one in asked])
    widest = max(map(len, nodes))
    if (
        not 1 < len(nodes) < world_size
        or len(nodes) * widest > _MOST_ROOM * world_size  # every node has as much room as the largest
        or shape == "flat"
        or (shape == "auto" and world_size < TREE_FROM)
    ):
        nodes = flat(world_size)
    number = {rank: at for at, node in enumerate(nodes) for rank in node}
    runs = groupby(number[rank] for rank in range(world_size))
    return _Agreed(tuple((at, sum(1 for _ in run)) for at, run in runs))


def _encoded(value: _Asked | _Agreed) -> str:
    return msgspec.json.encode(value).decode()


def _decoded(data: bytes, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"what the job's store says about the nodes cannot be read: {printable(str(error), 200)}"
        raise CollectiveSetupError(msg) from error
