"""Ray Data on a machine that no cluster joins, without the three actors that serve a cluster.

They collect statistics for the dashboard, ask the autoscaler for machines, and know on which machine each model's actor
is. Each takes up to 3 s of a core at the start to import Ray Data (2-core Zen 4, 2026-11). No setting leaves them out.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import ray
from ray.data import ExecutionResources
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.stats import _StatsManager

from catsdogs.start import on_existing_cluster, replaced

STATISTICS = ("register_dataset_to_stats_actor", "update_execution_metrics", "update_iteration_metrics")
NO_TRACKER = SimpleNamespace(update_actor_location=SimpleNamespace(remote=lambda *_: None))


class _OneMachine(ClusterAutoscaler):
    """What there is, is all there will be."""

    def try_trigger_scaling(self) -> None:
        """Do nothing."""

    def on_executor_shutdown(self) -> None:
        """Do nothing."""

    def get_total_resources(self) -> ExecutionResources:
        """Count the machine's."""
        total: ExecutionResources = ExecutionResources.from_resource_dict(ray.cluster_resources())
        return total


@contextlib.contextmanager
def without_cluster_actors() -> Iterator[None]:
    """Run datasets without the three actors, where Ray is this command's own."""
    if on_existing_cluster():
        yield
        return
    no_statistics = dict.fromkeys(STATISTICS, staticmethod(lambda *_, **__: None))
    no_locations = {"get_or_create_actor_location_tracker": lambda: NO_TRACKER, "get_actor_locations": lambda _: {}}
    with (
        replaced(_StatsManager, **no_statistics),
        replaced(streaming_executor, create_cluster_autoscaler=lambda *_, **__: _OneMachine()),
        replaced(actor_pool_map_operator, **no_locations),
    ):
        yield
