"""Labels from a table: the columns path, label, split and group; its problems are reported with their line numbers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from catsdogs import storage
from catsdogs.errors import InputError
from catsdogs.labels.labelled_files import AllRows, LabelledRow, Splits, check_same_classes, list_classes
from catsdogs.labels.path_table import PATH, Exclusion, PathTable
from catsdogs.labels.split_folders import TEST, TRAIN, VALIDATION
from catsdogs.progress import Message, Progress
from catsdogs.table_files import Column
from catsdogs.text import format_names

COLUMNS = (PATH, Column(("label",)), Column(("split",), optional=True), Column(("group",), optional=True))
ROLES = {"train": TRAIN, "validation": VALIDATION, "val": VALIDATION, "test": TEST}
MAX_NUMBERS = 5  # of lines, in a message


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table of labels, each path once.

    Attributes:
        rows: by split, TRAIN, VALIDATION or TEST; all under "" if the table has no splits.
    """

    uri: str
    rows: dict[str, list[LabelledRow]]
    sha256: str

    @classmethod
    def read(cls, uri: str, data_dir: str | None, exclusion: Exclusion, progress: Progress) -> "LabelTable":
        """Read the rows that are not excluded.

        Raises:
            InputError: the table cannot be read; a row without a path or a label, an unknown split, or a path with
                two labels, splits or groups.
        """
        table = PathTable.read(uri, "--labels", data_dir)
        problems = _Problems(uri, table.unit)
        numbered: dict[str, tuple[int, LabelledRow, str]] = {}
        for number, path, label, split, group in table.iter_rows(COLUMNS):
            row = LabelledRow(storage.find_entry(path), label, table.relative(path), group or None)
            role = problems.check_row(number, label, split)
            first = numbered.setdefault(path, (number, row, role))
            problems.compare(first, (number, row, role))
        problems.raise_first()
        if not numbered:
            raise InputError(f"--labels {uri}: expected rows with path and label, found none")
        kept = {entry.path for entry in exclusion.filter([row.entry for _, row, _ in numbered.values()], progress)}
        rows = defaultdict(list)
        for path, (_, row, role) in numbered.items():
            if path in kept:
                rows[role].append(row)
        return cls(uri, dict(rows), table.sha256)

    def read_splits(self) -> Splits:
        """Return the rows for training and validation; those of `test` validate if none have the split validation.

        Raises:
            InputError: a split has no rows for training, or the two have different classes.
        """
        if "" in self.rows:
            return Splits(self._check_classes(self.rows[""]), None, self.uri)
        if TRAIN not in self.rows:
            raise InputError(f"{self.uri}: expected rows with the split train, found only {format_names([*self.rows])}")
        train = self._check_classes(self.rows[TRAIN])
        role = VALIDATION if VALIDATION in self.rows else TEST
        validation = self.rows.get(role)
        if validation is not None:
            expected, found = f"the split train of {self.uri}", f"its split {role}"
            check_same_classes(list_classes(train), list_classes(validation), expected, found)
        unused = f"; not used: {len(self.rows[TEST]):,} of the split test" if {VALIDATION, TEST} <= {*self.rows} else ""
        return Splits(train, validation, self.uri, f"of its split {role}", unused)

    def read_all(self) -> AllRows:
        """Return the rows of every split, whatever classes they have."""
        return AllRows(self.rows, {role: list_classes(rows) for role, rows in self.rows.items()})

    def read_evaluation(self, split_name: str | None, progress: Progress) -> list[LabelledRow]:
        """Return the rows of a split, else of validation or test, else of a table without splits.

        Raises:
            InputError: there are no such rows.
        """
        wanted = (
            (VALIDATION, TEST, "") if split_name is None else (ROLES.get(split_name.strip("/").lower(), split_name),)
        )
        role = next((role for role in wanted if role in self.rows), None)
        if role is None:
            found = format_names([*filter(None, self.rows)])
            hint = "name the split with --split" if split_name is None else "check --split"
            raise InputError(f"{self.uri}: expected rows with the split {wanted[0]}, found {found}; {hint}")
        rows = self._check_classes(self.rows[role])
        place = f" with the split {role}" if role else ""
        progress(Message(f"{len(rows):,} images of {len(list_classes(rows))} classes in {self.uri}{place}"))
        return rows

    def _check_classes(self, rows: list[LabelledRow]) -> list[LabelledRow]:
        if len(names := list_classes(rows)) < 2:
            raise InputError(f"{self.uri}: expected two or more labels, found only {format_names(names)}")
        return rows


class _Problems:
    """Problems of the rows of a table, with the numbers of their lines."""

    def __init__(self, uri: str, unit: str) -> None:
        self._uri, self._unit = uri, unit
        self._numbers: dict[str, list[int]] = defaultdict(list)
        self._conflicts: list[str] = []
        self._without_split: list[int] = []
        self._has_splits = False

    def check_row(self, number: int, label: str, split: str) -> str:
        """Note a row without a label, or with an unknown split; return which split it is, or ""."""
        if not label:
            self._numbers["expected a label in each row, found none"].append(number)
        if not split:
            self._without_split.append(number)
            return ""
        self._has_splits = True
        if split.lower() not in ROLES:
            self._numbers[f"expected one of {', '.join(ROLES)} as split, found {split[:50]!r}"].append(number)
        return ROLES.get(split.lower(), "")

    def compare(self, first: tuple[int, LabelledRow, str], other: tuple[int, LabelledRow, str]) -> None:
        """Note a path with two labels, splits or groups."""
        fields = {
            "label": (first[1].label, other[1].label),
            "split": (first[2], other[2]),
            "group": (first[1].group, other[1].group),
        }
        for name, (before, after) in fields.items():
            if before != after:
                places = f"{before!r} in {self._unit} {first[0]} and {after!r} in {self._unit} {other[0]}"
                self._conflicts.append(f"{other[1].entry.path} has two {name}s, {places}")

    def raise_first(self) -> None:
        """Raise an InputError for the first kind of problem."""
        if self._has_splits and self._without_split:
            self._numbers["expected a split in each row or in none, found none"] += self._without_split
        for text, numbers in self._numbers.items():
            raise InputError(f"--labels {self._uri}: {text} in {_format_numbers(self._unit, numbers)}")
        if self._conflicts:
            more = f"; {len(self._conflicts) - 1:,} more" if len(self._conflicts) > 1 else ""
            raise InputError(f"--labels {self._uri}: {self._conflicts[0]}{more}; expected each path with one")


def _format_numbers(unit: str, numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MAX_NUMBERS]))
    more = f" and {len(numbers) - MAX_NUMBERS:,} more" if len(numbers) > MAX_NUMBERS else ""
    return f"{unit}{'s' * (len(numbers) > 1)} {shown}{more}"
