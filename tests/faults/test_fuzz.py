"""Every decoder of bytes from outside, fuzzed: other ranks' frames, replies, notes, checkpoints, the log's file.

LOGSYNC_FUZZ_S: how many seconds the slow test takes (600); LOGSYNC_FAULT_SEED: the seed of its cases. By command:

    LOGSYNC_FUZZ_S=3600 ./scripts/test --slow tests/faults/test_fuzz.py -k long -s
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from logsync.workers.transports import gloo
from logsync.workers.transports.nodes import flat, stages
from support.fault_world import drawn
from support.fuzzed_io import check_file, check_log, check_notes, check_reply_header, check_slots
from support.fuzzing import DECODERS, check_decoded, check_reply, check_rounds, check_state, check_windows, tracing
from support.mutants import HUGE, MAKERS, MSGPACK, made, misplaced, mutated

FUZZ_S = float(os.environ.get("LOGSYNC_FUZZ_S", "600"))
Fuzzer = Callable[[random.Random], object]


def check_kind(kind: str, dice: random.Random) -> None:
    check_decoded(kind, mutated(made(kind, dice), dice, MAKERS[kind][1]))


WORLDS: dict[str, Fuzzer] = {
    "windows": check_windows,
    "rounds": check_rounds,
    "replies": check_reply,
    "checkpoints": check_state,
    "logs": check_log,
    "slots": check_slots,
    "headers": check_reply_header,
    "notes": check_notes,
}
FUZZERS: dict[str, Fuzzer] = {**{kind: partial(check_kind, kind) for kind in DECODERS}, **WORLDS}

seeds = st.integers(0, 2**32 - 1)
examples = hypothesis_settings(max_examples=200, suppress_health_check=list(HealthCheck))


@st.composite
def mutants(draw: st.DrawFn, kind: str) -> bytes:
    """Draw a message; what is wrong with it is hypothesis's choice, and shrinks."""
    message = made(kind, random.Random(draw(seeds)))
    return mutated(message, draw(st.randoms(use_true_random=False)), MAKERS[kind][1])


@pytest.fixture
def traced_memory() -> Iterator[None]:
    with tracing():
        yield


@pytest.fixture
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.usefixtures("traced_memory")
@examples
@given(st.data())
def test_a_mutated_message_is_within_its_bounds_or_refused_and_costs_little_memory(
    kind: str, data: st.DataObject
) -> None:
    check_decoded(kind, data.draw(mutants(kind)))


@pytest.mark.parametrize("kind", DECODERS)
def test_whatever_stands_in_whatever_place_a_message_is_within_its_bounds_or_refused(kind: str) -> None:
    taken: Counter[bool] = Counter()
    for seed in range(3):
        for data in misplaced(made(kind, random.Random(seed)), MAKERS[kind][1]):
            taken[check_decoded(kind, data)] += 1

    assert taken[True] > 20, taken
    assert taken[False] > 200, taken


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if MAKERS[kind][1] is MSGPACK])
@pytest.mark.usefixtures("traced_memory")
def test_a_length_that_is_only_claimed_in_whatever_place_costs_no_memory(kind: str) -> None:
    for seed in range(2):
        for data in misplaced(made(kind, random.Random(seed)), MSGPACK, HUGE):
            assert not check_decoded(kind, data)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.usefixtures("traced_memory", "quiet")
@examples
@given(seed=seeds)
def test_a_world_that_hears_hostile_bytes_goes_on_as_if_it_had_not(world: str, seed: int) -> None:
    WORLDS[world](random.Random(seed))


@pytest.mark.usefixtures("quiet")
def test_a_resume_over_a_hostile_file_keeps_what_is_whole_and_goes_on(tmp_path: Path) -> None:
    @examples
    @given(seeds)
    def resume(seed: int) -> None:
        check_file(random.Random(seed), tmp_path)

    resume()


class LyingWire(gloo.Wire):
    """The root's end of a group, which garbles the header of its second reply on the way out."""

    sent = 0

    def _broadcast(self, tensor: Any, patience: timedelta) -> None:
        self.sent += 1
        honest = bytes(self._reply[:16])
        if self.sent == 2:
            self._reply[8:16] = (2**60).to_bytes(8, "little")
        super()._broadcast(tensor, patience)
        self._reply[:16] = honest


@pytest.mark.timeout(60)
def test_over_gloo_a_garbled_header_loses_the_group_on_all_ranks_at_once() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    timeout_s = 30.0
    outcomes: dict[int, list[Any]] = {0: [], 1: []}
    nodes = flat(2)

    def make_rounds(rank: int) -> None:
        group = dist.ProcessGroupGloo(store, rank, 2, timedelta(seconds=timeout_s))
        root, end = ((lambda _: b"reply"), LyingWire) if rank == 0 else (None, gloo.Wire)
        (stage,) = stages(nodes, rank)
        wire = end([gloo.Way(stage, rank, group, timeout_s)], nodes, timeout_s, root)
        del group  # a reference that is held keeps the connections open
        for _ in range(3):
            outcomes[rank].append(wire.exchange(b"frame", patient=True))
            if isinstance(outcomes[rank][-1], gloo.Broken):
                break
        wire.drop()

    threads = [threading.Thread(target=make_rounds, args=(rank,), daemon=True) for rank in (0, 1)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)

    assert time.monotonic() - started < timeout_s / 2, "the other rank waited for its timeout"
    assert outcomes[1][0] == b"reply"
    assert outcomes[1][1].detail == f"the header of the reply is corrupt: status 0, next slot 1024, length {2**60}"
    *replies, lost = outcomes[0]
    assert replies in ([b"reply"], [b"reply"] * 2)  # its second one may be on the way still
    assert isinstance(lost, gloo.Broken)


def play(fuzz: Fuzzer, name: str, *, traced: bool) -> None:
    """Make the case that has this name."""
    try:
        with tracing() if traced else nullcontext():
            fuzz(random.Random(name))
    except Exception as error:
        msg = f"the case of random.Random({name!r}) failed: {error}"
        raise AssertionError(msg) from error


@pytest.mark.slow
@pytest.mark.usefixtures("quiet")
@pytest.mark.timeout(FUZZ_S + 60)
def test_a_long_run_of_hostile_bytes_finds_nothing(tmp_path: Path) -> None:
    seed = drawn("fuzz").randrange(10**9)
    fuzzers: dict[str, Fuzzer] = {**FUZZERS, "files": lambda dice: check_file(dice, tmp_path)}
    cases: Counter[str] = Counter()
    deadline = time.monotonic() + FUZZ_S
    number = 0
    while time.monotonic() < deadline:
        number += 1
        for name, fuzz in fuzzers.items():
            # Worlds take ten times as long as decoders, which so get their share.
            for turn in range(8 if name in DECODERS else 1):
                play(fuzz, f"{seed} {name} {number} {turn}", traced=number % 20 == 0)
                cases[name] += 1
    print(f"{sum(cases.values())} cases in {FUZZ_S:g} s: {dict(cases)}")
    assert min(cases.values()) > 0
