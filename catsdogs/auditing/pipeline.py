"""The stages of `audit`: list, read and measure, find pairs, find issues, write.

audit(config)
  check_output()          outputs.py      no table that is read lies where the audit writes
  list_sets()             listing.py      the images, and those of --against; labels, splits and groups
  measure_files()         measuring.py    one read of each file with Ray Data: a row for every file
    DecodeForAudit()      ../data/audit_stage.py   in a child process: pixels become hash, brightness, ...
    RowFile()             row_file.py     the rows in a temporary file, in the order of the listing
  find_pairs()            pairs.py        equal contents, and perceptual hashes that differ in few bits
  find_suspects()         rating.py       with --suspects: labels that heads trained on other images disagree with
  find_issues()           issues.py       odd images; leaks and conflicts among the pairs; what to exclude
  build_summary()         summary.py      the counts
  build_page()            report_page.py  pictures of pairs and of odd images
  write_audit()           outputs.py      files.parquet, pairs.parquet, exclude.csv, report.html; then audit.json
"""

import dataclasses
import time
from typing import Any

from catsdogs import storage
from catsdogs.auditing.issues import find_issues
from catsdogs.auditing.listing import list_sets
from catsdogs.auditing.outputs import check_output, write_audit
from catsdogs.auditing.pairs import find_pairs
from catsdogs.auditing.summary import build_summary
from catsdogs.auditing.suspects import check_labels, read_run_checkpoint
from catsdogs.config import AuditConfig
from catsdogs.progress import Progress, report_failed_rows, silent
from catsdogs.start import import_while_ray_starts

URI_SETTINGS = ("data_dir", "labels", "input", "output", "exclude", "against", "suspects")


def audit(config: AuditConfig, progress: Progress = silent) -> dict[str, Any]:
    """Run all stages; see `api.audit`."""
    started = time.perf_counter()
    config = _make_absolute(config)
    check_output(config)
    checkpoint = None if config.suspects is None else read_run_checkpoint(config.suspects)
    sets = list_sets(config, progress)
    if checkpoint is not None:
        check_labels(sets.files["label"])
    measuring = import_while_ray_starts("catsdogs.auditing.measuring")
    from catsdogs.auditing import report_page  # not at the top: it imports Ray Data and matplotlib

    measured = measuring.measure_files(sets, progress)
    report_failed_rows(measured.files, "images could not be read or decoded", progress)
    pairs = find_pairs(measured.files, measured.num_audited, config.near)
    suspects = None
    if config.suspects is not None and checkpoint is not None:
        rating = import_while_ray_starts("catsdogs.auditing.rating")
        suspects = rating.find_suspects(config.suspects, checkpoint, sets, measured, pairs, progress)
    findings = find_issues(measured, pairs, suspects)
    summary = build_summary(config, sets, measured, findings, time.perf_counter() - started)
    page = report_page.build_page(config, summary, findings)
    write_audit(config.output, findings, page, summary)
    return summary


def _make_absolute(config: AuditConfig) -> AuditConfig:
    uris: dict[str, Any] = {
        name: storage.absolute(uri) for name in URI_SETTINGS if (uri := getattr(config, name)) is not None
    }
    return dataclasses.replace(config, **uris)
