"""What Prometheus scrapes."""

from __future__ import annotations

import math
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client.parser import text_string_to_metric_families

from logsync.coordinator.errors import ConfigError
from logsync.coordinator.sinks.prometheus import PrometheusSink
from support.sinks import entry, run

Samples = dict[tuple[str, str], float]


@contextmanager
def serving(address: str = "127.0.0.1:0", name: str = "unused") -> Iterator[PrometheusSink]:
    sink = PrometheusSink(address)
    sink.open(run(Path(name), 3, resumed=True, run_id="ab12"))
    try:
        yield sink
    finally:
        sink.close()


def scraped(port: int, host: str = "127.0.0.1") -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def samples(text: str) -> dict[str, dict[str, float]]:
    """Values by sample name and the label `name`."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            assert sample.labels["log"] == "train"
            found.setdefault(sample.name, {})[sample.labels.get("name", "")] = sample.value
    return found


def test_a_scrape_has_every_metrics_newest_value_under_its_own_name() -> None:
    with serving() as sink:
        sink.write(entry(3, {"train/loss": 0.5, 'a "b"\n\\{}': 1.0}))
        sink.write(entry(4, {"train/loss": 0.25, "eval/acc": 1 / 3}))

        found = samples(scraped(sink.port))

    assert found["logsync_metric"] == {"train/loss": 0.25, 'a "b"\n\\{}': 1.0, "eval/acc": 1 / 3}
    assert found["logsync_step"] == {"": 40.0}
    assert found["logsync_seq"] == {"": 4.0}
    assert found["logsync_entry_time_seconds"] == {"": 1004.0}


def test_what_is_not_finite_stays_so_and_no_step_is_nan() -> None:
    with serving() as sink:
        sink.write(entry(3, {"a": math.nan, "b": math.inf, "c": -math.inf}, step=None))
        found = samples(scraped(sink.port))

    assert math.isnan(found["logsync_metric"]["a"])
    assert found["logsync_metric"]["b"] == math.inf
    assert found["logsync_metric"]["c"] == -math.inf
    assert math.isnan(found["logsync_step"][""])


def test_a_resumed_run_starts_with_no_value_and_says_which_run_it_is() -> None:
    with serving(name="runs/x") as sink:
        text = scraped(sink.port)

    (info,) = [line for line in text.splitlines() if line.startswith("logsync_run_info{")]
    assert info == 'logsync_run_info{attempt="1",log="train",run_dir="runs/x",run_id="ab12",world_size="2"} 1.0'
    assert "logsync_metric{" not in text


def test_the_scripts_own_registry_is_neither_shown_nor_added_to() -> None:
    before = set(prometheus_client.REGISTRY._names_to_collectors)
    with serving() as sink:
        sink.write(entry(3))
        text = scraped(sink.port)

    assert set(prometheus_client.REGISTRY._names_to_collectors) == before
    assert "python_info" in before
    assert "python_info" not in text


def test_close_frees_the_port_and_leaves_no_thread() -> None:
    before = threading.active_count()
    with serving() as sink:
        port = sink.port
        scraped(port)
    sink.close()

    with pytest.raises(urllib.error.URLError):
        scraped(port)
    with serving(f"127.0.0.1:{port}") as again:
        assert again.port == port
    assert threading.active_count() == before


@pytest.mark.timeout(60)
def test_close_frees_the_port_although_a_forked_child_lives() -> None:
    with serving() as sink:
        port = sink.port
        ended, end = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(end)
            os.read(ended, 1)
            os._exit(0)
        os.close(ended)
    try:
        with pytest.raises(urllib.error.URLError):
            scraped(port)
        with serving(f"127.0.0.1:{port}") as again:
            assert "logsync_run_info" in scraped(again.port)
    finally:
        os.close(end)
        os.waitpid(child, 0)


def test_a_port_that_is_taken_is_an_error_that_names_it() -> None:
    with serving() as sink, pytest.raises(OSError, match=rf"port {sink.port} of 127.0.0.1 is in use"):
        PrometheusSink(f"127.0.0.1:{sink.port}").open(run(Path("unused")))


def test_by_default_other_hosts_can_reach_it_and_with_an_address_only_that_is_served() -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]

    with serving(str(port)):
        assert "logsync_run_info" in scraped(port, "127.0.0.2")
    with serving(f"127.0.0.1:{port}"), pytest.raises(urllib.error.URLError):
        scraped(port, "127.0.0.2")


@pytest.mark.parametrize("address", ["http", "65536", "-1", "1.5", "localhost", "localhost:", "9464:x", "٣"])
def test_what_is_no_port_is_refused_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match="takes a port"):
        PrometheusSink(address)


def test_write_needs_an_open() -> None:
    with pytest.raises(ValueError, match="not open"):
        PrometheusSink("0").write(entry(0))
