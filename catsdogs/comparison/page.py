"""The sections of `report.html`, from the content of `compare.json`."""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from catsdogs import report

Record = Mapping[str, Any]


def build_page(record: Record, largest: pa.Table, differences: Sequence[int]) -> str:
    """Build the page.

    Args:
        largest: rows of `changes.parquet`, the largest difference first.
        differences: histogram of the differences, from 0 to 1.
    """
    a, b, pairs = record["a"], record["b"], record["pairs"]
    sections = [report.facts(_select_facts(record))]
    if pairs is not None:
        sections += [
            report.flips(record["class_names"], pairs["flip_matrix"]),
            report.status_changes(pairs["status_matrix"]),
            report.largest_changes(largest.to_pylist(), pairs["changes"]),
        ]
        if pairs["labelled"]:
            only = pairs["only_a_correct"], pairs["only_b_correct"]
            sections.append(report.paired_accuracy(record["figures"], pairs["recall"], only))
    histograms = [
        report.PairedHistogram("Probability of the predicted class", a["prob_histogram"], b["prob_histogram"])
    ]
    if pairs is not None:
        histograms.append(report.PairedHistogram("Difference of an image's probability", differences, None))
    sections += [
        report.paired_histograms(histograms),
        report.paired_shares("Predicted classes", a["by_label"], b["by_label"]),
        report.paired_shares("Formats", a["formats"], b["formats"]),
        report.paired_sizes(a["sizes"], b["sizes"], record["figures"]),
        report.settings(_select_settings(record)),
    ]
    return report.page("Comparison", sections, subtitle=record["note"] or "")


def _select_facts(record: Record) -> dict[str, str]:
    figures = record["figures"]
    facts = {"images in both": f"{figures['in_both']:,}", "only in A": f"{figures['only_in_a']:,}"}
    facts["only in B"] = f"{figures['only_in_b']:,}"
    if figures["changed"] is not None:
        facts["changed"] = f"{figures['changed']:.2%}"
    if figures["mean_difference"] is not None:
        facts["mean difference"] = f"{figures['mean_difference']:.4f}"
    if figures["accuracy_a"] is not None:
        facts["accuracy A to B"] = f"{figures['accuracy_a']:.4f} to {figures['accuracy_b']:.4f}"
    if figures["psi"] is not None:
        facts["PSI"] = f"{figures['psi']:.3f}"
    if figures["embedding_shift"] is not None:
        facts["embedding shift"] = f"{figures['embedding_shift']:.3f}"
    return facts


def _select_settings(record: Record) -> dict[str, object]:
    settings: dict[str, object] = {}
    for side in ("a", "b"):
        for name in ("uri", "rows", "model_sha256"):
            settings[f"{side.upper()} {name}"] = record[side][name]
    for found in record["conditions"]:
        settings[f"--fail-if {found['condition']}"] = "holds" if found["holds"] else "does not hold"
    return settings
