"""The newest values as Prometheus gauges, on a port to be scraped."""

from __future__ import annotations

import contextlib
import errno
import importlib
import socket
from typing import Any

from logsync.coordinator.errors import ConfigError, printable
from logsync.coordinator.messages import LogEntry
from logsync.coordinator.sinks.base import RunInfo
from logsync.coordinator.sinks.trackers import require
from logsync.coordinator.waits import flat_metrics

__all__ = ["PrometheusSink"]

_PORT = 9464  # the one that OpenTelemetry's exporters use
_LAST_PORT = 65535
_EVERYWHERE = "0.0.0.0"  # noqa: S104 - Prometheus runs on another host, and every exporter is reached like this


class PrometheusSink:
    """Serve the newest entry's values at `http://<rank 0's host>:9464/metrics`, or at the port or HOST:PORT given.

        logsync_metric{log="train", name="train/loss"}      every metric's newest value, under its own name
        logsync_step{log="train"}, logsync_seq{log="train"} where the log stands; the step is NaN where there is none
        logsync_entry_time_seconds{log="train"}             when the newest entry was made, to alert on a job that hangs
        logsync_run_info{log, run_dir, run_id, attempt, world_size}     always 1

    It listens on every interface, because Prometheus usually runs elsewhere; anyone who reaches the host can read the
    values. Give `127.0.0.1:9464` to keep them on this host, and port 0 for any free one (`port` says which). It has
    a registry of its own, so what the training script registers with prometheus_client is neither shown nor disturbed.
    """

    def __init__(self, address: str = "") -> None:
        self._host, self._port = _parsed(address)
        self._server: Any = None
        self._thread: Any = None
        self._log = ""
        self._gauges: dict[str, Any] = {}

    @property
    def port(self) -> int:
        """The port it serves on; 0 while it does not."""
        return 0 if self._server is None else int(self._server.server_port)

    def load(self) -> None:
        """Import prometheus_client."""
        require("prometheus_client", "prometheus")
        importlib.import_module("prometheus_client")

    def open(self, run: RunInfo) -> None:
        """Begin to serve."""
        self.load()
        client = importlib.import_module("prometheus_client")
        registry = client.CollectorRegistry()

        def gauge(name: str, text: str, *labels: str) -> Any:
            return client.Gauge(f"logsync_{name}", text, ["log", *labels], registry=registry)

        gauges = {
            "metric": gauge("metric", "Newest merged value of a metric", "name"),
            "step": gauge("step", "Step of the newest entry"),
            "seq": gauge("seq", "Number of the newest entry"),
            "time": gauge("entry_time_seconds", "Unix time of the newest entry"),
            "info": gauge("run_info", "The run", "run_dir", "run_id", "attempt", "world_size"),
        }
        gauges["info"].labels(run.name, run.run_dir, run.run_id, run.attempt, run.world_size).set(1)
        try:
            self._server, self._thread = client.start_http_server(self._port, addr=self._host, registry=registry)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            msg = (
                f"port {self._port} of {self._host} is in use, by another job or another log of this one; give each "
                'its own, such as "prometheus:9465"'
            )
            raise OSError(error.errno, msg) from error
        self._log, self._gauges = run.name, gauges

    def write(self, entry: LogEntry) -> None:
        """Show this entry's values; metrics that it lacks keep their last."""
        if self._server is None:
            msg = "write() on a PrometheusSink that is not open"
            raise ValueError(msg)
        for key, value in flat_metrics(entry).items():
            self._gauges["metric"].labels(self._log, key).set(value)
        self._gauges["step"].labels(self._log).set(float("nan") if entry.step is None else entry.step)
        self._gauges["seq"].labels(self._log).set(entry.seq)
        self._gauges["time"].labels(self._log).set(entry.time)

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        if self._server is None:
            return
        server, self._server = self._server, None
        server.shutdown()
        # Also for children that were forked meanwhile: they have the socket too, and closing ours would not free it.
        with contextlib.suppress(OSError):
            server.socket.shutdown(socket.SHUT_RDWR)
        server.server_close()
        self._thread.join()


def _parsed(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # an IPv6 address
    if not address:
        return _EVERYWHERE, _PORT
    if not (port.isascii() and port.isdecimal()) or int(port) > _LAST_PORT:
        given = printable(repr(address), 100)
        msg = f'the sink "prometheus" takes a port (0 to {_LAST_PORT}) or HOST:PORT; given {given}'
        raise ConfigError(msg)
    return host or _EVERYWHERE, int(port)
