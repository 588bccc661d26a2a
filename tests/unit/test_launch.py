"""Which launcher, which rank, which transport: read once from the surroundings, and never taken by mistake."""

from __future__ import annotations

import logging
import sys
from typing import Any

import pytest

from logsync.coordinator.errors import ConfigError, LaunchError
from logsync.workers import connect
from logsync.workers.launch import Launched, choose_transport, launched, restart_count
from logsync.workers.transports.local import LocalTransport
from logsync.workers.transports.threads import ThreadWorld

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "77"}


def choose(transport: object = "auto", environ: dict[str, str] | None = None, **options: Any) -> Any:
    plain = {"timeout_s": 60.0, "warn_after_s": 60.0, "rank": None, "world_size": None, "process_group": None}
    return choose_transport(transport, environ=environ or {}, **{**plain, **options})


# Launchers


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        ({}, None),
        ({"PATH": "/bin", "LOCAL_RANK": "0", "MASTER_ADDR": "x"}, None),
        (TORCHRUN, Launched("torchrun", 3, 8)),
        (OPEN_MPI, Launched("Open MPI", 3, 8)),
        (SLURM, Launched("Slurm", 3, 8)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launched("torchrun", 0, 1)),
        ({"RANK": " 3 ", "WORLD_SIZE": "8\n"}, Launched("torchrun", 3, 8)),
        # torchrun started by srun or mpirun, once per node: the inner launcher knows
        ({**TORCHRUN, **SLURM, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, Launched("torchrun", 3, 8)),
        ({**TORCHRUN, **OPEN_MPI}, Launched("torchrun", 3, 8)),
        # shells inside an allocation, where nothing was launched
        ({"SLURM_JOB_ID": "77", "SLURM_NNODES": "1"}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1"}, None),
        ({"SLURM_JOB_ID": "77", "SLURM_PROCID": "0"}, None),
    ],
)
def test_a_launcher_is_known_by_its_variables(environ: dict[str, str], found: Launched | None) -> None:
    assert launched(environ) == found


@pytest.mark.parametrize(
    ("environ", "there", "missing", "start"),
    [
        ({"RANK": "3"}, "RANK=3", "WORLD_SIZE", "torchrun"),
        ({"WORLD_SIZE": "8"}, "WORLD_SIZE=8", "RANK", "torchrun"),
        ({"OMPI_COMM_WORLD_RANK": "3"}, "OMPI_COMM_WORLD_RANK=3", "OMPI_COMM_WORLD_SIZE", "mpirun"),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, "OMPI_COMM_WORLD_SIZE=8", "OMPI_COMM_WORLD_RANK", "mpirun"),
        ({"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8", "SLURM_PROCID", "srun"),
        ({"SLURM_PROCID": "3"}, "SLURM_PROCID=3", "SLURM_NTASKS", "srun"),
    ],
)
def test_half_of_a_launch_is_refused_with_what_is_missing_and_both_ways_out(
    environ: dict[str, str], there: str, missing: str, start: str
) -> None:
    with pytest.raises(LaunchError, match=f"^{there} is set, but {missing} is missing") as refused:
        launched(environ)

    assert f"with {start}" in str(refused.value)
    assert "transport='local'" in str(refused.value)


@pytest.mark.parametrize(
    ("rank", "size"), [("8", "8"), ("9", "8"), ("-1", "8"), ("0", "0"), ("x", "8"), ("3", "x"), ("1.5", "8"), ("", "")]
)
def test_variables_that_name_no_rank_of_a_world_are_refused_with_both(rank: str, size: str) -> None:
    for names in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("SLURM_PROCID", "SLURM_NTASKS"),
    ):
        with pytest.raises(LaunchError, match=f"{names[0]}='{rank}' and {names[1]}='{size}' do not name a rank"):
            launched(dict(zip(names, (rank, size), strict=True)))


