"""A function that Ray tasks compute for many items."""

import pytest
from ray.util.state import list_tasks

from catsdogs.data import map_in_tasks
from catsdogs.errors import InputError
from catsdogs.start import start_ray

# The functions are local, so that they are pickled by value: Ray's processes cannot import this module.


@pytest.fixture(autouse=True)
def _ray(ray_cluster):
    start_ray()


def test_results_have_the_order_of_the_items_and_few_tasks_are_in_flight():
    def square(number):
        import time

        time.sleep(0.2 * (number == 0))
        return number * number

    started = []
    results = map_in_tasks(square, (started.append(number) or number for number in range(20)))
    assert next(results) == 0
    assert len(started) == 4  # two for each of two CPUs
    assert list(results) == [number * number for number in range(1, 20)]


def test_tasks_have_a_readable_name():
    def _find_name(_number):
        import ray

        return ray.get_runtime_context().get_task_name()

    assert list(map_in_tasks(_find_name, [0])) == ["find name"]


def test_an_error_of_a_task_is_raised_as_it_is_and_ends_the_others():
    def fail_at_two(number):
        import time

        if number == 2:
            raise InputError("the input is wrong")
        for _ in range(30 * (number > 2)):  # not longer: now and then Ray cancels a task too early to interrupt it
            time.sleep(0.1)  # Ray interrupts a task between two instructions of Python
        return number

    results = map_in_tasks(fail_at_two, range(20))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(InputError, match=r"^the input is wrong$"):
        next(results)
    states = [task.state for task in list_tasks(filters=[("name", "=", "fail at two")], limit=10_000)]
    assert len(states) <= 6


def test_a_bug_in_a_task_is_raised_with_its_traceback():
    def divide(number):
        return 1 // number

    with pytest.raises(ZeroDivisionError) as caught:
        list(map_in_tasks(divide, [0]))
    assert "in divide" in caught.value.__notes__[0]
