"""Entries as an MLflow run."""

from __future__ import annotations

import importlib
import logging
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from logsync.coordinator.errors import printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.trackers import Axis, LastLogged, Replay, flat, require
from logsync.coordinator.waits import flat_metrics

__all__ = ["MlflowSink"]

_logger = logging.getLogger(__name__)

_RUN_TAG = "logsync.run_id"
_LAST_TAG = "logsync.last_entry"
_ANSWER_S = 10
# MLflow's own limits.
_LONGEST_NAME = 250
_LONGEST_PARAM = 6000
_MOST_METRICS = 999  # in one request, beside a tag
_FORBIDDEN = re.compile(r"[^\w.\- :/]")


class MlflowSink:
    """One MLflow run for the job, at the tracking URI given, or MLflow's own choice (`MLFLOW_TRACKING_URI`).

    The run belongs to the experiment of `MLFLOW_EXPERIMENT_NAME` or `MLFLOW_EXPERIMENT_ID` (else "Default"). It is
    found again by its tag `logsync.run_id`, or is the one of `MLFLOW_RUN_ID`. An entry is one request; of more than
    999 metrics, some. `MLFLOW_ENABLE_ASYNC_LOGGING` is not followed, because it hides what fails. MLflow cannot take
    points back: what it holds already when a run resumes is not logged again, so no point is doubled.

    Names have "_" for what MLflow does not permit; where two would become one, the later gets a suffix. MLflow's steps
    are whole numbers: epochs with a fraction stand at millionths, an entry without a step where the one before it
    stands. A NaN stays one; MLflow's databases keep infinities as the largest float.

    A server that does not answer within 10 s (or `MLFLOW_HTTP_REQUEST_TIMEOUT`, if that is less) fails the entry: it is
    asked for a sign of life before each, because MLflow itself would go on trying for a quarter of an hour.
    """

    def __init__(self, tracking_uri: str | None = None) -> None:
        self._given_uri = tracking_uri
        self._mlflow: Any = None
        self._client: Any = None
        self._uri = ""
        self._run_id = ""
        self._replay: Replay | None = None
        self._held = LastLogged()
        self._axis = Axis()
        self._names = _Names()

    def load(self) -> None:
        """Import mlflow."""
        require("mlflow", "mlflow")
        self._mlflow = importlib.import_module("mlflow")
        importlib.import_module("mlflow.utils.rest_utils")

    def open(self, run: RunInfo) -> None:
        """Begin the run or continue it."""
        self.load()
        self._uri = self._given_uri or self._mlflow.get_tracking_uri()
        self._check_it_answers()
        client = self._new_client()
        found = _found_or_new(client, run)
        if found.info.status != "RUNNING":
            client.update_run(found.info.run_id, status="RUNNING")
        self._run_id = found.info.run_id
        self._held = held = _last_logged(found.data.tags.get(_LAST_TAG, "")) or LastLogged()
        self._axis = Axis(fractions=held.fractions)
        if held.step is not None:
            self._axis.place(held.seq, held.step)
        self._replay = Replay("MLflow", run, held)
        self._client = client
        missing = held.missing_entry(run)
        if missing is not None:
            self.write(missing)

    def hyperparams(self, values: Mapping[str, object]) -> None:
        """Log them as the run's parameters; MLflow never changes one that it has."""
        client = self._opened()
        self._check_it_answers()
        names = _Names()
        texts = flat(values)
        wanted = {name: str(texts[key])[:_LONGEST_PARAM] for key, name in names.of(texts).items()}
        held = client.get_run(self._run_id).data.params
        changed = sorted(name for name in wanted if held.get(name, wanted[name]) != wanted[name])
        if changed:
            _logger.warning(
                "MLflow keeps the old values of the hyperparameters that changed since the run began: %s",
                printable(", ".join(changed)),
            )
        new = [self._mlflow.entities.Param(name, text) for name, text in wanted.items() if name not in held]
        client.log_batch(self._run_id, params=new, synchronous=True)

    def write(self, entry: LogEntry) -> None:
        """Log the entry, unless the run holds it from before a resume."""
        client = self._opened()
        if self._replay is not None and self._replay.covers(entry):
            self._held = self._held.without(entry.seq)
            return
        self._check_it_answers()
        place = self._axis.place(entry.seq, entry.step)
        milliseconds = round(entry.time * 1000)
        values = flat_metrics(entry)
        metrics = [
            self._mlflow.entities.Metric(name, values[key], milliseconds, place)
            for key, name in self._names.of(values).items()
        ]
        held = self._held.and_then(entry.seq, entry.step, fractions=self._axis.fractions)
        tag = self._mlflow.entities.RunTag(_LAST_TAG, msgspec.json.encode(held).decode())
        # The tag says that the entry is there, so it comes with the last of its metrics; MLflow would send it first.
        # The same metrics sent twice are one to MLflow, so a retry doubles nothing.
        *others, last = _parts(metrics)
        try:
            for part in others:
                client.log_batch(self._run_id, metrics=part, synchronous=True)
            client.log_batch(self._run_id, metrics=last, tags=[tag], synchronous=True)
        except self._mlflow.MlflowException as error:
            cause = error.__cause__ or error.__context__
            # Not so a server that has refused this one again and again: it would keep all others waiting.
            if isinstance(cause, OSError) and type(cause).__name__ != "RetryError":
                msg = f"the MLflow server at {_without_password(self._uri)} went away: {type(cause).__name__}"
                raise ConnectionError(msg) from None  # as below
            raise
        self._held = held

    def close(self) -> None:
        """Mark the run as finished; a second call does nothing."""
        if self._client is not None:
            client, self._client = self._client, None
            self._check_it_answers()
            client.set_terminated(self._run_id)

    def _opened(self) -> Any:
        if self._client is None:
            msg = "write() on an MlflowSink that is not open"
            raise ValueError(msg)
        return self._client

    def _new_client(self) -> Any:
        try:
            return self._mlflow.MlflowClient(tracking_uri=self._uri)
        except Exception as error:
            msg = (
                f"MLflow cannot keep runs at {_without_password(self._uri)}. mlflow-skinny, which logsync[mlflow] "
                'installs, only speaks to servers: give the address of one, as "mlflow:http://..." or in '
                "MLFLOW_TRACKING_URI, or install the whole of mlflow"
            )
            raise RuntimeError(msg) from error

    def _check_it_answers(self) -> None:
        """Raise ConnectionError unless the server gives an answer, whichever, to one short question."""
        where = urlsplit(self._uri)
        if where.scheme not in {"http", "https"}:
            return
        timeout_s = min(_ANSWER_S, self._mlflow.environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get())
        credentials = importlib.import_module("mlflow.utils.credentials")
        try:
            self._mlflow.utils.rest_utils.http_request(
                credentials.get_default_host_creds(self._uri),
                "/health",
                "GET",
                max_retries=0,
                timeout=timeout_s,
                raise_on_status=False,
            )
        except Exception as error:  # noqa: BLE001 - whatever the client raises, the server is not there
            problem = type(error.__cause__ or error.__context__ or error).__name__
            msg = f"the MLflow server at {_without_password(self._uri)} did not answer within {timeout_s} s: {problem}"
            raise ConnectionError(msg) from None  # its text has the address with the password


