"""Run coroutines of requests on the event loop of fsspec, which runs in a separate thread; and functions in threads."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from fsspec.asyn import get_loop

from catsdogs.storage import limits

T = TypeVar("T")


def submit(coroutine: Callable[..., Coroutine[Any, Any, T]], *arguments: Any, **parameters: Any) -> Future[T]:
    """Start a coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine(*arguments, **parameters), get_loop())


def run_sync(
    coroutine: Callable[..., Coroutine[Any, Any, T]],
    *arguments: Any,
    deadline_s: float | None = None,
    **parameters: Any,
) -> T:
    """Run a coroutine, and wait for its result.

    Args:
        deadline_s: it is cancelled after this time; the default is `limits.DEADLINE_S`.

    Raises:
        TimeoutError: it was cancelled.
    """
    deadline_s = limits.DEADLINE_S if deadline_s is None else deadline_s
    result: T = submit(_run, coroutine(*arguments, **parameters), deadline_s).result()
    return result


async def _run(coroutine: Coroutine[Any, Any, T], deadline_s: float) -> T:
    try:
        async with asyncio.timeout(deadline_s) as timeout:
            result = await coroutine
    except TimeoutError as error:
        if not timeout.expired():
            raise
        raise TimeoutError(f"it took more than {deadline_s:g} s") from error
    return result


def call_in_thread(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """Call a function in a new thread, for which a process that ends does not wait."""
    result: Future[T] = Future()

    def call() -> None:
        try:
            result.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - raised where the result is awaited
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return result
