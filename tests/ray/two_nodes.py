"""Two nodes on one machine: the coordinator's is lost while a rank on the other one trains, and one on its own is not.

Run by test_two_nodes.py in a process of its own, since a process has one Ray.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from support.ray_jobs import check_file, coordinator, train
from support.ray_world import RankProcess


def main() -> None:
    run_dir = Path(sys.argv[1])
    folder = tempfile.mkdtemp(prefix="ls", dir="/tmp")
    Path("/tmp/ray").mkdir(exist_ok=True)  # where the cluster leaves its address  # noqa: S108
    memory = 80 * 2**20
    head = {"num_cpus": 2, "include_dashboard": False, "temp_dir": folder, "object_store_memory": memory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(num_cpus=2, object_store_memory=memory)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        nodes = [ray.get_runtime_context().get_node_id(), other.node_id]

        # One rank on every node.
        spread = [RankProcess.options(scheduling_strategy=on(node)).remote(rank, 2) for rank, node in enumerate(nodes)]
        found = ray.get([rank.call.remote(train, str(run_dir / "spread"), 60) for rank in spread], timeout=60)
        check_file(run_dir / "spread", found, 60)

        # Both ranks on the first node, the coordinator on the second, which is lost.
        ranks = [RankProcess.options(scheduling_strategy=on(nodes[0])).remote(rank, 2) for rank in range(2)]
        tasks = [rank.call.remote(train, str(run_dir / "lost"), 100, 0.02, "lost", 3, other.node_id) for rank in ranks]
        log = run_dir / "lost" / "metrics.jsonl"
        while not log.exists() or log.read_bytes().count(b"\n") < 3:
            assert not ray.wait(tasks, timeout=0.02)[0], "training ended, or failed, at once"
        where = ray.get(coordinator("lost").node.remote(), timeout=30)
        assert where == other.node_id, f"the coordinator is on node {where}, not on {other.node_id}"
        cluster.remove_node(other, allow_graceful=False)
        check_file(run_dir / "lost", ray.get(tasks, timeout=100), 100)
        assert ray.get(coordinator("lost").node.remote(), timeout=30) == nodes[0]
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print("whole", time.strftime("%H:%M:%S"), os.getpid())


def on(node: str) -> NodeAffinitySchedulingStrategy:
    return NodeAffinitySchedulingStrategy(node, soft=False)


if __name__ == "__main__":
    main()
