"""The goals: ratios of two contestants' timings in the same round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.speed.contestants import (
    ALONE,
    DECODING,
    EPOCH,
    FROZEN,
    LOOP,
    OPENVINO,
    OURS,
    RAY,
    ROOFLINE,
    STEP,
    TRAINING,
    TUNED_REFERENCE,
    TURBO,
    WITHOUT_RAY,
)
from benchmarks.speed.timing import Timing

NOTEBOOK_EPOCHS = 10


def _compare_rates(ours: Timing, other: Timing) -> float:
    return ours.rate / other.rate


def _compare_with_roofline(step: Timing, forward: Timing) -> float:
    """Compare a step with a third of the rate of the forward pass: backward has twice its operations."""
    return 3 * step.rate / forward.rate


def _compare_notebooks(ours: Timing, other: Timing) -> float:
    """Compare the wall time of whole commands; the other ran one epoch of the notebook's ten."""
    return (other.start_s + NOTEBOOK_EPOCHS * (other.wall_s - other.start_s)) / ours.wall_s


@dataclass(frozen=True)
class Goal:
    """A ratio that has to be reached, and a higher one to aim at."""

    what: str
    ours: str
    other: str
    minimum: float
    target: float
    ratio: Callable[[Timing, Timing], float] = _compare_rates

    def format_row(self, timings: Mapping[str, Sequence[Timing]]) -> list[str]:
        """Format the goal and the ratio that was reached as a row of the page."""
        pairs = zip(timings[self.ours], timings[self.other], strict=True)
        ratios = [self.ratio(ours, other) for ours, other in pairs]
        reached = median(ratios)
        verdict = "reached" if reached >= self.minimum else "**missed**"
        verdict = "target reached" if reached >= self.target else verdict
        spread = f"{reached:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        return [self.what, f"{self.minimum:g}", f"{self.target:g}", spread, verdict]


GOALS = (
    Goal("`score`, steady / the way of Ray's documentation", OURS, RAY, 4.5, 6),
    Goal("the same / the tuned DataLoader loop", OURS, LOOP, 1.1, 1.3),
    Goal("the same / our model alone on a batch in memory", OURS, ALONE, 0.85, 0.95),
    Goal("the same / our pipeline without Ray", OURS, WITHOUT_RAY, 0.92, 0.97),
    Goal("our model alone / OpenVINO with its defaults", ALONE, OPENVINO, 1, 1.1),
    Goal("the same / OpenVINO, tuned", ALONE, f"{OPENVINO}, tuned", 1, 1.1),
    Goal("training step, all layers / a third of the roofline", STEP, ROOFLINE, 0.75, 0.83, _compare_with_roofline),
    Goal("`train`, all layers, steady / torchvision's loop, tuned", TRAINING, TUNED_REFERENCE, 1, 1.1),
    Goal("decoding and resizing on one core / libjpeg-turbo and torch's resize", DECODING, TURBO, 0.9, 1),
    Goal(
        "the notebook's 10 epochs, frozen: epoch by epoch / `train`, wall time", FROZEN, EPOCH, 6, 8, _compare_notebooks
    ),
)
