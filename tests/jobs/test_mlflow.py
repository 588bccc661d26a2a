"""The MLflow sink, against a real server on loopback that keeps its runs in SQLite; read back over HTTP."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from logsync.coordinator.errors import Step
from logsync.coordinator.host import Host
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.isolation import SinkSet
from logsync.coordinator.sinks.mlflow import MlflowSink
from logsync.workers import connect
from support.sinks import entry, feed, lanes, run, wait_for
from support.torchrun import entries

_START_S = 90


@dataclass(frozen=True)
class Server:
    uri: str
    group: int

    def ask(self, path: str, body: Mapping[str, object] | None = None, **query: str) -> dict[str, Any]:
        url = f"{self.uri}/api/2.0/mlflow/{path}?{urllib.parse.urlencode(query)}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 - our server
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
            found: dict[str, Any] = json.load(answer)
        return found

    def runs(self, run_id: str, experiment: str = "0") -> list[dict[str, Any]]:
        query = {"experiment_ids": [experiment], "filter": f"tags.`logsync.run_id` = '{run_id}'"}
        found: list[dict[str, Any]] = self.ask("runs/search", query).get("runs", [])
        return found

    def points(self, run_id: str, key: str) -> list[tuple[int, float]]:
        """A metric's steps and values in the order of steps, of the only run that has `run_id`."""
        (found,) = self.runs(run_id)
        history = self.ask("metrics/get-history", run_id=found["info"]["run_id"], metric_key=key).get("metrics", [])
        return sorted((int(point["step"]), float(point["value"])) for point in history)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        os.killpg(self.group, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self.group, signal.SIGCONT)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("mlflow")
    with closing(socket.create_server(("127.0.0.1", 0))) as probe:
        port = probe.getsockname()[1]
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--no-serve-artifacts"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--default-artifact-root", str(folder)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    try:
        wait_for_health(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield Server(f"http://127.0.0.1:{port}", process.pid)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for_health(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(url, timeout=1):  # noqa: S310 - our server
                return
        except OSError:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.05)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture
def log(server: Server, tmp_path: Path) -> Logging:
    return Logging(server, tmp_path)


@dataclass
class Logging:
    """One log's starts, each with a sink of its own as in a process of its own."""

    server: Server
    folder: Path

    @property
    def run_id(self) -> str:
        return f"id-{self.folder.name}"

    def start(self, *entries: LogEntry, next_seq: int = 0, resumed: bool = False, close: bool = True) -> MlflowSink:
        last = entry(next_seq - 1) if next_seq else None
        info = run(self.folder, next_seq, resumed=resumed, run_id=self.run_id, last_entry=last)
        sink = feed(lambda: MlflowSink(self.server.uri), info, *entries, close=close)
        assert isinstance(sink, MlflowSink)
        return sink

    def points(self, key: str) -> list[tuple[int, float]]:
        return self.server.points(self.run_id, key)


def test_points_stand_at_the_entries_steps_and_times_and_the_run_ends_finished(log: Logging) -> None:
    log.start(entry(0), entry(1, {"loss": 0.25, "eval/acc": 1 / 3}))

    (found,) = log.server.runs(log.run_id)
    history = log.server.ask("metrics/get-history", run_id=found["info"]["run_id"], metric_key="loss")["metrics"]
    assert [(m["value"], int(m["step"]), int(m["timestamp"])) for m in history] == [
        (0.0, 0, 1000_000),
        (0.25, 10, 1001_000),
    ]
    assert log.points("eval/acc") == [(10, 1 / 3)]
    assert found["info"]["status"] == "FINISHED"
    assert found["info"]["run_name"] == log.folder.name


def test_a_nan_stays_one_and_infinities_are_the_largest_floats(log: Logging) -> None:
    log.start(entry(0, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}))

    assert math.isnan(log.points("a")[0][1])
    assert log.points("b") == [(0, sys.float_info.max)]
    assert log.points("c") == [(0, -sys.float_info.max)]
    assert log.points("d") == [(0, 1.0)]


@pytest.mark.parametrize(
    ("steps", "places"), [([0, 1.5, 2], [0, 1_500_000, 2_000_000]), ([None, None], [0, 1]), ([7, None], [7, 7])]
)
def test_epochs_stand_at_millionths_and_no_step_stands_where_the_last_one_was(
    log: Logging, steps: list[Step], places: list[int]
) -> None:
    log.start(*(entry(seq, {"x": seq}, step=step) for seq, step in enumerate(steps)))

    assert [step for step, _ in log.points("x")] == places


