"""The page `report.html` of an audit."""

from collections.abc import Mapping
from typing import Any

from catsdogs import report
from catsdogs.auditing.issues import Findings
from catsdogs.config import AuditConfig


def build_page(config: AuditConfig, summary: Mapping[str, Any], findings: Findings) -> str:
    """Build the page of the counts."""
    facts = {name: f"{count:,}" for name, count in summary["by_issue"].items()}
    return report.page("Audit", [report.facts({"files": f"{len(findings.files):,}"} | facts)], subtitle=config.output)
