"""The process group of workers on one machine, for a Ray that the command started.

Ray Train's own backend opens torch's TCPStore on every network interface, where any neighbour reads and writes it
without a password. Here the workers meet in a file, and their sockets are on the loopback interface.
"""

import os
import shutil
import sys
import tempfile
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

LEAVE_TIMEOUT_S = 30.0
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class LocalBackend(Backend):
    """Sets up the process group of the workers. A single worker needs none."""

    share_cuda_visible_devices = True  # NCCL reaches the GPUs of the other workers
    _folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Initialize the process group on all workers."""
        if len(worker_group) == 1:
            return
        self._folder = tempfile.mkdtemp(prefix="process-group-", dir=os.environ.get("RAY_TMPDIR"))
        size = len(worker_group)
        arguments = (f"{self._folder}/store", size, backend_config.backend, backend_config.timeout_s)
        ray.get([worker_group.execute_single_async(i, init_process_group, i, *arguments) for i in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leave the process group on all workers."""
        if self._folder is not None:
            leaving = worker_group.execute_async(destroy_process_group)
            ray.wait(leaving, num_returns=len(leaving), timeout=LEAVE_TIMEOUT_S)  # a worker may be dead
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None


class LocalTorchConfig(TorchConfig):
    """A `TorchConfig` for workers that are all on this machine; it needs a `backend`, "gloo" or "nccl"."""

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets up the process group."""
        return LocalBackend


def init_process_group(world_rank: int, store: str, world_size: int, backend: str, timeout_s: int) -> None:
    """Initialize torch's process group with a file as store, and with sockets on the loopback interface alone."""
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, f"file://{store}", timeout, rank=world_rank, world_size=world_size)


def destroy_process_group() -> None:
    """Leave torch's process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
