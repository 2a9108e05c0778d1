"""An S3 server on loopback, behind the fault proxy."""

import subprocess
import sys
from pathlib import Path
from typing import Self

import boto3

from benchmarks.faults.processes import free_port, wait_for_port
from benchmarks.faults.proxy import FaultProxy

BUCKET = "rig"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Store:
    """moto's server in a process of its own; `environment` points a command at the proxy."""

    def __init__(self, images: Path) -> None:
        self._images = images

    def __enter__(self) -> Self:
        """Start the server and the proxy, and upload the images under `in/`."""
        port = free_port()
        command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        upstream = f"http://127.0.0.1:{port}"
        self.client = boto3.client(
            "s3",
            endpoint_url=upstream,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
        )
        wait_for_port(port, self._process)
        self.client.create_bucket(Bucket=BUCKET)
        for path in sorted(path for path in self._images.rglob("*") if path.is_file()):
            self.client.put_object(Bucket=BUCKET, Key=f"in/{path.relative_to(self._images)}", Body=path.read_bytes())
        self.proxy = FaultProxy(upstream).__enter__()
        self.environment = CREDENTIALS | {"AWS_ENDPOINT_URL_S3": self.proxy.endpoint}
        return self

    def __exit__(self, *_: object) -> None:
        """Stop both."""
        self.proxy.__exit__()
        self._process.terminate()
        self._process.wait()

    def read(self, prefix: str) -> dict[str, bytes]:
        """Read every object under a prefix, past the proxy; by key without the prefix."""
        return {
            key[len(prefix) + 1 :]: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
            for key in self._list_keys(f"{prefix}/")
        }

    def clear(self, prefix: str) -> None:
        """Remove every object under a prefix."""
        for key in self._list_keys(f"{prefix}/"):
            self.client.delete_object(Bucket=BUCKET, Key=key)

    def _list_keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]
