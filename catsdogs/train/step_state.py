"""The state of a run within an epoch, from which a resumed run takes the very next step.

The order of the rows and their augmentation are functions of seed, epoch and row, so the state has no random state.
`last/step_state.pt` is written atomically, and counts only for the epoch that follows `last/training_state.pt`: it
names the files of that save. It is removed once its epoch is saved.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from catsdogs import storage
from catsdogs.checkpoint import HEAD, check_shapes, list_shapes
from catsdogs.errors import InputError
from catsdogs.text import format_reason
from catsdogs.train.run_folder import LAST, STEP_STATE, Digests, serialize_state

if TYPE_CHECKING:  # imports torch, which the driver does not need
    import torch

LeftOutRow = dict[str, str]  # path, status and error


@dataclass(frozen=True)
class EpochProgress:
    """What is done of an epoch when a worker begins with it; as of `StepState`, for all workers together."""

    num_steps: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    seconds: float = 0.0
    left_out: list[LeftOutRow] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class StepState:
    """The model after some steps of an epoch, and what the epoch has accumulated.

    Attributes:
        epoch: the unfinished one, from 1.
        num_steps: steps of it that were taken.
        sums: over their rows, of all workers: cross-entropy, correct rows, rows.
        seconds: that they took.
        left_out: training images that could not be decoded.
        follows: the files of the epoch before.
        files_sha256: of the training files, as `hash_training_files` returns it.
    """

    epoch: int
    num_steps: int
    sums: list[float]
    seconds: float
    left_out: list[LeftOutRow]
    class_names: list[str]
    follows: Digests
    files_sha256: str
    model: "dict[str, torch.Tensor]"
    optimizer: dict[str, Any]

    @property
    def progress(self) -> EpochProgress:
        """What is done of the epoch."""
        return EpochProgress(self.num_steps, self.sums, self.seconds, self.left_out)

    def serialize(self) -> bytes:
        return serialize_state(vars(self))


def hash_training_files(files: pa.Table) -> str:
    """Hash the paths and classes of the training files, on which the rows of a step depend."""
    digest = hashlib.sha256()
    for path, index in zip(files["path"].to_pylist(), files["true_index"].to_pylist(), strict=True):
        digest.update(f"{path}\0{index}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()


def load_step_state(uri: str, training_state: Mapping[str, Any]) -> StepState | None:
    """Load the state within the epoch that follows a training state; None if there is none.

    Raises:
        InputError: the file is damaged or of another run.
    """
    step_uri = storage.join(uri, LAST, STEP_STATE)
    if not storage.exists(step_uri):
        return None
    num_finished, content = len(training_state["history"]), storage.read_bytes(step_uri)
    try:
        state = _parse(content)
    except Exception as error:  # damaged bytes raise errors of any type
        reason = f"is damaged: {type(error).__name__}: {format_reason(error)}"
        raise InputError(f"{step_uri} {reason}; {_describe_way_out(num_finished)}") from error
    if state.epoch <= num_finished:  # the process was killed before it removed the file
        return None
    follows = {name: digests[0] for name, digests in training_state.get("sha256", {}).items()}
    if state.epoch != num_finished + 1 or state.follows != follows:
        raise InputError(
            f"{step_uri} is of another run: expected a state within epoch {num_finished + 1} of this run, found one of "
            f"epoch {state.epoch}; {_describe_way_out(num_finished)}"
        )
    return state


def find_step_state(uri: str, training_state: Mapping[str, Any], files: pa.Table) -> StepState | None:
    """Load the state within the next epoch as `load_step_state` does, unless it is of other training files."""
    state = load_step_state(uri, training_state)
    return state if state and state.files_sha256 == hash_training_files(files) else None


def _describe_way_out(num_finished: int) -> str:
    return f"remove it to resume after {num_finished} finished epochs"


def _parse(content: bytes) -> StepState:
    """Parse a step state; raises an error of any type if it is not one."""
    import torch

    state = StepState(**torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))
    shapes = {name: tuple(tensor.shape) for name, tensor in state.model.items()}
    check_shapes(list_shapes(len(state.model[f"{HEAD}.bias"])), shapes, "model")
    assert "param_groups" in state.optimizer
    assert min(state.epoch, state.num_steps) > 0
    assert len(state.sums) == 3
    assert math.isfinite(math.fsum([*state.sums, state.seconds]))
    "".join([*state.class_names, state.files_sha256])
    for row in state.left_out:
        "".join([row["path"], row["status"], row["error"]])
    return state
