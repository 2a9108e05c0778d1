"""The `config.json` of a checkpoint that `evaluate --calibrate` writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from catsdogs import storage
from catsdogs.checkpoint import CALIBRATION, CONFIG
from catsdogs.errors import InputError, RunError


@dataclass(frozen=True)
class WritableConfig:
    """The `config.json` of a checkpoint to calibrate, as it was when a command started."""

    uri: str
    content: bytes
    version: str

    @classmethod
    def open(cls, checkpoint_uri: str, flag: str) -> "WritableConfig":
        """Check that it can be written, by writing what it contains; InputError with the flag if it cannot."""
        uri = storage.join(checkpoint_uri, CONFIG)
        found = storage.read_versioned(uri)
        try:
            written = found is not None and storage.replace_bytes(uri, *found)
            found = storage.read_versioned(uri)
        except RunError as error:
            raise InputError(f"{flag}: {error}; copy the checkpoint to a folder that can be written") from error
        if found is None or not written:
            raise InputError(f"{flag}: {uri} was written by another process; repeat the command when that has ended")
        return cls(uri, *found)

    def write_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Set the calibration, atomically; RunError if another process has written the file meanwhile."""
        config = json.loads(self.content) | {CALIBRATION: calibration}
        if not storage.replace_bytes(self.uri, json.dumps(config, indent=2).encode(), self.version):
            raise RunError(f"{self.uri} was written by another process meanwhile: evaluate the checkpoint again")
