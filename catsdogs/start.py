"""Start or join Ray. Neither torch nor Ray Data is imported for it."""

import contextlib
import importlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import ray
from ray._private import ray_constants
from ray._private.node import Node

from catsdogs.errors import RunError

NOBODY = b"127.0.0.1:1"  # an address at which nothing listens


def start_ray(launched: Callable[[], object] = lambda: None) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; nothing where this process has done so.

    Args:
        launched: called once there is little left to do but to wait for Ray.

    Raises:
        RunError: there is no cluster at RAY_ADDRESS, or it refuses us.
    """
    if ray.is_initialized():
        return
    address = _address()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's core calls every actor of Ray Data an error, for arguments that Ray Data gives it (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    try:
        # Ray would replace the caller's answer to SIGTERM by its own, first while it starts and for good.
        with (
            _buffer_stderr(),
            replaced(ray._private.utils, set_sigterm_handler=lambda _: None),
            _for_one_command(launched),
        ):
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{reason}: expected a running cluster at RAY_ADDRESS={address}; check the address, and "
            "RAY_AUTH_MODE=token with the cluster's token"
        ) from error


def import_while_ray_starts(name: str) -> ModuleType:
    """Import a module, which may import torch, while Ray starts: each takes seconds.

    It is Ray that starts in the calling thread: the processes of its start end with the thread that started them. The
    import begins once they run, as two threads of Python take turns: 1 s of the start (2-core Zen 4, 2026-11).

    Raises:
        RunError: as `start_ray`.
    """
    with ThreadPoolExecutor(1) as thread:
        start_ray(lambda: thread.submit(importlib.import_module, name))
    return importlib.import_module(name)  # which is done, or fails again


@contextlib.contextmanager
def _for_one_command(launched: Callable[[], object]) -> Iterator[None]:
    """Start no more of an own Ray than one command needs: 2.5 s sooner (2-core Zen 4, 2026-11).

    That is without the dashboard's server, what carries the workers' output to the driver, and what asks for machines.
    """
    if on_existing_cluster():
        launched()
        yield
        return
    start_raylet = Node.start_raylet

    def no_api_server(node: Node, **_: object) -> None:
        # Ray's own processes ask it things: they are refused at once, and without an address would wait for one.
        key, namespace = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD
        node.get_gcs_client().internal_kv_put(key, NOBODY, True, namespace)

    def start_last(node: Node, *args: Any) -> None:
        start_raylet(node, *args)
        launched()

    with replaced(
        Node,
        start_api_server=no_api_server,
        start_log_monitor=lambda _: None,
        start_monitor=lambda _: None,
        start_raylet=start_last,
    ):
        yield


@contextlib.contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give names of a module or a class other values for a while, where Ray has no setting."""
    before = {name: vars(owner)[name] for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


@contextlib.contextmanager
def _buffer_stderr() -> Iterator[None]:
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


def on_existing_cluster() -> bool:
    """Whether Ray is a cluster that stands already, which may have other nodes and may grow."""
    return _address() != "local"


def _address() -> str:
    """Name Ray's address; without one Ray would join what a cluster that is gone left in /tmp/ray, and wait for it."""
    return os.environ.get("RAY_ADDRESS") or "local"
