"""The page `report.html` of an audit: counts, pictures of pairs, the most important first, and of odd images."""

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from catsdogs import data, report
from catsdogs.auditing.issues import Findings
from catsdogs.config import AuditConfig
from catsdogs.schema import OK

# Pictures: at most 2 * (8 + 6 + 6 + 2) + 7 * 3 = 65, and 2 * 12 of suspect labels.
ODD_ISSUES = ("dark", "light", "blurry", "low_information", "odd_size", "odd_aspect_ratio", "wrong_extension")
MAX_ODD = 3  # of each issue
MAX_EXAMPLES = 50
MAX_CANDIDATES = 10_000  # pairs of a kind among which those to show are selected
MAX_NOTES = 10

IndexArray = npt.NDArray[np.int64]


class _Kind(NamedTuple):
    """A kind of pairs: the section, what they are, and how many are shown."""

    title: str
    text: str
    max_shown: int


KINDS = {
    "leakage": _Kind("Leaks", "pairs of images on two sides of a split", 8),
    "conflict": _Kind("Conflicts", "pairs of images with different labels", 6),
    "near": _Kind("Near duplicates", "pairs of images that look alike", 6),
    "exact": _Kind("Duplicates", "pairs of equal files", 2),
}


def build_page(config: AuditConfig, summary: Mapping[str, Any], findings: Findings) -> str:
    """Build the page; reads the images that it shows again."""
    sorted_pairs = _sort_pairs(findings)
    pairs = {name: _select_pairs(findings, found, KINDS[name].max_shown) for name, found in sorted_pairs.items()}
    odd = _select_odd(findings)
    rows = {row for selected in pairs.values() for pair in selected for row in _read_rows(findings, pair)}
    rows |= {*odd}
    if findings.suspects is not None:
        rows |= {row for suspect in findings.suspects.examples for row in (suspect.row, suspect.similar_row)}
    images = data.decode_images((findings.paths[row].as_py() for row in sorted(rows)), data.THUMBNAIL)
    pictures = {row: picture for row in rows if (picture := _build_picture(findings, images, row)) is not None}
    sections = [
        report.facts(_list_facts(summary)),
        report.issue_counts(summary["by_issue"], _list_notes(summary)),
        *(
            _build_pair_section(findings, KINDS[name], len(found), pairs[name], pictures)
            for name, found in sorted_pairs.items()
            if len(found)
        ),
        *_build_suspect_sections(findings, pictures),
        *_build_odd_sections(findings, odd, pictures),
        report.failures(summary["by_status"], _list_failures(findings), "decoded"),
        report.settings(summary["settings"]),
    ]
    return report.page("Audit", sections, subtitle=config.labels or config.data_dir or config.input or "")


def _list_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    counts = {
        "images": summary["files"],
        "without an image": summary["files"] - summary["by_status"].get(OK, 0),
        "equal pairs": summary["pairs"]["exact"],
        "near pairs": summary["pairs"]["near"],
        "pairs across splits": summary["pairs"]["cross_split"],
        "to exclude": summary["excluded"],
    }
    return {name: f"{count:,}" for name, count in counts.items()}


