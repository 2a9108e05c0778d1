"""The stage that measures files, without Ray: a record of the child is checked before it becomes a row."""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pytest
from spots import spots_jpeg

from catsdogs import storage
from catsdogs.data import DecodeForAudit, sandbox
from catsdogs.data.audit_stage import RECORD
from catsdogs.images import Decoded, Preprocessing

ARGUMENTS = (Preprocessing(), 10**6, 8)


@pytest.fixture(autouse=True)
def _end_child():
    yield
    sandbox.end_child()


@dataclass(frozen=True)
class DecodeWithForgery(DecodeForAudit):
    """Changes one number of the record, as an image that controls the child can."""

    name: str
    value: float

    def decode(self, image_bytes: bytes, row: int) -> Decoded:
        decoded = super().decode(image_bytes, row)
        if b"hostile" not in image_bytes:
            return decoded
        record = np.array(decoded.image).view(RECORD)
        record[self.name] = self.value
        return replace(decoded, image=record.view(np.uint8))


def run_stage(stage: DecodeForAudit, folder) -> list[dict]:
    contents = {"a.jpg": spots_jpeg(1), "b.jpg": spots_jpeg(2) + b"hostile", "c.jpg": spots_jpeg(3), "d.jpg": b"?"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    files = storage.build_files_table(storage.find_entry(str(folder / name)) for name in contents)
    return pa.concat_tables(stage(files)).to_pylist()


def test_a_file_without_an_image_has_no_measurements(tmp_path):
    *images, text = run_stage(DecodeForAudit(*ARGUMENTS), tmp_path)
    assert [row["status"] for row in images] == ["ok"] * 3
    assert len({row["phash"] for row in images}) == 3
    assert text["status"] == "unsupported"
    assert [text[name] for name in RECORD.names if name != "has_phash"] == [None] * (len(RECORD.names) - 1)
    assert len({row["sha256"] for row in (*images, text)}) == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("brightness", np.nan),
        ("brightness_p5", 1.01),
        ("brightness_p99", -0.01),
        ("contrast", np.inf),
        ("sharpness", 2000),
        ("entropy", 64),
        ("mode", 255),
        ("orientation", 9),
        ("frames", 2**31),
        ("has_phash", 2),
    ],
)
def test_a_record_with_a_number_out_of_range_fails_its_file_alone(tmp_path, name, value):
    rows = run_stage(DecodeWithForgery(*ARGUMENTS, name=name, value=value), tmp_path)
    assert [row["status"] for row in rows] == ["ok", "decoder_crash", "ok", "unsupported"]
    assert rows[1]["error"] == "the decoder sent an invalid result"
    assert [rows[1][column] for column in ("phash", "brightness", "mode", "frames")] == [None] * 4
    assert rows[1]["sha256"] is not None
