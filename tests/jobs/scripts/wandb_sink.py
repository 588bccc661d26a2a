"""What the tests of the W&B sink run in processes of their own: `wandb_sink.py SCENARIO FOLDER`."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from logsync.coordinator.sinks import trackers
from logsync.coordinator.sinks.wandb import WandbSink
from logsync.coordinator.sinks.wandb_files import history
from logsync.workers import connect
from support.sinks import entry, feed, run, wait_for


def offline(folder: Path) -> None:
    sink = WandbSink("digits")
    # As a sink lives: on one thread, which is not the main one.
    thread = threading.Thread(target=two_attempts, args=(sink, folder))
    thread.start()
    thread.join()

    feed(WandbSink, run(folder / "fractions", run_id="frac"), entry(0, step=0.5), entry(1, step=None), entry(2, step=2))
    feed(WandbSink, run(folder / "lacking", run_id="lack"), entry(0), entry(1))
    feed(WandbSink, run(folder / "lacking", 3, resumed=True, run_id="lack", last_entry=entry(2)), entry(3))
    os.environ["WANDB_MODE"] = "disabled"


def two_attempts(sink: WandbSink, folder: Path) -> None:
    first = folder / "plain"
    sink.open(run(first, run_id="abcd1234"))
    sink.hyperparams({"lr": 0.1, "optimizer": {"name": "adam"}})
    for seq in range(5):
        sink.write(entry(seq, {"loss": seq / 2, "nan": math.nan, "inf": math.inf}))
    sink.close()
    sink.open(run(first, 3, resumed=True, run_id="abcd1234", last_entry=entry(2)))
    for seq in (3, 4, 5, 6):  # at another pace: steps 30, 35, 40, 45 where 30 and 40 are there
        sink.write(entry(seq, {"loss": -1.0}, step=30 + 5 * (seq - 3)))
    sink.write(entry(7, {"eval": 1.0}, step=45))
    sink.hyperparams({"lr": 0.2})
    sink.close()


def killed(folder: Path) -> None:
    feed(WandbSink, run(folder, run_id="killed01"), *map(entry, range(1000)), close=False)
    # W&B's own process writes when it has gathered some.
    wait_for(lambda: sum(1 for _ in history(folder / "wandb", "killed01")) > 50)
    os.kill(os.getpid(), signal.SIGKILL)


def resumed(folder: Path) -> None:
    feed(WandbSink, run(folder, 50, resumed=True, run_id="killed01"), *map(entry, range(50, 1010)))


def disabled(folder: Path) -> None:
    feed(WandbSink, run(folder, run_id="gone"), entry(0))


def beside_the_users(folder: Path) -> None:
    import wandb  # noqa: PLC0415 - the others import it by the sink

    mine = wandb.init(mode="offline", id="mine", dir=folder)
    feed(WandbSink, run(folder, run_id="ours"), entry(0))
    mine.log({"x": 1})
    mine.finish()


def unconfigured(folder: Path) -> None:
    begun = time.monotonic()
    try:
        WandbSink().open(run(folder, run_id="none"))
    except Exception as error:  # noqa: BLE001 - the test looks at what it is
        print(f"{type(error).__name__}: {error}\nafter {time.monotonic() - begun:.0f} s")


def gaps(folder: Path) -> None:
    feed(WandbSink, run(folder, run_id="gaps"), entry(0), entry(1), entry(4))
    feed(WandbSink, run(folder, 1, resumed=True, run_id="gaps"), *map(entry, range(1, 4)))
    feed(WandbSink, run(folder, 1, resumed=True, run_id="gaps"), *map(entry, range(1, 6)))


def paces(folder: Path) -> None:
    feed(WandbSink, run(folder, run_id="paces"), *map(entry, range(5)))
    for end in (7, 8):
        again = (entry(seq, step=15 + 5 * seq) for seq in range(3, end))
        feed(WandbSink, run(folder, 3, resumed=True, run_id="paces"), *again)


def fails_to_open(folder: Path) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError

    real, trackers.LastLogged.missing_entry = trackers.LastLogged.missing_entry, fail  # type: ignore[assignment]
    sink = WandbSink()
    try:
        sink.open(run(folder, run_id="same"))
    except ConnectionError:
        trackers.LastLogged.missing_entry = real  # type: ignore[method-assign]
    sink.open(run(folder, run_id="same"))  # W&B refuses it while the first is open
    sink.write(entry(0))
    sink.close()


def closing(folder: Path) -> None:
    job(folder)
    (folder / "closed").write_text(str(time.time()))


def silent_job(folder: Path) -> None:
    command = [sys.executable, __file__, "closing", str(folder)]
    ran = subprocess.run(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True, timeout=90, check=True)
    print(ran.stdout, f"it went on for {time.time() - float((folder / 'closed').read_text()):.0f} s", sep="\n")


def job_of_ranks(folder: Path) -> None:
    import torch.distributed as dist  # noqa: PLC0415 - the others do without

    dist.init_process_group("gloo")
    job(folder)
    dist.destroy_process_group()


def job(folder: Path) -> None:
    with connect(1, sinks=["wandb", "jsonl"], run_dir=folder) as log:
        for step in range(3):
            log.record(loss=1.0)
            log.log_ready(step)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
