"""Start fewer of Ray's processes for one command, on loopback: the only module that uses private names of Ray.

Ray 2.60 starts processes that serve a cluster, and has no public setting that leaves them out, or that lets the others
listen on the loopback interface alone. A command that starts its own local Ray needs no cluster; each process costs
seconds of CPU. Callers use this module only for a Ray that the command started. If a private name has changed, the
affected group of replacements is not used, and one line is logged.
`CATSDOGS_STOCK_RAY=1` switches everything here off. tests/test_local_ray.py fails once Ray leaves one of the processes
out by itself: then delete its replacement here.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

logger = logging.getLogger(__name__)

# If a private name has changed, or what it does.
INCOMPATIBLE_RAY_ERRORS = (ImportError, AttributeError, TypeError, LookupError, ValueError, AssertionError)
LOOPBACK = "127.0.0.1"
UNUSED_ADDRESS = b"127.0.0.1:1"  # nothing listens there

Replacements = list[tuple[Any, str, Callable[..., Any]]]  # owner, attribute, new value


def _use_stock_ray() -> bool:
    return os.environ.get("CATSDOGS_STOCK_RAY", "") not in ("", "0")


@contextlib.contextmanager
def without_cluster_processes() -> Iterator[None]:
    """Let `ray.init` start no API server, autoscaler monitor and log monitor.

    Saves 2.0, 1.2 and 1.3 s of CPU (2-core AMD EPYC, 2026-11). Needed until `ray.init` has settings: ray#26042.
    """
    with _replaced("API server, autoscaler monitor and log monitor", _cluster_processes):
        yield


def _cluster_processes() -> Replacements:
    from ray._private import ray_constants
    from ray._private.node import Node

    key, namespace = ray_constants.DASHBOARD_ADDRESS.encode(), ray_constants.KV_NAMESPACE_DASHBOARD

    def start_api_server(node: Any, *_: Any, **__: Any) -> None:
        # Ray's other processes wait for the API server's address. This address refuses connections at once.
        node.get_gcs_client().internal_kv_put(key, UNUSED_ADDRESS, True, namespace)

    return [
        (Node, "start_api_server", start_api_server),
        (Node, "start_monitor", _do_nothing),
        (Node, "start_log_monitor", _do_nothing),
    ]


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Let `ray.init` start processes that listen on the loopback interface alone, as it does on macOS and Windows.

    Needed until it does so on Linux without a cluster, or has a setting for it: ray#26042. `start.py` warns if Ray's
    processes listen elsewhere.
    """
    with _replaced("processes that listen on all network interfaces", _loopback):
        yield


def _loopback() -> Replacements:
    from ray._private import services

    return [(services, "node_ip_address_from_perspective", lambda *_, **__: LOOPBACK)]


@contextlib.contextmanager
def without_cluster_actors() -> Iterator[None]:
    """Run Ray Data without its actors for statistics, autoscaling and actor locations.

    Saves 3.4, 3.7 and 1.6 s of CPU (2-core AMD EPYC, 2026-11). Needed until `DataContext` has settings: ray#51559.
    """
    with (
        _replaced("statistics of Ray Data", _statistics),
        _replaced("autoscaling of Ray Data", _autoscaling),
        _replaced("actor locations of Ray Data", _actor_locations),
    ):
        yield


def _statistics() -> Replacements:
    from ray.data._internal import stats

    return [(stats, "get_or_create_stats_actor", _NullActor)]


def _autoscaling() -> Replacements:
    import ray
    from ray.data import ExecutionResources
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor

    class FixedSize(ClusterAutoscaler):
        try_trigger_scaling = on_executor_shutdown = _do_nothing

        def get_total_resources(self) -> Any:
            return ExecutionResources.from_resource_dict(ray.cluster_resources())

    FixedSize()  # TypeError if Ray has added an abstract method
    ExecutionResources.from_resource_dict({})
    return [(streaming_executor, "create_cluster_autoscaler", lambda *_, **__: FixedSize())]


def _actor_locations() -> Replacements:
    from ray.data._internal.execution.operators import actor_pool_map_operator as operator

    replacements: Replacements = [(operator, "get_or_create_actor_location_tracker", _NullActor)]
    if hasattr(operator, "get_actor_locations"):  # new in Ray 2.60
        replacements.append((operator, "get_actor_locations", lambda *_, **__: {}))
    return replacements


