"""Starts a Ray of its own as a command does, decodes and runs a dataset; prints what it observed as JSON."""

import json
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from catsdogs.start import import_while_ray_starts, on_existing_cluster


def terminate(*_):
    """Handle SIGTERM."""


signal.signal(signal.SIGTERM, terminate)
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


observed = {
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
commands = [" ".join(process.cmdline()) for process in psutil.Process().children(recursive=True)]
observed["scripts"] = sorted({name for command in commands for name in re.findall(r"/(\w+\.py)", command)})
observed["named_actors"] = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
ray.shutdown()
observed["existing_after_the_shutdown"] = on_existing_cluster()
print(json.dumps(observed))
