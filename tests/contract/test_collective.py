from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from logsync.workers.transports.setup_error import setup_error
from support.torchrun import Ran, torchrun


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("collective")
    tests = Path(__file__).parents[1]
    return torchrun(
        Path(__file__).with_name("collective_job.py"),
        folder,
        nproc=3,
        folder=folder,
        timeout_s=100,
        environ={
            "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}",
            "RES_OPTIONS": "timeout:1 attempts:1",  # as in GlooWorld
        },
    )


def results(job: Ran, name: str) -> list[Any]:
    return [job.result(rank)[name] for rank in range(3)]


def test_the_job_ends_cleanly(job: Ran) -> None:
    job.assert_clean()


def test_a_round_is_two_collectives_of_our_own_group_the_second_torchs_broadcast(job: Ran) -> None:
    for result in results(job, "broadcasts"):
        # Logs at 0, 10, 20 and 30, and one round more in the first interval. The hello has the numbers 1 and 2.
        assert result["rounds"] == 5
        assert result["broadcasts"] == [
            [False, "logsync", "torch.uint8", 0, 2 + 2 * number + 1] for number in range(result["rounds"])
        ]


def test_no_collective_of_ours_is_on_the_default_group(job: Ran) -> None:
    assert [result["on_default"] for result in results(job, "broadcasts")] == [0, 0, 0]


def test_a_process_group_gives_a_log_to_some_ranks_also_where_they_are_in_different_numbers_of_groups(job: Ran) -> None:
    assert results(job, "some_ranks") == [None, [0, 2, True, {"who": 3.0}], [1, 2, False, {"who": 3.0}]]


def test_on_a_tree_a_rank_is_connected_to_its_node_and_a_nodes_first_rank_to_those_of_others(job: Ran) -> None:
    assert [opened["flat"] for opened in results(job, "connections")] == [2, 2, 2]
    assert [opened["tree"] for opened in results(job, "connections")] == [2, 1, 1]


def test_ranks_that_connect_by_different_ways_are_told_at_once_and_can_connect_again(job: Ran) -> None:
    for ranks, text, ready in results(job, "ways"):
        assert (ranks, ready) == ([2], True)
        assert "'flat' on rank 2, 'tree' on rank 0" in text


def test_file_descriptors_do_not_grow_with_rounds_or_with_closed_logs(job: Ran) -> None:
    for counts in results(job, "files"):
        assert len(set(counts[1:])) == 1, counts


def test_a_forked_child_is_refused_and_its_parent_goes_on(job: Ran) -> None:
    assert results(job, "fork") == [[7, True]] * 3


def test_handlers_of_sigterm_and_sigint_run_while_a_rank_waits_in_a_round(job: Ran) -> None:
    assert results(job, "signals") == [True, True, True]


def test_a_rank_that_is_interrupted_in_a_round_tells_the_others(job: Ran) -> None:
    root, interrupted, other = results(job, "interrupted")

    assert interrupted == ["KeyboardInterrupt", [], ""]
    for kind, ranks, text in (root, other):
        assert (kind, ranks) == ("PeerFailed", [1]), text
        assert "KeyboardInterrupt" in text


def test_a_process_group_destroyed_before_close_still_gives_a_whole_last_entry(job: Ran) -> None:
    root, *others = results(job, "destroyed")

    assert root == [[0, {"x": 3.0}, False], [10, {"x": 30.0}, False], [14, {"x": 12.0}, False]]
    assert others == [[], []]


def test_importing_the_contract_loads_neither_torch_nor_pytest() -> None:
    script = (
        "import sys, logsync.workers.testing; print(sorted({'torch', 'numpy', 'pytest', 'ray'} & set(sys.modules)))"
    )

    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=60)

    assert ran.stdout.strip() == "[]"


def test_a_restarted_job_that_cannot_build_its_group_is_told_of_the_addresses_of_its_predecessors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cure = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

    def said(restarts: str, own_store: str | None) -> str:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        monkeypatch.delenv(cure, raising=False)
        if own_store is not None:
            monkeypatch.setenv(cure, own_store)
        return str(setup_error(RuntimeError("Connection refused"), 3.0))

    assert f"{cure}=1" in said("1", None)
    assert f"{cure}=1" in said("2", "0")
    assert cure not in said("2", "1")
    assert cure not in said("0", None)
