"""Find the issues of each file, and what to exclude from training.

The thresholds of odd images are those of cleanvision 0.3.6 (`image_property_issue_manager.py`), applied to the same
measures (`images/measurements.py`), except for blur:

    dark               the 99th percentile of brightness is below 0.32
    light              the 5th percentile of brightness is above 1 - 0.05
    odd_aspect_ratio   the short side is less than 0.35 of the long one
    odd_size           the square root of the area is outside of the quartiles by more than 3 interquartile ranges, and
                       by more than half of the median: else one pixel would be odd where most images have one size
    low_information    0.1 times the entropy is below 0.3
    blurry             the sharpness is below 4.5, and the image has enough contrast for a hash

Blurry, measured on 3,000 photographs of cats and dogs: 2 of them are below 4.5. Of 250 that are blurred with a Gaussian
of 3, 4 or 5 pixels, 88%, 98.8% and 100% are. Of 100 that are blurred with 8 pixels, cleanvision finds 43: at its 64
pixels, little of the blur is left.

Shapes: N files, first those of the set, then those of `--against`; P pairs.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.auditing.pairs import NO_CONTENT, Pairs
from catsdogs.auditing.sets import MeasuredFiles
from catsdogs.auditing.suspects import Suspects
from catsdogs.config import ISSUES, SUSPECT_LABEL
from catsdogs.labels import TEST, TRAIN, VALIDATION
from catsdogs.schema import OK

MAX_DARK, MIN_LIGHT = 0.32, 0.95
MIN_ASPECT_RATIO = 0.35
MAX_SIZE_IQR, MIN_SIZE_MARGIN = 3.0, 0.5
MIN_ENTROPY = 3.0  # bits
MIN_SHARPNESS = 4.5
THRESHOLDS = {
    "dark": MAX_DARK,
    "light": MIN_LIGHT,
    "odd_aspect_ratio": MIN_ASPECT_RATIO,
    "odd_size": MAX_SIZE_IQR,
    "low_information": MIN_ENTROPY,
    "blurry": MIN_SHARPNESS,
}
# Where a format is at home. HEIF is the container of AVIF, too.
EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WebP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif", ".heif"),
    "HEIC": (".heic", ".heif"),
}
KNOWN_EXTENSIONS = {extension for extensions in EXTENSIONS.values() for extension in extensions}
# Of two sides of a leak, the one with the lower rank is left out. All of the set is before what it is compared with.
SPLITS = (TRAIN, VALIDATION, TEST)
NO_SPLIT, AGAINST = -1, 3
UNKNOWN = -1  # a label, or whether two are equal

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]


class Findings(NamedTuple):
    """What the audit has found.

    Attributes:
        files: of the set, with `extension_ok` and `issues`, a list of names, beside the measurements.
        paths: of all files, those of `--against`, too; `pairs` has their rows.
        same_label_P: 1 or 0; UNKNOWN if a label is missing.
        is_cross_P: whether the two are in different splits, or in different sets.
        excluded: path and reason.
        suspects: None without --suspects, or if the labels cannot be rated.
    """

    files: pa.Table
    paths: pa.ChunkedArray
    pairs: Pairs
    same_label_P: IntArray
    is_cross_P: BoolArray
    excluded: list[tuple[str, str]]
    suspects: Suspects | None


def find_issues(measured: MeasuredFiles, pairs: Pairs, suspects: Suspects | None = None) -> Findings:
    """Find the issues of every file of the set."""
    files = measured.audited
    rank_N, label_N = _read_ranks(measured), _read_labels(measured)
    is_cross_P = rank_N[pairs.a_P] != rank_N[pairs.b_P]
    labels_PS = label_N[pairs.a_P], label_N[pairs.b_P]
    same_label_P = np.where(np.minimum(*labels_PS) == UNKNOWN, UNKNOWN, labels_PS[0] == labels_PS[1])
    is_leaking_N, is_excluded_N = _find_leaks(rank_N, pairs, is_cross_P)
    extension_ok = _check_extensions(files)
    flags = _find_odd(files) | {
        "corrupt": pc.not_equal(files["status"], OK).to_numpy(),
        "duplicate": _find_repeated(pairs.content_N),
        "near_duplicate": _mark(len(rank_N), pairs, ~pairs.is_exact_P),
        "leakage": is_leaking_N,
        "conflict": _find_conflicts(label_N, pairs, same_label_P),
        SUSPECT_LABEL: _mark_suspects(len(rank_N), suspects),
        "wrong_extension": pc.equal(extension_ok, False).fill_null(False).to_numpy(zero_copy_only=False),
    }
    flags = {name: flag[: len(files)] for name, flag in flags.items()}
    issues = _list_names(np.stack([flags[name] for name in ISSUES], axis=1))
    reasons = {"corrupt": flags["corrupt"], "leakage": is_excluded_N[: len(files)], "conflict": flags["conflict"]}
    return Findings(
        files.append_column("extension_ok", extension_ok).append_column("issues", issues),
        measured.files["path"],
        pairs,
        same_label_P,
        is_cross_P,
        _list_excluded(files, reasons),
        suspects,
    )


def _read_ranks(measured: MeasuredFiles) -> IntArray:
    ranks = pc.index_in(measured.files["split"], pa.array(SPLITS, pa.string())).fill_null(NO_SPLIT)
    rank_N = np.array(ranks, np.int64)
    rank_N[measured.num_audited :] = AGAINST
    return rank_N


def _read_labels(measured: MeasuredFiles) -> IntArray:
    labels = measured.files["label"]
    codes = pc.index_in(labels, labels.unique().drop_null())
    return np.asarray(codes.fill_null(UNKNOWN), np.int64)


def _find_repeated(content_N: IntArray) -> BoolArray:
    counts = np.bincount(content_N[content_N != NO_CONTENT], minlength=1)
    return np.asarray((content_N != NO_CONTENT) & (counts[content_N] > 1))


def _mark(num_rows: int, pairs: Pairs, selected_P: BoolArray) -> BoolArray:
    """Mark both rows of the selected pairs."""
    marked_N = np.zeros(num_rows, np.bool_)
    marked_N[pairs.a_P[selected_P]] = True
    marked_N[pairs.b_P[selected_P]] = True
    return marked_N


def _mark_suspects(num_rows: int, suspects: Suspects | None) -> BoolArray:
    flagged_N = np.zeros(num_rows, np.bool_)
    if suspects is not None:
        flagged_N[suspects.rows_N] = suspects.table["flagged"].to_numpy()
    return flagged_N


def _find_leaks(rank_N: IntArray, pairs: Pairs, is_cross_P: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Find the files that are in two splits, and those of them that are to be left out.

    Files of equal content are compared as groups, which may be too large to be paired.
    """
    lowest_N, highest_N = _find_extremes(rank_N, pairs.content_N)
    is_leaking_N = _mark(len(rank_N), pairs, is_cross_P) | (lowest_N != highest_N)
    is_excluded_N = rank_N < highest_N
    a, b = pairs.a_P[is_cross_P], pairs.b_P[is_cross_P]
    is_excluded_N[np.where(rank_N[a] < rank_N[b], a, b)] = True
    return is_leaking_N, is_excluded_N


