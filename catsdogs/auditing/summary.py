"""The content of `audit.json`."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from catsdogs.auditing.issues import THRESHOLDS, Findings
from catsdogs.auditing.sets import AuditedSets, MeasuredFiles
from catsdogs.auditing.suspects import Suspects
from catsdogs.config import ISSUES, SUSPECT_LABEL, AuditConfig
from catsdogs.environment import read_versions

MAX_LISTED = 100  # buckets and groups


def build_summary(
    config: AuditConfig, sets: AuditedSets, measured: MeasuredFiles, findings: Findings, seconds: float
) -> dict[str, Any]:
    """Count what was found."""
    files = findings.files
    splits_by_group = _find_groups_in_several_splits(files)
    against = measured.files.slice(measured.num_audited)
    return {
        "files": len(files),
        "by_status": _count(files["status"]),
        "by_issue": _count_issues(findings),
        "by_split": _count(files["split"]),
        "by_label": _count(files["label"]),
        "missing_classes": _find_missing_classes(sets, files),
        "groups": pc.count_distinct(files["group"]).as_py(),
        "groups_in_several_splits": len(splits_by_group),
        "examples_of_such_groups": dict(list(splits_by_group.items())[:MAX_LISTED]),
        "against": {"files": len(against), "by_status": _count(against["status"])},
        "pairs": _count_pairs(findings),
        "suspects": _count_suspects(findings.suspects),
        "not_paired": _describe_unpaired(findings),
        "excluded": len(findings.excluded),
        "near": config.near,
        "thresholds": THRESHOLDS,
        "settings": dataclasses.asdict(config),
        "images_per_s": round(len(measured.files) / measured.seconds, 1),
        "seconds": round(seconds, 1),
        "versions": dict(read_versions()),
    }


def _count(column: pa.ChunkedArray) -> dict[str, int]:
    counts = column.drop_null().value_counts().to_pylist()
    return {count["values"]: count["counts"] for count in sorted(counts, key=lambda count: count["values"])}


def _count_issues(findings: Findings) -> dict[str, int]:
    counts = _count(pc.list_flatten(findings.files["issues"]))
    return {name: counts.get(name, 0) for name in ISSUES if name != SUSPECT_LABEL or findings.suspects is not None}


def _count_suspects(suspects: Suspects | None) -> dict[str, Any] | None:
    if suspects is None:
        return None
    table = suspects.table
    flagged = table.filter(table["flagged"])
    pairs = Counter(zip(flagged["label"].to_pylist(), flagged["suggested"].to_pylist(), strict=True))
    return {
        "rated": len(table) - table["self_confidence"].null_count,
        "flagged": len(flagged),
        "without_an_image": suspects.num_left_out,
        "classes_not_rated": suspects.unrated,
        "by_label": [
            {"label": label, "suggested": suggested, "images": count}
            for (label, suggested), count in pairs.most_common(MAX_LISTED)
        ],
        "features": suspects.source,
    }


def _count_pairs(findings: Findings) -> dict[str, int]:
    pairs = findings.pairs
    return {
        "exact": int(np.count_nonzero(pairs.is_exact_P)),
        "near": int(np.count_nonzero(~pairs.is_exact_P)),
        "cross_split": int(np.count_nonzero(findings.is_cross_P)),
        "other_label": int(np.count_nonzero(findings.same_label_P == 0)),
    }


def _describe_unpaired(findings: Findings) -> dict[str, Any]:
    buckets = sorted(findings.pairs.unpaired, key=lambda bucket: -bucket.num_images)
    examples = [
        {"kind": bucket.kind, "images": bucket.num_images, "example": findings.paths[bucket.row].as_py()}
        for bucket in buckets[:MAX_LISTED]
    ]
    return {"buckets": len(buckets), "max_images": findings.pairs.max_paired, "examples": examples}


def _find_missing_classes(sets: AuditedSets, files: pa.Table) -> dict[str, list[str]]:
    """Find the classes of which a split has no images, by split; "" stands for all files."""
    class_names = {name for names in sets.class_names.values() for name in names}
    found = files.select(["split", "label"]).group_by(["split", "label"]).aggregate([])
    present = set(zip(found["split"].to_pylist(), found["label"].to_pylist(), strict=True))
    missing = {
        split: sorted(name for name in class_names if (split or None, name) not in present)
        for split in sets.class_names
    }
    return {split: names for split, names in missing.items() if names}


def _find_groups_in_several_splits(files: pa.Table) -> dict[str, list[str]]:
    grouped = files.select(["group", "split"]).group_by(["group", "split"]).aggregate([])
    splits: dict[str, list[str]] = {}
    for group, split in zip(grouped["group"].to_pylist(), grouped["split"].to_pylist(), strict=True):
        if group is not None and split is not None:
            splits.setdefault(group, []).append(split)
    return {group: sorted(found) for group, found in sorted(splits.items()) if len(found) > 1}
