"""Whole jobs in one thread: the real coordinator, host, rounds, ledgers and windows, on a clock and a network of ours.

A `Scenario` is plain data drawn from a seed: what the script does, and what goes wrong. `simulate` plays it, from the
first start of the job to its last, and checks the promises; `shrink` makes a scenario that breaks one small.

The network is the one of the design's request and reply: a request is idempotent per (run, round, rank), is sent again
until its reply comes, and a round that is complete is answered with the same bytes, never decided again.
"""

from support.simulation.jobs import fails, simulate
from support.simulation.parts import REAL, Member, Parts, Root
from support.simulation.promises import Broken
from support.simulation.scenarios import Absence, Fault, Life, Noise, Op, Scenario, draw
from support.simulation.shrinking import shrink

__all__ = [
    "REAL",
    "Absence",
    "Broken",
    "Fault",
    "Life",
    "Member",
    "Noise",
    "Op",
    "Parts",
    "Root",
    "Scenario",
    "draw",
    "fails",
    "shrink",
    "simulate",
]
