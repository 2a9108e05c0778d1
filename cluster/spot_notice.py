"""Drain this node once AWS announces that it reclaims the spot instance, so that Ray Train's workers save their state.

python spot_notice.py --address HEAD:6379

Asks the instance metadata service (IMDSv2) every 5 s, as AWS recommends; the notice comes two minutes ahead. Source:
docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html. Instances that are not spot have no
notice. Ray 2.60 drains a node by the hidden command `ray drain-node` only; if it fails, it is tried again.
"""

import argparse
import datetime
import json
import logging
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import ray

ENDPOINT = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://169.254.169.254").rstrip("/")
INTERVAL_S = 5.0
TIMEOUT_S = 2.0
logger = logging.getLogger("spot_notice")


def main() -> None:
    """Wait for the notice, then drain the node."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--address", required=True, help="host:port of the head's Ray")
    address = parser.parse_args().address
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    ray.init(address=address, log_to_driver=False)
    node_id = ray.get_runtime_context().get_node_id()
    ray.shutdown()
    logger.info("waiting for a notice about node %s", node_id)
    while not drain_if_announced(address, node_id):
        time.sleep(INTERVAL_S)


def drain_if_announced(address: str, node_id: str) -> bool:
    """Return whether a notice was there and Ray drains the node."""
    try:
        notice = read_notice()
    except (OSError, ValueError, KeyError, TypeError):  # the service is not reachable now, or the response is no notice
        logger.debug("no notice could be read", exc_info=True)
        return False
    if notice is None:
        return False
    action, deadline = notice
    left_s = max(0, int((deadline - datetime.datetime.now(datetime.UTC)).total_seconds()))
    logger.info("AWS will %s this instance in %d s", action, left_s)
    command = [str(Path(sys.executable).with_name("ray")), "drain-node", "--address", address, "--node-id", node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"spot instance: {action}"]
    done = subprocess.run([*command, "--deadline-remaining-seconds", str(left_s)], check=False)
    return done.returncode == 0


def read_notice() -> tuple[str, datetime.datetime] | None:
    """Read what AWS will do and when; None if there is no notice."""
    headers = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = request("PUT", "/latest/api/token", headers)
    try:
        content = request("GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token.decode()})
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise
    notice = json.loads(content)
    return str(notice["action"]), datetime.datetime.fromisoformat(notice["time"])


def request(method: str, path: str, headers: dict[str, str]) -> bytes:
    """Send a request to the metadata service."""
    with urllib.request.urlopen(
        urllib.request.Request(ENDPOINT + path, method=method, headers=headers), timeout=TIMEOUT_S
    ) as response:
        content: bytes = response.read()
    return content


if __name__ == "__main__":
    main()
