"""What the README shows of the command line is what it says; numbers, times and bars are each run's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from support.command import logsync
from support.torchrun import plain_python, torchrun

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("## Look at a run\n")[2].partition("\n## ")[0]

pytestmark = pytest.mark.timeout(180)


def example(command: str) -> list[str]:
    """The lines that the README shows under `command`, bare of what differs between runs."""
    (shown,) = re.findall(rf"^```console\n\$ [^\n]*{command}[^\n]*\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    return bare(shown)


def bare(text: str) -> list[str]:
    text = re.sub("[▁▂▃▄▅▆▇█]+", "~", re.sub(r"[0-9]+[0-9.:e-]*( (min|s))*", "N", text))
    return [" ".join(line.split()) for line in text.splitlines() if line.strip() and not set(line) <= set(" ─")]


def test_show_looks_as_in_the_readme(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0])
    plain_python(script, folder=tmp_path).assert_clean()
    (run,) = (tmp_path / "runs").iterdir()

    shown = logsync("show", Path("runs") / run.name, folder=tmp_path)

    assert bare(shown.stdout) == example("logsync show")


def test_doctor_looks_as_in_the_readme(tmp_path: Path) -> None:
    arguments = ("logsync.workers.cli", "doctor", "--no-extras")
    environ = {"COLUMNS": "100", "PYTHONIOENCODING": "utf-8", "GLOO_SOCKET_IFNAME": "lo"}

    ran = torchrun(Path("-m"), *arguments, nproc=2, folder=tmp_path, timeout_s=120, environ=environ)

    ran.assert_clean()
    assert [line for line in example("doctor") if line not in bare(ran.output)] == []


def test_completion_and_the_codes_of_the_readme_are_those_of_the_help() -> None:
    shown = logsync("--help").stdout
    (completion,) = re.findall(r"`(eval [^`]+)`", SECTION)

    assert completion in shown
    assert set(re.findall(r"\b[0-2] if|with 0", SECTION)) == {"with 0", "1 if", "2 if"}
