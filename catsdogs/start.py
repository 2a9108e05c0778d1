"""Start or join Ray. Neither torch nor Ray Data is imported for it."""

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import ray

from catsdogs.errors import RunError


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; nothing where this process has done so.

    Raises:
        RunError: there is no cluster at RAY_ADDRESS, or it refuses us.
    """
    if ray.is_initialized():
        return
    # Without an address Ray would also join what a cluster that is gone left behind in /tmp/ray, and wait for it.
    address = os.environ.get("RAY_ADDRESS", "local")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's core calls every actor of Ray Data an error, for arguments that Ray Data gives it (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        # Ray would replace the caller's answer to SIGTERM by its own, first while it starts and for good.
        with _held_stderr(), replaced(ray._private.utils, "set_sigterm_handler", lambda _: None):
            # No dashboard of a Ray that ends with the command: it takes 2 s of the start (2 cores, 2026-11).
            dashboard = False if address == "local" else None
            ray.init(address, include_dashboard=dashboard, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{reason}: expected a running cluster at RAY_ADDRESS={address}; check the address, and "
            "RAY_AUTH_MODE=token with the cluster's token"
        ) from error


def import_beside_ray(name: str) -> ModuleType:
    """Import a module, which may import torch, while Ray starts: each takes seconds.

    It is Ray that starts in the calling thread: the processes of its start end with the thread that started them.

    Raises:
        RunError: as `start_ray`.
    """
    with ThreadPoolExecutor(1) as thread:
        module = thread.submit(importlib.import_module, name)
        start_ray()
    return module.result()


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Give a module's or a class's name another value for a while, where Ray has no setting."""
    before = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _held_stderr() -> Iterator[None]:
    """Hold back what Ray's core writes while it starts, such as that it takes its log level; shown where it fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(terminal, held.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def joins_cluster() -> bool:
    """Whether Ray is a cluster that stands already, which may have other nodes and may grow."""
    return bool(os.environ.get("RAY_ADDRESS"))
