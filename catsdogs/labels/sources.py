"""List the training and the validation files, or those to evaluate, from folders or from a table of labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from catsdogs import storage
from catsdogs.config import AuditConfig, EvaluateConfig, TrainConfig
from catsdogs.labels.folders import read_all_folders, read_evaluation_folder, read_training_folders
from catsdogs.labels.groups import add_groups, check_groups, split_off
from catsdogs.labels.label_table import LabelTable
from catsdogs.labels.labelled_files import AllRows, LabelledFiles, LabelledRow, build_labelled_files
from catsdogs.labels.path_table import Exclusion
from catsdogs.progress import Message, Progress, silent
from catsdogs.text import format_names


@dataclass(frozen=True)
class LabelSource:
    """Where labels are, and which images are used; the settings of a command, with absolute URIs."""

    data_dir: str | None = None
    labels: str | None = None
    exclude: str | None = None
    group_by: str | None = None

    @classmethod
    def from_config(cls, config: TrainConfig | EvaluateConfig | AuditConfig) -> "LabelSource":
        """Take the settings of a command, and make their paths absolute."""
        uris = (config.data_dir, config.labels, config.exclude)
        data_dir, labels, exclude = (None if uri is None else storage.absolute(uri) for uri in uris)
        return cls(data_dir, labels, exclude, config.group_by)

    @property
    def place(self) -> str:
        """What has the labels, for messages."""
        return self.labels or self.data_dir or ""


class TrainingFiles(NamedTuple):
    """The files of a training.

    Attributes:
        digests: SHA-256 of the tables that were read, by setting.
    """

    train: LabelledFiles
    validation: LabelledFiles
    digests: dict[str, str]


def list_training(source: LabelSource, val_split: float, progress: Progress = silent) -> TrainingFiles:
    """List the training and validation files; the last message names the classes and where the files are.

    Args:
        val_split: fraction that is split off for validation if the source does not name validation files.

    Raises:
        InputError: the labels cannot be read; a class without images, or in one split only; a group in both splits.
    """
    exclusion = Exclusion.read(source.exclude, source.data_dir)
    digests = exclusion.digests
    if source.labels is None:
        splits = read_training_folders(source.data_dir or "", exclusion, progress)
    else:
        table = LabelTable.read(source.labels, source.data_dir, exclusion, progress)
        digests = digests | {"labels": table.sha256}
        splits = table.read_splits()
    rows = _group(splits.train, source, progress)
    if splits.validation is None:
        train, validation = split_off(rows, val_split)
        found = f"held out of the same {'folder' if source.labels is None else 'rows'} (--val-split {val_split:g})"
    else:
        train, validation = rows, _group(splits.validation, source, progress)
        check_groups(train, validation)
        found = splits.validation_place
    files = TrainingFiles(build_labelled_files(train), build_labelled_files(validation), digests)
    class_names = files.train.class_names
    progress(
        Message(
            f"{len(class_names)} classes, {format_names(class_names)}: {len(train):,} training images "
            f"in {splits.train_place}, {len(validation):,} validation images {found}{splits.unused}"
        )
    )
    return files


def list_evaluation(source: LabelSource, split_name: str | None, progress: Progress = silent) -> LabelledFiles:
    """List the files of a named split, else of the validation or test split, else all.

    Raises:
        InputError: the labels cannot be read, or there is no such split.
    """
    exclusion = Exclusion.read(source.exclude, source.data_dir)
    if source.labels is None:
        rows = read_evaluation_folder(source.data_dir or "", split_name, exclusion, progress)
    else:
        table = LabelTable.read(source.labels, source.data_dir, exclusion, progress)
        rows = table.read_evaluation(split_name, progress)
    return build_labelled_files(_group(rows, source, progress))


def list_all(source: LabelSource, progress: Progress = silent) -> AllRows:
    """List the files of every split; what training would refuse, such as one class only, is not refused.

    Raises:
        InputError: the labels cannot be read.
    """
    exclusion = Exclusion.read(source.exclude, source.data_dir)
    if source.labels is None:
        found = read_all_folders(source.data_dir or "", exclusion, progress)
    else:
        found = LabelTable.read(source.labels, source.data_dir, exclusion, progress).read_all()
    counts = [f"{len(rows):,}{f' for {split}' if split else ''}" for split, rows in found.rows.items()]
    class_names = sorted({name for names in found.class_names.values() for name in names})
    text = f"{len(class_names)} classes, {format_names(class_names)}: {', '.join(counts)} images in {source.place}"
    progress(Message(text + found.unused))
    return found._replace(rows={split: _group(rows, source, progress) for split, rows in found.rows.items()})


def _group(rows: Sequence[LabelledRow], source: LabelSource, progress: Progress) -> list[LabelledRow]:
    if source.group_by is None:
        return list(rows)
    grouped = add_groups(rows, source.group_by)
    separate = [row for row in grouped if row.group is None]
    num_groups = len({row.group for row in grouped} - {None})
    example = f", such as {separate[0].relative}" if separate else ""
    progress(Message(f"--group-by: {num_groups:,} groups; {len(separate):,} images without a first capture{example}"))
    return grouped
