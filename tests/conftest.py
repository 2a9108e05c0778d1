"""What tests share: one Ray and one S3 server for the session, tiny images, a model that is predicted by hand."""

import atexit
import contextlib
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import numpy as np
import psutil
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from benchmarks.faults.inputs import CLASSES, IMG_SIZE, encoded, save_red_blue
from benchmarks.faults.processes import free_port, wait_for_port
from benchmarks.faults.proxy import FaultProxy
from catsdogs.config import TrainConfig
from catsdogs.progress import Message

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
REAL_BUCKET = os.environ.get("CATSDOGS_TEST_BUCKET", "")  # of MinIO, Ceph or AWS, through the AWS variables set


def pytest_configure() -> None:
    """Set what every process of the tests inherits, Ray's workers too; before Ray is imported, which reads it."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        if not (REAL_BUCKET and name.startswith("AWS_")):
            del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="catsdogs-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "auth_token").write_text("a-token-of-the-tests-" + "0" * 43)
    (home / "auth_token").chmod(0o600)
    moto = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(home / "absent"),
        "AWS_SHARED_CREDENTIALS_FILE": str(home / "absent"),
    }
    os.environ |= ({} if REAL_BUCKET else moto) | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "auth_token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "TORCH_HOME": str(home / "torch"),
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str | None]:
    """Serve S3 over HTTP on loopback; None where CATSDOGS_TEST_BUCKET names a bucket of a real store."""
    if REAL_BUCKET:
        yield None
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="session")
def s3_proxy_if_any(s3_server: str | None) -> Iterator[FaultProxy | None]:
    """Stand before the store with a proxy that can inject faults; None where the store is a real one."""
    if s3_server is None:
        yield None
        return
    with FaultProxy(s3_server) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        yield proxy


@pytest.fixture(scope="session")
def s3_endpoint(s3_proxy_if_any: FaultProxy | None) -> str | None:
    """Name the endpoint that the code under test talks to: the store, behind a proxy that can inject faults."""
    return s3_proxy_if_any.endpoint if s3_proxy_if_any else os.environ.get("AWS_ENDPOINT_URL_S3")


@pytest.fixture
def s3_proxy(s3_proxy_if_any: FaultProxy | None) -> Iterator[FaultProxy]:
    """Inject faults between the code under test and the store for one test."""
    if s3_proxy_if_any is None:
        pytest.skip("the store is a real one")
    s3_proxy_if_any.reset()
    yield s3_proxy_if_any
    s3_proxy_if_any.reset()


@pytest.fixture
def bucket(s3_server: str | None, s3_endpoint: str | None) -> Iterator[str]:
    """Name a bucket for one test, or a prefix of a real one; `s3://{bucket}/...` is read through the endpoint."""
    client = boto3.client("s3", endpoint_url=s3_server)
    name, prefix = REAL_BUCKET or f"bucket-{time.monotonic_ns()}", f"test-{time.time_ns()}" if REAL_BUCKET else ""
    if not REAL_BUCKET:
        client.create_bucket(Bucket=name)
    yield f"{name}/{prefix}".rstrip("/")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name, Prefix=prefix):
        if keys := [{"Key": item["Key"]} for item in page.get("Contents", ())]:
            client.delete_objects(Bucket=name, Delete={"Objects": keys})
    if not REAL_BUCKET:
        client.delete_bucket(Bucket=name)
    client.close()


@pytest.fixture
def put(bucket: str, s3_server: str | None) -> Iterator:
    """Put objects into the test's bucket: put(key, content)."""
    client = boto3.client("s3", endpoint_url=s3_server)
    name, _, prefix = bucket.partition("/")
    yield lambda key, content: client.put_object(Bucket=name, Key=f"{prefix}/{key}".lstrip("/"), Body=content)
    client.close()


