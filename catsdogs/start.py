"""Start Ray or join a cluster. Imports neither torch nor Ray Data."""

import contextlib
import importlib
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import ray

from catsdogs import local_ray
from catsdogs.errors import RunError
from catsdogs.logs import worker_runtime_env

_started_node_id: str | None = None  # of the local Ray that this process started


def start_ray() -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine. Do nothing if Ray is initialized.

    Raises:
        RunError: there is no cluster at RAY_ADDRESS, or it refuses the connection.
    """
    global _started_node_id
    if ray.is_initialized():
        return
    # Without an address, Ray would look in /tmp/ray for a cluster, and wait for it even if it is gone.
    address = os.environ.get("RAY_ADDRESS") or "local"
    is_local = address == "local"
    # Environment variables of Ray. First: leave CUDA_VISIBLE_DEVICES as it is in processes that reserve no GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Second: Ray's core logs an error for every actor of Ray Data (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    few_processes = local_ray.without_cluster_processes() if is_local else contextlib.nullcontext()
    try:
        with _buffered_stderr(), _kept_sigterm_handler(), few_processes:
            ray.init(
                address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                include_dashboard=False if is_local else None,
                runtime_env=worker_runtime_env() or None,
            )
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if is_local:
            raise RunError(f"{reason}: Ray did not start on this machine") from error
        raise RunError(
            f"{reason}: expected a running cluster at RAY_ADDRESS={address}; check the address, and "
            "RAY_AUTH_MODE=token with the cluster's token"
        ) from error
    _started_node_id = ray.get_runtime_context().get_node_id() if is_local else None


def on_existing_cluster() -> bool:
    """Return whether this process joined a cluster: it may have other nodes, may grow, and has settings of its own."""
    return not ray.is_initialized() or ray.get_runtime_context().get_node_id() != _started_node_id


def import_while_ray_starts(name: str) -> ModuleType:
    """Start Ray, and import a module at the same time: each takes seconds. Raises as `start_ray` does.

    `ray.init` must run in the calling thread: Ray's processes end with the thread that started them.
    """
    with ThreadPoolExecutor(1) as executor:
        executor.submit(importlib.import_module, name)
        start_ray()
    return importlib.import_module(name)  # from sys.modules, or it raises the error again


@contextlib.contextmanager
def _kept_sigterm_handler() -> Iterator[None]:
    """Restore the handler of SIGTERM: `ray.init` replaces it by one that raises SystemExit."""
    if threading.current_thread() is not threading.main_thread():  # ray.init replaces it in the main thread only
        yield
        return
    handler = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    try:
        yield
    except SystemExit as error:
        signal.signal(signal.SIGTERM, handler)
        if error.code == signal.SIGTERM:  # the signal arrived while Ray's handler was set
            signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _buffered_stderr() -> Iterator[None]:
    """Hide what Ray's core prints while it starts, unless the start fails."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        except BaseException:
            buffer.seek(0)
            os.write(terminal, buffer.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
