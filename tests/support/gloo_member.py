"""One process of a GlooWorld: play what is asked for on stdin, answer on stdout."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import traceback
from typing import Any

import torch.distributed as dist

from logsync.workers.testing import Member, play
from logsync.workers.transports.collective import CollectiveTransport


def main() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no member outlives the tests
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a scenario prints must not look like an answer
    dist.init_process_group("gloo")

    def make_transport(timeout_s: float) -> CollectiveTransport:
        return CollectiveTransport(timeout_s=timeout_s, shape=sys.argv[1])

    for line in sys.stdin:
        member = Member(dist.get_rank(), dist.get_world_size(), make_transport)
        answer: tuple[str, Any]
        try:
            answer = ("returned", play(line.strip(), member))
        except BaseException:  # noqa: BLE001 - told to the test
            answer = ("raised", traceback.format_exc())
        data = pickle.dumps(answer)
        answers.write(len(data).to_bytes(8, "little") + data)
        answers.flush()


if __name__ == "__main__":
    main()
