from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from logsync.workers.cli.app import command
from logsync.workers.cli.extras import MODULES
from support.command import logsync, surroundings

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
COMMANDS = ["show", "plot", "doctor"]


def project() -> dict[str, Any]:
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest needs the latter
    found: dict[str, Any] = toml.loads(PYPROJECT.read_text())["project"]
    return found


def test_help_names_every_command_and_the_exit_codes() -> None:
    shown = logsync("--help")

    assert shown.returncode == 0
    assert all(re.search(rf"^  {name} ", shown.stdout, re.MULTILINE) for name in COMMANDS)
    assert re.findall(r"^    ([012])  ", shown.stdout, re.MULTILINE) == ["0", "1", "2"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_options_exit_codes_and_examples_that_parse(name: str) -> None:
    shown = logsync(name, "--help").stdout
    examples = re.findall(rf"^ +(?:.* )?(?:logsync|logsync\.workers\.cli) {name}\b(.*)$", shown, re.MULTILINE)

    assert "--json" in shown
    assert "Exit codes:" in shown
    assert len(examples) >= 2
    for example in examples:
        command.commands[name].make_context(name, shlex.split(example))


@pytest.mark.parametrize(
    "arguments", [["show"], ["show", "x", "-n", "-1"], ["plot"], ["nonsense"], ["doctor", "--timeout", "soon"]]
)
def test_a_wrong_command_exits_with_2(arguments: list[str]) -> None:
    ran = logsync(*arguments)

    assert ran.returncode == 2
    assert ran.stdout == ""
    assert "Error: " in ran.stderr


def test_the_shell_is_told_how_to_complete() -> None:
    script = logsync(environ={"_LOGSYNC_COMPLETE": "bash_source"})
    offered = logsync(environ={"_LOGSYNC_COMPLETE": "bash_complete", "COMP_WORDS": "logsync ", "COMP_CWORD": "1"})

    assert "complete -o nosort -F _logsync_completion logsync" in script.stdout
    assert {line.partition(",")[2] for line in offered.stdout.splitlines()} == set(COMMANDS)


def test_the_installed_script_is_this_command() -> None:
    module, _, name = project()["scripts"]["logsync"].partition(":")

    assert getattr(importlib.import_module(module), name).__module__ == command.callback.__module__


def test_the_doctor_knows_every_extra_of_the_project() -> None:
    assert set(project()["optional-dependencies"]) - {"all", "demo", "dev"} <= set(MODULES)


def test_a_missing_plotting_library_is_one_line_that_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "sys.modules['plotly'] = None\n"  # as if it were not installed
        "sys.argv = ['logsync', 'plot', 'x']\n"
        "from logsync.workers.cli.app import main\n"
        "main()"
    )

    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=surroundings(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1
    assert "pip install 'logsync[plot]'" in ran.stderr


def test_looking_at_a_run_loads_neither_torch_nor_plotly(tmp_path: Path) -> None:
    script = (
        "import sys, logsync.workers.cli.show, logsync.workers.cli.page\n"
        "print({'torch', 'plotly', 'ray'} & set(sys.modules))"
    )

    ran = subprocess.run(
        [sys.executable, "-c", script],
        env=surroundings(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert ran.stdout == "set()\n"


def test_every_command_is_tested_here() -> None:
    assert isinstance(command, click.Group)
    assert list(command.commands) == COMMANDS
