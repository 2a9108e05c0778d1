"""The errors that catsdogs raises on purpose."""

import inspect
import pickle

import pytest

from catsdogs import errors

ALL = [value for value in vars(errors).values() if inspect.isclass(value)]


@pytest.mark.parametrize("error_class", ALL)
def test_errors_can_be_pickled_between_processes(error_class):
    found = pickle.loads(pickle.dumps(error_class("--lr: expected a positive number, got -1")))
    assert type(found) is error_class
    assert str(found) == "--lr: expected a positive number, got -1"
    assert found.args == ("--lr: expected a positive number, got -1",)


def test_every_error_has_the_base_class_and_is_in_the_docstring():
    for error_class in ALL:
        assert issubclass(error_class, errors.CatsdogsError)
        assert error_class.__name__ in errors.__doc__


def test_input_and_run_errors_are_distinct():
    assert not issubclass(errors.InputError, errors.RunError)
    assert not issubclass(errors.RunError, errors.InputError)
