"""Run a function on all machines of the cluster."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import ray

from catsdogs.ray_errors import unwrap_ray_error

TASKS_PER_CPU = 2  # one runs, one waits
T = TypeVar("T")
R = TypeVar("R")


def map_in_tasks(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Yield the result for each item in order, each computed by a Ray task; a few tasks for each CPU are in flight.

    Args:
        function: can be pickled, as the items and the results.

    Raises:
        Exception: what the function raised, or a RetryableError if Ray or a machine failed.
    """
    name = function.__name__.strip("_").replace("_", " ")  # in Ray's dashboard
    task = ray.remote(function).options(scheduling_strategy="SPREAD", name=name)
    max_in_flight = TASKS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    in_flight: deque[ray.ObjectRef[R]] = deque()
    try:
        for item in items:
            in_flight.append(task.remote(item))
            if len(in_flight) == max_in_flight:
                yield _get(in_flight.popleft())
        while in_flight:
            yield _get(in_flight.popleft())
    finally:
        for reference in in_flight:
            ray.cancel(reference)


def _get(reference: "ray.ObjectRef[R]") -> R:
    try:
        result: R = ray.get(reference)
    except Exception as error:
        raise unwrap_ray_error(error) from error
    return result