def make_local_trainer_class() -> "type[DataParallelTrainer]":
    """Make a `DataParallelTrainer` whose controller starts no unneeded actors.

    DatasetManager: not needed, our workers read their own data. PlacementGroupCleaner: not needed, the placement group
    ends with the driver. The scaling policy's requests: not needed, no autoscaler runs.
    Saves 4.8, 5.8 and 4.5 s of CPU (2-core AMD EPYC, 2026-11). Needed until `RunConfig` has settings: ray#65443.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    if not _use_stock_ray():
        try:
            return _build_trainer_class(DataParallelTrainer)
        except INCOMPATIBLE_RAY_ERRORS as error:
            _log_stock_ray("unneeded actors of Ray Train", error)
    return DataParallelTrainer


def _build_trainer_class(stock: "type[DataParallelTrainer]") -> "type[DataParallelTrainer]":
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    requests = ("_send_resource_request", "_maybe_send_resource_request", "_cancel_resource_request")
    for name in requests:
        getattr(FixedScalingPolicy, name)  # AttributeError if Ray has renamed it
    for name in ("_create_default_callbacks", "_initialize_and_run_controller"):
        getattr(stock, name)
    unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
    isinstance(None, unneeded)  # TypeError if they are no classes
    no_request_policy = type("NoRequestPolicy", (FixedScalingPolicy,), dict.fromkeys(requests, lambda *_, **__: None))

    class LocalTrainer(stock):  # type: ignore[misc, valid-type]
        def _create_default_callbacks(self, *args: Any, **kwargs: Any) -> Any:
            callbacks = super()._create_default_callbacks(*args, **kwargs)
            with _stock_ray_on_error("callbacks of Ray Train"):
                return [callback for callback in callbacks if not isinstance(callback, unneeded)]
            return callbacks

        def _initialize_and_run_controller(self, *args: Any, **kwargs: Any) -> Any:
            with _stock_ray_on_error("resource requests of Ray Train"):
                if type(kwargs["scaling_policy"]) is FixedScalingPolicy:
                    kwargs["scaling_policy"] = no_request_policy(self.scaling_config)
            return super()._initialize_and_run_controller(*args, **kwargs)

    return LocalTrainer


@contextlib.contextmanager
def _replaced(what: str, build: Callable[[], Replacements]) -> Iterator[None]:
    """Replace the functions of Ray that `build` lists, inside the block; replace none if one is missing."""
    originals: Replacements = []
    try:
        if not _use_stock_ray():
            replacements = build()
            originals = [(owner, name, vars(owner)[name]) for owner, name, _ in replacements]
            for owner, name, replacement in replacements:
                setattr(owner, name, _or_stock_ray(what, vars(owner)[name], replacement))
    except INCOMPATIBLE_RAY_ERRORS as error:
        _log_stock_ray(what, error)
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextlib.contextmanager
def _stock_ray_on_error(what: str) -> Iterator[None]:
    """Leave out the rest of the block, and log a line, if it raises one of INCOMPATIBLE_RAY_ERRORS."""
    try:
        yield
    except INCOMPATIBLE_RAY_ERRORS as error:
        _log_stock_ray(what, error)


def _or_stock_ray(what: str, original: Callable[..., Any], replacement: Callable[..., Any]) -> Callable[..., Any]:
    """Fall back to the original if the replacement raises one of INCOMPATIBLE_RAY_ERRORS."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return replacement(*args, **kwargs)
        except INCOMPATIBLE_RAY_ERRORS as error:
            _log_stock_ray(what, error)
            return original(*args, **kwargs)

    return call


def _log_stock_ray(what: str, error: Exception) -> None:
    logger.info("using stock Ray, with %s: a private name of Ray has changed (%r)", what, error)
    logger.debug("the private name was used here", exc_info=error)


def _do_nothing(*_: Any, **__: Any) -> None:
    """Replace a function by a no-op."""


class _NullActor:
    """Replaces an actor handle and ignores method calls."""

    __init__ = remote = _do_nothing

    def __call__(self, *_: Any, **__: Any) -> "_NullActor":  # as in `actor.method.options(...)`
        return self

    def __getattr__(self, name: str) -> "_NullActor":
        if name.startswith("__"):  # pickle looks these up
            raise AttributeError(name)
        return self
