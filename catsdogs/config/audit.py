"""The settings of `audit`."""

from dataclasses import dataclass

from catsdogs.config.checks import check, check_needed, check_pattern, check_range

SUSPECT_LABEL = "suspect_label"
ISSUES = (
    "corrupt",
    "duplicate",
    "near_duplicate",
    "leakage",
    "conflict",
    "dark",
    "light",
    "odd_size",
    "odd_aspect_ratio",
    "low_information",
    "blurry",
    "wrong_extension",
    SUSPECT_LABEL,
)
MAX_NEAR = 10  # bits; two photographs of the 3,000 differ by at least 12, apart from one pair of the same photograph


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """Look at images before training: corrupt, duplicate, leaking, conflicting and odd ones."""

    data_dir: str | None = None
    """Root with train/, validation/ or test/, all of which are read, or class folders directly."""
    labels: str | None = None
    """Table of path, label and perhaps split and group, .csv, .parquet or .jsonl; --data-dir is then its base."""
    input: str | None = None
    """Images without labels: a folder, prefix, one image, or a .parquet, .csv, .tsv or .txt list of paths."""
    output: str
    """Folder or s3:// prefix for the tables, audit.json and report.html; an earlier audit in it is replaced."""
    exclude: str | None = None
    """Table with the column path of images to leave out."""
    group_by: str | None = None
    """Regular expression; images whose relative paths have the same first capture are a group."""
    against: str | None = None
    """Another set, a folder or a table or list of paths: an image that is in both sets is a leak."""
    allow_schemes: str | None = None
    """Schemes that paths in a path list may have beside the list's own, such as s3,https; file is this machine."""
    near: int = 4
    """Images whose perceptual hashes, of 64 bits, differ in at most this many bits are near duplicates."""
    suspects: str | None = None
    """Find suspect labels, by features of this run with --freeze backbone, or of this checkpoint."""
    fail_on: str | None = None
    """Exit with code 3 if one of these issues is found, such as leakage,conflict,corrupt,duplicate."""

    def __post_init__(self) -> None:
        num_sources = sum(source is not None for source in (self.labels or self.data_dir, self.input))
        expected = "one of --data-dir, --labels and --input"
        check(num_sources == 1, "--input", expected, "none" if num_sources == 0 else "--input beside another")
        check_needed(self.group_by is None or self.input is None, "--group-by", "--data-dir or --labels")
        check_needed(self.suspects is None or self.input is None, "--suspects", "--data-dir or --labels")
        check_pattern(self.group_by)
        check_range(self, 0, MAX_NEAR, "near")
        unknown = [name for name in self.fail_on_issues if name not in ISSUES]
        is_valid = not unknown and (self.fail_on is None or bool(self.fail_on_issues))
        expected = f"some of {', '.join(ISSUES)}, separated by commas"
        check(is_valid, "--fail-on", expected, ", ".join(unknown) or "none")
        can_find_suspects = self.suspects is not None or SUSPECT_LABEL not in self.fail_on_issues
        check_needed(can_find_suspects, f"--fail-on {SUSPECT_LABEL}", "--suspects")

    @property
    def fail_on_issues(self) -> tuple[str, ...]:
        """The issues of `fail_on`."""
        return tuple(name.strip() for name in (self.fail_on or "").split(",") if name.strip())
