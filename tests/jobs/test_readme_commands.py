"""The commands of the README's console blocks, as written; what they would start is recorded instead of started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args as torchrun_arguments

from support.torchrun import entries, torchrun

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The commands under "Look at a run" are run with what they print, in tests/cli.
BLOCKS = re.findall(
    r"^```console\n(.*?)^```",
    re.sub(r"^## Look at a run\n.*?(?=^## )", "", README, flags=re.MULTILINE | re.DOTALL),
    re.MULTILINE | re.DOTALL,
)
OURS = ("./scripts/demo", "./scripts/test")  # they run this test


def block(with_command: str) -> str:
    """Return the block of the README that has this command, without its prompts."""
    (found,) = [text for text in BLOCKS if re.search(rf"^\$ (\S+=\S+ )*{re.escape(with_command)}", text, re.MULTILINE)]
    return "".join(line.removeprefix("$ ") for line in found.splitlines(keepends=True))


def started(commands: str, folder: Path, *recorded: str) -> list[list[str]]:
    """Run commands in the checkout; return those of the tools `recorded` that they would start, with the arguments."""
    tools = folder / "tools"
    tools.mkdir()
    calls = folder / "calls"
    for name in recorded:
        tool = tools / name
        tool.write_text(
            f"#!{sys.executable} -I\nimport json, os, sys\n"
            "if sys.argv[1:2] and sys.argv[1].endswith('.py'):  # a launcher's own helper\n"
            "    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
            "if sys.argv[3:5] == ['job', 'status']:\n"
            "    sys.exit('no such job')\n"
            f"print(json.dumps([{name!r}, *sys.argv[1:]]), file=open({str(calls)!r}, 'a'))\n"
        )
        tool.chmod(0o755)
    done = subprocess.run(
        ["/usr/bin/env", "bash", "-euc", commands],
        cwd=ROOT,
        env={"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tools / "python"), "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in calls.read_text().splitlines()]


def test_every_block_of_commands_is_one_of_these() -> None:
    known = [*OURS, "pip wheel", "scripts/torchrun_node.sh", "docker compose", "torchrun"]

    for text in BLOCKS:
        first = re.sub(r"^\$ (\S+=\S+ )*", "", text)
        assert first.startswith(tuple(known)), text


@pytest.mark.parametrize("command", OURS)
def test_the_commands_for_a_fresh_machine_are_there_to_be_run(command: str) -> None:
    assert os.access(ROOT / command, os.X_OK)
    subprocess.run(["/usr/bin/env", "bash", "-n", str(ROOT / command)], check=True, timeout=30)
    assert sum(f"$ {command} " in text for text in BLOCKS) >= 1


def test_on_every_node_the_launchers_start_what_torchrun_slurm_and_ray_understand(tmp_path: Path) -> None:
    node, sbatch, ray = started(block("scripts/torchrun_node.sh"), tmp_path, "python", "sbatch")

    assert node[:3] == ["python", "-m", "torch.distributed.run"]
    understood = torchrun_arguments(node[3:])
    assert (understood.nnodes, understood.nproc_per_node, understood.training_script) == ("2", "8", "train.py")
    assert understood.training_script_args == ["--checkpoint", "/shared/run/checkpoint.pt"]
    assert sbatch[-2:] == ["scripts/slurm.sbatch", "train.py"]
    assert (ROOT / sbatch[-2]).is_file()
    assert ray[:5] == ["python", "-m", "ray.scripts.scripts", "job", "submit"]
    assert ray[ray.index("--") :] == ["--", "python", "train.py"]


def test_a_job_brings_logsync_to_a_cluster_as_the_wheel_that_was_built(tmp_path: Path) -> None:
    wheel, submit = started(block("pip wheel"), tmp_path, "pip", "ray")

    assert wheel == ["pip", "wheel", "--no-deps", "--wheel-dir", "dist", "."]
    (module,) = json.loads(submit[submit.index("--runtime-env-json") + 1])["py_modules"]
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert Path(module) == ROOT / "dist" / f"logsync-{version[1]}-py3-none-any.whl"
    assert (ROOT / submit[submit.index("--working-dir") + 1] / submit[-1]).is_file()


def test_compose_files_are_where_the_commands_look_and_answer_on_the_ports_that_they_name(tmp_path: Path) -> None:
    commands = block("docker compose")
    for call, port in zip(started(commands, tmp_path, "docker"), [6006, 5000, 6006], strict=True):
        services = (ROOT / call[call.index("-f") + 1]).read_text()

        assert re.search(rf"ports: .*:-{port}}}:{port}\b", services)
    assert [int(port) for port in re.findall(r"localhost:(\d+)", commands)] == [6006, 5000]


def test_the_command_for_restarts_trains_by_the_example(tmp_path: Path) -> None:
    ((name, *arguments),) = started(block("torchrun"), tmp_path, "torchrun")
    understood = torchrun_arguments(arguments)
    assert (name, understood.max_restarts, understood.training_script) == ("torchrun", 3, "train.py")
    script = tmp_path / "train.py"
    script.write_text(re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[0])

    job = torchrun(script, nproc=int(understood.nproc_per_node), folder=tmp_path)

    job.assert_clean()
    assert [entry["step"] for entry in entries(next(tmp_path.glob("runs/*")))] == [0, 50, 100, 150, 199]
