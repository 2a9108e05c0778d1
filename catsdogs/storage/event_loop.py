"""Run coroutines of requests on the event loop of fsspec, which has a thread of its own."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from fsspec.asyn import get_loop

T = TypeVar("T")


def submit(coroutine: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **parameters: Any) -> Future[T]:
    """Start a coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine(*arguments, **parameters), get_loop())


def run_sync(coroutine: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **parameters: Any) -> T:
    """Run a coroutine, and wait for its result."""
    return submit(coroutine, *arguments, **parameters).result()
