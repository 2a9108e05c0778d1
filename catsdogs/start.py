"""Start or join Ray. Neither torch nor Ray Data is imported for it."""

import contextlib
import importlib
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import ray
from ray._private.node import Node

from catsdogs.errors import RunError

# Of Ray's node: they serve those who look at a cluster from outside or let it grow, and take 2.5 s of the start of a
# Ray that ends with the command (2-core Zen 4, 2026-11). There is a setting for none of them.
SERVERS = ("start_api_server", "start_log_monitor", "start_monitor")


def start_ray(launched: Callable[[], None] = lambda: None) -> None:
    """Join the cluster of RAY_ADDRESS, or start Ray on this machine; nothing where this process has done so.

    Args:
        launched: called once nothing is left to do but to wait for Ray's servers.

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
        with contextlib.ExitStack() as stack:
            stack.enter_context(_held_stderr())
            stack.enter_context(replaced(ray._private.utils, "set_sigterm_handler", lambda _: None))
            if address == "local":
                for name in SERVERS:
                    stack.enter_context(replaced(Node, name, lambda *_, **__: None))
                stack.enter_context(replaced(Node, "start_raylet", _followed(Node.start_raylet, launched)))
            else:
                launched()
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunError(
            f"{reason}: expected a running cluster at RAY_ADDRESS={address}; check the address, and "
            "RAY_AUTH_MODE=token with the cluster's token"
        ) from error


def import_beside_ray(name: str) -> ModuleType:
    """Import a module, which may import torch, while Ray starts: each takes seconds.

    It is Ray that starts in the calling thread: the processes of its start end with the thread that started them. The
    import begins once they run, as two threads of Python take turns: 1 s of the start (2-core Zen 4, 2026-11).

    Raises:
        RunError: as `start_ray`.
    """
    launched = threading.Event()

    def then_import() -> ModuleType:
        launched.wait()
        return importlib.import_module(name)

    with ThreadPoolExecutor(1) as thread:
        module = thread.submit(then_import)
        try:
            start_ray(launched.set)
        finally:
            launched.set()
    return module.result()


def _followed(method: Callable[..., None], then: Callable[[], None]) -> Callable[..., None]:
    def both(*args: object) -> None:
        method(*args)
        then()

    return both


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
