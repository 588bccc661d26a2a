"""What W&B wrote to disk in offline mode."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from logsync.coordinator.sinks.wandb_files import records

__all__ = ["OfflineRun", "offline_runs"]


@dataclass
class OfflineRun:
    """One attempt of a run.

    Attributes:
        history: what each log() call gave.
        axes: the x-axis of each defined metric.
        config: the newest value of each entry.
    """

    path: Path
    id: str = ""
    project: str = ""
    name: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    axes: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Return the runs under `folder` in the order of their folders' names."""
    return [_read(path) for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.parent.name)]


def _read(path: Path) -> OfflineRun:
    found = OfflineRun(path)
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.id, found.project, found.name = record.run.run_id, record.run.project, record.run.display_name
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "metric":
            found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "history":
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.history.append({key: value for key, value in row.items() if not key.startswith("_")})
    return found