def _list_notes(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List what concerns more than a pair of images."""
    notes = [
        (f"No images in {split or 'the set'} of", ", ".join(names))
        for split, names in summary["missing_classes"].items()
    ]
    if groups := summary["groups_in_several_splits"]:
        names = list(summary["examples_of_such_groups"])[:MAX_NOTES]
        notes.append((f"{groups:,} groups in more than one split", ", ".join(names)))
    notes += [
        (f"{bucket['images']:,} images that are {bucket['kind']} duplicates, too many to be paired", bucket["example"])
        for bucket in summary["not_paired"]["examples"][:MAX_NOTES]
    ]
    return notes


def _sort_pairs(findings: Findings) -> dict[str, IndexArray]:
    """Assign each pair of images to the most important kind, the closest first; leave out files that are no images."""
    pairs = findings.pairs
    failed = _find_failed(findings)
    kind_P = np.select([findings.is_cross_P, findings.same_label_P == 0, ~pairs.is_exact_P], range(3), 3).astype(
        np.int8
    )
    kind_P[np.isin(pairs.a_P, failed) | np.isin(pairs.b_P, failed)] = len(KINDS)
    order = np.argsort(pairs.distance_P, kind="stable")
    return {name: order[kind_P[order] == i] for i, name in enumerate(KINDS)}


def _find_failed(findings: Findings) -> IndexArray:
    return np.flatnonzero(pc.not_equal(findings.files["status"], OK).to_numpy())


def _select_pairs(findings: Findings, candidates: IndexArray, max_shown: int) -> list[int]:
    """Select pairs of which no image was in another."""
    seen: set[int] = set()
    selected: list[int] = []
    for pair in candidates[:MAX_CANDIDATES].tolist():
        rows = _read_rows(findings, pair)
        if len(selected) < max_shown and not seen & {*rows}:
            selected.append(pair)
            seen |= {*rows}
    return selected


def _read_rows(findings: Findings, pair: int) -> tuple[int, int]:
    return int(findings.pairs.a_P[pair]), int(findings.pairs.b_P[pair])


def _select_odd(findings: Findings) -> dict[int, list[str]]:
    """Select images of each issue that are not selected for another; return their issues by row.

    A file without an image may have another extension, too, but there is nothing to show.
    """
    issues = findings.files["issues"].combine_chunks()
    names, rows_of_names = pc.list_flatten(issues), pc.list_parent_indices(issues)
    corrupt = set(rows_of_names.filter(pc.equal(names, "corrupt")).to_pylist())
    selected: dict[int, list[str]] = {}
    for name in ODD_ISSUES:
        found = (row.as_py() for row in rows_of_names.filter(pc.equal(names, name)))
        rows = (row for row in found if row not in selected and row not in corrupt)
        for row in list(itertools.islice(rows, MAX_ODD)):
            selected[row] = [issue for issue in ODD_ISSUES if issue in issues[row].as_py()]
    return selected


def _build_picture(findings: Findings, images: Mapping[str, Any], row: int) -> report.Picture | None:
    path = findings.paths[row].as_py()
    if path not in images:
        return None
    if row >= len(findings.files):
        return report.Picture(path=path, image=images[path], true_label="other set")
    names = [findings.files[name][row].as_py() for name in ("label", "split")]
    return report.Picture(path=path, image=images[path], true_label=", ".join(filter(None, names)) or None)


def _build_pair_section(
    findings: Findings, kind: _Kind, num_pairs: int, selected: list[int], pictures: Mapping[int, report.Picture]
) -> report.Section:
    shown = []
    for pair in selected:
        sides = [pictures[row] for row in _read_rows(findings, pair) if row in pictures]
        if len(sides) == 2:
            shown.append(report.Finding(pictures=sides, note=_describe_pair(findings, pair)))
    text = f"{num_pairs:,} {kind.text}" + ("" if len(shown) == num_pairs else f"; {len(shown)} of them")
    return report.findings(kind.title, f"{text}:", shown)


def _describe_pair(findings: Findings, pair: int) -> str:
    if findings.pairs.is_exact_P[pair]:
        return "equal files"
    return f"{findings.pairs.distance_P[pair]} of 64 bits differ"


def _build_suspect_sections(findings: Findings, pictures: Mapping[int, report.Picture]) -> list[report.Section]:
    if findings.suspects is None:
        return []
    table = findings.suspects.table
    shown = [
        report.Finding(pictures=sides, note=f"self-confidence {suspect.self_confidence:.3f}")
        for suspect in findings.suspects.examples
        if len(sides := [pictures[row] for row in (suspect.row, suspect.similar_row) if row in pictures]) == 2
    ]
    text = (
        f"{pc.sum(table['flagged']).as_py():,} of {pc.count(table['self_confidence']).as_py():,} labels are suspect; "
        f"{len(shown)} of them, each beside the most similar image that has the suggested label:"
    )
    return [report.findings("Suspect labels", text, shown)]


def _build_odd_sections(
    findings: Findings, odd: Mapping[int, list[str]], pictures: Mapping[int, report.Picture]
) -> list[report.Section]:
    shown = [
        report.Finding(
            pictures=[pictures[row]],
            note=f"{', '.join(issues).replace('_', ' ')}: {_describe_image(findings, row)}",
        )
        for row, issues in odd.items()
        if row in pictures
    ]
    return [report.findings("Odd images", f"Up to {MAX_ODD} of each issue:", shown)] if shown else []


def _describe_image(findings: Findings, row: int) -> str:
    values = {name: findings.files[name][row].as_py() for name in ("width", "height", "brightness", "sharpness")}
    return "{width} x {height}, brightness {brightness:.2f}, sharpness {sharpness:.1f}".format(**values)


def _list_failures(findings: Findings) -> list[tuple[str, str, str]]:
    files = findings.files.select(["path", "status", "error"])
    failed = files.filter(pc.not_equal(files["status"], OK)).slice(0, MAX_EXAMPLES)
    columns = [column.to_pylist() for column in failed.columns]
    return [(path, status, error or "") for path, status, error in zip(*columns, strict=True)]
