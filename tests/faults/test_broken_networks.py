from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from support.fault_world import JobMaker, drawn

SLOW = pytest.mark.slow

pytestmark = pytest.mark.timeout(100)


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=SLOW)])
def test_when_the_connections_of_a_rank_are_reset_all_fail_and_nobody_is_blamed_for_it_but_that_rank(
    job: JobMaker, victim: int
) -> None:
    this = job(timeout=2)
    this.deed(victim, "reset", drawn("reset").randint(3, 30))
    this.start()

    for failure in this.failures(range(3), this.fault_at(victim)).values():
        assert failure["type"] in {"PeerLost", "CoordinatorLost", "RoundTimeout"}
        assert set(failure["ranks"]) <= {victim}, failure
    assert this.release() == {0: 0, 1: 0, 2: 0}
    this.assert_logged_every_step()


class Switch:
    """Network namespaces on one bridge, each with an interface and an address of its own.

    The bridge is in a namespace, too: in the machine's own a firewall, as container engines set one up, would filter
    what it passes on.
    """

    def __init__(self, size: int) -> None:
        self.name = f"ls{os.getpid() % 10**7}"
        self.address = "10.213.7.1"
        self.size = size

    def plug(self) -> str:
        """Build it; returns why it cannot be built."""
        try:
            self._ip(f"netns add {self.name}")
            # With an address of its own: it would take that of a port, whose frames then came through in any case.
            self._ip(f"-n {self.name} link add bridge address 02:00:00:00:00:01 type bridge")
            self._ip(f"-n {self.name} link set bridge up")
            self._ip(f"link add {self.name} type veth peer name here netns {self.name}")
            self._ip(f"-n {self.name} link set here master bridge up")
            self._ip(f"addr add {self.address}/24 dev {self.name}")
            self._ip(f"link set {self.name} up")
            for rank in range(self.size):
                space = self.space(rank)
                self._ip(f"netns add {space}")
                self._ip(f"-n {self.name} link add port{rank} type veth peer name eth0 netns {space}")
                self._ip(f"-n {self.name} link set port{rank} master bridge up")
                self._ip(f"-n {space} addr add 10.213.7.{rank + 10}/24 dev eth0")
                self._ip(f"-n {space} link set lo up")
                self._ip(f"-n {space} link set eth0 up")
        except subprocess.CalledProcessError as error:
            return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
        return ""

    def cut(self, rank: int) -> None:
        """Let nothing of a rank come through any more, without a word to either side."""
        self._ip(f"-n {self.name} link set port{rank} nomaster")

    def heal(self, rank: int) -> None:
        """Let everything through again."""
        self._ip(f"-n {self.name} link set port{rank} master bridge")

    def remove(self) -> None:
        """Take down what was built."""
        for rank in range(self.size):
            self._ip(f"netns del {self.space(rank)}", check=False)
        self._ip(f"link del {self.name}", check=False)
        self._ip(f"netns del {self.name}", check=False)

    def space(self, rank: int) -> str:
        """Return the name of a rank's namespace."""
        return f"{self.name}n{rank}"

    def _ip(self, arguments: str, *, check: bool = True) -> None:
        command = ["ip", *arguments.split()]
        subprocess.run(command, check=check, capture_output=True, text=True, timeout=10)


@pytest.fixture
def switch() -> Iterator[Switch]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the command `ip`")
    made = Switch(3)
    try:
        if problem := made.plug():
            pytest.skip(f"cannot build a network of namespaces: {problem}")
        yield made
    finally:
        made.remove()


@pytest.mark.parametrize(
    ("victim", "error", "nodes"),
    [
        (2, "RoundTimeout", []),
        pytest.param(0, "CoordinatorLost", [], marks=SLOW),
        pytest.param(1, "RoundTimeout", [1, 2], marks=SLOW),  # the first rank of its node
        pytest.param(2, "RoundTimeout", [1, 2], marks=SLOW),  # behind it
    ],
)
def test_a_rank_whose_network_is_cut_off_is_named_by_all_others_and_does_not_hang_itself(
    switch: Switch, job: JobMaker, victim: int, error: str, nodes: list[int]
) -> None:
    this = job(network=(switch.address, [(switch.space(rank), "eth0") for rank in range(3)]), nodes=nodes)
    this.deed(victim, "wait", drawn("cut").randint(3, 30))
    this.start()
    this.wait(victim, "fault")
    switch.cut(victim)
    this.allow(victim)

    this.assert_others_say(error, victim)
    alone = this.failures([victim], this.fault_at(victim))[victim]
    assert alone["type"] in {"RoundTimeout", "CoordinatorLost"}
    assert victim not in alone["ranks"]
    switch.heal(victim)  # too late: what comes through now must not hold up anybody's end
    assert this.release() == {0: 0, 1: 0, 2: 0}
    this.assert_logged_every_step()


@pytest.mark.parametrize("victim", [2, pytest.param(0, marks=SLOW)])
def test_a_partition_that_heals_before_the_timeout_costs_nothing_but_time(
    switch: Switch, job: JobMaker, victim: int
) -> None:
    this = job(timeout=40, steps=60, network=(switch.address, [(switch.space(rank), "eth0") for rank in range(3)]))
    this.deed(victim, "wait", drawn("healed").randint(3, 50))
    this.start()
    this.wait(victim, "fault")
    switch.cut(victim)
    this.allow(victim)
    lowest = 1 if victim == 0 else 0
    this.wait_for_warning(lowest, f"has waited 2 s for rank {victim}: ")
    switch.heal(victim)

    # Segments that were lost are sent again after a pause that has doubled each time.
    for rank in range(3):
        assert this.wait(rank, "done", "failed", within_s=40)["event"] == "done"
    assert this.release() == {0: 0, 1: 0, 2: 0}
    assert [(entry["seq"], entry["step"]) for entry in this.entries()] == [(step, step) for step in range(60)]
