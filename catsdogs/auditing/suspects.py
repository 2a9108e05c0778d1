"""Suspect labels: their table, and what can be checked before the images are read."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from catsdogs import storage
from catsdogs.checkpoint import CONFIG, CheckpointFiles, read_checkpoint
from catsdogs.errors import InputError
from catsdogs.text import format_names

MIN_FOLDS = 2  # with images of a class: then each head has seen some of it
SUSPECTS = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("suggested", pa.string(), nullable=False),
        pa.field("self_confidence", pa.float64()),
        pa.field("flagged", pa.bool_(), nullable=False),
    ]
)


class Example(NamedTuple):
    """A flagged label, and the most similar image that has the suggested label without a flag; rows of the files."""

    row: int
    similar_row: int
    self_confidence: float


class Suspects(NamedTuple):
    """The labels of all images with features, the least confident first.

    Attributes:
        table: `SUSPECTS`; `self_confidence` is null for classes that are not rated.
        rows_N: of the audited files, in the order of `table`.
        examples: of the flagged labels that come first.
        unrated: images of each class that is in one fold only.
        num_left_out: labelled files without an image.
        source: where the features are from.
    """

    table: pa.Table
    rows_N: npt.NDArray[np.int64]
    examples: list[Example]
    unrated: dict[str, int]
    num_left_out: int
    source: str


def check_labels(labels: pa.ChunkedArray) -> None:
    """Check that there are labels to compare; InputError with those that there are."""
    names = list_ratable(labels)
    if len(names) < 2:
        found = f"only {format_names(names)}" if names else "none"
        raise InputError(
            f"--suspects: expected at least 2 classes with at least {MIN_FOLDS} images each, found {found}; "
            "omit --suspects"
        )


def list_ratable(labels: pa.ChunkedArray) -> list[str]:
    """List the classes that have enough images to be in MIN_FOLDS folds."""
    counts = labels.drop_null().value_counts().to_pylist()
    return sorted(count["values"] for count in counts if count["counts"] >= MIN_FOLDS)


def read_run_checkpoint(run: str) -> CheckpointFiles:
    """Read the best checkpoint of a run, or a checkpoint folder itself.

    Raises:
        InputError: there is none.
    """
    folders = [storage.join(run, "best"), run]
    found = [uri for uri in folders if storage.exists(storage.join(uri, CONFIG))]
    if not found:
        raise InputError(
            f"--suspects: expected a run with the folder best, or a checkpoint folder, found none in {run}"
        )
    return read_checkpoint(found[0])
