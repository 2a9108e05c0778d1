"""A training step as one CUDA graph, so that Python does not limit steps of small batches.

Whole-network capture as in docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs: some steps on a side stream, then
the capture, which runs nothing, then replays on static inputs.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator

import torch

logger = logging.getLogger(__name__)

Batch = tuple[torch.Tensor, torch.Tensor]  # inputs and classes, int64 (N,), on the worker's device; N may be 0
Step = Callable[[Batch], torch.Tensor]  # a training step, or the replay of one
WARM_UP_STEPS = 3  # which choose algorithms and allocate the optimizer's state; they are steps like the others


class GraphedStep:
    """A step that is captured after WARM_UP_STEPS full batches, then replayed.

    Batches of another size run the step itself, as do all if it cannot be captured.

    Args:
        step: never waits for the device; its result is read before the next step.
        capture: builds the replay of a step on batches of one size.
    """

    def __init__(
        self,
        step: Step,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        report: Callable[[str], None],
        capture: Callable[[Step, Batch], Step],
    ) -> None:
        self._step = step
        self._optimizer = optimizer
        self._batch_size = batch_size
        self._report = report
        self._capture = capture
        self._num_full = 0
        self._replay: Step | None = None

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Take one step; returns what the step returns."""
        if len(batch[1]) != self._batch_size:
            return self._step(batch)
        self._num_full += 1
        if self._num_full <= WARM_UP_STEPS:
            return _run_on_side_stream(self._step, batch)
        if self._replay is None:
            self._replay = self._capture_step(batch)
        return self._replay(batch)

    def _capture_step(self, batch: Batch) -> Step:
        try:
            with _capturable(self._optimizer):
                return self._capture(self._step, batch)
        except Exception as error:
            logger.debug("the step cannot be captured", exc_info=True)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._report(f"training without a CUDA graph, which is slower: {reason}")
            return self._step


def _run_on_side_stream(step: Step, batch: Batch) -> torch.Tensor:
    if batch[1].device.type != "cuda":
        return step(batch)
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        result = step(batch)
    current.wait_stream(side)
    return result


def capture_graph(step: Step, batch: Batch) -> Step:
    """Capture a step on copies of a batch; the replay copies a batch there first.

    Raises:
        Exception: the step cannot be captured, or smaller batches would lack memory beside the graph.
    """
    static_batch = (batch[0].clone(), batch[1].clone())
    graph = torch.cuda.CUDAGraph()
    torch.cuda.empty_cache()  # of the steps before, which had no graph
    before = torch.cuda.memory_reserved()
    # The outer context restores the stream if the capture fails. Other threads may use the device meanwhile.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        static_result = step(static_batch)
    free, _ = torch.cuda.mem_get_info()
    if free < torch.cuda.memory_reserved() - before:
        raise RuntimeError("the device lacks memory for a graph beside smaller batches")

    def replay(batch: Batch) -> torch.Tensor:
        for static, tensor in zip(static_batch, batch, strict=True):
            static.copy_(tensor)
        graph.replay()
        return static_result

    return replay


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let the step of an optimizer be captured: AdamW checks this flag; SGD has none.

    Only for the capture, since AdamW warns of steps that run uncaptured with it.
    """
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group in groups:
            group["capturable"] = False
