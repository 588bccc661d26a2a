from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TIMEOUT_S = 170


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 10)
def test_a_log_has_a_rank_on_every_node_and_outlives_the_node_of_its_coordinator(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    surroundings = {
        **os.environ,
        "PYTHONPATH": f"{tests}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    script = Path(__file__).with_name("two_nodes.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=surroundings,
    )

    assert "whole" in ran.stdout, ran.stdout + ran.stderr
