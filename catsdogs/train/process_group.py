"""The process group of workers on one machine, for a Ray that the command started.

Ray Train's own backend opens torch's TCPStore on every network interface, where any neighbour reads and writes it
without a password. Here the workers meet in a file, and their sockets are on the loopback interface.
Ray Train's controller imports this module: torch is imported in the functions that workers run.
"""

import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig

LEAVE_TIMEOUT_S = 30.0
LOOPBACK_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


class LocalBackend(Backend):
    """Sets up the process group of the workers."""

    share_cuda_visible_devices = True  # NCCL reaches the GPUs of the other workers
    _folder: str | None = None

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Initialize the process group on all workers."""
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


@dataclass(frozen=True)
class LocalConfig(BackendConfig):
    """The process group of workers that are all on this machine; `backend` is "gloo" or "nccl"."""

    backend: str
    timeout_s: int

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that sets up the process group."""
        return LocalBackend


def init_process_group(world_rank: int, store: str, world_size: int, backend: str, timeout_s: int) -> None:
    """Initialize torch's process group with a file as store, and with sockets on the loopback interface alone."""
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = LOOPBACK_INTERFACE
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, f"file://{store}", timeout, rank=world_rank, world_size=world_size)


def destroy_process_group() -> None:
    """Leave torch's process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
