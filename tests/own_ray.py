"""Starts a Ray of its own as a command does, decodes and runs a dataset; prints what it observed as JSON.

With the argument `deleted`, it deletes the current folder first.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

from catsdogs.start import import_while_ray_starts, on_existing_cluster, stop_ray


def terminate(*_):
    """Handle SIGTERM."""


signal.signal(signal.SIGTERM, terminate)
if "deleted" in sys.argv:
    shutil.rmtree(os.getcwd())
data = import_while_ray_starts("catsdogs.data")

import ray.data  # noqa: E402 as commands do: Ray starts first
import ray.util  # noqa: E402


class Successor:
    """Add one to each row, in an actor."""

    def __call__(self, rows):
        return {"id": rows["id"] + 1}


def list_commands_with_torch():
    """List Ray's processes that have imported torch."""
    commands = []
    for process in psutil.Process().children(recursive=True):
        with suppress(OSError, psutil.Error):  # it has ended
            if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text():
                commands.append(" ".join(process.cmdline()))
    return commands


def look_around():
    """Return the environment of a worker, and the file from which it imports this package."""
    import catsdogs

    return dict(os.environ), catsdogs.__file__


environment, package = ray.get(ray.remote(look_around).remote())
folder = Path(environment["RAY_TMPDIR"])
observed = {
    "package_of_a_worker": package,
    "has_token": "RAY_AUTH_TOKEN" in environment and "RAY_AUTH_TOKEN" not in os.environ,
    "mode_of_the_folder": oct(folder.stat().st_mode & 0o777),
    "parent_of_the_folder": str(folder.parent),
    "existing": on_existing_cluster(),
    "outlives_the_import": ray.get(ray.put(True)),
    "keeps_the_handler_of_sigterm": signal.getsignal(signal.SIGTERM) is terminate,
    "with_torch_before_the_warm_up": list_commands_with_torch(),
}
data.warm_up_decoder(1.0)
while not list_commands_with_torch():  # the caller has a timeout
    time.sleep(0.1)

with data.quiet_ray_loggers(), data.without_cluster_actors():
    dataset = data.configure_ray_data(ray.data.range(100, override_num_blocks=2))
    observed["rows"] = sorted(row["id"] for row in dataset.map_batches(Successor, concurrency=1).take_all())
processes = psutil.Process().children(recursive=True)
commands = [" ".join(process.cmdline()) for process in processes]
sockets = [socket for process in [psutil.Process(), *processes] for socket in process.net_connections("inet")]
observed["listens_on"] = sorted({socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN})
observed["scripts"] = sorted({name for command in commands for name in re.findall(r"/(\w+\.py)", command)})
observed["named_actors"] = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
stop_ray()
observed["existing_after_the_shutdown"] = on_existing_cluster()
observed["folder_after_the_shutdown"] = folder.exists()
print(json.dumps(observed))
