"""What the launch scripts would start, and that the files of docker/ and scripts/ are sound; none of it is started."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
SHELL = sorted(
    path
    for folder in (SCRIPTS, ROOT / ".ci")
    for path in folder.iterdir()
    if path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"# shellcheck shell=bash"))
)


def ran(
    script: Path, *arguments: str, tools: Path | None = None, status: int = 0, environ: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return the environment and the command that a dry run shows; with another `status`, what the script complains."""
    # A bare environment: what this machine has set, Slurm's variables above all, is none of ours.
    path = os.pathsep.join([*([str(tools)] if tools else []), os.environ["PATH"]])
    done = subprocess.run(
        [str(script), *arguments],
        env={"PATH": path, "PYTHON": sys.executable, **(environ or {})},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == status, done.stderr
    if status:
        return {}, [done.stderr]
    words = shlex.split(done.stdout)
    start = next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word))
    return dict(word.split("=", 1) for word in words[:start]), words[start:]


def value_of(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


# -- torchrun_node.sh --------------------------------------------------------------------------------------------------

NODE = SCRIPTS / "torchrun_node.sh"


def test_a_node_meets_the_others_by_c10d_and_passes_the_scripts_arguments_on_as_they_are() -> None:
    options = ("--nnodes", "2", "--nproc-per-node=4", "--rdzv-endpoint", "192.0.2.7", "--rdzv-id", "run 7")

    environ, command = ran(NODE, "--dry-run", *options, "train.py", "--dry-run", "two words", "$HOME")

    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert value_of(command, "--nnodes") == "2"
    assert value_of(command, "--nproc-per-node") == "4"
    assert value_of(command, "--rdzv-backend") == "c10d"
    assert value_of(command, "--rdzv-endpoint") == "192.0.2.7:29400"
    assert value_of(command, "--rdzv-id") == "run 7"
    assert value_of(command, "--max-restarts") == "3"
    assert command[command.index("--") :] == ["--", "train.py", "--dry-run", "two words", "$HOME"]
    assert environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environ["OMP_NUM_THREADS"]) >= 1


def test_ranks_meet_on_the_interface_that_leads_to_the_rendezvous() -> None:
    # The loopback interface leads to nobody else, also where this machine's own name stands for it.
    for host in ("192.0.2.7", socket.gethostname(), "127.0.1.1"):
        environ, command = ran(NODE, "--dry-run", "--nnodes", "2", "--rdzv-endpoint", host, "train.py")
        interface = environ.get("GLOO_SOCKET_IFNAME")
        if interface is None:  # this machine has no network
            assert "--local-addr" not in command
            continue
        assert interface != "lo"
        assert interface in [name for _, name in socket.if_nameindex()]
        with socket.socket() as listener:
            listener.bind((value_of(command, "--local-addr"), 0))  # one of ours


def test_what_is_set_already_stays() -> None:
    given = {"GLOO_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "7", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}

    environ, _ = ran(NODE, "--dry-run", "--nnodes", "2", "--rdzv-endpoint", "192.0.2.7:1234", "train.py", environ=given)

    assert not environ.keys() & given.keys()


def test_a_node_alone_meets_itself_on_the_loopback_interface() -> None:
    environ, command = ran(NODE, "--dry-run", "train.py")

    assert environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert value_of(command, "--local-addr") == "127.0.0.1"
    assert value_of(command, "--rdzv-endpoint") == "localhost:29400"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no script was given"),
        (["--nnodes", "2", "train.py"], "--nnodes 2 needs --rdzv-endpoint"),
        (["--nnodes", "1:4", "train.py"], "--nnodes 1:4 needs --rdzv-endpoint"),
        (["--nnodes", "two", "train.py"], "--nnodes takes a number or MIN:MAX, given two"),
        (["--nproc-per-node", "0", "train.py"], "--nproc-per-node takes a number, given 0"),
        (["--max-restarts=-1", "train.py"], "--max-restarts takes a number, given -1"),
        (["--join-timeout", "1.5", "train.py"], "--join-timeout takes whole seconds, given 1.5"),
        (["--rdzv-backend", "etcd", "train.py"], "unknown option --rdzv-backend"),
        (["--nnodes"], "--nnodes needs a value"),
    ],
)
def test_a_wrong_command_is_refused_with_the_reason(arguments: list[str], said: str) -> None:
    _, (complaint,) = ran(NODE, *arguments, status=2)

    assert complaint == f"torchrun_node.sh: {said}; see --help\n"


# -- slurm.sbatch ------------------------------------------------------------------------------------------------------

SBATCH = SCRIPTS / "slurm.sbatch"


def test_a_slurm_job_starts_one_task_a_node_that_meet_on_the_first_node(tmp_path: Path) -> None:
    tool(tmp_path / "bin", "scontrol", '[ "$*" = "show hostnames gpu[3-5]" ] && printf "gpu%s\\n" 3 4 5')
    job = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "gpu[3-5]", "SLURM_JOB_NUM_NODES": "3"}
    size = {"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_PER_TASK": "64", "SLURM_SUBMIT_DIR": str(ROOT)}

    _, command = ran(SBATCH, "--dry-run", "train.py", "--lr", "1 e", tools=tmp_path / "bin", environ={**job, **size})

    assert command[0] == "srun"
    assert "--cpus-per-task=64" in command
    assert value_of(command, "--nnodes") == "3"
    assert value_of(command, "--nproc-per-node") == "8"
    assert value_of(command, "--rdzv-endpoint") == "gpu3:29745"
    assert value_of(command, "--rdzv-id") == "12345"
    assert command[-3:] == ["train.py", "--lr", "1 e"]
    # What each task starts is a command that the other script takes.
    _, node = ran(SCRIPTS.parent / command[command.index("--nnodes") - 1], "--dry-run", *command[-11:])
    assert value_of(node, "--rdzv-endpoint") == "gpu3:29745"
    assert node[-3:] == ["train.py", "--lr", "1 e"]


