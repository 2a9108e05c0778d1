"""Fewer processes of Ray: the same results, stock Ray where a private name has changed, and when the module may go."""

import contextlib
import inspect
import logging
import sys

import pytest
import ray
from conftest import LOOPBACK, run_own_ray
from ray._private import services
from ray._private.node import Node
from ray.data._internal import stats
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from catsdogs import local_ray

CLUSTER_SCRIPTS = {"dashboard.py", "monitor.py", "log_monitor.py"}
CLUSTER_ACTORS = {"datasets_stats_actor", "AutoscalingCoordinator", "ActorLocationTracker"}
UNNEEDED_CALLBACKS = {"DatasetsCallback", "PlacementGroupCleanerCallback"}


@pytest.fixture(autouse=True)
def switched_on(monkeypatch):
    """Test the replacements also if all tests run with stock Ray."""
    monkeypatch.delenv("CATSDOGS_STOCK_RAY", raising=False)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return run_own_ray(tmp_path_factory.mktemp("stock"), "deleted", CATSDOGS_STOCK_RAY="1")


def test_a_command_with_its_own_ray_starts_no_process_that_serves_a_cluster(own_ray):
    assert not CLUSTER_SCRIPTS & set(own_ray["scripts"])
    assert own_ray["named_actors"] == []
    assert not own_ray["existing"]
    assert own_ray["stderr"] == ""


def test_stock_ray_gives_the_same_rows(own_ray, stock):
    assert own_ray["rows"] == stock["rows"] == list(range(1, 101))


@pytest.mark.parametrize("name", sorted(CLUSTER_SCRIPTS | CLUSTER_ACTORS))
def test_stock_ray_still_starts_each_process_without_being_asked(stock, name):
    """Fails once Ray leaves a process out by itself: delete its replacement in local_ray.py."""
    assert name in stock["scripts"] + stock["named_actors"]


def test_stock_ray_still_listens_on_all_interfaces_which_is_said(stock):
    """Fails once it does not without being asked: delete `on_loopback`."""
    assert not set(stock["listens_on"]) <= LOOPBACK
    assert stock["stderr"].startswith("Ray listens on all network interfaces of this machine")


def test_ray_init_still_has_no_setting_for_its_processes():
    """Fails once Ray has one: use it, and delete `without_cluster_processes`."""
    settings = inspect.signature(ray.init).parameters
    assert [name for name in settings if "monitor" in name or "api_server" in name] == []


def test_ray_train_still_has_unneeded_callbacks():
    """Fails once Ray leaves them out without datasets, or asks no autoscaler: delete `make_local_trainer_class`."""
    trainer = DataParallelTrainer(print, scaling_config=ScalingConfig(num_workers=1))
    names = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert names >= UNNEEDED_CALLBACKS
    assert "_send_resource_request" in inspect.getsource(FixedScalingPolicy.after_controller_start)


def test_the_local_trainer_drops_only_the_unneeded_callbacks():
    scaling = ScalingConfig(num_workers=1)
    stock, local = (
        [type(callback).__name__ for callback in trainer(print, scaling_config=scaling)._create_default_callbacks()]
        for trainer in (DataParallelTrainer, local_ray.make_local_trainer_class())
    )
    assert local == [name for name in stock if name not in UNNEEDED_CALLBACKS]


def messages(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.INFO]


REPLACED = [
    (local_ray.without_cluster_processes, Node, "start_api_server"),
    (local_ray.without_cluster_processes, Node, "start_monitor"),
    (local_ray.without_cluster_processes, Node, "start_log_monitor"),
    (local_ray.on_loopback, services, "node_ip_address_from_perspective"),
    (local_ray.without_cluster_actors, stats, "get_or_create_stats_actor"),
    (local_ray.without_cluster_actors, streaming_executor, "create_cluster_autoscaler"),
    (local_ray.without_cluster_actors, actor_pool_map_operator, "get_or_create_actor_location_tracker"),
]
each_replacement = pytest.mark.parametrize(("shim", "owner", "name"), REPLACED, ids=[name for *_, name in REPLACED])