def _find_conflicts(label_N: IntArray, pairs: Pairs, same_label_P: IntArray) -> BoolArray:
    """Find the files with another label than their duplicate."""
    is_labelled_N = label_N != UNKNOWN
    lowest_N, highest_N = _find_extremes(label_N, np.where(is_labelled_N, pairs.content_N, NO_CONTENT))
    return np.asarray(_mark(len(label_N), pairs, same_label_P == 0) | (lowest_N != highest_N))


def _find_extremes(value_N: IntArray, content_N: IntArray) -> tuple[IntArray, IntArray]:
    """Return the lowest and the highest value among the files with a file's content."""
    lowest_N, highest_N = value_N.copy(), value_N.copy()
    known = np.flatnonzero(content_N != NO_CONTENT)
    if len(known):
        known = known[np.argsort(content_N[known], kind="stable")]
        starts = np.flatnonzero(np.diff(content_N[known], prepend=NO_CONTENT))
        lengths = np.diff(starts, append=len(known))
        lowest_N[known] = np.repeat(np.minimum.reduceat(value_N[known], starts), lengths)
        highest_N[known] = np.repeat(np.maximum.reduceat(value_N[known], starts), lengths)
    return lowest_N, highest_N


def _find_odd(files: pa.Table) -> dict[str, BoolArray]:
    """Compare the measurements with the thresholds; NaN, of files without an image, exceeds none."""
    names = ("width", "height", "brightness_p5", "brightness_p99", "entropy", "sharpness")
    columns = {name: files[name].cast(pa.float64()).fill_null(np.nan).to_numpy() for name in names}
    columns |= {name: np.where(np.isnan(columns["entropy"]), np.nan, columns[name]) for name in ("width", "height")}
    width_N, height_N = columns["width"], columns["height"]
    return {
        "dark": columns["brightness_p99"] < MAX_DARK,
        "light": columns["brightness_p5"] > MIN_LIGHT,
        "odd_aspect_ratio": np.minimum(width_N, height_N) < MIN_ASPECT_RATIO * np.maximum(width_N, height_N),
        "odd_size": _is_odd_size(np.sqrt(width_N * height_N)),
        "low_information": columns["entropy"] < MIN_ENTROPY,
        "blurry": (columns["sharpness"] < MIN_SHARPNESS) & files["phash"].is_valid().to_numpy(),
    }