def test_a_slurm_jobs_options_are_one_task_a_node() -> None:
    options = re.findall(r"^#SBATCH (.*)$", SBATCH.read_text(), re.MULTILINE)

    assert "--ntasks-per-node=1" in options
    # Slurm reads none that stand after the first command.
    assert max(map(SBATCH.read_text().rindex, options)) < SBATCH.read_text().index("set -euo pipefail")


def test_without_slurm_the_dry_run_shows_how_the_digits_would_be_trained() -> None:
    _, command = ran(SBATCH, "--dry-run")

    assert value_of(command, "--nnodes") == "2"
    assert value_of(command, "--nproc-per-node") == "1"
    assert value_of(command, "scripts/train_digits.py") == "--run-dir"
    assert value_of(command, "--run-dir") == "runs/slurm-0"


# -- ray_submit.sh -----------------------------------------------------------------------------------------------------

SUBMIT = SCRIPTS / "ray_submit.sh"


def test_a_job_is_submitted_to_the_dashboard_with_its_command_as_it_is(tmp_path: Path) -> None:
    options = ("--address=https://head:8265", "--working-dir", str(tmp_path), "--submission-id", "digits-7")

    _, command = ran(SUBMIT, "--dry-run", *options, "--", "python", "train.py", "--dry-run", "two words", "$HOME")

    assert command[:5] == [sys.executable, "-m", "ray.scripts.scripts", "job", "submit"]
    assert value_of(command, "--address") == "https://head:8265"
    assert value_of(command, "--working-dir") == str(tmp_path)
    assert value_of(command, "--submission-id") == "digits-7"
    assert "--runtime-env-json" not in command
    assert command[command.index("--") :] == ["--", "python", "train.py", "--dry-run", "two words", "$HOME"]


def test_a_wheel_travels_with_the_job(tmp_path: Path) -> None:
    wheel = tmp_path / 'log"sync.whl'
    wheel.touch()

    _, command = ran(SUBMIT, "--dry-run", "--wheel", str(wheel), "--", "python", "train.py")

    assert json.loads(value_of(command, "--runtime-env-json")) == {"py_modules": [str(wheel)]}


def test_the_dashboard_is_this_machines_unless_ray_is_told_otherwise() -> None:
    _, command = ran(SUBMIT, "--dry-run", "--", "python", "train.py")
    assert value_of(command, "--address") == "http://127.0.0.1:8265"

    environ = {"RAY_API_SERVER_ADDRESS": "http://head:8265"}
    _, command = ran(SUBMIT, "--dry-run", "--", "python", "train.py", environ=environ)
    assert value_of(command, "--address") == "http://head:8265"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no command was given"),
        (["--"], "no command was given"),
        (["python", "train.py"], "the job's command stands after --, given python"),
        (["--address", "head:6379", "--", "true"], "--address takes the dashboard's URL, given head:6379"),
        (["--working-dir", "/nowhere", "--", "true"], "--working-dir /nowhere is no folder"),
        (["--wheel", "/nowhere.whl", "--", "true"], "--wheel /nowhere.whl is no file"),
        (["--runtime-env", "x", "--", "true"], "unknown option --runtime-env"),
    ],
)
def test_a_wrong_submission_is_refused_with_the_reason(arguments: list[str], said: str) -> None:
    _, (complaint,) = ran(SUBMIT, *arguments, status=2)

    assert complaint == f"ray_submit.sh: {said}; see --help\n"


# -- check_containers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("docker", "said"),
    [
        (None, "SKIPPED, nothing was checked: there is no docker command here\n"),
        (
            "echo Trying >&2; echo no daemon >&2; exit 1",
            "SKIPPED, nothing was checked: docker finds no engine that answers: no daemon\n",
        ),
        (
            '[ "$1" = info ] || { echo compose is not a docker command >&2; exit 1; }',
            "SKIPPED, nothing was checked: docker has no compose plugin: compose is not a docker command\n",
        ),
    ],
    ids=["no docker", "no engine", "no compose"],
)
def test_without_an_engine_the_containers_check_says_that_it_was_skipped(
    tmp_path: Path, docker: str | None, said: str
) -> None:
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    if docker:
        tool(tmp_path, "docker", docker)

    done = subprocess.run(
        [str(SCRIPTS / "check_containers")],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )

    assert (done.returncode, done.stdout) == (0, said), done.stderr


# -- the files ---------------------------------------------------------------------------------------------------------


def linted(linter: str, *arguments: object) -> str:
    """Return what a linter that pip has installed beside this Python says."""
    command = [str(Path(sys.executable).with_name(linter)), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("script", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(script: Path) -> None:
    assert linted("shellcheck", "--external-sources", "--source-path", "SCRIPTDIR", script) == ""


def test_hadolint_finds_nothing() -> None:
    assert linted("hadolint", ROOT / "docker" / "Dockerfile") == ""


def test_the_image_is_built_with_a_folder_for_every_package_before_there_is_code(tmp_path: Path) -> None:
    (made,) = [line for line in (ROOT / "docker" / "Dockerfile").read_text().splitlines() if "mkdir -p" in line]
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = made.strip().removeprefix("&& ").removesuffix("\\")
    subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, check=True, timeout=30)

    packages = {
        path.parent.relative_to(ROOT) for top in ("coordinator", "workers") for path in (ROOT / top).rglob("*.py")
    }
    assert {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_dir()} == packages
