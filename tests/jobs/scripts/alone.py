"""A script that knows nothing of torch.distributed; torch is not even imported."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from logsync.workers import connect


def main() -> None:
    logging.basicConfig(level=logging.INFO)
    folder = Path(sys.argv[1])
    with connect(10, run_dir=folder, sinks=["jsonl"]) as log:
        for step in range(25):
            log.record(loss=step)
            log.log_ready(step)
        outcome = {"transport": log.transport, "torch": "torch" in sys.modules}
    (folder / "result.rank0.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
