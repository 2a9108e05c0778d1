"""What a real Ray makes of our errors, of bugs and of lost processes."""

import os
import signal

import pytest
import ray
import ray.data
import torch
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayTaskError

from catsdogs.data import configure_ray_data
from catsdogs.errors import InputError, RunError
from catsdogs.ray_errors import RetryableError, to_run_error, unwrap_ray_error
from catsdogs.start import start_ray


def catch(function):
    """Return the exception that a function raises."""
    try:
        function()
    except Exception as error:  # noqa: BLE001 whatever Ray raises
        return error
    raise AssertionError("no exception")


def run_task(error):
    """Raise an exception in a task of Ray Data; return what the driver gets."""

    def stage(_):
        raise error

    return catch(lambda: configure_ray_data(ray.data.range(1)).map_batches(stage).materialize())


def run_actor(error=None, in_constructor=False):
    """Raise an exception in an actor, or kill its process; return what the driver gets."""

    class Actor:  # local, so that it is pickled by value: Ray's processes cannot import this module
        def __init__(self):
            if in_constructor:
                raise error

        def run(self):
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error

    return catch(lambda: ray.get(ray.remote(Actor).remote().run.remote()))


@pytest.fixture(autouse=True)
def ray_started(ray_cluster):
    """Start Ray."""
    start_ray()


@pytest.mark.parametrize("run", [run_task, run_actor])
def test_our_error_of_a_stage_is_unwrapped(run):
    error = run(RunError("the S3 credentials are expired: renew them"))
    found = unwrap_ray_error(error)
    assert (type(found), str(found)) == (RunError, "the S3 credentials are expired: renew them")
    to_raise = to_run_error(error, "scoring", "2 finished parts are kept")
    assert type(to_raise) is RunError
    assert str(to_raise) == "the S3 credentials are expired: renew them; 2 finished parts are kept"


@pytest.mark.parametrize("run", [run_task, run_actor])
def test_another_exception_of_a_stage_is_a_bug_with_the_traceback_of_its_process(run):
    error = run(NameError("name 'imagee' is not defined"))
    bug = to_run_error(error, "scoring", "2 finished parts are kept")
    assert type(bug) is NameError
    assert str(bug) == "name 'imagee' is not defined"  # Ray Data appends advice about retries
    remote, kept = bug.__notes__
    assert "test_ray_errors.py" in remote
    assert "/ray/" not in remote
    assert "retry" not in remote
    assert "2 finished parts are kept" in kept


def test_an_exception_of_an_actors_constructor_is_a_bug():
    error = run_actor(NameError("name 'imagee' is not defined"), in_constructor=True)
    assert unwrap_ray_error(error) is error
    assert "name 'imagee' is not defined" in str(error)


@pytest.mark.parametrize("run", [run_task, run_actor])
@pytest.mark.parametrize("error", [MemoryError("no memory"), torch.OutOfMemoryError("CUDA out of memory")], ids=repr)
def test_a_full_memory_is_no_bug(run, error):
    found = run(error)
    assert isinstance(unwrap_ray_error(found), RetryableError)
    assert str(to_run_error(found, "scoring", "kept")).endswith(f"Error: {error}; kept")


def test_an_error_of_the_operating_system_is_no_bug():
    to_raise = to_run_error(run_actor(OSError(12, "Cannot allocate memory")), "scoring", "kept")
    assert type(to_raise) is RunError
    assert str(to_raise) == "scoring failed: OSError: [Errno 12] Cannot allocate memory; kept"


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), IsADirectoryError(21, "Is a directory")])
def test_a_file_that_a_stage_expects_and_that_is_not_there_is_a_bug(error):
    assert type(to_run_error(run_task(error), "scoring", "kept")) is type(error)


@pytest.mark.parametrize("name", ["DistBackendError", "DistNetworkError", "DistStoreError"])
def test_a_lost_connection_between_training_workers_is_no_bug(name):
    assert isinstance(unwrap_ray_error(getattr(torch.distributed, name)("connection reset")), RetryableError)


def test_a_killed_process_is_no_bug():
    crash = ray.remote(max_retries=0)(lambda: os.kill(os.getpid(), signal.SIGKILL))
    for error in (catch(lambda: ray.get(crash.remote())), run_actor()):
        assert isinstance(error, ray.exceptions.RayError)
        assert isinstance(unwrap_ray_error(error), RetryableError)


def test_a_dataset_without_progress_is_no_bug():
    failure = unwrap_ray_error(ExecutionTimeoutError("no progress in 1800 s"))
    assert (type(failure), str(failure)) == (RetryableError, "no progress in 1800 s")


def test_an_error_of_the_driver_is_returned_as_it_is():
    ours, bug = InputError("no images"), AssertionError()
    assert unwrap_ray_error(ours) is ours
    assert unwrap_ray_error(bug) is bug
    assert to_run_error(bug, "scoring", "kept") is bug


def test_our_error_that_led_to_a_bug_does_not_hide_it():
    bug = NameError("name 'imagee' is not defined")
    bug.__cause__ = InputError("no images")
    assert unwrap_ray_error(RayTaskError("decode", "in a task", bug)) is bug