def _is_odd_size(side_N: npt.NDArray[np.float64]) -> BoolArray:
    if np.isnan(side_N).all():
        return np.zeros(len(side_N), np.bool_)
    q1, median, q3 = np.nanpercentile(side_N, [25, 50, 75])
    margin = max(MAX_SIZE_IQR * (q3 - q1), MIN_SIZE_MARGIN * median)
    return np.asarray((side_N < q1 - margin) | (side_N > q3 + margin))


def _check_extensions(files: pa.Table) -> pa.ChunkedArray:
    """Compare the extension with the format; null where the format or the extension is unknown."""
    batches = files.select(["path", "format"]).to_batches()
    checked = [
        pa.array(map(_check_extension, *map(pa.Array.to_pylist, batch.columns)), pa.bool_()) for batch in batches
    ]
    return pa.chunked_array(checked, pa.bool_())


def _check_extension(path: str, file_format: str | None) -> bool | None:
    extension = f".{path.rpartition('.')[2].lower()}"
    if file_format is None or extension not in KNOWN_EXTENSIONS:
        return None
    return extension in EXTENSIONS[file_format]


def _list_names(flags_NK: BoolArray) -> pa.Array:
    """List the names of each file's issues."""
    issues = np.nonzero(flags_NK)[1]
    offsets = np.concatenate([[0], np.cumsum(flags_NK.sum(axis=1))])
    names = pa.array(ISSUES).take(pa.array(issues))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), names)


def _list_excluded(files: pa.Table, reasons: dict[str, BoolArray]) -> list[tuple[str, str]]:
    """List what to exclude from training: the path, and why."""
    is_excluded_N = np.any([*reasons.values()], axis=0)
    rows = np.flatnonzero(is_excluded_N)
    selected = files.select(["path", "status"]).filter(pa.array(is_excluded_N))
    paths, statuses = selected["path"].to_pylist(), selected["status"].to_pylist()
    return [
        (path, "; ".join(status if name == "corrupt" else name for name, flag in reasons.items() if flag[row]))
        for row, path, status in zip(rows.tolist(), paths, statuses, strict=True)
    ]