def _without_password(uri: str) -> str:
    return printable(re.sub("//[^/]*@", "//", uri))


def _found_or_new(client: Any, run: RunInfo) -> Any:
    chosen = os.environ.get("MLFLOW_RUN_ID")
    if chosen:
        return client.get_run(chosen)
    experiment = _experiment(client)
    tags = {_RUN_TAG: run.run_id} if run.run_id else {}
    found = client.search_runs([experiment], f"tags.`{_RUN_TAG}` = '{run.run_id}'", max_results=1) if tags else []
    return found[0] if found else client.create_run(experiment, tags=tags, run_name=run.run_dir.name)


def _experiment(client: Any) -> str:
    number = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if number:
        return number
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "Default"
    found = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if found is None else found.experiment_id)


class _Names:
    """Metric names as MLflow permits them, one for one."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the name of each key; a key always has the same."""
        known = list(keys)
        # What needs no change comes first, so that it is not the one to give way.
        for key in sorted((key for key in known if key not in self._names), key=lambda key: _permitted(key) != key):
            name = _permitted(key)
            if name in self._taken:
                name = f"{name[: _LONGEST_NAME - 9]}-{zlib.crc32(key.encode()):08x}"
            self._names[key] = name
            self._taken.add(name)
        return {key: self._names[key] for key in known}


def _permitted(key: str) -> str:
    parts = _FORBIDDEN.sub("_", key).split("/")
    # MLflow takes a name for a path, and it must be the shortest one to its place.
    name = "/".join("__" if part == ".." else part for part in parts if part not in {"", "."})
    if len(name) > _LONGEST_NAME:
        name = f"{name[: _LONGEST_NAME - 9]}-{zlib.crc32(key.encode()):08x}"
    return name or "_"


def _parts(metrics: list[Any]) -> list[list[Any]]:
    """Return `metrics` as what one request takes each; at least one part, that may be empty."""
    return [metrics[start : start + _MOST_METRICS] for start in range(0, max(1, len(metrics)), _MOST_METRICS)]


def _last_logged(text: str) -> LastLogged | None:
    try:
        return msgspec.json.decode(text, type=LastLogged)
    except msgspec.DecodeError:
        return None