@each_replacement
def test_ray_is_changed_inside_the_block_only(shim, owner, name):
    before = vars(owner)[name]
    with contextlib.suppress(KeyboardInterrupt), shim():
        assert vars(owner)[name] is not before
        raise KeyboardInterrupt
    assert vars(owner)[name] is before


@each_replacement
def test_a_name_that_ray_has_renamed_gives_stock_ray_and_one_line(shim, owner, name, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "catsdogs")
    monkeypatch.setattr(owner, f"{name}_v2", vars(owner)[name], raising=False)
    monkeypatch.delattr(owner, name)
    before = dict(vars(owner))
    with shim():
        assert {other: value for other, value in vars(owner).items() if before[other] is not value} == {}
    assert len(messages(caplog)) == 1
    assert name in messages(caplog)[0]


@pytest.mark.parametrize("module", ["ray._private.node", "ray.data._internal.execution.streaming_executor"])
def test_a_module_that_ray_has_moved_gives_stock_ray_and_one_line(module, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "catsdogs")
    monkeypatch.setitem(sys.modules, module, None)  # its import fails
    monkeypatch.delattr(module)
    with local_ray.without_cluster_processes(), local_ray.without_cluster_actors():
        pass
    assert len(messages(caplog)) == 1


def test_a_function_with_another_signature_is_called_as_ray_calls_it(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "catsdogs")
    calls = []

    class NodeWithoutClient:
        start_api_server = vars(Node)["start_api_server"]

    monkeypatch.setattr(Node, "start_api_server", lambda *args, **kwargs: calls.append((args, kwargs)) or "started")
    with local_ray.without_cluster_processes():
        assert Node.start_api_server(NodeWithoutClient(), 1, include_dashboard=False, new_option=2) == "started"
    assert [(args[1:], kwargs) for args, kwargs in calls] == [((1,), {"include_dashboard": False, "new_option": 2})]
    assert len(messages(caplog)) == 1


@pytest.mark.parametrize(
    ("owner", "name"),
    [(DataParallelTrainer, "_create_default_callbacks"), (FixedScalingPolicy, "_maybe_send_resource_request")],
)
def test_ray_train_with_other_names_gives_its_own_trainer_and_one_line(owner, name, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "catsdogs")
    base = next(parent for parent in owner.__mro__ if name in vars(parent))
    monkeypatch.delattr(base, name)
    assert local_ray.make_local_trainer_class() is DataParallelTrainer
    assert len(messages(caplog)) == 1


def test_ray_train_with_other_behaviour_runs_as_it_is_and_logs_one_line(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "catsdogs")
    trainer = local_ray.make_local_trainer_class()(print, scaling_config=ScalingConfig(num_workers=1))
    base = next(parent for parent in DataParallelTrainer.__mro__ if "_create_default_callbacks" in vars(parent))
    monkeypatch.setattr(base, "_create_default_callbacks", lambda *_: None)
    monkeypatch.setattr(base, "_initialize_and_run_controller", lambda *args, **kwargs: (args[1:], kwargs))
    assert trainer._create_default_callbacks() is None
    assert trainer._initialize_and_run_controller(1, policy=2) == ((1,), {"policy": 2})
    assert len(messages(caplog)) == 2


@pytest.mark.parametrize("value", ["", "0"])
def test_an_empty_variable_does_not_switch_anything_off(value, monkeypatch):
    monkeypatch.setenv("CATSDOGS_STOCK_RAY", value)
    assert local_ray.make_local_trainer_class() is not DataParallelTrainer


def test_one_variable_switches_everything_off(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "catsdogs")
    monkeypatch.setenv("CATSDOGS_STOCK_RAY", "1")
    before = [vars(owner)[name] for _, owner, name in REPLACED]
    with local_ray.without_cluster_processes(), local_ray.without_cluster_actors():
        assert [vars(owner)[name] for _, owner, name in REPLACED] == before
    assert local_ray.make_local_trainer_class() is DataParallelTrainer
    assert messages(caplog) == []
