"""What decides results besides the settings: versions of packages, device and precision. A run records them."""

import functools
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

PACKAGES = ("catsdogs", "ray", "torch", "torchcodec", "simplejpeg", "pyarrow", "pillow")
ENVIRONMENT, EARLIER = "environment", "earlier_environments"  # keys of a run's record


@functools.cache
def read_versions() -> Mapping[str, str]:
    """Read the versions of the packages that decide results."""
    return {name: version(name) for name in PACKAGES}


def update_environment(record: Mapping[str, Any], device: str, precision: str) -> tuple[dict[str, Any], str]:
    """Update the environment in the record of a run, and keep the earlier ones.

    Returns:
        The record; and what differs from the last environment, empty if nothing does or none was recorded.
    """
    now = {**read_versions(), "device": device, "precision": precision}
    before = record.get(ENVIRONMENT)
    if before == now:
        return dict(record), ""
    if not isinstance(before, dict):  # of an earlier version
        return {**record, ENVIRONMENT: now}, ""
    names = [name for name in {**now, **before} if now.get(name) != before.get(name)]
    changes = "; ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in names)
    earlier = record.get(EARLIER)
    kept = earlier if isinstance(earlier, list) else []  # damaged, or none yet
    return {**record, ENVIRONMENT: now, EARLIER: [*kept, before]}, changes