@pytest.fixture(scope="session")
def ray_head(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Start one Ray head of two CPUs with token authentication; commands and jobs join it."""
    ports = [free_port() for _ in range(5)]
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("w")
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=2",
        "--num-gpus=0",
        "--disable-usage-stats",
    ]
    command += [
        f"--temp-dir={Path(os.environ['RAY_AUTH_TOKEN_PATH']).parent / 'ray'}"
    ]  # a socket's path is 107 bytes at most
    command += [
        f"--port={ports[0]}",
        f"--dashboard-port={ports[1]}",
        "--dashboard-host=127.0.0.1",
        "--node-ip-address=127.0.0.1",
    ]
    # Ray's own defaults for these are fixed, and another Ray of this machine may hold them.
    command += [f"--dashboard-agent-listen-port={ports[2]}", f"--dashboard-agent-grpc-port={ports[3]}"]
    command += [f"--metrics-export-port={ports[4]}"]
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path})
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{ports[0]}"
    try:
        wait_for_port(ports[1], head)
        yield SimpleNamespace(pid=head.pid, dashboard=f"http://127.0.0.1:{ports[1]}")
    finally:
        _leave_ray()
        del os.environ["RAY_ADDRESS"]
        for process in [
            *psutil.Process(head.pid).children(recursive=True),
            head,
        ]:  # `ray start` takes 30 s to end itself
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)
        log.close()


@pytest.fixture(scope="session")
def ray_cluster(ray_head: SimpleNamespace) -> str:
    """Name the address of the dashboard of the session's Ray."""
    return ray_head.dashboard


def _leave_ray() -> None:
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


@pytest.fixture
def run_command(ray_cluster: str):
    """Run `catsdogs` as a user does, in a process of its own that joins the session's Ray."""

    def run(*arguments: object, timeout: float = 300, **options: object) -> subprocess.CompletedProcess:
        command = [BIN / "catsdogs", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, **options)

    return run


def solid(color: tuple[int, int, int], size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Draw one colour, with a little noise that depends on the colour alone."""
    rng = np.random.default_rng(color)
    pixels = np.full((size[1], size[0], 3), color, dtype=np.int16) + rng.integers(-6, 7, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    """Write an image into bytes."""
    return encoded(image, kind, quality=92)


def red_or_blue(label: str, i: int) -> bytes:
    """Draw the i-th picture of a class of `CLASSES`."""
    strong, weak = 150 + i * 7 % 90, 10 + i * 13 % 60
    return encode(solid((strong, 20, weak) if label == "red" else (weak, 20, strong)))


@pytest.fixture(scope="session")
def red_blue_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw train/ and validation/ with the classes blue and red: 13 + 7 images a class."""
    root = tmp_path_factory.mktemp("labelled")
    for folder, start, count in (("train", 0, 13), ("validation", 100, 7)):
        for label in CLASSES:
            (root / folder / label).mkdir(parents=True)
            for i in range(count):
                (root / folder / label / f"{i:02}.jpg").write_bytes(red_or_blue(label, start + i))
    return root


@pytest.fixture(scope="session")
def red_blue_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a ResNet50 whose logits grow with an image's blue and red."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_red_blue(folder, slope=2.0)
    return folder


@pytest.fixture(scope="session")
def finished_run(ray_cluster: str, red_blue_root: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Train two epochs of all layers without a break: its config, folder, events and result."""
    from catsdogs.train import train  # not above: it imports Ray, which reads the environment that is set here

    folder = tmp_path_factory.mktemp("finished")
    config = TrainConfig(
        data_dir=str(red_blue_root),
        storage_path=str(folder),
        name="run",
        weights="none",
        epochs=2,
        batch_size=8,
        img_size=IMG_SIZE,
        precision="fp32",
        seed=3,
    )
    events: list = []
    result = train(config, events.append)
    return SimpleNamespace(config=config, folder=folder / "run", events=events, result=result)


def read_summary(run: Path) -> list[dict[str, str]]:
    """Read the lines of a run's summary.csv."""
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def lines_of(events: list) -> list[str]:
    """Take the lines from what a command told."""
    return [event.text for event in events if isinstance(event, Message)]


def killing_at(beginning: str, head_pid: int) -> tuple[list, Callable[[object], None]]:
    """Collect a run's events, and kill one of its workers at the first line that begins so."""
    events: list = []

    def tell(event: object) -> None:
        first = not any(line.startswith(beginning) for line in lines_of(events))
        events.append(event)
        if first and any(line.startswith(beginning) for line in lines_of([event])):
            kill_training_worker(head_pid)

    return events, tell


def kill_training_worker(head_pid: int) -> None:
    """Kill a worker of Ray Train's on the session's Ray."""
    for process in psutil.Process(head_pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("RayTrainWorker" in word for word in process.cmdline()):
                process.kill()
                return
    raise AssertionError("no training worker to kill")
