"""Start Ray or join a cluster. Imports neither torch nor Ray Data."""

import atexit
import contextlib
import importlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ray

from catsdogs import local_ray
from catsdogs.errors import PROGRAMMING_ERRORS, InputError, RunError
from catsdogs.logs import worker_runtime_env
from catsdogs.ray_session import remove_folders, session_environment

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 30.0
MAX_IMPORT_S = 10.0  # of the wait for imports; process exit during an import of torch may crash
START_ATTEMPTS = 2  # on a busy machine, Ray gives up after 30 s

_started_node_id: str | None = None  # of the local Ray that this process started
_has_joined = False  # a process reads its token once: after that of a cluster, it cannot use another


def start_ray() -> None:
    """Join the cluster at RAY_ADDRESS, or start Ray on this machine. Do nothing if Ray is initialized.

    Raises:
        InputError: an argument of the command line is not UTF-8.
        RunError: there is no cluster at RAY_ADDRESS, or it refuses the connection; or Ray does not start here.
    """
    global _has_joined
    if ray.is_initialized():
        _has_joined = _has_joined or on_existing_cluster()
        return
    _check_arguments()
    # Without an address, Ray would look in /tmp/ray for a cluster, and wait for it even if it is gone.
    address = os.environ.get("RAY_ADDRESS") or "local"
    # Environment variables of Ray. First: leave CUDA_VISIBLE_DEVICES as it is in processes that reserve no GPU.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Second: Ray's core logs an error for every actor of Ray Data (ray#53727).
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address == "local":
        _start_own_ray()
    else:
        _has_joined = True
        _join_cluster(address)


def _check_arguments() -> None:
    """Ray stores the command line of a job as text."""
    for argument in sys.orig_argv:
        if not _is_unicode(argument):
            raise InputError(
                f"{argument}: expected UTF-8, Ray does not start with such an argument: set LC_ALL=C.UTF-8, or give a "
                "link with another name"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # Python decodes other bytes to halves of surrogate pairs
        return False
    return True


def _start_own_ray() -> None:
    global _started_node_id
    atexit.register(stop_ray)
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            _init_own_ray()
            break
        except (RunError, *PROGRAMMING_ERRORS):
            raise
        except Exception as error:
            reason = _format_reason(error)
            if attempt == START_ATTEMPTS:
                raise RunError(
                    f"Ray did not start on this machine ({reason}): wait until the machine is less busy, or see Ray's "
                    "logs, which --verbose keeps"
                ) from error
            logger.debug("Ray did not start", exc_info=True)
            logger.warning("Ray did not start (%s): trying once more", reason)
    _started_node_id = ray.get_runtime_context().get_node_id()
    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        logger.warning("Ray listens on all network interfaces of this machine: let no stranger reach its ports")


def _init_own_ray() -> None:
    try:
        with (
            session_environment(with_token=not _has_joined),
            local_ray.without_cluster_processes(),
            local_ray.on_loopback(),
            _current_folder(_find_import_folder()),
        ):
            _init("local", include_dashboard=False)
    except BaseException:
        stop_ray()
        raise


def _join_cluster(address: str) -> None:
    global _started_node_id
    try:
        _check_reachable(address)
        with _current_folder(_find_import_folder()):
            _init(address)
    except PROGRAMMING_ERRORS:
        raise
    except Exception as error:
        raise RunError(
            f"{_format_reason(error)}: expected a running cluster at RAY_ADDRESS={address}; check the address, and "
            "RAY_AUTH_MODE=token with the cluster's token"
        ) from error
    _started_node_id = None


def _check_reachable(address: str) -> None:
    """Raise OSError if nothing listens at `host:port`: Ray would wait for minutes without a word."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()


def _init(address: str, **settings: Any) -> None:
    with _hidden_stderr(), _kept_sigterm_handler():
        ray.init(
            address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=worker_runtime_env() or None,
            **settings,
        )


def _format_reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def stop_ray() -> None:
    """Leave the cluster, or end the Ray that this process started."""
    try:
        ray.shutdown()
    finally:
        remove_folders()


def on_existing_cluster() -> bool:
    """Return whether this process joined a cluster: it may have other nodes, may grow, and has settings of its own."""
    return not ray.is_initialized() or ray.get_runtime_context().get_node_id() != _started_node_id


def import_while_ray_starts(name: str) -> ModuleType:
    """Start Ray, and import a module at the same time: each takes seconds. Raises as `start_ray` does.

    `ray.init` must run in the calling thread: Ray's processes end with the thread that started them.
    """
    thread = threading.Thread(target=_import, args=(name,), daemon=True)
    thread.start()
    try:
        start_ray()
    finally:
        # Not without limit: Ctrl-C in an import of this thread can leave a lock that the other one waits for.
        thread.join(MAX_IMPORT_S)
    return importlib.import_module(name)  # from sys.modules, or it raises the error again


def _import(name: str) -> None:
    with contextlib.suppress(Exception):
        importlib.import_module(name)


def _find_import_folder() -> Path:
    """Return the folder from which workers import first: that of this package, if it is not installed."""
    folder = Path(__file__).parents[1]
    return Path(sysconfig.get_path("stdlib")) if folder.name in ("site-packages", "dist-packages") else folder


@contextlib.contextmanager
def _current_folder(folder: Path) -> Iterator[None]:
    """Make a folder the current one while `ray.init` runs: Ray's workers import from that one first.

    The user's may have modules with names of libraries, or a folder `catsdogs`; it may be deleted, or be no UTF-8.
    """
    try:
        before = os.open(".", os.O_PATH)
    except OSError:  # this user may not enter it, so there is no way back
        yield
        return
    os.chdir(folder)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


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
def _hidden_stderr() -> Iterator[None]:
    """Hide what Ray's core prints while it starts: it goes to the debug log."""
    try:
        terminal = os.dup(2)
    except OSError:  # closed
        yield
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):  # None or closed in Python
        sys.stderr.flush()
    with tempfile.TemporaryFile() as buffer:
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            buffer.seek(0)
            if printed := buffer.read():
                logger.debug("Ray printed: %s", printed.decode(errors="replace"))