@pytest.mark.parametrize(("text", "count"), [(None, 0), ("0", 0), ("3", 3), ("", 0), ("x", 0), ("-1", 0)])
def test_restarts_are_counted_by_torchrun(text: str | None, count: int) -> None:
    assert restart_count({} if text is None else {"TORCHELASTIC_RESTART_COUNT": text}) == count


# Transports


def test_alone_it_is_the_single_node_fallback_with_one_line_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="logsync")

    transport = choose("auto", {"RANK": "0", "WORLD_SIZE": "1"})

    assert isinstance(transport, LocalTransport)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "single-node fallback" in record.message
    assert "torch.distributed is not initialised" in record.message


@pytest.mark.parametrize("environ", [TORCHRUN, OPEN_MPI, SLURM])
def test_one_of_several_ranks_is_never_taken_for_a_lonely_one(
    environ: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(LaunchError, match=r"as rank 3 of 8, but torch\.distributed has no process group") as refused:
        choose("auto", environ)

    assert "init_process_group() before connect()" in str(refused.value)
    assert "transport='local'" in str(refused.value)
    assert not caplog.records


@pytest.mark.parametrize("environ", [TORCHRUN, {"RANK": "3"}, {"RANK": "x", "WORLD_SIZE": "y"}, SLURM])
def test_local_is_local_whatever_the_surroundings(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="logsync")

    for name in ("local", " Local\n"):
        assert choose(name, environ).name == "local"
    assert not caplog.records


def test_half_a_launch_stops_auto_too() -> None:
    with pytest.raises(LaunchError, match="WORLD_SIZE is missing"):
        choose("auto", {"RANK": "3"})


@pytest.mark.parametrize("options", [{}, {"process_group": object()}])
def test_collective_needs_a_process_group(options: dict[str, Any]) -> None:
    for transport in ("collective", "COLLECTIVE", *(["auto"] if options else [])):
        with pytest.raises(LaunchError, match=r"init_process_group\(\) before connect\(\)"):
            choose(transport, **options)


def test_a_process_group_and_local_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="process_group was given together with transport='local'"):
        choose("local", process_group=object())


@pytest.mark.parametrize("transport", ["", "gloo", "threads", None, 3, object(), LocalTransport])
def test_an_unknown_transport_is_refused_with_those_there_are(transport: object) -> None:
    with pytest.raises(ConfigError, match="must be 'auto', 'local', 'collective', 'ray' or a Transport, given"):
        choose(transport)


@pytest.mark.parametrize("transport", ["collective:ring", "local:tree", "auto:flat", "ray:tree"])
def test_an_option_that_a_transport_does_not_have_is_refused_with_those_there_are(transport: str) -> None:
    with pytest.raises(ConfigError, match=r"'collective:tree' and 'collective:flat'.*" + transport):
        choose(transport)


def test_a_transport_of_ones_own_is_used_as_it_is() -> None:
    transport = ThreadWorld(3).transports[2]

    assert choose(transport, TORCHRUN) is transport
    assert choose(transport, rank=2, world_size=3) is transport


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 1}, "rank=1 was given, but this process has rank 0 on transport 'local'"),
        ({"world_size": 2}, "world_size=2 was given, but this process has world_size 1 on transport 'local'"),
        ({"rank": 0, "world_size": 4}, "world_size=4 was given"),
        ({"rank": -1}, "rank=-1 was given"),
    ],
)
def test_a_rank_or_world_size_that_is_not_so_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose("local", **given)

    assert choose("local", rank=0, world_size=1).name == "local"


@pytest.mark.parametrize("options", [{"rank": 0, "world_size": 1}, {"lockstep": False}])
def test_where_ray_is_not_installed_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.delitem(sys.modules, "logsync.workers.transports.ray_actor", raising=False)
    monkeypatch.delattr("logsync.workers.transports.ray_actor", raising=False)
    monkeypatch.setitem(sys.modules, "ray", None)

    with pytest.raises(LaunchError, match=r"needs Ray, which is not installed: pip install 'logsync\[ray\]'"):
        connect(1, transport="ray", sinks=[], **options)
