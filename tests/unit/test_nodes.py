from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from logsync.coordinator.errors import CollectiveSetupError, ConfigMismatch, LogsyncError
from logsync.workers.transports.nodes import TREE_FROM, Nodes, agree, flat, node_name, slots, stages, tree

pytestmark = pytest.mark.timeout(60)


def gathered(nodes: Nodes, frames: list[str]) -> list[str | None]:
    """Return what the root has in its hands once every rank has brought its frame, stage by stage."""
    brought: list[list[str | None]] = [[frame] for frame in frames]
    for depth in range(2):
        before = list(brought)
        for rank in range(len(frames)):
            own = stages(nodes, rank)
            if depth < len(own) and own[depth].members[0] == rank:
                stage = own[depth]
                parts = [before[member] for member in stage.members]
                assert all(len(part) == stage.width for part in parts)
                room: list[str | None] = [None] * (stage.width * (stage.places - len(parts)))
                brought[rank] = [frame for part in parts for frame in part] + room
    return brought[0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_the_root_finds_every_ranks_frame_in_its_slot_wherever_the_ranks_are(names: list[int]) -> None:
    frames = [f"of rank {rank}" for rank in range(len(names))]
    for nodes in (tree([str(name) for name in names]), flat(len(names))):
        box = gathered(nodes, frames)

        assert [box[slot] for slot in slots(nodes)] == frames


@given(st.lists(st.integers(0, 5), min_size=1, max_size=24))
def test_on_a_tree_a_rank_meets_its_node_and_only_first_ranks_meet_each_other(names: list[int]) -> None:
    nodes = tree([str(name) for name in names])
    first = [names.index(name) for name in dict.fromkeys(names)]
    for rank, name in enumerate(names):
        met = {member for stage in stages(nodes, rank) for member in stage.members}
        neighbours = {other for other, its in enumerate(names) if its == name}

        assert met == neighbours | (set(first) if rank in first else set())


@pytest.mark.parametrize(
    ("environ", "name"),
    [
        ({"RANK": "13", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8"}, "of rank 8"),
        ({"RANK": "9", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "3"}, "of rank 9"),
        ({"LOCAL_WORLD_SIZE": "4"}, "of rank 4"),  # of rank 7
    ],
)
def test_a_launcher_that_counts_the_ranks_of_a_node_says_which_node_it_is(environ: dict[str, str], name: str) -> None:
    assert node_name(7, environ) == name


@pytest.mark.parametrize("count", ["", "0", "many", "-2"])
def test_without_such_a_launcher_the_node_is_the_host(count: str) -> None:
    names = {node_name(rank, {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": count}) for rank in range(3)}

    assert len(names) == 1
    assert not names.pop().startswith("of rank")


def agreed(names: Sequence[str], shapes: Sequence[str]) -> list[Any]:
    """Return what each rank of a world gets, asking all at once."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    found: list[Any] = [None] * len(names)

    def ask(rank: int) -> None:
        try:
            found[rank] = agree(store, "here", rank, len(names), node=names[rank], shape=shapes[rank], timeout_s=20)
        except LogsyncError as error:
            found[rank] = error

    threads = [threading.Thread(target=ask, args=(rank,), daemon=True) for rank in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def as_lists(nodes: Nodes) -> list[list[int]]:
    return [list(node) for node in nodes]


@pytest.mark.parametrize(
    ("names", "shape", "nodes"),
    [
        (["a", "a", "b", "b", "c"], "tree", [[0, 1], [2, 3], [4]]),
        (["a", "b", "a", "b"], "tree", [[0, 2], [1, 3]]),
        (["a", "a", "b"], "flat", [[0, 1, 2]]),
        (["a", "a", "b"], "auto", [[0, 1, 2]]),  # too few for a tree
        (["a", "a", "a"], "tree", [[0, 1, 2]]),
        (["a", "b", "c"], "tree", [[0, 1, 2]]),  # a rank per node: there is nobody to gather from
        ([*"aaaaaaaa", *"bcdefghi"], "tree", [list(range(16))]),  # nine times eight places for sixteen ranks
    ],
)
def test_all_ranks_agree_on_the_nodes(names: list[str], shape: str, nodes: list[list[int]]) -> None:
    assert [as_lists(found) for found in agreed(names, [shape] * len(names))] == [nodes] * len(names)


@pytest.mark.parametrize(("size", "is_tree"), [(TREE_FROM - 1, False), (TREE_FROM, True)])
def test_by_itself_a_large_world_on_several_nodes_becomes_a_tree(size: int, is_tree: bool) -> None:  # noqa: FBT001
    found = agreed([str(rank // 8) for rank in range(size)], ["auto"] * size)

    assert all(nodes == found[0] for nodes in found)
    assert len(found[0]) == (TREE_FROM // 8 if is_tree else 1)


def test_ranks_that_ask_for_different_ways_are_all_told_whose_differ() -> None:
    for error in agreed(["a", "a", "b", "b"], ["tree", "tree", "flat", "tree"]):
        assert isinstance(error, ConfigMismatch)
        assert error.ranks == (2,)
        assert "'flat' on rank 2, 'tree' on rank 0" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("here/nodes", '[[["x", 2]]]', "cannot be read"),
        ("here/nodes", "[[[0, 2], [1, 1]]]", "has 3 ranks on its nodes, this rank is one of 2"),
        ("here/nodes", "[[[0, 2000000000]]]", "ranks on its nodes, this rank is one of 2"),
        ("here/nodes", "[[[0, -1], [1, 3]]]", "cannot be read"),
    ],
)
def test_an_answer_that_no_root_gives_is_an_error_and_allocates_nothing(key: str, value: str, said: str) -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    store.set(key, value)

    with pytest.raises(CollectiveSetupError, match=said):
        agree(store, "here", 1, 2, node="a", shape="tree", timeout_s=20)