def test_every_name_arrives_even_where_two_would_become_one(log: Logging) -> None:
    odd = [
        "acc@5",
        "acc_5",
        "acc#5",
        "/lead",
        "a//b",
        "a/./b",
        "a/../b",
        "..",
        "é ü",
        "n" * 300,
        "n" * 301,
        "",
        "x:y z.w-",
    ]
    log.start(entry(0, {key: float(n) for n, key in enumerate(odd)}), entry(1, {"acc#5": 2.5}))

    (found,) = log.server.runs(log.run_id)
    values = {metric["key"]: metric["value"] for metric in found["data"]["metrics"]}
    assert sorted(values.values()) == [0.0, 1.0, 2.5, *map(float, range(3, len(odd)))]
    assert values["acc_5"] == 1.0
    assert values["x:y z.w-"] == len(odd) - 1
    assert {"lead", "a/b", "a/__/b", "é ü"} <= set(values)


def test_an_entry_with_more_metrics_than_a_request_takes_arrives_whole(log: Logging) -> None:
    log.start(entry(0, {f"m{n}": float(n) for n in range(1100)}))

    (found,) = log.server.runs(log.run_id)
    assert sorted(metric["value"] for metric in found["data"]["metrics"]) == [float(n) for n in range(1100)]


def test_an_entry_that_is_sent_in_parts_counts_as_stored_only_when_all_are_there(
    log: Logging, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"m{n}": float(n) for n in range(1100)}
    sink = log.start(entry(0, many), close=False)
    send, requests = sink._client.log_batch, []

    def killed_at_the_second(run_id: str, metrics: list[Any], tags: object = (), **options: object) -> None:
        requests.append(len(metrics))
        if len(requests) == 2:
            raise KeyboardInterrupt
        send(run_id, metrics, tags=tags, **options)

    monkeypatch.setattr(sink._client, "log_batch", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        sink.write(entry(1, many))
    assert requests == [999, 101]

    log.start(entry(1, many), entry(2, many), next_seq=1, resumed=True)
    assert [step for step, _ in log.points("m0")] == [0, 10, 20]
    assert [step for step, _ in log.points("m1099")] == [0, 10, 20]


def test_a_failure_is_seen_although_the_environment_asks_for_logging_in_the_background(
    log: Logging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    sink = log.start(entry(0), close=False)
    (found,) = log.server.runs(log.run_id)
    log.server.ask("runs/delete", {"run_id": found["info"]["run_id"]})

    with pytest.raises(Exception, match="must be in the 'active' state"):
        sink.write(entry(1))


def test_hyperparameters_are_parameters_and_the_first_value_stays(
    log: Logging, caplog: pytest.LogCaptureFixture
) -> None:
    many = {f"p{n}": n for n in range(150)}
    for lr in (0.1, 0.2):
        sink = log.start(close=False, resumed=lr == 0.2)
        sink.hyperparams({"lr": lr, "optimizer": {"name": "adam"}, **many, "text": "x" * 7000})
        sink.close()

    (found,) = log.server.runs(log.run_id)
    params = {param["key"]: param["value"] for param in found["data"]["params"]}
    assert params == {"lr": "0.1", "optimizer/name": "adam", **{k: str(v) for k, v in many.items()}, "text": "x" * 6000}
    assert next(message for message in caplog.messages if "keeps the old values" in message).endswith(": lr")


# Resume


@pytest.mark.parametrize("killed", [False, True])
def test_a_resumed_job_continues_its_run_and_doubles_no_step(log: Logging, *, killed: bool) -> None:
    log.start(*map(entry, range(5)), close=not killed)

    sink = log.start(
        *(entry(seq, {"loss": -1.0}, time=9.0) for seq in range(3, 7)), next_seq=3, resumed=True, close=False
    )
    (found,) = log.server.runs(log.run_id)
    assert found["info"]["status"] == "RUNNING"
    sink.close()

    assert log.points("loss") == [(0, 0.0), (10, 0.5), (20, 1.0), (30, 1.5), (40, 2.0), (50, -1.0), (60, -1.0)]


def test_what_an_attempt_lost_is_logged_by_the_next(log: Logging) -> None:
    log.start(entry(0), entry(1), entry(4), close=False)

    log.start(*map(entry, range(1, 4)), next_seq=1, resumed=True, close=False)
    log.start(*(entry(seq, {"loss": -1.0}, time=9.0) for seq in range(1, 6)), next_seq=1, resumed=True)

    assert log.points("loss") == [(0, 0.0), (10, 0.5), (20, 1.0), (30, 1.5), (40, 2.0), (50, -1.0)]


def test_the_checkpoints_entry_that_a_kill_kept_from_the_run_is_added(log: Logging) -> None:
    log.start(entry(0), entry(1), close=False)

    log.start(entry(3), next_seq=3, resumed=True)

    assert log.points("loss") == [(0, 0.0), (10, 0.5), (20, 1.0), (30, 1.5)]


def test_a_server_that_goes_away_in_the_middle_of_a_request_is_an_error_that_passes(
    log: Logging, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = log.start(entry(0), close=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    # Healthy when it is asked, and stopped right after it.
    monkeypatch.setattr(sink, "_check_it_answers", lambda: None)

    with log.server.stopped(), pytest.raises(ConnectionError, match="went away"):
        sink.write(entry(1))
    sink.write(entry(1))

    assert log.points("loss") == [(0, 0.0), (10, 0.5)]


def test_a_resume_at_another_pace_doubles_no_step(log: Logging) -> None:
    log.start(entry(0, step=0), entry(1, step=0.5), entry(2, step=1), close=False)

    log.start(*(entry(seq, step=seq / 4) for seq in range(2, 6)), entry(6, step=2), next_seq=2, resumed=True)

    assert [step for step, _ in log.points("loss")] == [0, 500_000, 1_000_000, 1_250_000, 2_000_000]


def test_fractions_are_remembered_over_a_resume(log: Logging) -> None:
    log.start(entry(0, step=0.5), entry(1, step=1))

    log.start(entry(2, step=2), entry(3, step=None), next_seq=2, resumed=True)

    assert [step for step, _ in log.points("loss")] == [500_000, 1_000_000, 2_000_000, 2_000_000]


def test_an_entry_that_is_sent_twice_is_one(log: Logging) -> None:
    log.start(entry(0), entry(1), entry(1))

    assert log.points("loss") == [(0, 0.0), (10, 0.5)]


# Whose run it is


def test_the_experiment_is_the_environments(log: Logging, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "digits")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", log.server.uri)
    for resumed in (False, True):
        feed(MlflowSink, run(log.folder, resumed=resumed, run_id=log.run_id), entry(0))

    experiment = log.server.ask("experiments/get-by-name", experiment_name="digits")["experiment"]["experiment_id"]
    assert len(log.server.runs(log.run_id, experiment)) == 1


def test_a_run_that_the_environment_names_is_used(log: Logging, monkeypatch: pytest.MonkeyPatch) -> None:
    made = log.server.ask("runs/create", {"experiment_id": "0"})["run"]["info"]["run_id"]
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    log.start(entry(0))

    assert log.server.runs(log.run_id) == []
    assert log.server.ask("runs/get", run_id=made)["run"]["data"]["metrics"][0]["key"] == "loss"


# A server that is not there


def test_a_server_that_is_stopped_fails_an_entry_within_a_bound_and_takes_it_afterwards(
    log: Logging, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = log.start(entry(0), close=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")

    with log.server.stopped():
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match=r"MLflow server at http://127.0.0.1:\d+ did not answer within 1 s"):
            sink.write(entry(1))
        with pytest.raises(ConnectionError):
            sink.close()
        assert time.monotonic() - begun < 30
    sink.open(run(log.folder, 1, resumed=True, run_id=log.run_id))
    sink.write(entry(1))
    sink.close()

    assert log.points("loss") == [(0, 0.0), (10, 0.5)]


def test_a_thousand_logs_beside_a_server_that_stops_are_all_in_the_file_and_what_it_lacks_is_counted(
    log: Logging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    job = connect(1, run_dir=log.folder, sinks=["jsonl", f"mlflow:{log.server.uri}"])
    assert isinstance(job._host, Host)
    sinks, run_id = job._host._sinks, job._host.coordinator.run_id

    def go_on(steps: range) -> None:
        for step in steps:
            job.record(loss=float(step))
            assert job.log_ready(step)

    go_on(range(20))
    job._host.release()
    assert sinks.flush(60)
    with log.server.stopped():
        go_on(range(20, 1000))
        begun = time.monotonic()
        job.close()
        assert time.monotonic() - begun < 20  # 10 s is the bound; the rest is for a machine that is busy
        wait_for(lambda: not lanes(sinks))

    assert [entry["loss"] for entry in entries(log.folder)] == [float(step) for step in range(1000)]
    assert log.server.points(run_id, "loss") == [(step, float(step)) for step in range(20)]
    assert sinks.lost == {f"mlflow:{log.server.uri}": 980}


def test_a_server_that_never_answers_or_is_not_there_is_an_error_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(ConnectionError, match=f"at http://127.0.0.1:{port} did not answer within 1 s"):
            MlflowSink(f"http://me:secret@127.0.0.1:{port}").open(run(tmp_path))

    sinks = SinkSet([f"mlflow:http://me:secret@127.0.0.1:{port}", "jsonl"])
    sinks.prepare(run(tmp_path))
    sinks.write(entry(0))
    sinks.close()

    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    assert f"the MLflow server at http://127.0.0.1:{port} did not answer" in caplog.text
    assert "secret" not in caplog.text


def test_where_mlflow_can_keep_nothing_the_error_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot keep runs at nowhere://host/x\. .* MLFLOW_TRACKING_URI"):
        MlflowSink("nowhere://me:secret@host/x").open(run(tmp_path))


def test_the_environment_is_not_changed(log: Logging) -> None:
    before = dict(os.environ)
    log.start(entry(0))

    assert dict(os.environ) == before


def test_write_needs_an_open_and_close_may_come_at_any_time() -> None:
    sink = MlflowSink("http://127.0.0.1:1")
    sink.close()
    with pytest.raises(ValueError, match="not open"):
        sink.write(entry(0))
