"""A Ray cluster of a head and two nodes on this machine.

It prints its address. Each line on standard input, a random seed, kills the raylet of one node and adds another node.
"""

import random
import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 1 << 30
READY = "the cluster is at"


def main() -> None:
    """Run the cluster until standard input ends."""
    head = {"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    cluster.wait_for_nodes()
    print(f"{READY} {cluster.address}", flush=True)
    for line in sys.stdin:
        victim = nodes.pop(random.Random(line).randrange(len(nodes)))
        cluster.remove_node(victim, allow_graceful=False)
        nodes.append(cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES))
        print("killed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
