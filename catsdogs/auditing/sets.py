"""The images of an audit: as they are listed, and as they are measured."""

from typing import NamedTuple

import pyarrow as pa

from catsdogs.schema import FILES

# A file of a set; one of `--input` or `--against` has no label, split and group.
SET_FILES = pa.schema([*FILES, *(pa.field(name, pa.string()) for name in ("label", "split", "group"))])


class AuditedSets(NamedTuple):
    """The images to look at.

    Attributes:
        files: `SET_FILES`, sorted by path.
        against: the same, of `--against`; empty without it.
        class_names: of each split, also those without images; without splits, all under "".
    """

    files: pa.Table
    against: pa.Table
    class_names: dict[str, list[str]]


class MeasuredFiles(NamedTuple):
    """The rows of all files.

    Attributes:
        files: first those of the set, then those of `--against`, each sorted by path; the columns of `SET_FILES` but
            `version`, of `data.DecodeForAudit`, and `status`, `error`, `width` and `height`.
        num_audited: files of the set.
        seconds: that reading and measuring took.
    """

    files: pa.Table
    num_audited: int
    seconds: float

    @property
    def audited(self) -> pa.Table:
        """The files of the set, without those of `--against`."""
        return self.files.slice(0, self.num_audited)
