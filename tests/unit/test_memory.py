"""A coordinator that takes over from one that was lost goes on as that one would have."""

from __future__ import annotations

import itertools
import random

import pytest

from logsync.coordinator.errors import ProtocolError
from logsync.coordinator.memory import recall, remember
from support.lockstep import Lockstep, settings


@pytest.mark.parametrize(
    ("mode", "frequency_type", "seed"), list(itertools.product(["exact", "on_update"], ["step", "epoch"], range(5)))
)
def test_a_run_whose_coordinator_is_replaced_after_every_round_has_the_same_answers_and_entries(
    mode: str, frequency_type: str, seed: int
) -> None:
    config = settings(5 if frequency_type == "step" else 0.05, mode=mode, frequency_type=frequency_type)
    steady, replaced = Lockstep(3, config), Lockstep(3, config)
    chance = random.Random(seed)
    step = 0.0
    for call in range(200):
        step = step + chance.choice([0, 1, 1, 1, 2]) if chance.random() > 0.01 else max(0.0, step - 7)
        given = int(step) if frequency_type == "step" else step / 100
        answers = []
        update, frequency, write = chance.random() < 0.2, chance.random() < 0.02, chance.random() < 0.02
        for world in (steady, replaced):
            if update:
                world.ranks[call % 3].model_updated(given)
            if frequency:
                world.ranks[call % 3].set_frequency(7 if frequency_type == "step" else 0.07)
            answers.append(world.write([given] * 3) if write else world.call([given] * 3))
        assert answers[0] == answers[1], call
        assert steady.ranks[0].last_entry == replaced.ranks[0].last_entry
        replaced.coordinator = recall(remember(replaced.coordinator), config, 3)

    assert steady.coordinator.next_seq > 10


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x90", remember(Lockstep(1, settings()).coordinator)[:-3]])
def test_what_no_coordinator_remembered_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="a rank remembers what no coordinator was"):
        recall(data, settings(), 1)
