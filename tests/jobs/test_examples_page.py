"""The page of frameworks and recipes: every block runs as written, started by the page's own command for two nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support.pages import sections
from support.torchrun import Ran, entries, plain_python
from support.worlds import free_port

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "scripts" / "examples" / "README.md"
SCRIPT = Path(__file__).parent / "scripts" / "page.py"

pytestmark = pytest.mark.timeout(330)

# The steps that each section's run has in its log.
STEPS = {
    "plain": [0, 5, 10, 13],
    "trainer/logsync": [5, 10, 15, 20, 20],
    "lightning": [4, 9, 14, 14],
    "accelerate": [0, 5, 10, 14],
    "accumulation": [1, 3, 3],
    "pipeline": [0, 5, 10, 13],
    "fsdp": [0, 5, 10, 13],
    "uneven": [0, 4, 8, 100, 104, 108, 109],
    "evaluation": [1, 6, 11, 14, 19, 24, 28],
    "resume": [0, 4, 8, 11],
    "sink": [0, 5, 10],
}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> list[Ran]:
    folder = tmp_path_factory.mktemp("page")
    (command,) = re.findall(r"^\$ torchrun (.*) train\.py$", PAGE.read_text(), re.MULTILINE)
    command = command.replace("29511", str(free_port()))

    def start(node: int) -> Ran:
        options = shlex.split(command.replace("--node-rank 0", f"--node-rank {node}"))
        arguments = ("torch.distributed.run", *options, SCRIPT, PAGE, folder)
        environ = {"PYTHONPATH": f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"}
        return plain_python(Path("-m"), *arguments, folder=folder / f"node{node}", timeout_s=300, environ=environ)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, range(2)))


def run(nodes: list[Ran], name: str) -> list[dict[str, Any]]:
    return entries(nodes[0].folder.parent / "runs" / name)


def test_every_section_runs_to_its_end_on_every_rank(nodes: list[Ran]) -> None:
    titles = {title for title, _ in sections(PAGE)} - {""}
    for rank, node in enumerate(nodes):
        node.assert_clean()
        ended = json.loads((node.folder.parent / f"ended.rank{rank}.json").read_text())
        assert ended == dict.fromkeys(titles, "well")
    assert len(titles) >= 12


@pytest.mark.parametrize("name", STEPS)
def test_a_section_logs_at_the_steps_that_it_should(nodes: list[Ran], name: str) -> None:
    assert [entry["step"] for entry in run(nodes, name)] == STEPS[name]


def test_sections_log_what_they_say(nodes: list[Ran]) -> None:
    folder = nodes[0].folder.parent
    assert [entry["ranks"] for entry in run(nodes, "pipeline")] == [{"train/loss": 1}] * 4
    assert all(entry["train/grad_norm"] > 0 for entry in run(nodes, "fsdp")[:3])
    assert all(entry["train/lr"] == 1e-3 for entry in run(nodes, "accelerate")[:3])
    early = [entry["train/loss"] for entry in run(nodes, "early")]
    assert early[-1] < 1.0 <= min(early[:-1])
    assert [entry["attempt"] for entry in run(nodes, "resume")] == [0, 0, 1, 1]
    accuracies = [entry["eval/accuracy"] for entry in run(nodes, "evaluation") if "eval/accuracy" in entry]
    assert len(accuracies) == 2
    assert accuracies[1] > accuracies[0] > 0.2
    assert (folder / "best.pt").exists()
    newest = json.loads((folder / "runs" / "sink" / "newest.json").read_text())
    assert newest["step"] == 10


def test_the_links_of_the_page_lead_somewhere() -> None:
    text = PAGE.read_text()
    titles = {re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title, _ in sections(PAGE)} | {
        "several-nodes"
    }
    links = re.findall(r"\]\(([^)]+)\)", text)

    assert len(links) >= 15
    for link in links:
        path, _, anchor = link.partition("#")
        assert (PAGE.parent / path).exists(), link
        if not path:
            assert anchor in titles, link
