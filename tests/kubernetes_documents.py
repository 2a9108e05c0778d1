"""Reads the documents of cluster/kubernetes/."""

from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).parents[1] / "cluster" / "kubernetes"


def read_document(name: str) -> dict[str, Any]:
    """Read a RayJob or a RayCronJob."""
    document: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return document


def read_job(name: str) -> dict[str, Any]:
    """Read the job of a RayJob, or that of each run of a RayCronJob."""
    spec: dict[str, Any] = read_document(name)["spec"]
    job: dict[str, Any] = spec.get("jobTemplate", spec)
    return job


def read_entrypoint(name: str, replacements: dict[str, object]) -> str:
    """Read the command of a job, and replace parts of it, each of which it must have."""
    command: str = read_job(name)["entrypoint"]
    for old, new in replacements.items():
        assert old in command, old
        command = command.replace(old, str(new))
    return command
