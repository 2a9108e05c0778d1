"""verify(): the proof of a finished output again, for anyone, from its files alone."""

import json
from collections.abc import Sequence
from typing import Any, NoReturn

from catsdogs import storage
from catsdogs.config import VerifyConfig
from catsdogs.errors import InputError, RunError
from catsdogs.progress import Progress, silent
from catsdogs.score.audit import audit
from catsdogs.score.parts import PartRecord
from catsdogs.score.plan import RUN, SUCCESS, SUMMARY, Plan
from catsdogs.score.summary import summarize_rows


def verify(config: VerifyConfig, progress: Progress = silent) -> dict[str, Any]:
    """Compare the rows of an output with its plan, both ways, and with its records; what the rows add up to.

    Raises:
        InputError: there is no scoring.
        RunError: names the first thing that is wrong.
    """
    output = storage.absolute(config.output)
    found = storage.read_versioned(storage.join(output, RUN))
    if found is None:
        raise InputError(f"--output {output}: expected a scoring of catsdogs, found no {RUN}")
    try:
        return _proved(output, json.loads(found[0])["class_names"], progress)
    except RunError as error:
        raise RunError(f"{error}; the scoring's command goes on from there") from error


def _proved(output: str, class_names: Sequence[str], progress: Progress) -> dict[str, Any]:
    plan = Plan.load(output)

    def differs(record: PartRecord) -> NoReturn:
        raise RunError(f"{output}: the record of {record.part} is missing or wrong")

    added_up = summarize_rows(plan, audit(plan, progress, differs), class_names)
    if storage.read_versioned(storage.join(output, SUCCESS)) is None:
        raise RunError(f"{output}: all rows are there, but no {SUCCESS}")
    summary = json.loads(storage.read_bytes(storage.join(output, SUMMARY)))
    for name, value in added_up.items():
        if summary.get(name) != value:
            raise RunError(f"{output}/{SUMMARY}: expected {name} {value}, found {summary.get(name)}")
    return added_up
